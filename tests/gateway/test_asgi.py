"""The ASGI gateway, against the words of the HTTP specification."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.errors import ClientDisconnected, GatewayError, ResponseError
from prefork.gateway.asgi import AsgiGateway, decode_path
from prefork.protocol.response import FieldLines
from tests.harness.loop import go


def serve(app, exchange, *, state=None, root_path=""):
    """Run *exchange* through the gateway."""
    go(AsgiGateway(app, state=state, root_path=root_path)(exchange))


def scope_of(exchange, **settings):
    """The scope that an application is called with."""
    seen = {}

    async def app(scope, receive, send):
        seen.update(scope)
        await answer(send)

    serve(app, exchange, **settings)
    return seen


async def answer(send, body=b"ok", status=200, headers=()):
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# ---- scope ----


def test_scope_holds_every_key_of_the_specification(exchange_for):
    """Applications index into it without asking."""
    exchange = exchange_for(
        "get",
        "/caf%C3%A9/a%2Fb?x=%201&y",
        headers=[(b"host", b"example.org"), (b"x-a", b"1"), (b"x-a", b"2")],
        version="1.0",
        client=("192.0.2.7", 1),
        server=("198.51.100.1", 443),
        scheme="https",
    )

    assert scope_of(exchange, state={"db": 1}, root_path="/api") == {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.0",
        "method": "GET",
        "scheme": "https",
        "path": "/api/café/a/b",
        "raw_path": b"/api/caf%C3%A9/a%2Fb",
        "query_string": b"x=%201&y",
        "root_path": "/api",
        "headers": [(b"host", b"example.org"), (b"x-a", b"1"), (b"x-a", b"2")],
        "client": ("192.0.2.7", 1),
        "server": ("198.51.100.1", 443),
        "extensions": {
            "http.response.trailers": {},
            "http.response.early_hint": {},
            "http.response.debug": {},
            "http.response.pathsend": {},
            "http.response.zerocopysend": {},
        },
        "state": {"db": 1},
    }


@pytest.mark.parametrize(
    ("root", "target", "path", "raw_path"),
    [
        ("/api", "/static/a.txt", "/api/static/a.txt", b"/api/static/a.txt"),
        ("/api", "/api/static/a.txt", "/api/static/a.txt", b"/api/static/a.txt"),
        ("/api", "/api", "/api", b"/api"),
        ("/api", "/apices", "/api/apices", b"/api/apices"),
        ("/caf\u00e9", "/x", "/caf\u00e9/x", b"/caf%C3%A9/x"),
    ],
)
def test_path_begins_with_the_root_path_whatever_the_proxy_did(exchange_for, root, target, path, raw_path):
    """Mounted sub-applications take it off again; some proxies strip it, some do not."""
    scope = scope_of(exchange_for("GET", target), root_path=root)

    assert (scope["path"], scope["raw_path"], scope["root_path"]) == (path, raw_path, root)


def test_scope_without_lifespan_state_does_not_offer_it(exchange_for):
    """ "If missing the server does not support this feature": an empty dict would say that it does."""
    assert "state" not in scope_of(exchange_for())


def test_scope_of_a_unix_socket_has_a_path_and_no_client(exchange_for):
    """ "[path, None] where path is that of the unix socket"."""
    scope = scope_of(exchange_for(client=None, server=("/run/app.sock", None)))

    assert (scope["client"], scope["server"]) == (None, ("/run/app.sock", None))


def test_each_request_gets_a_shallow_copy_of_the_state(exchange_for):
    """The objects are shared, the namespace is not."""
    state = {"pool": [1]}

    async def app(scope, receive, send):
        scope["state"]["own"] = True
        scope["state"]["pool"].append(2)
        await answer(send)

    serve(app, exchange_for(), state=state)
    assert state == {"pool": [1, 2]}


def test_middleware_may_change_the_headers_of_the_scope(exchange_for):
    """Some append to the list in place; the request the server logs must not change with it."""
    exchange = exchange_for()

    async def app(scope, receive, send):
        scope["headers"].append((b"x-added", b"1"))
        await answer(send)

    serve(app, exchange)
    assert exchange.request.headers == [(b"host", b"example.org")]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_path_decodes_what_clients_encode(text):
    """Any text, percent-encoded as UTF-8, comes back."""
    assert decode_path("".join(f"%{byte:02X}" for byte in text.encode()).encode()) == text


@pytest.mark.parametrize(
    ("raw", "path"), [(b"/%ff", "/�"), (b"/%", "/%"), (b"/%zz", "/%zz"), (b"/a+b", "/a+b"), (b"*", "*")]
)
def test_path_that_is_not_utf8_or_not_encoded_is_still_text(raw, path):
    """The scope must not fail on what the protocol let through; raw_path has the truth."""
    assert decode_path(raw) == path


# ---- receive ----


def received(exchange, times):
    """The first *times* messages, the response completed before the last."""
    messages = []

    async def app(scope, receive, send):
        messages.extend([await receive() for _ in range(times - 1)])
        await answer(send)
        messages.append(await receive())

    serve(app, exchange)
    return messages


def test_request_without_body_is_one_empty_message(exchange_for):
    """ "A trigger to actually run request code"."""
    assert received(exchange_for(), 2) == [
        {"type": "http.request", "body": b"", "more_body": False},
        {"type": "http.disconnect"},
    ]


def test_last_piece_says_that_no_more_comes(exchange_for):
    """An application must not have to ask once more for an empty piece."""
    assert received(exchange_for("POST", body=[b"ab", b"c"]), 3) == [
        {"type": "http.request", "body": b"ab", "more_body": True},
        {"type": "http.request", "body": b"c", "more_body": False},
        {"type": "http.disconnect"},
    ]


def test_end_that_comes_after_the_last_piece_is_a_message(exchange_for):
    """Only then does a chunked body turn out to be complete."""
    exchange = exchange_for("POST", chunked=True)
    messages = []

    async def app(scope, receive, send):
        exchange.feed(b"ab")
        messages.append(await receive())
        exchange.feed_end()
        messages.append(await receive())
        await answer(send)

    serve(app, exchange)
    assert [(each["body"], each["more_body"]) for each in messages] == [(b"ab", True), (b"", False)]


def test_receive_after_the_response_is_a_disconnect_even_if_body_is_left(exchange_for):
    """ "Sent to the application if receive is called after a response has been sent"."""
    assert received(exchange_for("POST", body=[b"ab"]), 1) == [{"type": "http.disconnect"}]


def test_receive_after_the_body_waits_for_the_client_to_leave(exchange_for):
    """Long polling: answering at once would make its loop spin."""
    exchange = exchange_for()
    messages = []

    async def app(scope, receive, send):
        await receive()
        waiting = asyncio.create_task(receive())
        await asyncio.sleep(0)
        assert not waiting.done()
        exchange.disconnect()
        messages.append(await waiting)
        await answer(send)

    serve(app, exchange)
    assert messages == [{"type": "http.disconnect"}]


def test_receive_of_an_incomplete_body_is_a_disconnect_when_the_client_leaves(exchange_for):
    """ASGI has no exception here."""
    exchange = exchange_for("POST", content_length=5)
    messages = []

    async def app(scope, receive, send):
        waiting = asyncio.create_task(receive())
        await asyncio.sleep(0)
        exchange.disconnect()
        messages.append(await waiting)
        await answer(send)

    serve(app, exchange)
    assert messages == [{"type": "http.disconnect"}]


def test_disconnect_is_told_without_suspending(exchange_for):
    """Starlette's `is_disconnected` cancels a receive that does not answer at its first step."""
    exchange = exchange_for()
    messages = []

    async def app(scope, receive, send):
        await receive()
        exchange.disconnect()
        step = receive()
        with pytest.raises(StopIteration) as stopped:
            step.send(None)
        messages.append(stopped.value.value)
        await answer(send)

    serve(app, exchange)
    assert messages == [{"type": "http.disconnect"}]


