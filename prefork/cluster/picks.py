"""Who gets a connection: the picks that a listener with handoff can have.

A pick only chooses. It is asked again if the one it chose turns out to be gone, and it
knows nothing of channels. Most are asked for one of the workers that have room now; a
sticky one names a worker whether it has room or not, and the connection waits for that
one, because for a session that lives in one worker's memory any other is the wrong one.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

from prefork.cluster.handles import WorkerHandle
from prefork.errors import ConfigError, LoadError, did_you_mean
from prefork.ipc.frames import MAX_FDS
from prefork.scoreboard import BEAT_INTERVAL
from prefork.worker.main import load_function

log = logging.getLogger("prefork")

# Connections given to one worker and not acknowledged. A worker that is slow to take them
# leaves the rest to the kernel's backlog, which is made for waiting; a socket buffer full of
# descriptors is not (net.core.wmem_default holds some hundred messages).
MOST_UNACKNOWLEDGED = 64

# A loop that is late by more than this many seconds is held up by its application. Less is the
# scheduler's doing, on a machine that has other things to do.
LATE = 0.02


@dataclass(slots=True, eq=False)
class Offer:
    """A connection that waits for a worker, or for a worker's answer. A pick may know *client*, *listener* and *head*."""

    number: int
    descriptor: int
    door: int  # index of the listener that it came by
    client: Any  # address and port; None if it has none, as on a unix socket
    listener: Any  # the listening socket's name, as the kernel tells it
    head: bytes = b""  # what has come of its first request, if the pick wants to know
    is_gone: bool = False  # the client has ended it


@dataclass(slots=True, eq=False)
class Candidate:
    """What is counted for one worker, over all listeners."""

    handle: WorkerHandle
    given: int = 0  # connections, since it was forked
    elsewhere: int = 0  # connections that it has got without us
    last_turn: int = 0  # when it was last given one: breaks ties in turn
    unacknowledged: dict[int, Offer] = field(default_factory=dict)
    placed: list[Offer] = field(default_factory=list)  # those of them that are not sent yet
    is_exhausted: bool = False  # it has no descriptors left, for the moment
    most_together: int = MAX_FDS  # connections in one message, of which it gets all or none

    @property
    def room(self) -> int:
        """Connections that it may be given now."""
        return 0 if self.is_exhausted else MOST_UNACKNOWLEDGED - len(self.unacknowledged)

    @property
    def load(self) -> int:
        """Open connections, those on their way included. Exact at every instant if it gets them from us only."""
        stats = self.handle.stats
        if stats.opened - self.given > self.elsewhere:
            self.elsewhere = stats.opened - self.given
        return self.given + self.elsewhere - stats.closed

    @property
    def in_flight(self) -> int:
        """Requests at work, and connections that will bring one in a moment."""
        return self.handle.stats.in_flight + len(self.unacknowledged)


class Pick:
    """Chooses the worker for a connection. One object may serve several listeners."""

    needs_head = False  # the offer's *head* is to be filled first
    is_patient = False  # it chooses among all candidates; if that one has no room, the connection waits for it

    def choose(self, offer: Offer, candidates: Sequence[Candidate]) -> Candidate:
        """One of *candidates*, of which there is at least one."""
        raise NotImplementedError

    def has_seen_enough(self, head: bytes) -> bool:
        """Whether more of the request's head than *head* would change nothing."""
        return b"\r\n\r\n" in head


class LeastConnections(Pick):
    """The worker with the fewest connections; among equals the one whose turn is longest ago."""

    def choose(self, offer: Offer, candidates: Sequence[Candidate]) -> Candidate:
        return min(candidates, key=_fewest)


def _fewest(candidate: Candidate) -> tuple[int, int]:
    return candidate.load, candidate.last_turn


