"""An ASGI application behind the whole server."""

from __future__ import annotations

import json
import socket

import pytest

from tests.harness.client import Client, get
from tests.harness.server import Server


@pytest.fixture(scope="module")
def server():
    with Server("tests.apps.asgi:app", workers=1) as server:
        server.wait_ready(1)
        yield server


def test_scope_tells_both_ends_of_the_connection(server, client):
    scope = json.loads(client.get("/scope?a=b").body)
    assert scope == {
        "scheme": "http",
        "client": list(client.socket.getsockname()),
        "server": ["127.0.0.1", server.port],
        "http_version": "1.1",
        "method": "GET",
        "path": "/scope",
    }


def test_bodies_stream_both_ways(client):
    """Each piece comes back before the next is sent."""
    client.send(b"POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\n12345")
    client.read_until(b"5\r\n12345\r\n")
    client.send(b"67890")
    client.read_until(b"5\r\n67890\r\n0\r\n\r\n")
    assert client.get("/").text == "hello"


def test_receive_tells_that_the_client_left(server):
    with Client(server.port) as client:
        client.send(b"GET /listen HTTP/1.1\r\nHost: t\r\n\r\n")
    assert get(server.port, "/seen").text == "seen"


def test_half_closed_client_is_told_as_left_and_answered_all_the_same(client):
    """The two cannot be told apart before something is written."""
    client.send(b"GET /answer-after-disconnect HTTP/1.1\r\nHost: t\r\n\r\n")
    client.socket.shutdown(socket.SHUT_WR)
    assert client.read().text == "answered all the same"
    assert client.read_to_end() == b""


def test_half_closed_client_whose_application_gave_up_is_not_kept(client):
    client.send(b"GET /listen HTTP/1.1\r\nHost: t\r\n\r\n")
    client.socket.shutdown(socket.SHUT_WR)
    assert client.is_closed_by_peer()


def test_application_that_answers_nothing_is_a_500(server, client):
    assert client.get("/silent").status == 500
    server.wait_for(r"GatewayError: the application returned without a response")


def test_application_that_answers_half_is_cut(client):
    with pytest.raises((EOFError, ConnectionResetError)):
        client.get("/half")