def test_two_receives_at_once_do_not_both_end_the_request(exchange_for):
    """One has the last piece, the other waits on for the disconnect."""
    exchange = exchange_for("POST", content_length=2)
    messages = []

    async def app(scope, receive, send):
        both = [asyncio.create_task(receive()) for _ in range(2)]
        await asyncio.sleep(0)
        exchange.feed(b"ab")
        exchange.feed_end()
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        await answer(send)
        messages.extend(await asyncio.gather(*both))

    serve(app, exchange)
    assert sorted(each["type"] for each in messages) == ["http.disconnect", "http.request"]


def test_receive_that_waits_for_body_ends_with_the_response(exchange_for):
    """A listener for the disconnect must not outlive a response to a half-sent request."""
    exchange = exchange_for("POST", content_length=2)
    messages = []

    async def app(scope, receive, send):
        listening = asyncio.create_task(receive())
        await asyncio.sleep(0)
        await answer(send, status=413)
        messages.append(await listening)

    serve(app, exchange)
    assert messages == [{"type": "http.disconnect"}]


# ---- send ----


def test_response_leaves_as_it_was_sent(exchange_for, wire):
    """Head with the first piece, header order and repetition kept."""

    async def app(scope, receive, send):
        headers = [[b"set-cookie", b"a"], (b"content-length", b"3"), [b"set-cookie", b"b"]]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        await send({"type": "http.response.body", "body": b"ab", "more_body": True})
        await send({"type": "http.response.body", "body": b"c"})

    serve(app, exchange_for())
    fields = [(b"set-cookie", b"a"), (b"content-length", b"3"), (b"set-cookie", b"b")]
    assert wire.calls == [("head", 201, fields, b"ab", True), ("body", b"c", False)]


