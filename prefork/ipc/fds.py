"""Descriptors across a unix socket, and `Fds`, which owns those that arrived.

Both calls are non-blocking whatever the socket's flag says, because another process may share the
open file description and with it the flag. Plain recv(2) must never touch such a socket: it
discards descriptors in silence. So does `socket.recv_fds`, which ignores the flags it is given and
leaves descriptors open across exec(2).
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from prefork.errors import FrameError
from prefork.ipc.frames import MAX_FDS

_INT_SIZE = array.array("i").itemsize
_ANCILLARY_SIZE = socket.CMSG_SPACE(MAX_FDS * _INT_SIZE)


def send(sock: socket.socket, data: bytes | memoryview, fds: Sequence[int] = ()) -> int:
    """Send what the kernel takes of *data* and say how much, which is at least one byte.

    *fds* ride with the first byte. Once it is taken the message in flight holds its own references
    and ours may be closed. Raises BlockingIOError if nothing was taken.
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    return sock.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """At most *size* bytes, b"" at the end, with the descriptors that rode on them (close-on-exec).

    Raises BlockingIOError if there is nothing to read, and FrameError if descriptors were lost.
    """
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    data, ancillary, came, _ = sock.recvmsg(size, _ANCILLARY_SIZE, flags)
    fds = _descriptors(ancillary)
    if came & socket.MSG_CTRUNC:
        close_all(fds)
        # unix(7): also what the kernel says when our own table of descriptors is full.
        raise FrameError(f"descriptors were lost: only {len(fds)} came through, of at most {MAX_FDS}")
    return data, fds


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % _INT_SIZE])  # a truncated one may end anywhere
    return fds.tolist()


def close_all(fds: Iterable[int]) -> None:
    """Close each of *fds*."""
    for fd in fds:
        with suppress(OSError):  # close(2) frees the descriptor even where it reports an error
            os.close(fd)


class Fds:
    """The descriptors of one message. Whoever takes one owns it; `close` closes the rest."""

    __slots__ = ("_count", "_fds")

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds = deque(fds)
        self._count = len(self._fds)

    def __len__(self) -> int:
        return len(self._fds)

    def take(self) -> int:
        """The next descriptor, in the order in which they were sent. Raises FrameError if none is left."""
        if not self._fds:
            raise FrameError(f"the message came with {self._count} descriptors and none is left")
        return self._fds.popleft()

    def take_socket(self) -> socket.socket:
        """The next descriptor as a socket. Raises FrameError if it is none, and keeps it then."""
        fd = self.take()
        try:
            return socket.socket(fileno=fd)
        except OSError as exc:
            self._fds.appendleft(fd)
            raise FrameError(f"descriptor {fd} is not a socket") from exc

    def close(self) -> None:
        """Close what nobody took. May be called again."""
        while self._fds:
            close_all([self._fds.popleft()])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
