"""The heartbeat: a timer of the worker's own event loop, which a blocked loop therefore stops.

It writes to the scoreboard when it ran and by how much it was late, asks nobody and
is asked by nobody: whoever wants to know how late the loop is now, reads (`Slot.lag_at`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

from prefork.scoreboard import BEAT_INTERVAL, Slot


class Heartbeat:
    """Beats from its making until it is closed. Each beat calls *on_beat* with the instant."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, slot: Slot, on_beat: Callable[[float], object] | None = None
    ) -> None:
        self._loop = loop
        self._slot = slot
        self._on_beat = on_beat
        slot.lag = 0.0
        slot.beat = monotonic()
        self._arm(slot.beat)

    def close(self) -> None:
        """The slot keeps what was last written."""
        self._timer.cancel()

    def _arm(self, now: float) -> None:
        self._due = now + BEAT_INTERVAL
        self._timer = self._loop.call_later(BEAT_INTERVAL, self._run)

    def _run(self) -> None:
        now = monotonic()
        # In this order: between the two a reader finds the loop late rather than on time.
        self._slot.lag = max(0.0, now - self._due)
        self._slot.beat = now
        self._arm(now)
        if self._on_beat is not None:
            self._on_beat(now)
