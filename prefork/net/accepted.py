"""Accepting connections, at half the price of `socket.accept`.

That makes its socket from enums, event loops read them again, and everybody asks the
kernel anew for the addresses that accept(2) and the listening socket have told: together
a tenth of all that a short connection costs.
"""

from __future__ import annotations

import socket
from typing import Any

WILDCARDS = ("0.0.0.0", "::")

# Stands for a client whose address cannot be told any more. Not for one on a unix socket, whom many trust.
NOBODY = ("0.0.0.0", 0)


class Accepted(socket.socket):
    """A connection that was accepted, not blocking. *peer* and *local* are its two addresses, as the kernel names them."""

    __slots__ = ("local", "peer")

    # As numbers: socket.socket makes an enum of them each time.
    family = socket.SocketType.family  # type: ignore[assignment]
    type = socket.SocketType.type  # type: ignore[assignment]

    peer: Any  # of a client that left meanwhile, if nobody knew it before: NOBODY, or nothing on a unix socket
    local: Any | None  # None: to be asked for

    @classmethod
    def adopt(cls, connection: socket.socket) -> Accepted:
        """Take over *connection*, which another process has accepted."""
        kind = int(connection.family), int(connection.type), connection.proto
        return cls.take(connection.detach(), kind)

    @classmethod
    def take(cls, descriptor: int, kind: tuple[int, int, int]) -> Accepted:
        """The same, for a descriptor; *kind*: its family, type and protocol."""
        accepted = cls(*kind, descriptor)
        accepted.setblocking(False)
        accepted.local = None
        try:
            accepted.peer = accepted.getpeername()
        except OSError:
            accepted.peer = "" if kind[0] == socket.AF_UNIX else NOBODY
        return accepted


class Acceptor:
    """Accepts from *listening*, which does not block."""

    def __init__(self, listening: socket.socket) -> None:
        self.socket = listening
        self._kind = int(listening.family), int(listening.type), listening.proto
        name = listening.getsockname()
        # A socket that is bound to all addresses has told only the port.
        self._local = None if isinstance(name, tuple) and name[0] in WILDCARDS else name

    def accept(self) -> Accepted:
        """The next connection in the queue. Raises OSError, BlockingIOError if there is none."""
        descriptor, peer = self.socket._accept()  # type: ignore[attr-defined]
        accepted = Accepted(*self._kind, descriptor)
        accepted.setblocking(False)
        accepted.peer = peer
        accepted.local = self._local
        return accepted
