"""Handoff: the master accepts, and gives each connection to the worker that its listener's pick chooses.

Load is counted without asking anybody: the master knows how many connections it
gave to a worker, the worker writes into the scoreboard how many of them it has closed.
The difference is exact at every instant, also while connections are still on their way.

The master keeps its copy of a connection until the worker says "accepted". A
worker that dies first, or refuses because it drains, costs the client nothing: the
same connection goes to the next worker.

What comes in one turn of the reactor is placed first, connection by connection, and sent
then: one message for several connections of the same worker.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from operator import attrgetter

from prefork.cluster.handles import WorkerHandle
from prefork.cluster.peek import Peeks
from prefork.cluster.picks import Candidate, Offer, Pick
from prefork.cluster.reactor import Reactor
from prefork.errors import ChannelClosed, reason_of
from prefork.ipc.frames import MAX_FDS, Kind
from prefork.ipc.handoff import Verdict, decode_answer, encode_offers

log = logging.getLogger("prefork")

# Accepts in one turn of the master, so that a flood of connections does not keep it from its workers.
ACCEPT_BUDGET = 64

# Connections of one listener that wait for the one worker they can go to. Beyond it the backlog
# holds the clients, also those of other workers: nobody can tell them apart there.
MOST_WAITING = 256

# Out of descriptors, here or in a worker, or accept(2) fails for another reason: try again after this many seconds, as asyncio does.
PAUSE = 1.0


class Dispatcher:
    """Gives connections to workers until they are acknowledged."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.is_paused = False  # out of descriptors: nothing is accepted, and the waiting go on waiting
        self._doors: dict[int, Door] = {}  # by the listener's index
        self._candidates: dict[int, Candidate] = {}  # by worker id; also those that are chosen no more
        self._numbers = 0  # of offers
        self._turns = 0  # connections given, those given again included

    # ---- listeners ----

    def open(self, index: int, listening: socket.socket, pick: Pick) -> None:
        """Accept from *listening*, ours from now on, and give to whom *pick* chooses of those that join."""
        self._doors[index] = door = Door(self, index, listening, pick)
        self.reactor.add(door)

    def shut(self, index: int) -> None:
        """Close the listening socket, and what it brought and no worker has got. May be repeated."""
        door = self._doors.pop(index, None)
        if door is not None:
            self.reactor.remove(door)
            door.close()

    # ---- workers ----

    def join(self, handle: WorkerHandle, index: int) -> None:
        """*handle* listens on that listener: it may be chosen from now on."""
        candidate = self._candidates.setdefault(handle.id, Candidate(handle))
        self._doors[index].candidates[handle.id] = candidate
        self.give()

    def leave(self, handle: WorkerHandle, index: int | None = None) -> None:
        """*handle* drains, or does not listen there any more: it is not chosen, what it was given it may still take."""
        for door in self._doors.values() if index is None else self._at(index):
            door.candidates.pop(handle.id, None)
        self.give()  # some may have waited for it

    def lose(self, handle: WorkerHandle) -> None:
        """*handle* is dead: what it has not acknowledged goes to others."""
        candidate = self._candidates.pop(handle.id, None)
        for door in self._doors.values():
            door.candidates.pop(handle.id, None)
        if candidate is not None:
            self._take_back(candidate, list(candidate.unacknowledged.values()))
        self.give()

    def hear(self, handle: WorkerHandle, body: bytes) -> None:
        """The body of an ACK. Raises FrameError."""
        verdict, numbers = decode_answer(body)
        self._settle(handle, numbers, verdict)
        self.give()

    def settle(self, handle: WorkerHandle, number: int, accepted: bool, is_exhausted: bool = False) -> None:
        """A worker's answer to one offer: *is_exhausted* if it had no descriptor for it."""
        verdict = Verdict.EXHAUSTED if is_exhausted else Verdict.ACCEPTED if accepted else Verdict.REFUSED
        self._settle(handle, (number,), verdict)
        self.give()

    def close(self) -> None:
        """Close the doors, and our copies of what is not settled: at the end, and in a newly forked child.

        A copy left in a child would keep the connection open after its worker has closed it, and
        the client would wait for the end until that child ends.
        """
        for index in list(self._doors):
            self.shut(index)
        for candidate in self._candidates.values():
            _close(candidate.unacknowledged.values())
            candidate.unacknowledged.clear()
        self._candidates.clear()

    # ---- for the doors ----

    def number(self) -> int:
        """For a new offer."""
        self._numbers += 1
        return self._numbers

    def place(self, offer: Offer, candidate: Candidate) -> None:
        """*candidate* is to get *offer* with the next `give`."""
        candidate.unacknowledged[offer.number] = offer
        candidate.placed.append(offer)
        candidate.given += 1
        self._turns += 1
        candidate.last_turn = self._turns

    def give(self) -> None:
        """Place all that waits and send it, until there is nothing more to be done."""
        is_done = False
        while not (is_done or self.is_paused):
            for door in list(self._doors.values()):  # a user's pick may shut one
                door.place_waiting()
            # A failed send puts back what it was to send.
            is_done = True
            for candidate in list(self._candidates.values()):
                if candidate.placed and not self._send_placed(candidate):
                    is_done = False

    def pause(self, what: str, error: OSError) -> None:
        """Nearly always it is that no descriptor is left. No worker's fault, and no other would do."""
        if not self.is_paused:
            log.error("cannot %s: %s; trying again in %g s", what, reason_of(error), PAUSE)
            self.is_paused = True
            self.reactor.call_later(PAUSE, self._resume)

    def _resume(self) -> None:
        self.is_paused = False
        self.give()

    # ---- the rest ----

    def _at(self, index: int) -> list[Door]:
        return [self._doors[index]] if index in self._doors else []

    def _send_placed(self, candidate: Candidate) -> bool:
        """False if some could not be sent."""
        placed, candidate.placed = candidate.placed, []
        unsent = deque(_batches(placed, candidate.most_together))
        try:
            while unsent:
                batch = unsent[0]
                candidate.handle.channel.send(
                    encode_offers(batch[0].door, [offer.number for offer in batch]),
                    kind=Kind.HANDOFF,
                    fds=[offer.descriptor for offer in batch],
                    keep=True,
                )
                unsent.popleft()
        except ChannelClosed as error:  # it is dead, which its pidfd will tell
            log.debug("%s cannot be given a connection: %s", candidate.handle.describe(), error)
            for door in self._doors.values():
                door.candidates.pop(candidate.handle.id, None)
        except OSError as error:  # no descriptor is left for the copy that is sent
            self.pause("give a connection away", error)
        if unsent:
            self._take_back(candidate, [offer for batch in unsent for offer in batch])
        return not unsent

    def _settle(self, handle: WorkerHandle, numbers: Iterable[int], verdict: Verdict) -> None:
        candidate = self._candidates.get(handle.id)
        if candidate is None:
            return
        unacknowledged = candidate.unacknowledged
        offers = [unacknowledged[number] for number in numbers if number in unacknowledged]
        match verdict:
            case Verdict.ACCEPTED:
                candidate.most_together = min(2 * candidate.most_together, MAX_FDS)
                for offer in offers:
                    del unacknowledged[offer.number]
                    os.close(offer.descriptor)
            case Verdict.REFUSED:
                # Most likely the master knows already that it left. To offer it the same again would never end.
                for offer in offers:
                    for door in self._at(offer.door):
                        door.candidates.pop(handle.id, None)
                self._take_back(candidate, offers)
            case Verdict.EXHAUSTED:
                candidate.most_together = 1  # there may be room for some of them
                self._spare(candidate)
                self._take_back(candidate, offers)

    def _spare(self, candidate: Candidate) -> None:
        """It has no descriptors: give it nothing for a while."""
        if candidate.is_exhausted:
            return
        candidate.is_exhausted = True
        log.error("%s is out of descriptors: it is given no connections for %g s", candidate.handle.describe(), PAUSE)

        def try_again() -> None:
            candidate.is_exhausted = False
            self.give()

        self.reactor.call_later(PAUSE, try_again)

    def _take_back(self, candidate: Candidate, offers: list[Offer]) -> None:
        """What *candidate* did not get waits again, in front of what came later."""
        candidate.given -= len(offers)
        for offer in offers:
            del candidate.unacknowledged[offer.number]
            if offer.door in self._doors:
                self._doors[offer.door].waiting.append(offer)
            else:
                os.close(offer.descriptor)
        # Several messages may come back, the earlier one first.
        for door in self._doors.values():
            door.waiting = deque(sorted(door.waiting, key=attrgetter("number")))


