"""What one request or client does, another does not feel: contexts, remembered heads, turns of the loop."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

import pytest

from tests.harness.client import Client
from tests.harness.server import Server

PATIENCE = 5.0  # seconds


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def server(request):
    with Server("tests.apps.shared:asgi", workers=1, lifespan="off", loop=request.param) as server:
        server.wait_ready(1)
        yield server


@pytest.fixture(scope="module", params=["1", "0"], ids=["threads", "inline"])
def wsgi_server(request):
    with Server("tests.apps.shared:wsgi", workers=1, threads=request.param) as server:
        server.wait_ready(1)
        yield server


def test_context_of_a_request_that_paused_reading_is_not_the_next_ones(server):
    """Behind a proxy the next request of the connection is another user's."""
    with Client(server.port) as client:
        assert client.request("POST", "/upload", body=b"x" * 5_000_000).text == "nobody"
        assert [client.get(f"/{n}").text for n in range(3)] == ["nobody"] * 3


def test_context_of_a_request_that_paused_writing_is_not_the_next_ones(server):
    with Client(server.port) as client:
        client.send(b"GET /big HTTP/1.1\r\nHost: t\r\n\r\nGET /after HTTP/1.1\r\nHost: t\r\n\r\n")
        assert len(client.read().body) == 20_000_000
        assert client.read().text == "nobody"
        assert client.get("/later").text == "nobody"


def test_context_of_a_wsgi_request_is_not_the_next_ones(wsgi_server):
    with Client(wsgi_server.port) as client:
        assert [client.get(f"/{n}").text for n in range(3)] == ["nobody"] * 3


def test_host_of_an_absolute_target_is_not_another_requests(wsgi_server):
    """Two heads with equal field lines share what was learnt of them, and a target belongs to one head."""

    def host(head: bytes) -> str:
        with Client(wsgi_server.port) as client:
            client.send(head + b" HTTP/1.0\r\nUser-Agent: t\r\n\r\n")
            return client.read().headers["x-host"]

    assert host(b"GET http://one.example/a") == "one.example"
    assert host(b"GET /b") == "none"
    assert host(b"GET http://two.example/c") == "two.example"


def flood(port: int, data: bytes, stop: threading.Event) -> None:
    """Send *data* again and again, and read what comes, until told to stop."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.setblocking(False)
        rest = memoryview(data)
        while not stop.is_set():
            with suppress(BlockingIOError):
                rest = rest[sock.send(rest) :] or memoryview(data)
            with suppress(BlockingIOError):
                sock.recv(1 << 20)


@pytest.mark.parametrize(
    "data",
    [b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n" * 5000, b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n"],
    ids=["pipelines", "reads an endless stream of small pieces"],
)
def test_busy_client_does_not_starve_the_others(server, data):
    """Neither ever makes the worker wait, so without a limit it would serve nobody else."""
    stop = threading.Event()
    busy = threading.Thread(target=flood, args=(server.port, data, stop))
    busy.start()
    try:
        for _ in range(5):
            with Client(server.port, PATIENCE) as client:
                assert client.get("/").text == "nobody"
    finally:
        stop.set()
        busy.join()


def test_connection_that_ends_for_its_unread_body_says_so(server):
    """A client that knows sends its next request on another connection."""
    with Client(server.port) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 50000000\r\n\r\n")
        assert client.read().headers["connection"] == "close"
        client.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 50000000\r\n\r\n")
        assert client.read_to_end() == b""
