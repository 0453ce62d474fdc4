"""WebSockets behind the whole server, with a client that is another's work and with raw frames."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from contextlib import contextmanager

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as _connect

from tests.harness.client import DEADLINE, Client, get
from tests.harness.server import Server, resident_memory

OPENING = (
    b"GET %b HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n%b\r\n"
)


@pytest.fixture(scope="module")
def server():
    with Server("tests.apps.sockets:handler", workers=1, ws_max_size=1_000_000) as server:
        server.wait_ready(1)
        yield server


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def native(request):
    """On both loops, whose transports differ."""
    with Server("tests.apps.sockets:handler", workers=1, loop=request.param) as server:
        server.wait_ready(1)
        yield server


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def asgi(request):
    with Server("tests.apps.sockets:asgi", workers=1, lifespan="off", loop=request.param) as server:
        server.wait_ready(1)
        yield server


def connect(server, path="/echo", **options):
    return _connect(f"ws://127.0.0.1:{server.port}{path}", open_timeout=DEADLINE, close_timeout=DEADLINE, **options)


def raw(server, path=b"/echo", more=b"", fields=b""):
    """A connection that has been accepted, with *more* sent in the same breath as the request."""
    client = Client(server.port)
    client.send(OPENING % (path, fields) + more)
    assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
    return client


def masked(first, payload):
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return bytes((first,)) + length + bytes(4) + payload


def ending(server, path):
    """How the handler's WebSocket at *path* ended: code and reason, as soon as it has."""
    return get(server.port, f"/ended?path={path}").text


def closing(error):
    """Code and reason that the server closed with."""
    return (error.rcvd.code, error.rcvd.reason) if error.rcvd else None


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 900_000])
def test_messages_come_back_as_they_were(server, compression, size):
    with connect(server, compression=compression) as ws:
        for message in ("é" * (size // 2), bytes(size)):
            ws.send(message)
            assert ws.recv(DEADLINE) == message


def test_fragments_are_one_message(server):
    with connect(server) as ws:
        ws.send(["a", "b" * 1000, "c"])
        assert ws.recv(DEADLINE) == "a" + "b" * 1000 + "c"


def test_pings_are_answered(server):
    with connect(server) as ws:
        assert ws.ping().wait(DEADLINE)


def test_handler_sees_the_request_and_chooses(server):
    with connect(server, "/facts?a=1", subprotocols=["a", "b"], additional_headers={"X-Agent": "me"}) as ws:
        told = json.loads(ws.recv(DEADLINE))
        assert ws.subprotocol == "b"
        assert ws.response.headers["x-own"] == "yes"
        assert ws.response.headers["server"] == "prefork"
        assert told == {
            "path": "/facts",
            "query": {"a": "1"},
            "agent": "me",
            "client": list(ws.local_address),
            "scheme": "ws",
            "subprotocols": ["a", "b"],
            "subprotocol": "b",
            "worker": 1,
        }


@pytest.mark.parametrize(("told", "scheme"), [("https", "wss"), ("wss", "wss"), ("http", "ws"), ("ws", "ws")])
def test_scheme_is_what_a_trusted_proxy_says(server, asgi, told, scheme):
    """Some tell that of the page, some that of the WebSocket."""
    fields = {"X-Forwarded-Proto": told, "X-Agent": "me"}
    with connect(server, "/facts", subprotocols=["b"], additional_headers=fields) as ws:
        assert json.loads(ws.recv(DEADLINE))["scheme"] == scheme
    with connect(asgi, "/scheme", additional_headers=fields) as ws:
        assert ws.recv(DEADLINE) == scheme


def test_same_handler_answers_http(server):
    assert get(server.port).text == "hello"


def test_frames_that_come_with_the_request_are_not_lost(server):
    with raw(server, more=masked(0x81, b"early")) as client:
        assert client.read_exactly(7) == b"\x81\x05early"


def test_handler_that_returns_closes_with_1000(server):
    with connect(server, "/facts", subprotocols=["b"], additional_headers={"X-Agent": "me"}) as ws:
        ws.recv(DEADLINE)
        ws.send("thanks")
        with pytest.raises(ConnectionClosed) as caught:
            ws.recv(DEADLINE)
    assert closing(caught.value) == (1000, "")


def test_handler_closes_with_its_own_code(server):
    with connect(server, "/closes") as ws, pytest.raises(ConnectionClosed) as caught:
        ws.recv(DEADLINE)
    assert closing(caught.value) == (4000, "enough")


def test_handler_that_raises_closes_with_1011(server):
    with connect(server, "/fails") as ws, pytest.raises(ConnectionClosed) as caught:
        ws.recv(DEADLINE)
    assert closing(caught.value) == (1011, "internal error")
    server.wait_for("WebSocket /fails failed")
    server.wait_for("RuntimeError: on purpose")


def test_handler_hears_the_clients_code(server):
    with connect(server, "/echo?close") as ws:
        ws.close(3001, "bye")
    assert ending(server, "/echo?close") == "3001 bye"


def test_handler_hears_that_the_connection_was_lost(server):
    client = raw(server, b"/echo?lost")
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.close()
    assert ending(server, "/echo?lost") == "1006 "


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\x81\x05hello", 1002),
        (masked(0xC1, b"x"), 1002),
        (masked(0x81, b"\xff"), 1007),
        (b"\x82\xff" + (1_000_001).to_bytes(8, "big") + bytes(4), 1009),
    ],
)
def test_broken_protocol_is_told_and_cut(server, frame, code):
    """The rest of what the client sends must not make the kernel reset the connection before it has read why."""
    with raw(server, more=frame + bytes(200_000)) as client:
        client.read_until(b"\x88")
        size = client.read_exactly(1)[0]
        assert int.from_bytes(client.read_exactly(size)[:2], "big") == code
        assert client.read_to_end() == b""