def test_keys_are_optional_where_the_specification_says_so_and_unknown_ones_are_ignored(exchange_for, wire):
    """headers defaults to none, body to b"", more_body to False; additional keys are no error."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "later": 1})
        await send({"type": "http.response.body", "later": 1})

    serve(app, exchange_for())
    assert wire.calls == [("head", 204, [], b"", False)]


def test_header_names_are_lower_cased(exchange_for, wire):
    """ "Header names must be lowercased": what decides framing must not depend on who forgot."""

    async def app(scope, receive, send):
        await answer(send, headers=[(b"Content-Type", b"Text")])

    serve(app, exchange_for())
    assert FieldLines(tuple(wire.head[1])).lines == b"content-type: Text\r\n"


@pytest.mark.parametrize("body", [bytearray(b"ok"), memoryview(b"ok")])
def test_body_may_be_any_bytes_like(exchange_for, wire, body):
    """Starlette hands views through."""

    async def app(scope, receive, send):
        await answer(send, body)

    serve(app, exchange_for())
    assert wire.body == b"ok"


def test_send_waits_for_a_slow_client(exchange_for, wire):
    """Back-pressure reaches the application's own loop."""
    exchange = exchange_for()
    wire.writable = False
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        sent.append(1)
        await send({"type": "http.response.body"})

    async def run():
        serving = asyncio.create_task(AsgiGateway(app, state=None)(exchange))
        await wire.is_draining.wait()
        assert not sent
        wire.take()
        await serving

    go(run())
    assert wire.complete


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({}, "expected ASGI message 'http.response.start', got None"),
        ({"type": "http.response.body"}, "expected ASGI message 'http.response.start', got 'http.response.body'"),
        ({"type": "http.response.push"}, "expected ASGI message 'http.response.start', got 'http.response.push'"),
        ({"type": "http.response.start"}, "'status' of 'http.response.start' is None, an int was expected"),
        ({"type": "http.response.start", "status": "200"}, "is str, an int was expected"),
        ({"type": "http.response.start", "status": True}, "is bool, an int was expected"),
        ({"type": "http.response.start", "status": 200, "headers": None}, "'headers' of .* is None"),
        ({"type": "http.response.start", "status": 200, "headers": [b"a"]}, r"\[name, value\] was expected"),
        ({"type": "http.response.start", "status": 200, "headers": [("a", b"b")]}, r"\[str, bytes\]: 'a': b'b'"),
        ({"type": "http.response.start", "status": 200, "headers": [(b"a", 5)]}, r"\[bytes, int\]"),
    ],
)
def test_malformed_first_message_is_refused_in_the_applications_frame(exchange_for, wire, message, complaint):
    """ "It should raise an exception out of the send awaitable back to the application"."""

    async def app(scope, receive, send):
        await send(message)

    with pytest.raises(GatewayError, match=complaint):
        serve(app, exchange_for())
    assert wire.calls == []


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"type": "http.response.start", "status": 200}, "expected .*'http.response.body', got 'http.response.start'"),
        ({"type": "http.response.body", "body": "x"}, "'body' of 'http.response.body' is str, bytes were expected"),
        ({"type": "http.response.body", "body": None}, "'body' of 'http.response.body' is None"),
    ],
)
def test_malformed_second_message_is_refused(exchange_for, wire, message, complaint):
    """And the response can still become a 500, since its head waits."""
    exchange = exchange_for()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send(message)

    with pytest.raises(GatewayError, match=complaint):
        serve(app, exchange)
    exchange.fail()
    assert wire.status == 500


