"""Clients that break HTTP or a limit: the status, then a close that does not destroy it.

Behind each request comes more than a socket's buffer takes in one read. A server that
closed with these bytes unread would reset the connection, and the answer with it.
"""

from __future__ import annotations

import re

import pytest

from tests.harness.client import Client, get
from tests.harness.server import Server

JUNK = b"x" * 1_000_000

REFUSED = {
    "a bare LF": (400, b"GET / HTTP/1.1\nHost: t\n\n"),
    "no Host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "TLS on a plain port": (400, b"\x16\x03\x01\x02\x00\x01\x00"),
    "two lengths": (400, b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"),
    "a length and chunks": (
        400,
        b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ),
    "a body announced too large": (413, b"POST /length HTTP/1.1\r\nHost: t\r\nContent-Length: 1000001\r\n\r\n"),
    "a long target": (414, b"GET /" + b"a" * 1000 + b" HTTP/1.1\r\nHost: t\r\n\r\n"),
    "an unknown expectation": (417, b"POST / HTTP/1.1\r\nHost: t\r\nExpect: miracles\r\n\r\n"),
    "a large head": (431, b"GET / HTTP/1.1\r\nHost: t\r\nA: " + b"a" * 5000),
    "many fields": (431, b"GET / HTTP/1.1\r\nHost: t\r\n" + b"A: a\r\n" * 20 + b"\r\n"),
    "an unknown coding": (501, b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"),
    "version 2.0": (505, b"GET / HTTP/2.0\r\nHost: t\r\n\r\n"),
    # In the body, with the application at work.
    "chunks grown too large": (
        413,
        b"POST /length HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nf4241\r\n",
    ),
    "a broken chunk": (400, b"POST /length HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
}


@pytest.fixture(scope="module")
def server():
    settings = {"limit_head": 4096, "limit_fields": 10, "limit_target": 500, "limit_body": 1_000_000}
    with Server("tests.apps.bodies:app", workers=1, access_log="-", **settings) as server:
        server.wait_ready(1)
        yield server


@pytest.mark.parametrize("what", REFUSED)
def test_refusal_arrives_whole_and_the_connection_ends(server, what):
    status, request = REFUSED[what]
    with Client(server.port) as client:
        client.send(request + JUNK)
        answer = client.read()
        assert (answer.status, answer.headers["connection"]) == (status, "close")
        assert answer.body
        assert client.read_to_end() == b""
    assert get(server.port).text == "hello"


def test_refusal_answers_after_what_was_pipelined_before(server):
    """The good requests in front are served first."""
    with Client(server.port) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n" * 3 + b"BAD\r\n\r\n")
        assert [client.read().status for _ in range(4)] == [200, 200, 200, 400]
        assert client.read_to_end() == b""


def test_broken_body_behind_a_begun_response_cuts_it(server):
    """A second status line would be read as part of the body."""
    with Client(server.port) as client:
        client.send(b"POST /echo HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        client.read_until(b"3\r\nabc\r\n")
        client.send(b"zz\r\n")
        with pytest.raises((EOFError, ConnectionResetError)):
            client.read_until(b"0\r\n\r\n")


def test_refusals_are_in_both_logs(server):
    with Client(server.port) as client:
        client.send(b"DEADBEEF\r\n\r\n")
        client.read()
        port = client.socket.getsockname()[1]
    server.wait_for(rf"info  refused a request of 127.0.0.1 port {port} with 400: ")
    server.wait_for(r'127.0.0.1 "- - HTTP/-" 400 \d+ 0.000000 worker 1$')


def test_refused_body_is_in_the_access_log_with_its_request(server):
    with Client(server.port) as client:
        client.send(b"POST /length?logged HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        client.read()
    server.wait_for(r'127.0.0.1 "POST /length\?logged HTTP/1.1" 400 \d+ [0-9.]+ worker 1$')
    assert not re.search(r"POST /length\?logged failed", server.log), "the client was to blame, not the application"
