"""Deadlines of some tenths of a second, waited for by reading the socket.

Without its deadline each of these reads would hang until the client's own, 20 s.
"""

from __future__ import annotations

import socket
import time

import pytest

from tests.harness.client import DEADLINE, Client, get
from tests.harness.server import Server

TIMEOUT = 0.3  # seconds, for each


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def server(request):
    timeouts = {f"{name}_timeout": TIMEOUT for name in ("head", "body", "keep_alive", "write")}
    with Server("tests.apps.bodies:app", workers=1, loop=request.param, **timeouts) as server:
        server.wait_ready(1)
        yield server


@pytest.fixture
def client(server):
    with Client(server.port) as client:
        client.begun = time.monotonic()
        yield client
        assert time.monotonic() - client.begun >= TIMEOUT, "a deadline is never early"


def test_connection_that_never_asks_is_closed(client):
    """Without a word: there is no request to answer."""
    assert client.read_to_end() == b""


def test_head_that_stalls_is_a_408(client):
    client.send(b"GET / HTTP/1.1\r\nHost")
    assert client.read().status == 408
    assert client.read_to_end() == b""


def test_head_that_drips_is_a_408(client):
    """One deadline for the whole head, however slowly it comes."""
    client.socket.setblocking(False)
    drips = iter(b"GET / HTTP/1.1\r\nA: " + b"a" * 200)
    client.send(bytes([next(drips)]))
    while not is_readable(client, 0.05):
        client.send(bytes([next(drips)]))
    client.socket.settimeout(DEADLINE)
    assert client.read().status == 408


def test_second_head_that_stalls_is_a_408(client):
    """The keep-alive deadline is exchanged for that of the head."""
    client.send(b"GET / HTTP/1.1\r\nHost: t\r\n\r\nGET / HT")
    assert client.read().status == 200
    assert client.read().status == 408


def test_body_that_stalls_is_a_408(client):
    client.send(b"POST /length HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nhalf")
    assert client.read().status == 408
    assert client.read_to_end() == b""


def test_body_that_stalls_behind_a_begun_response_is_cut(client):
    client.send(b"POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nhalf")
    client.read_until(b"half\r\n")
    with pytest.raises((EOFError, ConnectionResetError)):
        client.read_until(b"\r\n")


def test_body_that_does_not_come_after_continue_is_a_408(client):
    client.send(b"POST /length HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    assert client.read().status == 100
    assert client.read().status == 408


def test_idle_connection_is_closed(client):
    assert client.get("/").status == 200
    assert client.read_to_end() == b""


def test_idle_connection_is_closed_after_many_requests(client):
    """Also when answers were larger than the buffer, so that writing stopped and went on in between."""
    for _ in range(3):
        client.get("/whole?size=3000000")
    client.begun = time.monotonic()
    assert client.read_to_end() == b""


def test_rest_of_an_unread_body_is_not_awaited_for_ever(client):
    """Small enough to be read for the connection's sake, and it does not come."""
    client.send(b"POST /unread HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nhalf")
    assert client.read().text == "not read"
    assert client.read_to_end() == b""


def test_client_that_takes_nothing_is_cut(server, client):
    """It would keep the application, and the memory of what it was sent."""
    client.send(b"GET /flood?size=1000000000 HTTP/1.1\r\nHost: t\r\n\r\n")
    wait_until_cut(server, client)


def test_client_that_takes_nothing_of_a_last_answer_is_cut(server, client):
    """The connection is closing already: what is unsent must not keep it."""
    client.send(b"GET /whole?size=30000000 HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
    wait_until_cut(server, client)


def wait_until_cut(server: Server, client: Client) -> None:
    """The log says why, and what the client then reads is not a whole answer."""
    port = client.socket.getsockname()[1]
    server.wait_for(rf"info  aborted a response to 127.0.0.1 port {port}: nothing was taken in time")
    with pytest.raises((EOFError, ConnectionResetError)):
        client.read()


def test_slow_client_is_served_as_long_as_it_takes_something(server):
    """Far longer than the deadline, a little in each interval."""
    with Client(server.port) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.send(b"GET /whole?size=12000000 HTTP/1.1\r\nHost: t\r\n\r\n")
        client.read_until(b"\r\n\r\n")
        for _ in range(12):
            time.sleep(TIMEOUT / 2)  # this client's pace, nothing is waited for
            client.read_exactly(1_000_000)
        assert client.get("/").text == "hello"


def test_slow_application_has_no_deadline(server):
    """All these are for clients; how long an application takes is its own affair."""
    with Client(server.port) as client:
        client.send(b"GET /wait?event=slow HTTP/1.1\r\nHost: t\r\n\r\n")
        with Client(server.port) as idle:  # closed after two sweeps: time has passed
            assert idle.get("/").text == "hello"
            assert idle.read_to_end() == b""
        get(server.port, "/set?event=slow")
        assert client.read().text == "waited"


def is_readable(client: Client, seconds: float) -> bool:
    client.socket.settimeout(seconds)
    try:
        return bool(client.socket.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        client.socket.settimeout(DEADLINE)
