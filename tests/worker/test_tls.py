"""A server with TLS: whom it greets how, which certificates it shows, and how it takes new ones."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import ssl
import struct
import time
from pathlib import Path

import pytest
import websockets.sync.client

from prefork.gateway.exchange import Exchange
from prefork.net.tls import TLS, TLSFiles
from prefork.worker.service import Service
from tests.harness.certificates import Certificate, make_certificate
from tests.harness.client import Client, get
from tests.harness.server import DEADLINE, Server
from tests.harness.worker import LOOPS, Address, run_beside_worker, until

GET = b"GET / HTTP/1.1\r\nHost: t\r\n\r\n"

# Preloaded, for that user may not be able to read the application either.
NOBODY = {"user": "65534", "group": "65534", "preload": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Certificate]:
    folder = tmp_path_factory.mktemp("tls")
    authority = make_certificate(folder, "authority", subject="/CN=Authority")
    return {
        "localhost": make_certificate(folder, "localhost", ["localhost"]),
        "renewed": make_certificate(folder, "renewed", ["localhost"]),
        "wild": make_certificate(folder, "wild", ["*.example.org"]),
        "authority": authority,
        "ann": make_certificate(folder, "ann", subject="/CN=Ann", issuer=authority),
    }


def files(*certificates: Certificate) -> dict[str, list[str]]:
    return {"certfile": [str(c.crt) for c in certificates], "keyfile": [str(c.key) for c in certificates]}


@pytest.fixture(params=[(loop, sharing) for loop in LOOPS for sharing in ("inherit", "handoff")], ids="-".join)
def way(request):
    """How a connection reaches a worker, and its loop."""
    return {"loop": request.param[0], "sharing": request.param[1]}


def context(certificate: Certificate | None = None) -> ssl.SSLContext:
    """A client that trusts everybody, and shows *certificate*."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    client.set_alpn_protocols(["h2", "http/1.1"])
    if certificate is not None:
        client.load_cert_chain(certificate.crt, certificate.key)
    return client


def connect(
    port: int,
    name: str | None = "localhost",
    client: ssl.SSLContext | None = None,
    first: bytes = b"",
    session: ssl.SSLSession | None = None,
) -> Client:
    """*first* is sent in the clear, before the handshake."""
    connection = Client(port)
    try:
        connection.send(first)
        client = client or context()
        connection.socket = client.wrap_socket(connection.socket, server_hostname=name, session=session)
    except BaseException:
        connection.close()
        raise
    return connection


def shown(client: Client) -> bytes:
    return client.socket.getpeercert(binary_form=True)


def der(certificate: Certificate) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.crt.read_text())


# ---- answers ----


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("headers", [(), ("Connection: close",)], ids=["kept", "closed"])
def test_stream_that_is_made_in_the_loop_arrives_whole(made, loop, headers):
    """Its pieces are to leave at once, which TLS transports have a way of their own to delay."""
    settings = {"threads": "0", "graceful_timeout": 1, **files(made["localhost"])}
    with Server("tests.apps.wsgi:app", workers=1, loop=loop, **settings) as server:
        server.wait_ready(1)
        with connect(server.port) as client:
            answer = client.get("/pieces", *headers)
            assert answer.status == 200
            assert answer.text.endswith("\n998\n999\n")


# ---- certificates ----