def test_message_after_the_end_is_refused_and_changes_nothing(exchange_for, wire):
    """The client has its answer; the application learns of its mistake."""

    async def app(scope, receive, send):
        await answer(send)
        await send({"type": "http.response.body", "body": b"more"})

    with pytest.raises(GatewayError, match="'http.response.body' was sent after the response was complete"):
        serve(app, exchange_for())
    assert wire.body == b"ok"


def test_trailers_are_the_end_of_a_response_that_announced_them(exchange_for, wire):

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "trailers": True})
        await send({"type": "http.response.body", "body": b"ok"})
        await send({"type": "http.response.trailers", "headers": [(b"a", b"b")], "more_trailers": True})
        await send({"type": "http.response.trailers", "headers": [[b"c", b"d"]]})

    serve(app, exchange_for())
    assert wire.calls[-1] == ("trailers", [(b"a", b"b"), (b"c", b"d")])
    assert (wire.body, wire.complete) == (b"ok", True)


def test_announced_trailers_have_to_come(exchange_for, wire):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "trailers": True})
        await send({"type": "http.response.body", "body": b"ok"})

    with pytest.raises(GatewayError, match="http.response.trailers"):
        serve(app, exchange_for())
    assert not wire.complete


def test_early_hints_leave_before_the_response(exchange_for, wire):
    """A browser fetches what they name while the application still thinks (RFC 8297)."""

    async def app(scope, receive, send):
        await send({"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload", b"</b.js>"]})
        await answer(send)

    serve(app, exchange_for())
    assert wire.calls[0] == ("interim", 103, [(b"link", b"</a.css>; rel=preload"), (b"link", b"</b.js>")])
    assert wire.status == 200


@pytest.mark.parametrize("links", ["</a.css>", b"</a.css>", ["</a.css>"], None, 1])
def test_early_hints_are_bytes(exchange_for, wire, links):
    async def app(scope, receive, send):
        await send({"type": "http.response.early_hint", "links": links})

    with pytest.raises(GatewayError, match="an iterable of bytes was expected"):
        serve(app, exchange_for())


def test_debug_message_is_taken_and_not_sent(exchange_for, wire):
    async def app(scope, receive, send):
        await send({"type": "http.response.debug", "info": {"template": "a.html"}})
        await answer(send)

    serve(app, exchange_for())
    assert [call[0] for call in wire.calls] == ["head"]


def test_response_that_http_forbids_is_told_to_the_application(exchange_for, wire):
    """The protocol judges, `send` delivers."""
    wire.refuse = ResponseError("header value b'a\\nb' has a line feed")

    with pytest.raises(ResponseError, match="line feed"):
        serve(lambda scope, receive, send: answer(send), exchange_for())


# ---- the client leaves ----


def test_send_to_a_client_that_left_raises_an_oserror(exchange_for, wire):
    """ "The server should raise a server-specific subclass of OSError"; the worker reports none."""
    caught = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        wire.leave()
        try:
            await send({"type": "http.response.body"})
        except OSError as exc:
            caught.append(exc)
            raise

    with pytest.raises(ClientDisconnected):
        serve(app, exchange_for())
    assert len(caught) == 1
    assert not wire.complete


