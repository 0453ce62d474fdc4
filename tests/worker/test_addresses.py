"""Other ways to a worker than TCP over IPv4: unix sockets, IPv6, TLS, and the ways to share them."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
from contextlib import suppress

import pytest

from tests.harness.certificates import Certificate, make_certificate
from tests.harness.client import Client, get
from tests.harness.server import Server


def has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request):
    return request.param


def test_unix_socket(tmp_path, loop):
    """Its clients have no address, its path is the server's."""
    path = str(tmp_path / "socket")
    with Server("tests.apps.asgi:app", workers=2, loop=loop, bind=f"unix:{path}", access_log="-") as server:
        server.wait_ready(2)
        scope = json.loads(get(path, "/scope").body)
        assert (scope["client"], scope["server"]) == (None, [path, None])
        server.wait_for(r' - "GET /scope HTTP/1.1" 200 ')


def test_unix_socket_stays_when_a_worker_leaves(tmp_path, loop):
    """The path belongs to the master: a worker that goes must not take it along."""
    path = str(tmp_path / "socket")
    with Server("tests.apps.plain:app", workers=1, loop=loop, bind=f"unix:{path}") as server:
        server.wait_ready(1)
        assert get(path, "/leave").text == "leaving"
        server.worker(2)
        assert get(path).text == "hello"


@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 here")
def test_ipv6(loop):
    with Server("tests.apps.asgi:app", workers=1, loop=loop, bind="[::1]:0") as server:
        server.wait_ready(1)
        scope = json.loads(get(("::1", server.port), "/scope").body)
        assert scope["server"] == ["::1", server.port]
        assert scope["client"][0] == "::1"


@pytest.mark.parametrize("sharing", ["inherit", "reuseport", "handoff"])
def test_sharing(loop, sharing):
    """However connections reach the workers, both get some and all are served."""
    with Server("tests.apps.plain:app", workers=2, loop=loop, sharing=sharing) as server:
        server.wait_ready(2)
        workers = set()
        clients = []
        try:
            # 60 connections to one of two workers only: by chance once in 10**17 runs.
            while len(clients) < 60:
                clients.append(Client(server.port))
                workers.add(clients[-1].get("/worker").text.split()[0])
            assert workers == {"1", "2"} or sharing == "inherit"
            assert {client.get("/").text for client in clients} == {"hello"}
        finally:
            for client in clients:
                client.close()


# ---- TLS ----


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"), "localhost", ["localhost"])


@pytest.fixture(params=[("uvloop", "inherit"), ("asyncio", "handoff")], ids=str)
def tls_server(request, certificate):
    files = {"certfile": certificate.crt, "keyfile": certificate.key}
    loop, sharing = request.param
    with Server("tests.apps.asgi:app", workers=1, loop=loop, sharing=sharing, head_timeout=1, **files) as server:
        server.wait_ready(1)
        yield server


def tls_client(server: Server, certificate: Certificate) -> Client:
    client = Client(server.port)
    context = ssl.create_default_context(cafile=certificate.crt)
    client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
    return client


def test_tls(tls_server, certificate):
    """Requests, large bodies, closing: all as without."""
    with tls_client(tls_server, certificate) as client:
        assert json.loads(client.get("/scope").body)["scheme"] == "https"
        body = b"0123456789" * 300_000
        assert client.request("POST", "/echo", body=body).body == body
        assert client.get("/", "Connection: close").text == "hello"
        assert client.read_to_end() == b""
    with tls_client(tls_server, certificate) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 20000000\r\n\r\n" + bytes(20_000_000))
        assert client.read().text == "hello"


def test_tls_listener_survives_those_who_do_not_speak_it(tls_server, certificate):
    with Client(tls_server.port) as plain:
        plain.send(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
        assert plain.read().status == 400
    with Client(tls_server.port) as silent:
        assert silent.is_closed_by_peer(), "the handshake has the deadline of the head"
    with tls_client(tls_server, certificate) as client:
        assert client.get("/").text == "hello"


def test_drain_does_not_wait_for_a_silent_tls_client(tls_server, certificate):
    """It holds its connection and never answers our goodbye."""
    with tls_client(tls_server, certificate) as client:
        assert client.get("/").text == "hello"
        tls_server.signal(signal.SIGTERM)
        assert tls_server.wait_exit(deadline=10) == 0
    assert not re.search("cut off|Traceback", tls_server.log)