def test_name_decides_the_certificate_and_alpn_is_http_1_1(made, way):
    """However the connection came to the worker."""
    with Server("tests.apps.plain:app", workers=1, **way, **files(made["localhost"], made["wild"])) as server:
        server.wait_ready(1)
        for name, certificate in {"localhost": "localhost", "a.example.org": "wild", None: "localhost"}.items():
            with connect(server.port, name) as client:
                assert shown(client) == der(made[certificate])
                assert client.socket.selected_alpn_protocol() == "http/1.1"
                assert client.get().text == "hello"


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("client_cert", ["required", "optional"])
def test_client_certificates(made, loop, client_cert):
    """A client without one is turned away, or served as nobody."""
    settings = {"client_ca": made["authority"].crt, "client_cert": client_cert, **files(made["localhost"])}
    with Server("tests.apps.plain:app", workers=1, loop=loop, **settings) as server:
        server.wait_ready(1)
        with connect(server.port, client=context(made["ann"])) as ann:
            assert ann.get().text == "hello"
        if client_cert == "optional":
            with connect(server.port) as nobody:
                assert nobody.get().text == "hello"
        else:
            # In TLS 1.3 the client hears of it with its first read.
            with pytest.raises((ssl.SSLError, ConnectionResetError, EOFError)), connect(server.port) as nobody:
                nobody.get()
        with pytest.raises((ssl.SSLError, ConnectionResetError, EOFError)):
            with connect(server.port, client=context(made["wild"])) as unknown:
                unknown.get()
        server.wait_for(r"info  refused a TLS connection of 127\.0\.0\.1: .*(?i:certificate)")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_client_certificate_is_asked_for_by_every_connection(made, loop, version):
    """A client that would resume is served all the same, after a whole handshake; TLS 1.2 used to resume for two hours."""
    with Server(
        "tests.apps.plain:app", workers=1, loop=loop, client_ca=made["authority"].crt, **files(made["localhost"])
    ) as server:
        server.wait_ready(1)
        client = context(made["ann"])
        client.maximum_version = version
        with connect(server.port, client=client) as first:
            assert first.get().text == "hello"
            with connect(server.port, client=client, session=first.socket.session) as second:
                assert second.get().text == "hello"
                assert not second.socket.session_reused


# ---- what ASGI applications are told ----


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", ["ann", None])
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_asgi_scope_has_the_tls_extension(made, loop, name, version):
    """Each request of a connection has its own, whatever the one before made of it."""
    settings = {"client_ca": made["authority"].crt, "client_cert": "optional"}
    with Server("tests.apps.asgi:app", workers=1, loop=loop, **settings, **files(made["localhost"])) as server:
        server.wait_ready(1)
        client = context(made[name] if name else None)
        client.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
        with connect(server.port, client=client) as connection:
            for _ in range(2):
                assert json.loads(connection.get("/tls", "X-Forwarded-Proto: http").body) == told(
                    made, name, connection.socket
                )


def told(made, name, connection):
    """What the extension tells of *connection*, a client's; https://asgi.readthedocs.io/en/latest/specs/tls.html."""
    ciphers = {cipher["name"]: cipher["id"] & 0xFFFF for cipher in connection.context.get_ciphers()}
    return {
        "server_cert": ssl.DER_cert_to_PEM_cert(der(made["localhost"])),
        "client_cert_chain": [ssl.DER_cert_to_PEM_cert(der(made[name]))] if name else [],
        "client_cert_name": f"CN={name.title()}" if name else None,
        "client_cert_error": None,
        "tls_version": {"TLSv1.2": 0x0303, "TLSv1.3": 0x0304}[connection.version()],
        "cipher_suite": ciphers[connection.cipher()[0]],
    }


@pytest.mark.parametrize("loop", LOOPS)
def test_websocket_scope_has_the_tls_extension(made, loop):
    """As that of a request has."""
    settings = {"client_ca": made["authority"].crt, **files(made["localhost"])}
    with Server("tests.apps.sockets:asgi", workers=1, loop=loop, **settings) as server:
        server.wait_ready(1)
        url = f"wss://127.0.0.1:{server.port}/tls"
        with websockets.sync.client.connect(url, ssl=context(made["ann"]), server_hostname="localhost") as ws:
            assert json.loads(ws.recv(DEADLINE)) == told(made, "ann", ws.socket)


def test_plain_connection_has_no_tls_extension():
    """The specification forbids it, even where a proxy says that the client spoke TLS."""
    with Server("tests.apps.asgi:app", workers=1) as server:
        server.wait_ready(1)
        assert json.loads(get(server.port, "/tls", "X-Forwarded-Proto: https").body) is None


# ---- renewal ----


def place(target: Certificate, source: Certificate) -> None:
    for file, new in ((target.crt, source.crt), (target.key, source.key)):
        shutil.copy(new, f"{file}.new")
        os.replace(f"{file}.new", file)


