"""PROXY headers on the wire: from trusted proxies they say who the client is, and nobody gets in without one."""

from __future__ import annotations

import json
import struct

import pytest

from prefork.net.proxy import SIGNATURE
from tests.harness.client import Client, get
from tests.harness.server import Server

LINE = b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n"
ENDS = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack("!HH", 56324, 443)
BINARY = SIGNATURE + struct.pack("!BBH", 0x21, 0x11, len(ENDS) + 3) + ENDS + b"\4\0\0"
LOCAL = SIGNATURE + struct.pack("!BBH", 0x20, 0, 0)
REQUEST = b"GET /scope HTTP/1.1\r\nHost: test\r\n\r\n"


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def server(request):
    with Server("tests.apps.asgi:app", workers=1, loop=request.param, proxy_protocol=True, head_timeout=2) as server:
        server.wait_ready(1)
        yield server


def scope_of(client: Client) -> dict:
    return json.loads(client.read().body)


@pytest.mark.parametrize("header", [LINE, BINARY], ids=["v1", "v2"])
def test_client_and_server_are_those_of_the_header(server, header):
    with Client(server.port) as client:
        client.send(header + REQUEST)
        scope = scope_of(client)
        assert (scope["client"], scope["server"]) == (["192.0.2.1", 56324], ["198.51.100.2", 443])
        client.send(REQUEST)  # it holds for the whole connection
        assert scope_of(client)["client"] == ["192.0.2.1", 56324]


@pytest.mark.parametrize("header", [LINE, BINARY], ids=["v1", "v2"])
def test_header_may_come_in_pieces(server, header):
    """The first one is all that the worker sees, until it has seen it and asks for more."""
    with Client(server.port) as client:
        for at in range(len(header)):
            client.send(header[at : at + 1])
        client.send(REQUEST)
        assert scope_of(client)["client"] == ["192.0.2.1", 56324]


def test_health_check_of_the_proxy_has_the_proxys_address(server):
    with Client(server.port) as client:
        client.send(LOCAL + REQUEST)
        assert scope_of(client)["client"] == list(client.socket.getsockname())


def test_client_that_the_proxy_does_not_know_is_none(server):
    """Not the proxy: its address may be one that the application trusts."""
    with Client(server.port) as client:
        client.send(b"PROXY UNKNOWN\r\nGET /scope HTTP/1.1\r\nHost: test\r\nX-Forwarded-For: 127.0.0.9\r\n\r\n")
        assert scope_of(client)["client"] is None


@pytest.mark.parametrize("start", [REQUEST, b"PROXY TCP4 192.0.2.1\r\n" + REQUEST, BINARY[:13] + b"\xff" + BINARY[14:]])
def test_connection_without_a_good_header_is_closed_unanswered(server, start):
    with Client(server.port) as client:
        client.send(start)
        assert client.is_closed_by_peer()
    server.wait_for("closed a connection of 127.0.0.1 port [0-9]+: .*PROXY")


def test_header_has_the_deadline_of_the_head(server):
    with Client(server.port) as client:
        client.send(LINE[:20])
        assert client.is_closed_by_peer()


def test_second_header_is_a_bad_request(server):
    """Only the first bytes of a connection are the proxy's word."""
    with Client(server.port) as client:
        client.send(LINE + LINE + REQUEST)
        assert client.read().status == 400


def test_peers_that_are_not_trusted_are_closed():
    with Server("tests.apps.asgi:app", workers=1, proxy_protocol=True, proxy_allow_ips="10.0.0.0/8") as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.send(LINE + REQUEST)
            assert client.is_closed_by_peer()
        server.wait_for("not among those that send PROXY headers")


def test_header_is_a_bad_request_where_none_is_expected():
    with Server("tests.apps.asgi:app", workers=1) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.send(LINE + REQUEST)
            assert client.read().status == 400
        assert get(server.port).text == "hello"


def test_unix_socket(tmp_path):
    path = str(tmp_path / "socket")
    with Server("tests.apps.asgi:app", workers=1, bind=f"unix:{path}", proxy_protocol=True) as server:
        server.wait_ready(1)
        with Client(path) as client:
            client.send(BINARY + REQUEST)
            assert scope_of(client)["client"] == ["192.0.2.1", 56324]


@pytest.mark.parametrize(("told", "client"), [("10.1.1.1", ["192.0.2.9", 0]), ("192.0.2.1", ["192.0.2.1", 1])])
def test_fields_are_obeyed_if_the_client_of_the_header_is_trusted(told, client):
    """A TCP balancer in front of an HTTP proxy: the header tells the proxy, the proxy's field the client."""
    with Server("tests.apps.asgi:app", workers=1, proxy_protocol=True, forwarded_allow_ips="10.0.0.0/8") as server:
        server.wait_ready(1)
        with Client(server.port) as connection:
            connection.send(f"PROXY TCP4 {told} 10.0.0.2 1 80\r\n".encode())
            connection.send(b"GET /scope HTTP/1.1\r\nHost: test\r\nX-Forwarded-For: 192.0.2.9\r\n\r\n")
            assert scope_of(connection)["client"] == client
