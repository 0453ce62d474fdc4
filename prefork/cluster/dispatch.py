"""Handoff: the master accepts, and gives each connection to the least loaded worker.

Load is counted without asking anybody: the master knows how many connections it
gave to a slot, the slot's worker writes into the scoreboard how many of them it
has closed. The difference is exact at every instant, also while connections are
still on their way.

The master keeps its copy of a connection until the worker says "accepted". A
worker that dies first, or refuses because it drains, costs the client nothing: the
same connection goes to the next worker.
"""

from __future__ import annotations

import errno
import itertools
import logging
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from prefork.cluster.handles import WorkerHandle
from prefork.errors import ChannelClosed, reason_of
from prefork.ipc.frames import Kind
from prefork.scoreboard import Scoreboard

log = logging.getLogger("prefork")

# Connections given to one worker and not acknowledged. A worker that is slow to take them
# leaves the rest to the kernel's backlog, which is made for waiting; a socket buffer full of
# descriptors is not (net.core.wmem_default holds some hundred messages).
MOST_UNACKNOWLEDGED = 64

# Accepts in one turn of the master, so that a flood of connections does not keep it from its workers.
ACCEPT_BUDGET = 64

# Out of descriptors or memory: try again after this many seconds, as asyncio does.
PAUSE = 1.0
OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class Offer:
    """A connection on its way to a worker."""

    number: int
    connection: socket.socket
    listener: int  # index: the worker wants to know by which door it came


@dataclass(slots=True)
class Candidate:
    """What is counted for one worker."""

    handle: WorkerHandle
    given: int = 0  # connections, since it was forked
    last_turn: int = 0  # when it was last given one: breaks ties in turn
    unacknowledged: dict[int, Offer] = field(default_factory=dict)


class Dispatcher:
    """Gives connections to workers until they are acknowledged."""

    def __init__(self, board: Scoreboard, call_later: _Later) -> None:
        self._board = board
        self._call_later = call_later
        self._candidates: dict[int, Candidate] = {}  # by worker id; only those that listen
        self._leaving: dict[int, Candidate] = {}  # no longer chosen, but offers are still with them
        self._waiting: list[Offer] = []  # taken back while there was nobody to give them to
        self._numbers = 0  # of offers
        self._turns = 0  # connections given, those given again included
        self._is_paused = False  # out of descriptors: the waiting go on waiting

    @property
    def can_take(self) -> bool:
        """Whether there is a worker with room for another connection."""
        return not self._is_paused and any(
            len(c.unacknowledged) < MOST_UNACKNOWLEDGED for c in self._candidates.values()
        )

    def join(self, handle: WorkerHandle) -> None:
        """*handle* listens: it may be chosen from now on."""
        self._candidates[handle.id] = Candidate(handle)
        self._give_waiting()

    def leave(self, handle: WorkerHandle) -> None:
        """*handle* drains: it is chosen no more, what it was given it may still take."""
        candidate = self._candidates.pop(handle.id, None)
        if candidate is not None:
            self._leaving[handle.id] = candidate

    def lose(self, handle: WorkerHandle) -> None:
        """*handle* is dead: what it has not acknowledged goes to others."""
        self.leave(handle)
        candidate = self._leaving.pop(handle.id, None)
        if candidate is not None:
            self._waiting.extend(candidate.unacknowledged.values())
            self._give_waiting()

    def offer(self, connection: socket.socket, listener: int) -> None:
        """Give a newly accepted connection to a worker; ours from now on."""
        self._numbers += 1
        self._waiting.append(Offer(self._numbers, connection, listener))
        self._give_waiting()

    def settle(self, handle: WorkerHandle, number: int, accepted: bool) -> None:
        """The worker's answer to an offer."""
        candidate = self._candidates.get(handle.id) or self._leaving.get(handle.id)
        if candidate is None:
            return
        offer = candidate.unacknowledged.pop(number, None)
        if offer is None:
            return
        if accepted:
            offer.connection.close()
        else:
            candidate.given -= 1
            self._waiting.append(offer)
        self._give_waiting()

    def close(self) -> None:
        """Close our copies of what is not settled: at the end, and in a newly forked child.

        A copy left in a child would keep the connection open after its worker has closed it, and
        the client would wait for the end until that child ends.
        """
        given = (offer for c in self._all_candidates() for offer in c.unacknowledged.values())
        for offer in (*given, *self._waiting):
            offer.connection.close()
        self._waiting.clear()

    def load(self, candidate: Candidate) -> int:
        """Open connections of a worker, those on their way included."""
        return candidate.given - self._board[candidate.handle.slot].closed

    def _all_candidates(self) -> Iterator[Candidate]:
        return itertools.chain(self._candidates.values(), self._leaving.values())

    def _choose(self) -> Candidate | None:
        """The worker with the fewest connections; among equals the one whose turn is longest ago."""
        free = [c for c in self._candidates.values() if len(c.unacknowledged) < MOST_UNACKNOWLEDGED]
        return min(free, key=lambda c: (self.load(c), c.last_turn), default=None)

    def _give_waiting(self) -> None:
        while self._waiting and not self._is_paused:
            candidate = self._choose()
            if candidate is None:
                return
            offer = self._waiting[0]
            try:
                candidate.handle.channel.send(
                    [offer.number, offer.listener], kind=Kind.HANDOFF, fds=[offer.connection.fileno()], keep=True
                )
            except ChannelClosed as error:  # it is dead, which its pidfd will tell
                log.debug("%s cannot be given a connection: %s", candidate.handle.describe(), error)
                self.leave(candidate.handle)
                continue
            except OSError as error:
                # No descriptor is left for the copy that is sent. No fault of the worker's, and no other would do.
                log.error("cannot give a connection away: %s; trying again in %g s", reason_of(error), PAUSE)
                self._is_paused = True
                self._call_later(PAUSE, self._resume)
                return
            del self._waiting[0]
            candidate.unacknowledged[offer.number] = offer
            candidate.given += 1
            self._turns += 1
            candidate.last_turn = self._turns

    def _resume(self) -> None:
        self._is_paused = False
        self._give_waiting()


class _Later(Protocol):
    def __call__(self, delay: float, call: Callable[[], None], /) -> object: ...


class Acceptor:
    """A listening socket whose connections the dispatcher gives away."""

    wants_write = False

    def __init__(self, listening: socket.socket, index: int, dispatcher: Dispatcher, call_later: _Later) -> None:
        self._socket = listening
        self._index = index
        self._dispatcher = dispatcher
        self._call_later = call_later
        self._is_paused = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def wants_read(self) -> bool:
        """With no worker to take a connection, the kernel's backlog holds the clients."""
        return not self._is_paused and self._dispatcher.can_take

    def on_readable(self) -> None:
        for _ in range(ACCEPT_BUDGET):
            if not self._dispatcher.can_take:
                return
            try:
                connection, _peer = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return  # the queue is empty, or the client left it: the next turn tells
            except OSError as error:
                if error.errno not in OUT_OF_RESOURCES:
                    raise
                log.error("cannot accept a connection: %s; trying again in %g s", reason_of(error), PAUSE)
                self._is_paused = True
                self._call_later(PAUSE, self._resume)
                return
            connection.setblocking(False)
            self._dispatcher.offer(connection, self._index)

    def on_writable(self) -> None:
        raise AssertionError("a listening socket is never written")

    def _resume(self) -> None:
        self._is_paused = False