def test_message_before_what_is_wrong_is_answered(server):
    with raw(server, more=masked(0x81, b"good") + b"\x81\x00") as client:
        assert client.read_exactly(7) == b"\x81\x04good\x88"


def test_bomb_is_refused(server):
    with connect(server, compression="deflate") as ws:
        ws.send(bytes(50_000_000))
        with pytest.raises(ConnectionClosed) as caught:
            ws.recv(DEADLINE)
    assert caught.value.rcvd.code == 1009


@pytest.mark.parametrize("size", [1_000_000, 1_000_001])
@pytest.mark.parametrize("pieces", [1, 7])
def test_limit_is_that_of_the_message_and_not_of_its_compressed_form(server, size, pieces):
    """Which is larger, of what cannot be compressed."""
    message = os.urandom(size)
    step = size // pieces + 1
    with connect(server, compression="deflate", max_size=None) as ws:
        fragments = message if pieces == 1 else [message[at : at + step] for at in range(0, size, step)]
        if size == 1_000_000:
            ws.send(fragments)
            assert ws.recv(DEADLINE) == message
        else:
            with pytest.raises(ConnectionClosed) as caught:
                ws.send(fragments)  # may be told already
                ws.recv(DEADLINE)
            assert caught.value.rcvd.code == 1009


def test_message_of_the_wrong_kind_closes(server):
    with connect(server, "/text") as ws:
        ws.send(b"binary")
        with pytest.raises(ConnectionClosed) as caught:
            ws.recv(DEADLINE)
    assert closing(caught.value) == (1003, "a text message was expected")


def test_message_that_is_no_json_closes(server):
    with connect(server, "/json") as ws:
        ws.send('{"a":1}')
        assert ws.recv(DEADLINE) == '{"a":1}'
        ws.send("{")
        with pytest.raises(ConnectionClosed) as caught:
            ws.recv(DEADLINE)
    assert caught.value.rcvd.code == 1007


# ---- before it is open ----


def test_denial_is_an_ordinary_response(server):
    with pytest.raises(InvalidStatus) as caught:
        connect(server, "/denies")
    response = caught.value.response
    assert (response.status_code, response.body) == (401, b"who are you?")
    assert response.headers["www-authenticate"] == "Basic"


def test_connection_serves_on_after_a_denial(server):
    with Client(server.port) as client:
        client.send(OPENING % (b"/closes-at-once", b""))
        assert client.read().status == 403
        assert client.get("/").text == "hello"


def test_handler_that_neither_accepts_nor_denies_is_a_500(server):
    with pytest.raises(InvalidStatus, match="500"):
        connect(server, "/ignores")
    server.wait_for("GatewayError: the application returned without accepting or denying the WebSocket")


