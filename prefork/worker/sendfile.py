"""A range of a file to a client by sendfile(2): from the page cache to the socket, past the interpreter.

A `Transfer` borrows the socket of a live transport. First the transport has to have
nothing left to write, and until the transfer ends nobody else may write; reading goes on
as ever. What sendfile does not do (TLS, some file systems) is read and written
piece by piece, with the same result.

Waiting for room in the socket needs a poll of our own, since an event loop refuses to watch a
descriptor that one of its transports owns: `Sockets`, one epoll set per worker, is itself
watched by the loop. No descriptor is duplicated, so closing the transport closes the connection.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import struct
import termios
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from prefork.errors import ClientDisconnected, ResponseError
from prefork.gateway.file import NOWAIT, read_cached

# Bytes handed to the kernel before other connections get their turn: some 100 us of work.
TURN = 1024 * 1024

# Bytes read at a time where sendfile is of no use: what fits the caches, and a transport's high-water mark.
PIECE = 128 * 1024

# What sendfile answers when the pair of descriptors is beyond it, rather than broken.
UNABLE: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSOCK, errno.EOVERFLOW})

_GONE: Final = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError)


class Sockets:
    """Tells when there is room in the sockets of transports. One per worker."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._waiters: dict[int, asyncio.Future[None]] = {}
        self._registered: set[int] = set()
        loop.add_reader(self._epoll.fileno(), self._wake)

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    async def wait_writable(self, descriptor: int) -> None:
        """Until *descriptor* has room or is broken. `forget` it before it is closed."""
        mask = select.EPOLLOUT | select.EPOLLONESHOT
        if descriptor in self._registered:
            self._epoll.modify(descriptor, mask)
        else:
            self._epoll.register(descriptor, mask)
            self._registered.add(descriptor)
        waiter = self._waiters[descriptor] = self._loop.create_future()
        try:
            await waiter
        finally:
            del self._waiters[descriptor]

    def forget(self, descriptor: int) -> None:
        """Watch *descriptor* no more; whoever waits for it goes on."""
        if descriptor in self._registered:
            self._registered.discard(descriptor)
            with suppress(OSError):  # closed already
                self._epoll.unregister(descriptor)
        self._resolve(descriptor)

    def _wake(self) -> None:
        for descriptor, _ in self._epoll.poll(0):
            self._resolve(descriptor)

    def _resolve(self, descriptor: int) -> None:
        waiter = self._waiters.get(descriptor)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Transfer:
    """One range of one file, on its way to one client."""

    __slots__ = ("_count", "_descriptor", "_drain", "_is_over", "_sockets", "_transport", "sent")

    def __init__(
        self, transport: asyncio.WriteTransport, sockets: Sockets, drain: Callable[[], Awaitable[None]], count: int
    ) -> None:
        """Of *count* bytes. *drain* waits until the transport's protocol may write again; ClientDisconnected if it never will."""
        self._count = count
        self.sent = 0  # bytes the kernel, or the transport, has accepted
        self._transport = transport
        self._sockets = sockets
        self._drain = drain
        self._is_over = False
        # A TLS transport has a socket too, which would take plain text for what is owed in cipher.
        is_plain = transport.get_extra_info("sslcontext") is None
        self._descriptor: int = transport.get_extra_info("socket").fileno() if is_plain else -1

    async def run(self, file: int, offset: int) -> None:
        """Send what the descriptor *file* has from *offset*; its position stays as it is.

        Raises ResponseError if the file ends before, ClientDisconnected if the client
        goes away, OSError if the file cannot be read. However it is left but by returning, by
        cancellation too, the client has part of a message: the connection must be aborted.
        """
        try:
            if self._descriptor >= 0:
                await self._empty()
                await self._send(file, offset)
            if self.sent < self._count:
                await self._copy(file, offset)
        finally:
            self.stop()

    def stop(self) -> None:
        """The connection is lost, or all is sent. Must come before its socket is closed: numbers are used again."""
        if not self._is_over and self._descriptor >= 0:
            self._sockets.forget(self._descriptor)
        self._is_over = True

    @property
    def missing(self) -> int:
        """Bytes the client has not confirmed yet: shrinks while it takes anything at all.

        *sent* stands still for long with a slow client: the kernel tells that there is room
        when a third of the socket's buffer is free, and that may be megabytes.
        """
        missing = self._count - self.sent + self._transport.get_write_buffer_size()
        if self._descriptor >= 0 and not self._is_over:
            missing += unacknowledged(self._descriptor)
        return missing

    # ---- the socket ----

    async def _empty(self) -> None:
        """What was written before leaves first."""
        if not self._transport.get_write_buffer_size():
            return
        # With a mark of nought `resume_writing` comes when there is nothing left.
        self._transport.set_write_buffer_limits(high=0)
        try:
            await self._drain()
        finally:
            self._transport.set_write_buffer_limits()

    async def _send(self, file: int, offset: int) -> None:
        """As much of the range as sendfile takes: all of it, or nothing."""
        count = self._count
        while self.sent < count:
            at = offset + self.sent
            size = min(TURN, count - self.sent)
            if not _is_cached(file, at, size):
                await asyncio.get_running_loop().run_in_executor(None, os.pread, file, size, at)
            self._check()
            try:
                done = os.sendfile(self._descriptor, file, at, size)
            except BlockingIOError:
                await self._sockets.wait_writable(self._descriptor)
                continue
            except _GONE as exc:
                raise _gone() from exc
            except OSError as exc:
                if exc.errno in UNABLE and not self.sent:
                    return
                raise
            if not done:
                raise _cut(count - self.sent)
            self.sent += done
            if done == TURN:
                await asyncio.sleep(0)

    # ---- piece by piece ----

    async def _copy(self, file: int, offset: int) -> None:
        while self.sent < self._count:
            at = offset + self.sent
            size = min(PIECE, self._count - self.sent)
            data = read_cached(file, size, at)
            if data is None:
                data = await asyncio.get_running_loop().run_in_executor(None, os.pread, file, size, at)
            self._check()
            if not data:
                raise _cut(self._count - self.sent)
            self._transport.write(data)
            self.sent += len(data)
            await self._drain()
            await asyncio.sleep(0)  # a fast client never makes `drain` wait

    def _check(self) -> None:
        if self._is_over or self._transport.is_closing():
            raise _gone()


def unacknowledged(descriptor: int) -> int:
    """Bytes in the socket's buffer that the peer has not confirmed; 0 where that cannot be told (tcp(7), SIOCOUTQ)."""
    with suppress(OSError):
        return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0\0\0\0"))[0])
    return 0


def _is_cached(file: int, offset: int, size: int) -> bool:
    """False if sendfile would wait for a disk, and the whole loop with it. Looks at both ends only."""
    if not NOWAIT:
        return True
    byte = bytearray(1)
    try:
        for at in (offset, offset + size - 1):
            os.preadv(file, [byte], at, NOWAIT)
    except OSError:  # EAGAIN; or the file system cannot say, as those behind a network
        return False
    return True


def _cut(missing: int) -> ResponseError:
    return ResponseError(f"the file is shorter than was announced: {missing} bytes are missing")


def _gone() -> ClientDisconnected:
    return ClientDisconnected("the client went away before its response was complete")
