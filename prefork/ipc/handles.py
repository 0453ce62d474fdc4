"""A user's handle on its way: from an object to a descriptor, and back to an object elsewhere.

The receiver finds out by itself what a descriptor is, from fstat(2) and fcntl(2): nothing that the
sender could say about it would be more reliable, or spare a call.
"""

from __future__ import annotations

import fcntl
import io
import os
import socket
import ssl
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_FILE_MODES = {os.O_RDONLY: "rb", os.O_WRONLY: "wb", os.O_RDWR: "r+b"}


class HandedSocket(socket.socket):
    """A socket that came from another process, with what that process had already read from it."""

    __slots__ = ("received",)

    def __init__(self, *args: Any, received: bytes = b"", **named: Any) -> None:
        super().__init__(*args, **named)
        self.received = received  # comes before what can still be read


class HandedDescriptor(io.RawIOBase):
    """A descriptor that came from another process and is neither a socket nor a file to read or write: a directory."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        if self.closed:
            raise ValueError("the descriptor was closed")
        return self._fd

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._fd)


Handle = HandedSocket | io.FileIO | HandedDescriptor


def revive(fd: int, received: bytes = b"") -> Handle:
    """The object for a descriptor that arrived, which it owns from here on."""
    with suppress(OSError):  # no socket, or no file, after all: of a kind that Python knows nothing about
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            return _revive_socket(fd, received)
        return io.FileIO(fd, _FILE_MODES.get(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE, "r+b"))
    return HandedDescriptor(fd)


def _revive_socket(fd: int, received: bytes) -> HandedSocket:
    handed = HandedSocket(fileno=fd, received=received)
    # The flag came along with the open file description, and the object would not know of it.
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK:
        handed.setblocking(False)
    return handed


class Parcel:
    """A handle that is about to be sent. Until `let_go` the object is still the caller's."""

    __slots__ = ("_let_go", "fd", "is_copy")

    def __init__(self, fd: int, is_copy: bool, let_go: Callable[[], object]) -> None:
        self.fd = fd
        self.is_copy = is_copy  # ours already, whatever happens
        self._let_go = let_go

    def let_go(self) -> None:
        """The object has lost its descriptor, or never had one of its own."""
        with suppress(OSError):  # it was flushed; what close(2) says now changes nothing
            self._let_go()


def pack(handle: object, *, keep: bool) -> Parcel:
    """Get *handle* ready. Raises TypeError for what cannot travel, OSError or ValueError if it is not open.

    Without *keep* a socket's own descriptor travels, which takes no other: who has none left may
    still hand sockets over.
    """
    if isinstance(handle, ssl.SSLSocket):
        raise TypeError("a TLS socket cannot be handed over: its keys would stay in this process")
    if isinstance(handle, int) and not isinstance(handle, bool):
        os.fstat(handle)
        return Parcel(os.dup(handle), True, _nothing) if keep else Parcel(handle, False, _nothing)
    fileno = getattr(handle, "fileno", None)
    if fileno is None:
        raise TypeError(f"a handle is a socket, a file or a descriptor's number, not {type(handle).__name__}")
    if isinstance(handle, socket.socket) and not keep:
        os.fstat(handle.fileno())
        return Parcel(handle.fileno(), False, handle.detach)
    close = _nothing if keep else getattr(handle, "close", None)
    if close is None:
        raise TypeError(f"a {type(handle).__name__} cannot be moved, for it has no close(): send it with keep=True")
    if isinstance(handle, io.IOBase):
        handle.flush()
    return Parcel(os.dup(fileno()), True, close)


def _nothing() -> None:
    pass