def test_new_connections_get_the_renewed_certificate(made, tmp_path, way):
    """Those that are there go on, workers that come later have it too, and a bad one is told and not taken."""
    served = Certificate(tmp_path / "served.crt", tmp_path / "served.key")
    place(served, made["localhost"])
    with Server("tests.apps.plain:app", workers=1, **way, **files(served)) as server:
        server.wait_ready(1)
        with connect(server.port) as old:
            assert old.get().text == "hello"
            shutil.copy(made["renewed"].crt, served.crt)
            server.wait_for(
                r"error the changed TLS files are not used, what they held before still is: "
                rf"the private key in {served.key} does not belong to the certificate in {served.crt}$"
            )
            with connect(server.port) as same:
                assert shown(same) == der(made["localhost"])
            place(served, made["renewed"])
            server.wait_for("new connections get the renewed TLS certificates")
            wait_until_shown(server.port, made["renewed"])
            assert old.get().text == "hello"
            assert shown(old) == der(made["localhost"])
        with connect(server.port) as client:
            assert client.get("/leave").text == "leaving"
        server.worker(2)
        with connect(server.port) as client:
            assert shown(client) == der(made["renewed"])
        assert server.log.count("the changed TLS files are not used") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_worker_that_may_not_read_the_key_gets_the_renewed_one(made):
    """Keys belong to root; the directory above them, too."""
    folder = Path("/tmp") / f"prefork-{os.getpid()}"
    folder.mkdir(mode=0o700)
    served = Certificate(folder / "served.crt", folder / "served.key")
    try:
        place(served, made["localhost"])
        with Server("tests.apps.plain:app", workers=1, **NOBODY, **files(served)) as server:
            server.wait_ready(1)
            place(served, made["renewed"])
            wait_until_shown(server.port, made["renewed"])
            assert "error" not in server.log
    finally:
        shutil.rmtree(folder)


def wait_until_shown(port: int, certificate: Certificate) -> None:
    """A worker tells nobody when it has taken a certificate: one has to ask again."""
    end = time.monotonic() + DEADLINE
    while True:
        with connect(port) as client:
            if shown(client) == der(certificate):
                return
        assert time.monotonic() < end, "the renewed certificate is not shown"


# ---- greetings ----


@pytest.mark.parametrize(
    "first",
    [GET, b"GET / HTTP/1.1\r\nHost: t\r\n" + b"x: y\r\n" * 10_000, b"G", b"\x80\x2e\x01\x03\x01", b"\0"],
    ids=["a request", "a large head", "a byte", "SSL 2.0", "nonsense"],
)
def test_plain_text_on_a_tls_port_is_answered_with_400(made, way, first):
    """The answer arrives whole, although most of what was sent is never read."""
    with Server("tests.apps.plain:app", workers=1, access_log="-", **way, **files(made["localhost"])) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.send(first)
            answer = client.read()
            assert (answer.status, answer.headers["connection"]) == (400, "close")
            assert answer.text == (
                "this port speaks HTTPS, and what came is not TLS: use a URL that begins with https://\n"
            )
            assert "date" in answer.headers
            assert client.read_to_end() == b""
        server.wait_for(r'Z 127\.0\.0\.1 "- - HTTP/-" 400 \d+ ')
        with connect(server.port) as client:
            assert client.get().text == "hello"
        assert "Traceback" not in server.log


@pytest.mark.parametrize("loop", LOOPS)
def test_client_refused_on_a_tls_port_leaves_the_counters_at_zero(made, loop):
    """What is in flight decides who is given work, and used to be -1."""

    async def nothing(exchange: Exchange) -> None:
        raise AssertionError("no request was read")

    async def test(service: Service, address: Address) -> None:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(GET)
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        slot = service.slot
        await until(lambda: bool(slot.closed), service)
        assert (slot.requests, slot.begun, slot.in_flight, slot.connections) == (1, 1, 0, 0)

    names = files(made["localhost"])
    run_beside_worker(test, nothing, loop=loop, tls=TLS(TLSFiles.named(names["certfile"], names["keyfile"])))


