"""A connection that somebody else has accepted, or even read from, is served as any other."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace

import pytest

from prefork.gateway.exchange import Exchange
from prefork.net.forwarded import Trusted
from prefork.worker.server import Server
from prefork.worker.service import Service
from tests.harness.client import DEADLINE
from tests.harness.worker import LOOPS, Address, run_beside_worker, until

WIRE = b"POST /a HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nhelloGET /b HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n"
ANSWERS = [b"/a: hello", b"/b: "]


async def gateway(exchange: Exchange) -> None:
    """Says what was asked."""
    body = b""
    while piece := await exchange.read():
        body += piece
    exchange.start(200, [])
    exchange.send(exchange.request.path + b": " + body, False)


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        return client, listening.accept()[0]


PAIRS = {"tcp": tcp_pair, "unix": socket.socketpair}


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("loop", LOOPS)
def test_what_was_read_before_comes_before_what_the_socket_has(loop, kind, blocking):
    """Cut anywhere: the request is the same, whoever read how much of it."""

    async def test(service: Service, _address: Address) -> None:
        server = Server(service, None)
        for size in range(len(WIRE) + 1):
            client, connection = PAIRS[kind]()
            connection.setblocking(blocking)
            client.sendall(WIRE[size:])
            assert server.adopt(connection, WIRE[:size])
            assert connection.fileno() == -1, "it is the server's now"
            reader, writer = await asyncio.open_connection(sock=client)
            answer = await reader.read()
            assert [part.partition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 ")[1:]] == ANSWERS, size
            writer.close()
            await writer.wait_closed()
        slot = service.slot
        await until(lambda: service.is_idle, service)
        assert (slot.opened, slot.closed, slot.in_flight, slot.load) == (len(WIRE) + 1, len(WIRE) + 1, 0, 0)
        await server.drain(1)

    run_beside_worker(test, gateway, loop=loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_more_than_enough_that_was_read_before_is_not_lost(loop):
    """So many requests at once that reading is paused before the transport has begun to read."""
    requests = 3000

    async def test(service: Service, _address: Address) -> None:
        server = Server(service, None)
        client, connection = tcp_pair()
        assert server.adopt(connection, b"GET /x HTTP/1.1\r\nHost: t\r\n\r\n" * requests)
        reader, writer = await asyncio.open_connection(sock=client)
        for _ in range(requests):
            await reader.readuntil(b"/x: ")
        writer.write(WIRE)
        answer = await reader.read()
        assert answer.count(b"HTTP/1.1 200") == 2
        writer.close()
        await server.drain(1)

    run_beside_worker(test, gateway, loop=loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_who_left_after_what_was_read_is_answered_if_it_still_listens(loop):
    """Half-closed: the end comes behind the bytes that were read, not before them."""

    async def test(service: Service, _address: Address) -> None:
        server = Server(service, None)
        client, connection = tcp_pair()
        client.shutdown(socket.SHUT_WR)
        assert server.adopt(connection, WIRE)
        reader, writer = await asyncio.open_connection(sock=client)
        assert (await reader.read()).count(b"HTTP/1.1 200") == 2
        writer.close()
        await server.drain(1)

    run_beside_worker(test, gateway, loop=loop)


def test_while_draining_nothing_is_adopted():
    """The connection stays the caller's, who may give it to somebody else."""

    async def test(service: Service, _address: Address) -> None:
        server = Server(service, None)
        server.stop_accepting()
        client, connection = tcp_pair()
        with client, connection:
            assert not server.adopt(connection, WIRE)
            assert connection.fileno() >= 0
        await server.drain(1)

    run_beside_worker(test, gateway, loop="asyncio")


@pytest.mark.parametrize("begins", ["TLS", "a PROXY header"])
def test_where_something_comes_before_the_request_nothing_can_have_been_read(begins):
    """Bytes of a handshake cannot be put back, and bytes of a request cannot have come before it."""

    async def test(service: Service, _address: Address) -> None:
        tls = SimpleNamespace(context=None) if begins == "TLS" else None
        server = Server(service, tls, None if tls else Trusted.parse(("*",)))
        client, connection = tcp_pair()
        with client, connection:
            with pytest.raises(
                ValueError, match=f"3 bytes of a connection were read, but connections begin with {begins}"
            ):
                server.adopt(connection, b"GET")
            assert connection.fileno() >= 0
        await server.drain(1)

    run_beside_worker(test, gateway, loop="asyncio")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", PAIRS)
def test_a_descriptor_from_the_master_is_served(loop, kind):
    """One after the other of the same listener, of which only the first is asked what it is."""

    async def test(service: Service, _address: Address) -> None:
        server = Server(service, None)
        for _ in range(3):
            client, connection = PAIRS[kind]()
            server.take_over(connection.detach(), 5)
            reader, writer = await asyncio.open_connection(sock=client)
            writer.write(WIRE)
            async with asyncio.timeout(DEADLINE):
                assert (await reader.read()).count(b"HTTP/1.1 200") == 2
            writer.close()
        await until(lambda: service.is_idle, service)
        assert (service.slot.opened, service.slot.load) == (3, 0)
        await server.drain(1)

    run_beside_worker(test, gateway, loop=loop)
