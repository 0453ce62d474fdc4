"""Looking at the first bytes of a connection without taking them.

A client may be slow, or say nothing at all: each is waited for by the reactor, for a
bounded time, and nothing is ever taken from the socket. A head that has begun leaves its
socket readable, so it is not waited for by poll but looked at again after a while.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from prefork.cluster.picks import Offer, Pick
from prefork.cluster.reactor import Reactor, Timer

# For a client to send what the pick wants to see, in seconds. Then it is placed by what there is.
PATIENCE = 2.0

# More of a head is not looked at, in bytes: half of what --limit-head allows.
MOST_SEEN = 16 * 1024

# Connections of one listener that are being looked at. Beyond it the backlog holds the clients.
MOST_PEEKED = 256

# While so many are being looked at, silent clients must not keep out the others: each then gets
# only this long, in seconds, which is a round trip to nearly everywhere.
SHORT_PATIENCE = 0.1

# From one look at a head that has begun to the next, in seconds; doubled while nothing more comes.
FIRST_LOOK, LAST_LOOK = 0.005, 0.1


class Peeks:
    """The connections of one listener whose heads have not come."""

    def __init__(
        self, reactor: Reactor, pick: Pick, kind: tuple[int, int, int], on_seen: Callable[[Offer], None]
    ) -> None:
        """*kind*: the sockets' family, type and protocol. *on_seen* is called with each offer, its head filled in, or with one that has ended."""
        self.reactor = reactor
        self.pick = pick
        self.kind = kind
        self._on_seen = on_seen
        self._peeks: dict[Peek, None] = {}  # in the order of their coming
        self._relief: Timer | None = None

    @property
    def room(self) -> int:
        return MOST_PEEKED - len(self._peeks)

    def add(self, offer: Offer) -> bool:
        """True if there is enough of its head already. Otherwise it is ours until *on_seen* is called."""
        peek = Peek(self, offer)
        if peek.look():
            peek.sock.detach()
            return True
        self._peeks[peek] = None
        peek.begin()
        if not self.room and self._relief is None:
            self._relief = self.reactor.call_later(SHORT_PATIENCE, self._relieve)
        return False

    def finish(self, peek: Peek) -> None:
        del self._peeks[peek]
        peek.end()
        self._on_seen(peek.offer)

    def close(self) -> list[Offer]:
        """Give all of them up; the caller closes them."""
        offers = [peek.offer for peek in self._peeks]
        for peek in self._peeks:
            peek.end()
        self._peeks.clear()
        if self._relief is not None:
            self._relief.cancel()
        return offers

    def _relieve(self) -> None:
        """There was no room, for a moment at least: those that were here then have had their time."""
        self._relief = None
        for peek in list(self._peeks):
            if peek.since + SHORT_PATIENCE <= self.reactor.now():
                self.finish(peek)


class Peek:
    """One connection, as a source of the reactor."""

    is_steady = False
    wants_write = False

    def __init__(self, peeks: Peeks, offer: Offer) -> None:
        self.offer = offer
        self.since = peeks.reactor.now()
        # Not its owner: detached at the end.
        self.sock = socket.SocketType(*peeks.kind, offer.descriptor)
        self._peeks = peeks
        self._again: Timer | None = None
        self._interval = FIRST_LOOK
        self._is_silent = True  # nothing has come

    def fileno(self) -> int:
        return self.offer.descriptor

    @property
    def wants_read(self) -> bool:
        return self._is_silent

    def begin(self) -> None:
        reactor = self._peeks.reactor
        reactor.add(self)
        self._deadline = reactor.call_later(PATIENCE, lambda: self._peeks.finish(self))
        self._plan_next()

    def end(self) -> None:
        self._peeks.reactor.remove(self)
        self._deadline.cancel()
        if self._again is not None:
            self._again.cancel()
        self.sock.detach()

    def look(self) -> bool:
        """Whether no further look is needed."""
        try:
            head = self.sock.recv(MOST_SEEN, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            head = b""
        self._interval = FIRST_LOOK if len(head) > len(self.offer.head) else min(2 * self._interval, LAST_LOOK)
        self._is_silent = False
        self.offer.head = head
        self.offer.is_gone = not head
        return not head or len(head) >= MOST_SEEN or self._peeks.pick.has_seen_enough(head)

    def on_readable(self) -> None:
        if self.look():
            self._peeks.finish(self)
        else:
            self._plan_next()

    def on_writable(self) -> None:
        raise AssertionError("it is only looked at")

    def _plan_next(self) -> None:
        if not self._is_silent:
            self._again = self._peeks.reactor.call_later(self._interval, self.on_readable)
