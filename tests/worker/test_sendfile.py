"""Files by sendfile over live transports of both event loops: real sockets, real files, clients of every kind."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Self, cast

import pytest

from prefork.errors import ClientDisconnected, ResponseError
from prefork.worker.loop import loop_factory
from prefork.worker.sendfile import Sockets, Transfer, _is_cached
from tests.harness.certificates import make_certificate
from tests.harness.descriptors import no_descriptor_leaks  # noqa: F401  (a fixture)

DEADLINE = 20.0  # seconds
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
SIZE = 12_000_000  # bytes; more than the buffers of two sockets hold


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Run a coroutine in a loop of the kind."""
    with asyncio.Runner(loop_factory=loop_factory(request.param)) as runner:
        unhandled: list[object] = []
        runner.get_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        yield lambda coroutine: runner.run(asyncio.wait_for(coroutine, DEADLINE))
        assert not unhandled


@pytest.fixture(scope="module", autouse=True)
def one_loop_before() -> None:
    """libuv opens a pipe for signals with the first loop of a process, and keeps it."""
    loop_factory("uvloop")().close()


@pytest.fixture(scope="module")
def content() -> bytes:
    """Bytes of which no two places look alike."""
    return b"".join(struct.pack("<I", number) for number in range(SIZE // 4))


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("r+b") as opened:
        yield opened.fileno()


class Protocol(asyncio.Protocol):
    """The server's end of one connection, with what a transfer asks of it."""

    def __init__(self, sockets: Sockets) -> None:
        self.sockets = sockets
        self.received = b""
        self.made = asyncio.Event()
        self.heard = asyncio.Event()
        self.lost = asyncio.Event()
        self.transfer: Transfer | None = None
        self._drained: asyncio.Event = asyncio.Event()
        self._drained.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.made.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        self._drained.set()
        if self.transfer is not None:
            self.transfer.stop()

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.heard.set()

    def eof_received(self) -> bool:
        return self.transport.get_extra_info("sslcontext") is None

    def pause_writing(self) -> None:
        self._drained.clear()

    def resume_writing(self) -> None:
        self._drained.set()

    async def drain(self) -> None:
        await self._drained.wait()
        if self.lost.is_set():
            raise ClientDisconnected("gone")

    async def send(self, head: bytes, file: int, offset: int, count: int) -> None:
        """As the worker does it: what fails cuts the connection."""
        self.transport.write(head)
        self.transfer = Transfer(self.transport, self.sockets, self.drain, count)
        try:
            await self.transfer.run(file, offset)
        except BaseException:
            self.transport.abort()
            raise


class WatchedSockets(Sockets):
    """Tells when a transfer has to wait, since the buffers of both ends are full."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.full = asyncio.Event()

    async def wait_writable(self, descriptor: int) -> None:
        self.full.set()
        await super().wait_writable(descriptor)


class Connection:
    """Both ends of a connection: `server` is a Protocol, `client` a socket that does not block."""

    def __init__(self, sockets: WatchedSockets) -> None:
        self.sockets = sockets

    async def __aenter__(self) -> Self:
        listening = socket.create_server(("127.0.0.1", 0))
        # Small, so that little is in flight when a client does not read. Inherited by what it accepts.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 * 1024)
        self.client = socket.socket()
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        self.client.connect(listening.getsockname())
        self.client.setblocking(False)
        accepted, _ = listening.accept()
        listening.close()
        accepted.setblocking(False)
        loop = asyncio.get_running_loop()
        self.server = Protocol(self.sockets)
        await loop.connect_accepted_socket(lambda: self.server, accepted)
        await self.server.made.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.client.close()
        self.server.transport.abort()
        await self.server.lost.wait()
        await asyncio.sleep(0)  # the socket is closed after connection_lost

    async def read(self, size: int) -> bytes:
        """Exactly *size* bytes, or fewer if the connection ends."""
        received = bytearray()
        while len(received) < size:
            data = await asyncio.get_running_loop().sock_recv(self.client, min(size - len(received), 1 << 20))
            if not data:
                break
            received += data
        return bytes(received)

    def vanish(self) -> None:
        """The client is gone at once: its kernel answers with RST."""
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.close()


async def with_connection(test: Callable[[Connection], Awaitable[None]], context: ssl.SSLContext | None = None) -> None:
    sockets = WatchedSockets(asyncio.get_running_loop())
    try:
        async with Connection(sockets) as connection:
            await test(connection)
        assert not sockets._registered
        assert not sockets._waiters
    finally:
        sockets.close()


def start(connection: Connection, file: int, count: int = SIZE, head: bytes = HEAD) -> asyncio.Task[None]:
    return asyncio.ensure_future(connection.server.send(head, file, 0, count))


async def start_and_stand_still(connection: Connection, file: int) -> tuple[asyncio.Task[None], Transfer]:
    """A transfer in the middle of *file*, which goes on only when the client takes something."""
    sending = start(connection, file)
    await connection.sockets.full.wait()
    assert connection.server.transfer is not None
    return sending, connection.server.transfer


def test_file_follows_its_head(run, file, content):
    """Every byte, once and in order."""

    async def test(connection: Connection) -> None:
        sending = start(connection, file)
        assert await connection.read(len(HEAD) + SIZE) == HEAD + content
        await sending

    run(with_connection(test))


@pytest.mark.parametrize(("offset", "count"), [(0, 1), (1, 3), (5_000_001, 2_000_003), (SIZE - 1, 1)])
def test_range_is_sent_and_the_file_stays_where_it_was(run, file, content, offset, count):
    """The descriptor may be shared by requests, so its position is nobody's."""

    async def test(connection: Connection) -> None:
        os.lseek(file, 7, os.SEEK_SET)
        sending = asyncio.ensure_future(connection.server.send(HEAD, file, offset, count))
        assert await connection.read(len(HEAD) + count) == HEAD + content[offset : offset + count]
        await sending
        assert os.lseek(file, 0, os.SEEK_CUR) == 7

    run(with_connection(test))


def test_what_was_written_before_leaves_first(run, file, content):
    """The transport may still hold megabytes when the file's turn comes."""

    async def test(connection: Connection) -> None:
        before = b"b" * 5_000_000
        connection.server.transport.write(before)
        assert connection.server.transport.get_write_buffer_size()
        sending = start(connection, file, 1000)
        assert await connection.read(len(before)) == before
        assert await connection.read(len(HEAD) + 1000) == HEAD + content[:1000]
        await sending
        connection.server.transport.write(b"after")
        assert await connection.read(5) == b"after"

    run(with_connection(test))


def test_reading_goes_on_meanwhile(run, file):
    """Pipelined requests arrive, and so does the news that the client is gone."""

    async def test(connection: Connection) -> None:
        sending, _ = await start_and_stand_still(connection, file)
        await asyncio.get_running_loop().sock_sendall(connection.client, b"next")
        await connection.server.heard.wait()
        assert connection.server.received == b"next"
        assert not sending.done()
        await connection.read(len(HEAD) + SIZE)
        await sending

    run(with_connection(test))


def test_progress_is_seen_as_soon_as_the_client_takes_something(run, file):
    """The write deadline lives on it: a slow client is not a stalled one."""

    async def test(connection: Connection) -> None:
        sending, transfer = await start_and_stand_still(connection, file)
        missing = transfer.missing
        assert SIZE - transfer.sent < missing <= SIZE
        left = len(HEAD) + SIZE
        while transfer.missing == missing:
            left -= len(await connection.read(20_000))
        assert len(await connection.read(left)) == left
        await sending

    run(with_connection(test))


@pytest.mark.parametrize("is_reading", [True, False], ids=["reading", "not reading"])
def test_client_that_vanishes_ends_the_transfer(run, file, is_reading):
    """By the transport's news, or by our own poll where the transport does not read."""

    async def test(connection: Connection) -> None:
        if not is_reading:
            connection.server.transport.pause_reading()
        sending = start(connection, file)
        await connection.read(100_000)
        connection.vanish()
        with pytest.raises(ClientDisconnected):
            await sending
        await connection.server.lost.wait()

    run(with_connection(test))


def test_client_that_sends_nothing_more_is_served(run, file, content):
    """Half-closed: it reads on."""

    async def test(connection: Connection) -> None:
        sending = start(connection, file)
        connection.client.shutdown(socket.SHUT_WR)
        assert await connection.read(len(HEAD) + SIZE) == HEAD + content
        await sending

    run(with_connection(test))


def test_abort_ends_the_transfer_and_the_connection(run, file):
    """The write deadline, or the end of a drain: nothing of ours may keep the socket open."""

    async def test(connection: Connection) -> None:
        sending, _ = await start_and_stand_still(connection, file)
        connection.server.transport.abort()
        with pytest.raises(ClientDisconnected):
            await sending
        assert len(await connection.read(SIZE + 1000)) < SIZE

    run(with_connection(test))


def test_cancelled_transfer_leaves_nothing_behind(run, file):
    """The application's own timeout around a send."""

    async def test(connection: Connection) -> None:
        sending, _ = await start_and_stand_still(connection, file)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await connection.server.lost.wait()

    run(with_connection(test))


def test_file_that_has_shrunk_is_an_error(run, file):
    """The length was announced; a short body must not pass for a whole one."""

    async def test(connection: Connection) -> None:
        sending, _ = await start_and_stand_still(connection, file)
        os.ftruncate(file, 6_000_000)
        received = await connection.read(SIZE)
        with pytest.raises(ResponseError, match="6000000 bytes are missing"):
            await sending
        assert len(received) <= len(HEAD) + 6_000_000

    run(with_connection(test))


def test_one_stalled_client_holds_up_nobody(run, file, content):
    """Twenty downloads side by side, and one that is not taken."""

    async def test(stalled: Connection) -> None:
        sending = start(stalled, file)

        async def download() -> bytes:
            async with Connection(stalled.sockets) as connection:
                task = start(connection, file, 2_000_000)
                received = await connection.read(len(HEAD) + 2_000_000)
                await task
                return received

        assert set(await asyncio.gather(*(download() for _ in range(20)))) == {HEAD + content[:2_000_000]}
        assert not sending.done()
        stalled.vanish()
        with pytest.raises(ClientDisconnected):
            await sending

    run(with_connection(test))


def test_default_timeout_of_sockets_changes_nothing(run, file, content):
    """An application may call socket.setdefaulttimeout for its own clients."""

    async def test(connection: Connection) -> None:
        socket.setdefaulttimeout(5)
        try:
            sending = start(connection, file)
            assert await connection.read(len(HEAD) + SIZE) == HEAD + content
            await sending
        finally:
            socket.setdefaulttimeout(None)

    run(with_connection(test))


def test_file_that_sendfile_refuses_is_read(run):
    """As those of /proc."""

    async def test(connection: Connection) -> None:
        file = os.open("/proc/self/maps", os.O_RDONLY)
        try:
            expected = os.pread(file, 300, 0)
            with pytest.raises(OSError):
                os.sendfile(connection.client.fileno(), file, 0, 1)
            sending = start(connection, file, 300)
            assert await connection.read(len(HEAD) + 300) == HEAD + expected
            await sending
        finally:
            os.close(file)

    run(with_connection(test))


def test_descriptor_that_cannot_be_read_is_the_callers_error(run, tmp_path):
    """The application passed one that is open for writing only."""

    async def test(connection: Connection) -> None:
        file = os.open(tmp_path / "new", os.O_WRONLY | os.O_CREAT)
        try:
            with pytest.raises(OSError):
                await connection.server.send(HEAD, file, 0, 100)
        finally:
            os.close(file)

    run(with_connection(test))


def test_file_not_in_memory_is_read_in_a_thread_first(run, file, content):
    """sendfile would wait for the disk, and every connection of the worker with it."""
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    if _is_cached(file, SIZE // 2, 1):
        pytest.skip("this file system does not forget, or does not tell")

    async def test(connection: Connection) -> None:
        sending = start(connection, file)
        assert await connection.read(len(HEAD) + SIZE) == HEAD + content
        await sending

    run(with_connection(test))


# ---- TLS ----


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and a client's."""
    certificate = make_certificate(tmp_path_factory.mktemp("tls"), "localhost")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate.crt, certificate.key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    return server, client


def tls_client(port: int, context: ssl.SSLContext, size: int, received: list[bytes]) -> None:
    """Read *size* bytes, or to the end."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as plain, context.wrap_socket(plain) as stream:
        data = bytearray()
        while len(data) < size and (piece := stream.recv(1 << 16)):
            data += piece
        received.append(bytes(data))


@pytest.mark.parametrize("is_cut", [False, True])
def test_tls_encrypts_what_it_reads(run, file, content, contexts, is_cut):
    """sendfile would put plain text on the wire."""
    count = 3_000_000
    size = len(HEAD) + count
    if is_cut:
        size = 100_000
    received: list[bytes] = []

    async def test() -> None:
        loop = asyncio.get_running_loop()
        sockets = Sockets(loop)
        made: asyncio.Queue[Protocol] = asyncio.Queue()

        class Announcing(Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                made.put_nowait(self)

        server = await loop.create_server(lambda: Announcing(sockets), "127.0.0.1", 0, ssl=contexts[0])
        port = server.sockets[0].getsockname()[1]
        thread = threading.Thread(target=tls_client, args=(port, contexts[1], size, received))
        thread.start()
        protocol = await made.get()
        if is_cut:
            with pytest.raises(ClientDisconnected):
                await protocol.send(HEAD, file, 0, SIZE)
        else:
            await protocol.send(HEAD, file, 0, count)
            protocol.transport.close()
        await protocol.lost.wait()
        server.close()
        await server.wait_closed()
        await asyncio.to_thread(thread.join)
        sockets.close()

    run(test())
    assert received[0][:size] == (HEAD + content)[:size]