class Door:
    """A listening socket, as a source of the reactor, with those that came by it and those that may get them."""

    is_steady = False
    wants_write = False

    def __init__(self, dispatcher: Dispatcher, index: int, listening: socket.socket, pick: Pick) -> None:
        listening.setblocking(False)
        if listening.family != socket.AF_UNIX:  # inherited by what is accepted; see worker.server
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.candidates: dict[int, Candidate] = {}  # by worker id
        self.waiting: deque[Offer] = deque()
        self._dispatcher = dispatcher
        self._index = index
        self._listening = listening
        self._name = listening.getsockname()
        self._pick = pick
        kind = int(listening.family), int(listening.type), listening.proto
        self._peeks = Peeks(dispatcher.reactor, pick, kind, self._on_seen) if pick.needs_head else None

    def fileno(self) -> int:
        return self._listening.fileno()

    @property
    def wants_read(self) -> bool:
        """With no worker to take a connection, the kernel's backlog holds the clients."""
        return self._room > 0

    def on_readable(self) -> None:
        for _ in range(min(self._room, ACCEPT_BUDGET)):
            if not self._accept():
                break
        self._dispatcher.give()

    def on_writable(self) -> None:
        raise AssertionError("a listening socket is never written")

    def place_waiting(self) -> None:
        """Have a worker chosen for each that waits, as far as there is room."""
        if self.waiting:
            if self._pick.is_patient:
                self._place_each()
            else:
                self._place_in_turn()

    def close(self) -> None:
        self._listening.close()
        _close(self.waiting)
        self.waiting.clear()
        if self._peeks is not None:
            _close(self._peeks.close())

    @property
    def _room(self) -> int:
        """Connections that can be accepted now."""
        if self._dispatcher.is_paused:
            return 0
        room = sum([candidate.room for candidate in self.candidates.values()])
        if self._pick.is_patient:
            room = min(room, MOST_WAITING - len(self.waiting))
        elif self.waiting:
            return 0
        return room if self._peeks is None else min(room, self._peeks.room)

    def _accept(self) -> bool:
        """False if there is no more to accept now."""
        try:
            descriptor, peer = self._listening._accept()  # type: ignore[attr-defined] # without an object for each
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False  # the queue is empty, or the client left it: the next turn tells
        except OSError as error:
            self._dispatcher.pause("accept a connection", error)
            return False
        client = peer[:2] if isinstance(peer, tuple) else None
        offer = Offer(self._dispatcher.number(), descriptor, self._index, client, self._name)
        if self._peeks is None or self._peeks.add(offer):
            self._keep(offer)
        return True

    def _on_seen(self, offer: Offer) -> None:
        self._keep(offer)
        self._dispatcher.give()

    def _keep(self, offer: Offer) -> None:
        if offer.is_gone:
            os.close(offer.descriptor)
        else:
            self.waiting.append(offer)

    def _place_in_turn(self) -> None:
        free = [candidate for candidate in self.candidates.values() if candidate.room > 0]
        while self.waiting and free:
            offer = self.waiting.popleft()
            chosen = self._pick.choose(offer, free)
            self._dispatcher.place(offer, chosen)
            if not chosen.room:
                free.remove(chosen)

    def _place_each(self) -> None:
        """The first one's worker may have no room, and the second one's may."""
        candidates = list(self.candidates.values())
        if not candidates:
            return
        waiting, self.waiting = self.waiting, deque()
        for offer in waiting:
            chosen = self._pick.choose(offer, candidates)
            if chosen.room > 0:
                self._dispatcher.place(offer, chosen)
            else:
                self.waiting.append(offer)


def _batches(offers: list[Offer], most: int) -> Iterator[list[Offer]]:
    """What can be sent as one message each: connections of one listener, no more than *most*."""
    for _, of_one_door in groupby(offers, attrgetter("door")):
        together = list(of_one_door)
        yield from (together[at : at + most] for at in range(0, len(together), most))


def _close(offers: Iterable[Offer]) -> None:
    for offer in offers:
        with suppress(OSError):  # the descriptor is free all the same
            os.close(offer.descriptor)
