"""The ASGI and native sides of a WebSocket over a recording wire: order, queue, cancellation."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

import pytest

from prefork.errors import ClientDisconnected, GatewayError, LoadError, ResponseError, WebSocketDisconnected
from prefork.gateway.asgi_websocket import AsgiWebSockets, WebSocketConversation
from prefork.gateway.load import Interface, Takes, load_application
from prefork.gateway.message import Request
from prefork.gateway.websocket import NativeWebSockets, WebSocket
from prefork.gateway.websocket_exchange import (
    QUEUE_HIGH_WATER,
    QUEUE_HIGH_WATER_BYTES,
    WebSocketExchange,
    is_closing_code,
)
from prefork.protocol.websocket import Handshake
from tests.harness.loop import go

CONNECT = {"type": "websocket.connect"}
ACCEPT = {"type": "websocket.accept"}


class Wire:
    """Writes down what the exchange asks of it. *refuse* is raised by `open`."""

    def __init__(self):
        self.calls = []
        self.refuse = None
        self.taken = None  # an event, while the client is slow

    def open(self, exchange, subprotocol, headers):
        if self.refuse is not None:
            raise self.refuse
        self.calls.append(("open", subprotocol, headers))

    def send(self, data):
        self.calls.append(("send", data))

    def is_writable(self):
        return self.taken is None

    async def drain(self):
        self.calls.append(("drain",))
        await self.taken.wait()

    def close(self, code, reason):
        self.calls.append(("close", code, reason))

    def resume_messages(self):
        self.calls.append(("resume",))


@pytest.fixture
def ws_wire():
    return Wire()


@pytest.fixture
def exchange(exchange_for, ws_wire):
    http = exchange_for("GET", "/ws%20x?a=1", headers=[(b"origin", b"http://a")])
    return WebSocketExchange(http, Handshake(b"k", ("a", "b"), ""), ws_wire)


@pytest.fixture
def opened(exchange, ws_wire):
    exchange.accept(None, [])
    ws_wire.calls.clear()
    return exchange


# ---- ASGI ----


def test_scope_is_that_of_the_specification(exchange):
    scope = AsgiWebSockets(None, state={"a": 1}, root_path="/root").scope(exchange)
    assert scope == {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": "/root/ws x",
        "raw_path": b"/root/ws%20x",
        "query_string": b"a=1",
        "root_path": "/root",
        "headers": [(b"host", b"example.org"), (b"origin", b"http://a")],
        "client": ("192.0.2.7", 40123),
        "server": ("127.0.0.1", 8000),
        "subprotocols": ["a", "b"],
        "extensions": {"websocket.http.response": {}},
        "state": {"a": 1},
    }


def test_asgi_conversation(exchange, ws_wire):
    async def app(scope, receive, send):
        assert await receive() == CONNECT
        await send({"type": "websocket.accept", "subprotocol": "b", "headers": [(b"X-A", b"1")]})
        exchange.feed("text")
        exchange.feed(b"data")
        assert await receive() == {"type": "websocket.receive", "text": "text"}
        assert await receive() == {"type": "websocket.receive", "bytes": b"data"}
        await send({"type": "websocket.send", "text": "t", "bytes": None})
        await send({"type": "websocket.send", "bytes": bytearray(b"b")})
        exchange.feed_end(1001, "gone")
        for _ in range(2):
            assert await receive() == {"type": "websocket.disconnect", "code": 1001, "reason": "gone"}

    go(AsgiWebSockets(app, state=None)(exchange))
    assert ws_wire.calls == [("open", "b", [(b"x-a", b"1")]), ("send", "t"), ("send", b"b")]


def test_messages_that_came_before_the_end_are_received_first(opened):
    opened.feed("last words")
    opened.feed_end(1006, "")

    async def converse():
        receive = WebSocketConversation(opened).receive
        return [(await receive())["type"] for _ in range(3)]

    assert go(converse()) == ["websocket.connect", "websocket.receive", "websocket.disconnect"]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"type": "websocket.send", "text": "a"}], "cannot be sent to: it is asked for"),
        ([ACCEPT, ACCEPT], "cannot be accepted: it is accepted"),
        ([ACCEPT, {"type": "websocket.send"}], "one of them must be there"),
        ([ACCEPT, {"type": "websocket.send", "text": "a", "bytes": b"b"}], "one of them must be there"),
        ([ACCEPT, {"type": "websocket.send", "text": b"a"}], "one of them must be there"),
        ([ACCEPT, {"type": "websocket.close"}, {"type": "websocket.send", "text": "a"}], "closed or denied"),
        ([ACCEPT, {"type": "websocket.close"}, {"type": "websocket.close"}], "closed or denied"),
        ([ACCEPT, {"type": "websocket.close", "code": 1006}], "cannot be closed with 1006"),
        ([ACCEPT, {"type": "websocket.close", "code": "1000"}], "cannot be closed with '1000'"),
        ([ACCEPT, {"type": "websocket.close", "reason": b"x"}], "'reason' of 'websocket.close' is bytes"),
        ([ACCEPT, {"type": "http.response.start"}], "has no place in a WebSocket"),
        ([ACCEPT, {"type": "websocket.http.response.start", "status": 400}], "cannot be denied: it is accepted"),
        ([{"type": "websocket.http.response.body"}], "has no place here"),
        ([{"type": "websocket.http.response.start", "status": "400"}], "'status' of"),
        ([{"type": "websocket.http.response.start", "status": 400}, ACCEPT], "cannot be accepted: it is denied"),
        ([{"type": "websocket.accept", "subprotocol": b"a"}], "'subprotocol' of 'websocket.accept' is bytes"),
        ([{"type": "websocket.accept", "headers": [("a", "b")]}], "both must be bytes"),
        ([{"type": "websocket.accept", "headers": [b"abc"]}], "[name, value] was expected"),
        ([{"type": "websocket.close"}, ACCEPT], "closed or denied"),
    ],
)
def test_asgi_message_out_of_turn_is_an_error_where_it_was_sent(exchange, messages, complaint):
    send = WebSocketConversation(exchange).send

    async def converse():
        for message in messages[:-1]:
            await send(message)
        with pytest.raises(GatewayError) as caught:
            await send(messages[-1])
        return str(caught.value)

    assert complaint in go(converse())


def test_send_after_the_client_has_left_is_an_oserror(opened):
    """Version 2.4 of the specification."""
    opened.feed_end(1006, "")
    send = WebSocketConversation(opened).send
    with pytest.raises(OSError, match="1006"):
        go(send({"type": "websocket.send", "text": "a"}))
    with pytest.raises(OSError, match="1006"):
        go(send({"type": "websocket.close"}))


def test_close_before_the_accept_is_a_403(exchange, wire):
    go(WebSocketConversation(exchange).send({"type": "websocket.close"}))
    assert (wire.status, wire.complete) == (403, True)


def test_denial_may_be_streamed(exchange, wire):
    async def deny():
        send = WebSocketConversation(exchange).send
        await send({"type": "websocket.http.response.start", "status": 401, "headers": [(b"A", b"b")]})
        await send({"type": "websocket.http.response.body", "body": b"a", "more_body": True})
        await send({"type": "websocket.http.response.body", "body": memoryview(b"b")})

    go(deny())
    assert (wire.status, wire.body, wire.header(b"a"), wire.complete) == (401, b"ab", [b"b"], True)
    exchange.finish()


@pytest.mark.parametrize("messages", [[], [{"type": "websocket.http.response.start", "status": 400}]])
def test_application_that_decides_nothing_is_told(exchange, messages):
    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    with pytest.raises(GatewayError, match="without accepting or denying"):
        go(AsgiWebSockets(app, state=None)(exchange))


def test_accept_that_http_forbids_leaves_the_choice_open(exchange, ws_wire, wire):
    ws_wire.refuse = ResponseError("no such subprotocol")
    with pytest.raises(GatewayError, match="no such subprotocol"):
        exchange.accept("x", [])
    exchange.fail()
    assert wire.status == 500


def test_accept_for_a_client_that_left(exchange, ws_wire):
    ws_wire.refuse = ClientDisconnected("gone")
    with pytest.raises(WebSocketDisconnected) as caught:
        exchange.accept(None, [])
    assert caught.value.code == 1006


# ---- the queue ----


def test_queue_is_full_in_messages_and_is_resumed_when_it_is_nearly_empty(opened, ws_wire):
    for at in range(QUEUE_HIGH_WATER - 1):
        assert opened.feed(str(at))
    assert not opened.feed("last")

    async def take():
        while not ws_wire.calls:
            await opened.receive()

    go(take())
    assert ws_wire.calls == [("resume",)]
    assert opened.has_messages


def test_queue_is_full_in_bytes(opened, ws_wire):
    assert opened.feed(bytes(QUEUE_HIGH_WATER_BYTES - 1))
    assert not opened.feed(b"x")
    go(opened.receive())
    assert ws_wire.calls == [("resume",)]


def test_cancelled_receive_loses_no_message(opened):
    """`asyncio.wait_for(receive(), 1)` is how people wait for either of two things."""

    async def converse():
        first = asyncio.create_task(opened.receive())
        second = asyncio.create_task(opened.receive())
        await asyncio.sleep(0)
        opened.feed("a")
        first.cancel()
        assert await second == "a"
        third = asyncio.create_task(opened.receive())
        await asyncio.sleep(0)
        third.cancel()
        await asyncio.sleep(0)
        opened.feed("b")
        return await opened.receive()

    assert go(converse()) == "b"


def test_all_receivers_hear_of_the_end(opened):
    async def converse():
        tasks = [asyncio.create_task(opened.receive()) for _ in range(3)]
        await asyncio.sleep(0)
        opened.feed_end(1000, "")
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [each.code for each in go(converse())] == [1000] * 3


def test_send_waits_for_a_slow_client(opened, ws_wire):
    async def converse():
        ws_wire.taken = asyncio.Event()
        task = asyncio.create_task(opened.send("a"))
        await asyncio.sleep(0)
        assert not task.done()
        ws_wire.taken.set()
        await task

    go(converse())
    assert ws_wire.calls == [("send", "a"), ("drain",)]


def test_send_that_waited_for_a_client_that_left_raises(opened, ws_wire):
    async def converse():
        ws_wire.taken = asyncio.Event()
        task = asyncio.create_task(opened.send("a"))
        await asyncio.sleep(0)
        opened.feed_end(1006, "")
        ws_wire.taken.set()
        await task

    with pytest.raises(WebSocketDisconnected):
        go(converse())


def turns_during(converse):
    """How often the loop turned while *converse* ran."""

    async def count():
        turns = 0
        task = asyncio.create_task(converse())
        await asyncio.sleep(0)
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        await task
        return turns

    return go(count())


@pytest.mark.parametrize(("message", "count"), [(b"x", 64), ("x" * 100, 61), (bytes(65536), 2)])
def test_sends_without_a_wait_give_the_loop_a_turn(opened, message, count):
    """A client that takes everything at once makes no `send` wait."""

    async def converse(times):
        for _ in range(times):
            await opened.send(message)

    assert turns_during(partial(converse, count - 1)) == 0
    assert turns_during(partial(converse, count * 10)) in (10, 11)


def test_send_that_follows_a_wait_costs_no_turn(opened):
    """An echo waits for each message already."""

    async def converse(*, answers):
        for _ in range(200):
            asyncio.get_running_loop().call_soon(opened.feed, bytes(4000))
            message = await opened.receive()
            if answers:
                await opened.send(message)

    assert turns_during(partial(converse, answers=True)) == turns_during(partial(converse, answers=False))


def test_messages_of_many_senders_keep_their_order(opened, ws_wire):
    async def converse():
        await asyncio.gather(*(opened.send(str(at)) for at in range(200)))

    go(converse())
    assert [data for _, data in ws_wire.calls] == [str(at) for at in range(200)]


def test_send_hears_in_its_turn_that_the_client_left(opened):
    async def converse():
        asyncio.get_running_loop().call_soon(opened.feed_end, 1006, "")
        while True:
            await opened.send("a")

    with pytest.raises(WebSocketDisconnected):
        go(converse())


def test_closing_codes_are_those_that_a_frame_may_carry():
    allowed = [code for code in range(6000) if is_closing_code(code)]
    assert allowed == [*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)]
    assert not any(map(is_closing_code, (True, None, "1000", 1000.0)))


# ---- native ----


def native(handler, exchange):
    go(NativeWebSockets(handler, worker="w")(exchange))


def test_native_echo(exchange, ws_wire):
    async def handler(socket: WebSocket):
        assert (socket.path, socket.raw_path, socket.query["a"], socket.headers["Origin"], socket.worker) == (
            "/ws x",
            b"/ws%20x",
            "1",
            "http://a",
            "w",
        )
        await socket.accept("a", headers=[("X-Own", "1")])
        assert (socket.subprotocol, socket.close_code) == ("a", None)
        exchange.feed("m")
        exchange.feed_end(1001, "bye")
        async for message in socket:
            with pytest.raises(WebSocketDisconnected):
                await socket.send(message)
        assert (socket.close_code, socket.close_reason) == (1001, "bye")
        await socket.close()

    native(handler, exchange)
    assert ws_wire.calls == [("open", "a", [(b"x-own", b"1")])]


def test_native_handler_that_returns_closes(exchange, ws_wire):
    async def handler(socket):
        await socket.accept()
        await socket.send_json({"a": "é"})
        await socket.send(memoryview(b"m"))

    native(handler, exchange)
    assert ws_wire.calls[1:] == [("send", '{"a":"é"}'), ("send", b"m"), ("close", 1000, "")]


@pytest.mark.parametrize(
    ("verb", "message", "code"),
    [("receive_text", b"x", 1003), ("receive_bytes", "x", 1003), ("receive_json", "[" * 99999, 1007)],
)
def test_message_of_the_wrong_kind_closes(exchange, ws_wire, verb, message, code):
    async def handler(socket):
        await socket.accept()
        exchange.feed(message)
        await getattr(socket, verb)()

    with suppress(WebSocketDisconnected):
        native(handler, exchange)
    assert ws_wire.calls[-1][:2] == ("close", code)


def test_native_receive_before_accept_says_what_to_do(exchange):
    async def handler(socket):
        await socket.receive()

    with pytest.raises(GatewayError, match=r"await socket.accept\(\)"):
        native(handler, exchange)


def test_native_message_must_be_str_or_bytes(exchange):
    async def handler(socket):
        await socket.accept()
        await socket.send({"a": 1})

    with pytest.raises(GatewayError, match="dict, str or bytes"):
        native(handler, exchange)


# ---- which handlers take WebSockets ----


async def takes_sockets(socket: WebSocket): ...


async def takes_both(incoming: Request | WebSocket): ...


async def takes_requests(request: Request): ...


async def says_nothing(it): ...


async def takes_unknown(it: TypeCheckersOnly | WebSocket): ...  # noqa: F821 - that is the point


class Object:
    async def __call__(self, socket: WebSocket): ...


class TwoMethods:
    def __call__(self, request): ...

    async def websocket(self, socket): ...


@pytest.mark.parametrize(
    ("handler", "takes"),
    [
        (takes_sockets, Takes.WEBSOCKETS),
        (partial(takes_sockets), Takes.WEBSOCKETS),
        (takes_both, Takes.BOTH),
        (takes_requests, Takes.REQUESTS),
        (says_nothing, Takes.REQUESTS),
        (takes_unknown, Takes.WEBSOCKETS),
        (Object(), Takes.WEBSOCKETS),
        (TwoMethods(), Takes.BOTH),
    ],
)
@pytest.mark.parametrize("interface", ["auto", "native"])
def test_annotation_tells_what_a_native_handler_takes(handler, takes, interface):
    application = load_application(handler, interface)
    assert (application.interface, application.takes) == (Interface.NATIVE, takes)


def test_plain_function_cannot_converse():
    def handler(socket: WebSocket): ...

    with pytest.raises(LoadError, match="must be 'async def'"):
        load_application(handler)