def test_application_that_swallows_the_disconnect_has_done_nothing_wrong(exchange_for, wire):
    """ "Applications may catch this exception and do cleanup work before ... returning with no exception"."""

    async def app(scope, receive, send):
        wire.leave()
        try:
            await answer(send)
        except OSError:
            return

    with pytest.raises(ClientDisconnected):
        serve(app, exchange_for())


def test_application_that_returns_without_a_response_to_nobody_has_done_nothing_wrong(exchange_for):
    """It waited for the disconnect and went. The exchange is unfinished all the same, so its owner must hear of it."""
    exchange = exchange_for()

    async def app(scope, receive, send):
        exchange.disconnect()

    with pytest.raises(ClientDisconnected):
        serve(app, exchange)


def test_response_to_a_client_that_closed_its_sending_half_arrives(exchange_for, wire):
    """It gets `http.disconnect` as a warning, and may answer all the same."""
    exchange = exchange_for()
    exchange.disconnect()
    serve(lambda scope, receive, send: answer(send), exchange)

    assert wire.body == b"ok"


class FrameworkError(Exception):
    """What a framework of its own makes of an OSError from send."""


@pytest.mark.parametrize("how", ["context", "cause", "group"])
def test_what_a_framework_makes_of_the_disconnect_is_the_disconnect(exchange_for, wire, how):
    """ "Servers must be prepared to catch this exception if they raised it and should not log it as an error"."""

    async def app(scope, receive, send):
        wire.leave()
        try:
            await answer(send)
        except OSError as exc:
            if how == "context":
                raise FrameworkError  # noqa: B904 - Starlette does just this
            if how == "cause":
                raise RuntimeError("gone") from exc
            raise ExceptionGroup("tasks", [exc]) from None

    with pytest.raises(ClientDisconnected):
        serve(app, exchange_for())


@pytest.mark.parametrize("how", ["bug", "group"])
def test_mistake_made_while_cleaning_up_is_not_hidden_by_the_disconnect(exchange_for, wire, how):
    """A KeyError there is the application's own."""

    async def app(scope, receive, send):
        wire.leave()
        try:
            await answer(send)
        except OSError as exc:
            if how == "group":
                raise ExceptionGroup("tasks", [exc, KeyError("bug")]) from None
            raise KeyError("bug")  # noqa: B904 - the mistake under test

    with pytest.raises((KeyError, ExceptionGroup)):
        serve(app, exchange_for())


# ---- the application ends ----


def test_exception_of_the_application_comes_out_as_it_is(exchange_for):
    """The worker logs it and answers 500."""

    async def app(scope, receive, send):
        raise LookupError("x")

    with pytest.raises(LookupError):
        serve(app, exchange_for())


def test_return_without_a_response_is_an_error(exchange_for):
    """The client would wait for ever."""

    async def app(scope, receive, send):
        pass

    with pytest.raises(GatewayError, match="returned without a response: 'http.response.start' was never sent"):
        serve(app, exchange_for())


def test_return_before_the_end_of_the_response_is_an_error(exchange_for):
    """A truncated body must not pass for a whole one."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})

    with pytest.raises(GatewayError, match="returned before its response was complete"):
        serve(app, exchange_for())


def test_application_that_is_not_asgi_is_told_so(exchange_for):
    """`--interface asgi` with something else: a TypeError about 'await' would help nobody."""

    def app(*args):
        return [b"hello"]

    with pytest.raises(GatewayError, match="returned list when called with scope, receive and send"):
        serve(app, exchange_for())


def test_headers_that_can_be_read_once_only_are_not_lost(exchange_for, wire):
    """A generator with one odd field is looked at a second time; it used to be empty then."""

    class Bytes(bytes):
        pass

    async def app(scope, receive, send):
        await answer(send, headers=(field for field in [(b"a", b"b"), (Bytes(b"c"), b"d")]))

    serve(app, exchange_for())
    assert wire.head[1] == [(b"a", b"b"), (b"c", b"d")]
