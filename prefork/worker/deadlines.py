"""Deadlines of connections: one sweep per worker instead of a timer per request.

A timer that is armed and cancelled with each request costs more than the parsing of
it. A connection just stores the instant at which it runs out; the sweep looks at
all of them now and then. So a deadline is kept to within `INTERVAL`, never early.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from enum import Enum
from typing import Protocol

# Seconds between sweeps. 10,000 idle connections cost about a millisecond each time.
INTERVAL = 0.5

NEVER = float("inf")

# How long to go on reading after the last byte was sent, in seconds. Closing with unread bytes in
# the socket makes the kernel send RST, which can destroy the answer on its way (RFC 9112, 9.6).
# A peer that still sends is given more time, up to the second number; both are Apache's.
LINGER = 2.0
LINGER_WHILE_SENDING = 30.0


class Awaited(Enum):
    """What a connection waits for. Whatever it is, except the application, has a deadline."""

    APPLICATION = "the application, which may take its time"
    FIRST_REQUEST = "the first byte of the first request"
    NEXT_REQUEST = "the first byte of another request"
    HEAD = "the end of a head that has begun, however slowly it drips"
    BODY = "the next piece of a body that the application waits for"
    REST = "the end of a body that nobody wants"
    WRITING = "the client, to take what was sent"
    CLOSE = "the client, to close after it was told that we are done"


IDLE = (Awaited.FIRST_REQUEST, Awaited.NEXT_REQUEST)


class Expiring(Protocol):
    deadline: float  # on the loop's clock; NEVER for none

    def on_deadline(self, now: float) -> None:
        """The instant has passed: end what took too long, or set a later one."""


class Sweep:
    """Calls *tick* each time, and `on_deadline` of every member of *connections* whose deadline has passed."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connections: Collection[Expiring], tick: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._tick = tick
        self._connections = connections
        self._timer = loop.call_later(INTERVAL, self._run)

    def close(self) -> None:
        self._timer.cancel()

    def _run(self) -> None:
        # First of all, so that no error below can end the sweeping.
        self._timer = self._loop.call_later(INTERVAL, self._run)
        self._tick()
        now = self._loop.time()
        # First found, then told: telling one may remove it from the set we walk over.
        for connection in [c for c in self._connections if c.deadline <= now]:
            connection.on_deadline(now)
