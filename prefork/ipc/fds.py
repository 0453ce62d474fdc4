"""Descriptors across a unix socket, and `Fds`, which owns those that arrived.

All calls are non-blocking whatever the socket's flag says, because another process may share the
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

# Plain integers: the operators of an enum's members cost more than the system call.
SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_RECEIVE_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_CTRUNC = int(socket.MSG_CTRUNC)

Buffer = bytes | bytearray | memoryview


def send(sock: socket.socket, pieces: Sequence[Buffer], fds: Sequence[int] = ()) -> int:
    """Send what the kernel takes of *pieces* and say how much, which is at least one byte.

    *fds* ride with the first byte. Once it is taken the message in flight holds its own references
    and ours may be closed. Raises BlockingIOError if nothing was taken.
    """
    if fds:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        return sock.sendmsg(pieces, ancillary, SEND_FLAGS)
    if len(pieces) == 1:
        return sock.send(pieces[0], SEND_FLAGS)
    return sock.sendmsg(pieces, (), SEND_FLAGS)


def receive(sock: socket.socket, size: int) -> tuple[bytes, Sequence[int], bool]:
    """At most *size* bytes, b"" at the end, with the descriptors that rode on them (close-on-exec).

    The third is true if descriptors were lost: our own table of descriptors is full, says unix(7),
    or more came than `MAX_FDS`. None of them is returned then. Raises BlockingIOError if there is
    nothing to read.
    """
    data, ancillary, came, _ = sock.recvmsg(size, _ANCILLARY_SIZE, _RECEIVE_FLAGS)
    if not ancillary and not came & _CTRUNC:
        return data, (), False
    return data, *_descriptors(ancillary, came)


def receive_into(sock: socket.socket, room: memoryview) -> tuple[int, Sequence[int], bool]:
    """The same into *room*; how many bytes they were, 0 at the end."""
    count, ancillary, came, _ = sock.recvmsg_into((room,), _ANCILLARY_SIZE, _RECEIVE_FLAGS)
    if not ancillary and not came & _CTRUNC:
        return count, (), False
    return count, *_descriptors(ancillary, came)


def _descriptors(ancillary: list[tuple[int, int, bytes]], came: int) -> tuple[Sequence[int], bool]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % _INT_SIZE])  # a truncated one may end anywhere
    if came & _CTRUNC:
        close_all(fds)  # the others without those that are lost would go to the wrong frame
        return (), True
    return fds.tolist(), False


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


# What a message without descriptors owns. Empty for ever, so one is enough for all.
NO_FDS = Fds()