class RoundRobin(Pick):
    """One after the other, those without room left out."""

    def __init__(self) -> None:
        self._turns: dict[int, int] = {}  # when a worker, by id, was last chosen here
        self._turn = 0

    def choose(self, offer: Offer, candidates: Sequence[Candidate]) -> Candidate:
        turns = self._turns
        chosen = min(candidates, key=lambda candidate: (turns.get(candidate.handle.id, 0), candidate.handle.id))
        if chosen.handle.id not in turns:  # the moment to forget those that are gone: their ids never come back
            oldest = min(candidate.handle.id for candidate in candidates)
            self._turns = turns = {id: turn for id, turn in turns.items() if id >= oldest}
        self._turn += 1
        turns[chosen.handle.id] = self._turn
        return chosen


class LeastBusy(Pick):
    """No worker whose loop is held up, if there is another; then the fewest requests at work, then the fewest connections."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def choose(self, offer: Offer, candidates: Sequence[Candidate]) -> Candidate:
        now = self._clock()
        return min(candidates, key=lambda c: (is_late(c, now), c.in_flight, *_fewest(c)))


def is_late(candidate: Candidate, now: float) -> bool:
    """Whether the worker's loop is held up, or was when it last beat."""
    stats = candidate.handle.stats
    overdue = now - stats.beat - BEAT_INTERVAL if stats.beat else 0.0
    return max(stats.lag, overdue) > LATE


class Sticky(Pick):
    """The same worker for the same key, by the highest random weight (Thaler and Ravishankar, 1998).

    The weights are those of slots: a worker's replacement inherits its clients, and where a
    slot comes or goes only its own share of them moves. While a worker is dead its clients
    go to the next by weight, and nobody waits for the replacement. How loaded a worker is
    does not count, and one that has no room is waited for.
    """

    is_patient = True

    def __init__(self, by: str, name: str = "") -> None:
        self.by, self.name = by, name
        self.needs_head = by != "ip"
        self._field = re.compile(
            rb"\r\n" + re.escape(name if by == "header" else "cookie").encode() + rb":([^\r\n]*)(?=\r\n)", re.IGNORECASE
        )
        self._without_key = LeastConnections()

    def choose(self, offer: Offer, candidates: Sequence[Candidate]) -> Candidate:
        key = self._key_in(offer.head) or _address_of(offer)
        if not key:  # nothing tells one client of a unix socket from another
            return self._without_key.choose(offer, [c for c in candidates if c.room] or candidates)
        return max(candidates, key=lambda c: (_weight(key, c.handle.slot), c.handle.id))

    def has_seen_enough(self, head: bytes) -> bool:
        return bool(self._key_in(head)) or super().has_seen_enough(head)

    def _key_in(self, head: bytes) -> bytes:
        """The header's or cookie's value: the first that is not empty, on a line that is whole. b"" if there is none."""
        end = head.find(b"\r\n\r\n")
        for match in self._field.finditer(head if end < 0 else head[: end + 2]):
            value = match[1].strip(b" \t")
            if self.by == "cookie":
                value = _cookie(value, self.name.encode())
            if value:
                return value
        return b""


def _cookie(line: bytes, name: bytes) -> bytes:
    """The value of the cookie *name*, as it stands in a Cookie header (RFC 6265, section 4.2.1)."""
    for pair in line.split(b";"):
        found, equals, value = pair.strip(b" \t").partition(b"=")
        if equals and found == name:
            return value
    return b""


def _address_of(offer: Offer) -> bytes:
    if offer.client is None:
        return b""
    # The same client may come to a socket of IPv4 and to one of both.
    return str(offer.client[0]).removeprefix("::ffff:").encode()


@lru_cache(maxsize=16384)  # while a connection waits its worker is looked up again and again
def _weight(key: bytes, slot: int) -> bytes:
    return blake2b(key, digest_size=8, salt=slot.to_bytes(8, "big")).digest()