def test_client_that_leaves_before_the_answer_is_told(server):
    with Client(server.port) as client:
        client.send(OPENING % (b"/waits-unaccepted", b""))
    assert ending(server, "/waits-unaccepted") == "1006 "


@pytest.mark.parametrize(
    ("field", "status"),
    [
        ("Sec-WebSocket-Version: 12", 426),
        ("Sec-WebSocket-Key: x", 400),
        ("Content-Length: 1", 400),
    ],
)
def test_bad_handshake_is_refused(server, field, status):
    name = field.partition(":")[0]
    lines = [line for line in (OPENING % (b"/echo", b"")).decode().split("\r\n") if line and not line.startswith(name)]
    with Client(server.port) as client:
        client.send("\r\n".join([*lines, field, "", "x"]).encode())
        answer = client.read()
        assert answer.status == status
        if status == 426:
            assert answer.headers["sec-websocket-version"] == "13"
            assert answer.headers["upgrade"] == "websocket"


def test_missing_extra_is_a_501_and_one_line(tmp_path):
    (tmp_path / "websockets.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'websockets'\", name='websockets')"
    )
    with Server("tests.apps.sockets:handler", workers=1, environ={"PYTHONPATH": f"{tmp_path}:."}) as server:
        for _ in range(2):
            with Client(server.port) as client:
                client.send(OPENING % (b"/echo", b""))
                assert client.read().status == 501
        assert get(server.port).text == "hello"
    assert server.log.count("pip install 'prefork[websocket]'") == 1


# ---- flow ----


def test_slow_application_holds_its_client_back(server):
    """The messages wait in the client and in the kernel, not here."""
    with raw(server, b"/slow") as client:
        assert client.read_exactly(7) == b"\x81\x05ready"
        client.socket.settimeout(1)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 1000:
                client.send(masked(0x82, bytes(50_000)))
                sent += 1
        assert sent < 1000
        assert get(server.port, "/received").text == "0"
    get(server.port, "/go")
    assert ending(server, "/slow") == "1006 "
    assert 0 < int(get(server.port, "/received").text) <= sent


def test_slow_client_holds_the_application_back(server):
    with raw(server, b"/floods"):
        sent, _ = ending(server, "flood").split()
        assert int(sent) < 300


@pytest.mark.parametrize("size", [100, 65536])
def test_reader_that_stalls_is_not_buffered_for(native, size):
    """On CPython 3.12 and later, `writelines` of asyncio's transport never tells that the buffer is full."""
    worker = native.worker(1)
    before = resident_memory(worker)
    with Client(native.port) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.send(OPENING % (b"/streams?size=%d" % size, b""))
        client.read_until(b"\r\n\r\n")
        for _ in range(200):  # round trips, in which a worker that is not held back would send on
            assert get(native.port).text == "hello"
        assert resident_memory(worker) - before < 16_000_000
    assert ending(native, f"/streams?size={size}") == "1006 "


@pytest.mark.parametrize("size", [100, 65536])
def test_client_that_takes_all_at_once_leaves_the_others_their_turn(native, size):
    """The application never waits for it, and does not receive either."""
    with reading(raw(native, b"/streams?size=%d" % size)):
        for _ in range(3):
            assert get(native.port).text == "hello"
    assert ending(native, f"/streams?size={size}") == "1006 "


@pytest.mark.parametrize("fields", [b"", b"Sec-WebSocket-Extensions: permessage-deflate\r\n"])
def test_asgi_client_that_takes_all_at_once_leaves_the_others_their_turn(asgi, fields):
    with reading(raw(asgi, b"/streams", fields=fields)):
        for _ in range(3):
            assert get(asgi.port).text == "hello"
    assert "1006" in ending(asgi, "/streams")


def test_send_raises_as_soon_as_the_transport_closes(native):
    """It may have much to flush to a client that has closed its side; what is written then goes nowhere."""
    with raw(native, b"/late") as client:
        ending(native, "full")
        client.socket.shutdown(socket.SHUT_WR)
        assert "1006" in ending(native, "late")


