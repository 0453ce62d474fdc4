"""Forwarded fields on the wire: obeyed from trusted peers, passed on as they came from all others."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct

import pytest

from tests.harness.client import Client, get
from tests.harness.server import Server, suspend


def scope(address, *headers: str) -> dict:
    return json.loads(get(address, "/scope", *headers).body)


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def server(request):
    with Server("tests.apps.asgi:app", workers=1, loop=request.param, access_log="-") as server:
        server.wait_ready(1)
        yield server


def test_client_and_scheme_are_what_a_proxy_on_this_machine_says(server):
    """The default, as with gunicorn and uvicorn."""
    seen = scope(server.port, "X-Forwarded-For: 6.6.6.6, 192.0.2.1", "X-Forwarded-Proto: https")
    assert (seen["client"], seen["scheme"]) == (["192.0.2.1", 0], "https")


def test_access_log_has_the_client_that_was_told(server):
    scope(server.port, "X-Forwarded-For: 192.0.2.77")
    server.wait_for(r" 192\.0\.2\.77 .*GET /scope HTTP/1\.1")


def test_each_request_of_a_connection_is_told_anew(server):
    """A proxy sends the requests of many clients over one connection."""
    with Client(server.port) as client:
        for host in ("192.0.2.1", "192.0.2.2", "192.0.2.1"):
            assert json.loads(client.get("/scope", f"X-Forwarded-For: {host}").body)["client"] == [host, 0]
        own = list(client.socket.getsockname())
        assert json.loads(client.get("/scope").body)["client"] == own
        assert json.loads(client.get("/scope", "X-Forwarded-For: unknown").body)["client"] == own


def test_fields_that_are_not_named_are_not_obeyed(server):
    seen = scope(server.port, "Forwarded: for=192.0.2.1;proto=https", "X-Forwarded-Host: evil.example")
    assert (seen["client"][0], seen["scheme"]) == ("127.0.0.1", "http")


def test_forwarded_of_rfc_7239():
    with Server("tests.apps.asgi:app", workers=1, forwarded_headers="forwarded") as server:
        server.wait_ready(1)
        seen = scope(
            server.port, 'Forwarded: for=6.6.6.6, for="[2001:db8::1]:4711";proto=https', "X-Forwarded-For: 7.7.7.7"
        )
        assert (seen["client"], seen["scheme"]) == (["2001:db8::1", 4711], "https")


@pytest.mark.parametrize("settings", [{"forwarded_allow_ips": "10.0.0.0/8"}, {"forwarded_headers": "off"}])
def test_peers_that_are_not_trusted_are_not_obeyed(settings):
    with Server("tests.apps.asgi:app", workers=1, **settings) as server:
        server.wait_ready(1)
        seen = scope(server.port, "X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: https")
        assert (seen["client"][0], seen["scheme"]) == ("127.0.0.1", "http")


@pytest.mark.parametrize(("trusted", "client"), [("unix", ["192.0.2.1", 0]), ("127.0.0.1", None)])
def test_unix_peers_are_trusted_by_their_word(tmp_path, trusted, client):
    path = str(tmp_path / "socket")
    with Server("tests.apps.asgi:app", workers=1, bind=f"unix:{path}", forwarded_allow_ips=trusted) as server:
        server.wait_ready(1)
        assert scope(path, "X-Forwarded-For: 192.0.2.1")["client"] == client


@pytest.mark.parametrize("sharing", ["inherit", "handoff"])
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_client_that_has_left_is_not_taken_for_one_on_a_unix_socket(loop, sharing):
    """Its address cannot be asked for any more, and who has none is trusted by default."""
    settings = {"loop": loop, "sharing": sharing, "forwarded_allow_ips": "unix", "access_log": "-"}
    with Server("tests.apps.asgi:app", workers=1, bind="0.0.0.0:0", **settings) as server:
        server.wait_ready(1)
        worker = server.worker(1)
        suspend(worker)
        try:
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(b"GET /forged HTTP/1.1\r\nHost: t\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST
        finally:
            os.kill(worker, signal.SIGCONT)
        assert get(server.port, "/scope").status == 200
        server.wait_for(r"GET /scope")
        assert "6.6.6.6" not in server.log