def test_whoever_sends_nothing_is_dropped_at_the_deadline(made, way):
    """Before the first byte as within the handshake."""
    with Server("tests.apps.plain:app", workers=1, head_timeout=1, **way, **files(made["localhost"])) as server:
        server.wait_ready(1)
        with Client(server.port) as silent, Client(server.port) as slow:
            slow.send(b"\x16\x03")
            assert silent.is_closed_by_peer()
            assert slow.is_closed_by_peer()
        with connect(server.port) as client:
            assert client.get().text == "hello"


def test_clients_that_leave_before_they_begin_are_forgotten(made, way):
    """With FIN or with RST; the worker ends at once, since it has nothing to wait for."""
    with Server("tests.apps.plain:app", workers=1, **way, **files(made["localhost"])) as server:
        server.wait_ready(1)
        for linger in (None, struct.pack("ii", 1, 0)):
            for first in (b"", b"\x16", b"\x16\x03\x01", b"G"):
                with Client(server.port) as client:
                    client.send(first)
                    if linger is not None:
                        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        with connect(server.port) as client:
            assert client.get().text == "hello"
    assert not re.search("Traceback|cut off|error", server.log)


# ---- PROXY headers ----

V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 443\r\n"
V2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + socket.inet_aton("192.0.2.7") + socket.inet_aton("198.51.100.1")
V2 += struct.pack("!HH", 4711, 443)


@pytest.mark.parametrize("header", [V1, V2], ids=["version 1", "version 2"])
@pytest.mark.parametrize("is_tls", [False, True], ids=["http", "https"])
def test_proxy_header_comes_before_everything(made, way, header, is_tls):
    """In one piece with what follows, alone, or byte by byte."""
    more = files(made["localhost"]) if is_tls else {}
    with Server("tests.apps.asgi:app", workers=1, proxy_protocol=True, access_log="-", **way, **more) as server:
        server.wait_ready(1)
        for pieces in ([header], [header[:9], header[9:]], [header[i : i + 1] for i in range(len(header))]):
            with Client(server.port) as client:
                client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for piece in pieces:
                    client.send(piece)
                if is_tls:
                    client.socket = context().wrap_socket(client.socket, server_hostname="localhost")
                assert client.get().text == "hello"
        if not is_tls:
            with Client(server.port) as client:
                client.send(header + GET)
                assert client.read().text == "hello"
        server.wait_for(r'Z 192\.0\.2\.7 "GET / HTTP/1\.1" 200 ', 3)


@pytest.mark.parametrize("is_tls", [False, True], ids=["http", "https"])
def test_connection_without_a_proxy_header_is_closed(made, way, is_tls):
    """One who comes past the proxy could be anybody."""
    more = files(made["localhost"]) if is_tls else {}
    with Server("tests.apps.plain:app", workers=1, proxy_protocol=True, head_timeout=1, **way, **more) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.send(GET)
            assert client.is_closed_by_peer()
        server.wait_for(r"warning closed a connection of 127\.0\.0\.1 port \d+: the connection begins with 'GET")
        with Client(server.port) as slow:
            slow.send(V1[:-1])
            assert slow.is_closed_by_peer()


def test_proxy_header_of_a_stranger_is_not_read(way):
    """Whoever may say who the client is, is a matter of the settings."""
    settings = {"proxy_protocol": True, "proxy_allow_ips": "192.0.2.0/24"}
    with Server("tests.apps.plain:app", workers=1, **settings, **way) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.send(V1 + GET)
            assert client.is_closed_by_peer()
        server.wait_for(r"warning closed a connection of 127\.0\.0\.1 port \d+, who is not among those that send PROXY")


def test_plain_text_behind_a_proxy_header_is_answered_with_400(made, way):
    """The line in the log names the client, not the proxy."""
    settings = {"proxy_protocol": True, **files(made["localhost"])}
    with Server("tests.apps.plain:app", workers=1, **settings, **way) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.send(V1 + GET)
            assert client.read().status == 400
        server.wait_for(r"refused a client of 192\.0\.2\.7 port 4711 with 400: it did not speak TLS")