@contextmanager
def reading(client):
    """*client* takes what comes as fast as it can; inside, it has taken more than all buffers hold."""
    is_left, is_fed = threading.Event(), threading.Event()

    def read():
        size = 0
        while not is_left.is_set() and (data := client.socket.recv(1 << 20)):
            size += len(data)
            if size > 8_000_000:
                is_fed.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert is_fed.wait(DEADLINE)
        yield
    finally:
        is_left.set()
        reader.join()
        client.close()


# ---- time ----


def test_silent_client_is_pinged_and_cut():
    with Server("tests.apps.sockets:handler", workers=1, ws_ping_interval=0.5, ws_ping_timeout=0.5) as server:
        with raw(server) as client:
            assert client.read_exactly(2) == b"\x89\x00"
            assert client.read_exactly(1) == b"\x88"
            assert ending(server, "/echo") == "1006 no answer to a ping"
        server.wait_for("no answer to a ping")


def test_client_that_answers_pings_stays():
    with Server("tests.apps.sockets:handler", workers=1, ws_ping_interval=0.3, ws_ping_timeout=0.3) as server:
        with raw(server) as client:
            for _ in range(3):
                assert client.read_exactly(2) == b"\x89\x00"
                client.send(masked(0x8A, b""))
            client.send(masked(0x81, b"here"))
            assert client.read_exactly(6) == b"\x81\x04here"


def test_drain_closes_with_1012():
    with Server("tests.apps.sockets:handler", workers=1) as server:
        with connect(server) as ws:
            ws.send("a")
            ws.recv(DEADLINE)
            server.signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed) as caught:
                ws.recv(DEADLINE)
        assert closing(caught.value) == (1012, "service restart")
        assert server.wait_exit() == 0
    assert "cut off" not in server.log


def test_drain_does_not_wait_for_ever_for_a_client_that_does_not_close():
    with Server("tests.apps.sockets:handler", workers=1, graceful_timeout=0.5) as server:
        with raw(server) as client:
            server.signal(signal.SIGTERM)
            assert client.read_exactly(1) == b"\x88"
            assert server.wait_exit() == 0


# ---- other shapes ----


def test_handler_of_websockets_only_asks_for_an_upgrade():
    with Server("tests.apps.sockets:only", workers=1) as server:
        answer = get(server.port)
        assert (answer.status, answer.headers["upgrade"]) == (426, "websocket")
        with connect(server) as ws:
            ws.send("a")
            assert ws.recv(DEADLINE) == "a"


def test_object_may_have_a_method_for_each():
    with Server("tests.apps.sockets:both", workers=1) as server:
        assert get(server.port).text == "over HTTP"
        with connect(server) as ws:
            ws.send("a")
            assert ws.recv(DEADLINE) == "a"


def test_application_without_websockets_ignores_the_upgrade():
    """RFC 9110, section 7.8: a server may."""
    with Server("tests.apps.plain:app", workers=1) as server, Client(server.port) as client:
        client.send(OPENING % (b"/", b""))
        assert client.read().status == 200


def test_asgi_application():
    with Server("tests.apps.sockets:asgi", workers=1, lifespan="off") as server:
        with connect(server) as ws:
            assert ws.response.headers["x-own"] == "yes"
            for message in ("text", b"bytes"):
                ws.send(message)
                assert ws.recv(DEADLINE) == message
        with pytest.raises(InvalidStatus) as caught:
            connect(server, "/deny")
        assert (caught.value.response.status_code, caught.value.response.body) == (418, b"teapot")
        with pytest.raises(InvalidStatus, match="403"):
            connect(server, "/reject")
        with pytest.raises(InvalidStatus, match="500"):
            connect(server, "/order")
        server.wait_for("GatewayError: the WebSocket cannot be sent to: it is asked for")


def test_starlette_application():
    with Server("tests.apps.sockets:starlette()", workers=1) as server:
        with connect(server, "/ws", subprotocols=["chat"]) as ws:
            assert ws.subprotocol == "chat"
            ws.send("hello")
            assert ws.recv(DEADLINE) == "HELLO"
            ws.close(3000, "done")
        assert ending(server, "/ws") == "3000 done"
        with pytest.raises(InvalidStatus) as caught:
            connect(server, "/denied")
        assert (caught.value.response.status_code, caught.value.response.body) == (409, b"no")
        with pytest.raises(InvalidStatus, match="403"):
            connect(server, "/nowhere")