class Custom(Pick):
    """The user's function. Where it fails, `LeastConnections` chooses, and the log says so, once for each way to fail."""

    def __init__(self, function: Callable[[Offer, list[WorkerHandle]], object], name: str) -> None:
        """A *function* with a true attribute `needs_head` is called when the head has come."""
        self.needs_head = bool(getattr(function, "needs_head", False))
        self._function = function
        self._name = name
        self._instead = LeastConnections()
        self._told: set[object] = set()

    def choose(self, offer: Offer, candidates: Sequence[Candidate]) -> Candidate:
        try:
            chosen = self._function(offer, [candidate.handle for candidate in candidates])
        except Exception as error:  # noqa: BLE001 - told below, with its traceback
            self._tell(type(error), "raised", error)
        else:
            for candidate in candidates:
                if candidate.handle is chosen:
                    return candidate
            self._tell(type(chosen), f"returned {chosen!r}, which is none of the workers that it was given", None)
        return self._instead.choose(offer, candidates)

    def _tell(self, kind: object, what: str, error: Exception | None) -> None:
        if kind not in self._told:
            self._told.add(kind)
            log.error(
                "pick %s %s: the worker with the fewest connections is taken; further cases are not logged",
                self._name,
                what,
                exc_info=error,
            )


_PLAIN: dict[str, Callable[[], Pick]] = {
    "least_connections": LeastConnections,
    "round_robin": RoundRobin,
    "least_busy": LeastBusy,
}
_KEYS = ("ip", "header", "cookie")

# RFC 9110, section 5.1: a field's name; RFC 6265 has the same for a cookie's.
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


def sticky(by: Literal["ip", "header", "cookie"] = "ip", name: str = "") -> Pick:
    """The same worker for the same client address, or the same value of the header or cookie *name*. Raises ConfigError.

    A connection is placed once, by its first request, whose head is looked at and not taken:
    of 16 KiB and 2 seconds at the most. One without the header or cookie is placed by its
    address, and one of a unix socket goes to the worker with the fewest connections.
    """
    if by not in _KEYS:
        raise ConfigError(
            f"sticky is by {by!r}, but must be by one of {', '.join(_KEYS)}{did_you_mean(str(by), _KEYS)}"
        )
    if by == "ip":
        if name:
            raise ConfigError(f"sticky by ip has the name {name!r}, but only headers and cookies have names")
    elif not _TOKEN.fullmatch(name):
        raise ConfigError(f"sticky by {by} needs the name of a {by}, such as sticky:{by}:x-session, and has {name!r}")
    return Sticky(by, name)


def make_pick(spec: object) -> Pick:
    """The pick that *spec* names, or is. Raises ConfigError.

    "least_connections", "round_robin", "least_busy", "sticky:ip", "sticky:header:NAME",
    "sticky:cookie:NAME", "module:function", a callable `pick(connection, workers)`, or
    what `sticky` returned.
    """
    if isinstance(spec, Pick):
        return spec
    if callable(spec):
        return Custom(spec, getattr(spec, "__qualname__", repr(spec)))
    if not isinstance(spec, str):
        raise ConfigError(f"pick is {spec!r}, but must be {ALLOWED}")
    if spec in _PLAIN:
        return _PLAIN[spec]()
    word, colon, rest = spec.partition(":")
    if word == "sticky" and colon:
        by, _, name = rest.partition(":")
        return sticky(by, name)  # type: ignore[arg-type]
    if not colon:
        raise ConfigError(f"pick is {spec!r}, but must be {ALLOWED}{did_you_mean(spec, (*_PLAIN, 'sticky:ip'))}")
    return _load(spec)


ALLOWED = f"one of {', '.join(_PLAIN)}, sticky:ip, sticky:header:NAME, sticky:cookie:NAME, or module:function"


def _load(target: str) -> Pick:
    try:
        name, function = load_function(target)
    except LoadError as error:
        raise ConfigError(f"pick: {error}") from error
    if isinstance(function, Pick):
        return function
    if not callable(function):
        raise ConfigError(
            f"pick {name!r} is of type {type(function).__name__}, but must be a function of a connection and workers"
        )
    return Custom(function, name)
