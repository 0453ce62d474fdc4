"""Leaving: what is in flight is finished, what is idle is closed, what takes too long is cut off."""

from __future__ import annotations

import signal
import time

import pytest

from tests.harness.client import Client, get
from tests.harness.server import Server

STREAMS = "tests.apps.bodies:app"


@pytest.fixture(params=["uvloop", "asyncio"])
def server(request):
    with Server(STREAMS, workers=1, loop=request.param) as server:
        server.wait_ready(1)
        yield server


@pytest.fixture
def idle(server):
    """A kept-alive connection without a request: that it is closed shows that the drain is under way."""
    with Client(server.port) as idle:
        assert idle.get("/").status == 200
        yield idle


def begin_post(client: Client, path: str = "/length") -> None:
    """Half a request, and nothing stops the server from running its application."""
    client.send(f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\n".encode() + b"12345")


def test_request_in_flight_is_finished(server, idle):
    """Its answer says that it is the last one; then the worker leaves with 0."""
    with Client(server.port) as client:
        begin_post(client)
        server.signal(signal.SIGTERM)
        assert idle.read_to_end() == b""
        client.send(b"67890")
        answer = client.read()
        assert (answer.text, answer.headers["connection"]) == ("10", "close")
        assert client.read_to_end() == b""
        assert server.wait_exit() == 0
    assert "cut off" not in server.log


def test_stream_in_flight_is_finished(server, idle):
    """Its head had left before: the connection is closed after it all the same."""
    with Client(server.port) as client:
        begin_post(client, "/echo")
        client.read_until(b"12345\r\n")
        server.signal(signal.SIGTERM)
        assert idle.read_to_end() == b""
        client.send(b"67890")
        assert client.read_to_end() == b"5\r\n67890\r\n0\r\n\r\n"
        assert server.wait_exit() == 0


def test_head_that_has_begun_is_served(server, idle):
    with Client(server.port) as client:
        client.send(b"GET / HTTP/1.1\r\nHo")
        server.signal(signal.SIGTERM)
        assert idle.read_to_end() == b""
        client.send(b"st: t\r\n\r\n")
        answer = client.read()
        assert (answer.text, answer.headers["connection"]) == ("hello", "close")
        assert server.wait_exit() == 0


def test_connection_that_never_asked_does_not_delay(server):
    with Client(server.port) as client:
        start = time.monotonic()
        get(server.port)  # accepted after that one
        server.signal(signal.SIGTERM)
        assert client.read_to_end() == b""
        assert server.wait_exit() == 0
        assert time.monotonic() - start < 10, "the head's deadline was waited for"


def test_request_over_the_graceful_timeout_is_cut_off():
    """The application is cancelled, its client gets a 500, and the worker leaves with 0."""
    with Server(STREAMS, workers=1, graceful_timeout=0.3) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            begin_post(client, "/hold?event=never")
            get(server.port, "/wait?event=never-begun")
            server.signal(signal.SIGTERM)
            assert client.read().status == 500
            assert server.wait_exit() == 0
        server.wait_for(
            r"warning not finished within 0.3 s \(--graceful-timeout\) and cut off: 1 requests on 1 connections"
        )
        server.wait_for(r"worker 1 .* ended: .*\b0\b")


def test_client_that_takes_nothing_is_cut_off():
    with Server(STREAMS, workers=1, graceful_timeout=0.3) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.send(b"GET /whole?size=30000000 HTTP/1.1\r\nHost: t\r\n\r\n")
            client.read_until(b"\r\n\r\n")
            server.signal(signal.SIGTERM)
            assert server.wait_exit() == 0
            with pytest.raises((EOFError, ConnectionResetError)):
                client.read_exactly(30_000_000)


def test_thread_that_hangs_does_not_hold_the_worker():
    """A thread cannot be cancelled; it ends with the process."""
    with Server("tests.apps.wsgi:app", workers=1, graceful_timeout=0.3) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.send(b"GET /hang HTTP/1.1\r\nHost: t\r\n\r\n")
            with Client(server.port) as other:
                assert other.get("/").text == "hello"
            server.signal(signal.SIGTERM)
            assert server.wait_exit(deadline=4) == 0
            assert client.read().status == 500


def test_worker_whose_loop_is_blocked_is_killed():
    """It hears of nothing; the master ends it after the graceful timeout and a little."""
    with Server(STREAMS, workers=1, graceful_timeout=0.1) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.send(b"GET /block HTTP/1.1\r\nHost: t\r\n\r\n")
            server.wait_for("^this worker stands still$")
            server.signal(signal.SIGTERM)
            assert server.wait_exit() == 0
        server.wait_for(r"worker 1 .* ended: killed by SIGKILL")
