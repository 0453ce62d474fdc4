"""The master's event loop: poll(2), timers, and nothing else.

It is not asyncio, and not epoll, on purpose: an epoll set is shared with every
process forked after it was made, so a child that closes its copies would make the
master deaf. poll(2) keeps its set in the caller's memory. With a hundred workers a
turn costs some microseconds more, which a master can afford.
"""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

READABLE = select.POLLIN | select.POLLPRI
WRITABLE = select.POLLOUT
# What the kernel reports unasked. The owner finds out by reading.
BROKEN = select.POLLHUP | select.POLLERR


class Source(Protocol):
    """Something with a descriptor that the reactor watches."""

    def fileno(self) -> int: ...

    is_steady: bool  # what it wants changes only in its own calls, or it says so by `Reactor.refresh`

    @property
    def wants_read(self) -> bool:
        """False while what arrives shall wait in the kernel."""

    @property
    def wants_write(self) -> bool:
        """True while there is something queued to be written."""

    def on_readable(self) -> None: ...

    def on_writable(self) -> None: ...


@runtime_checkable
class Owner(Protocol):
    """A source that owns its descriptor."""

    def close(self) -> None: ...


@dataclass(order=True, slots=True)
class Timer:
    """A call at an instant of the monotonic clock."""

    when: float
    order: int
    call: Callable[[], None] | None = field(compare=False)
    on_cancel: Callable[[], None] | None = field(compare=False, default=None)

    def cancel(self) -> None:
        """Not to be called any more. Too late, or again, it has no effect."""
        if self.call is not None:
            self.call = None
            if self.on_cancel is not None:
                self.on_cancel()


class Reactor:
    """Watches sources and timers; `turn` handles what is ready and returns."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self._poll = select.poll()
        self._sources: dict[int, Source] = {}
        self._masks: dict[int, int] = {}
        self._unsteady: set[int] = set()  # descriptors whose masks are looked at in every turn
        self._changed: set[int] = set()  # and those that are in the next one
        self._timers: list[Timer] = []
        self._soon: list[Callable[[], object]] = []
        self._order = itertools.count()

    def add(self, source: Source) -> None:
        descriptor = source.fileno()
        self._sources[descriptor] = source
        # Registered by the next turn. One that replaces another on the same descriptor keeps what poll knows of it.
        self._masks.setdefault(descriptor, 0)
        self._changed.add(descriptor)
        if not source.is_steady:
            self._unsteady.add(descriptor)

    def refresh(self, source: Source) -> None:
        """What a steady *source* wants has changed."""
        self._changed.add(source.fileno())

    def remove(self, source: Source) -> None:
        """Forget *source*; before its descriptor is closed, since the number may be used again."""
        descriptor = source.fileno()
        self._unsteady.discard(descriptor)
        self._changed.discard(descriptor)
        if self._sources.pop(descriptor, None) is not None and self._masks.pop(descriptor):
            self._poll.unregister(descriptor)

    def call_soon(self, call: Callable[[], object]) -> None:
        """*call* once, at the beginning of the next turn: before anything that arrives."""
        self._soon.append(call)

    def call_later(self, delay: float, call: Callable[[], None], on_cancel: Callable[[], None] | None = None) -> Timer:
        """*call* once, *delay* seconds from now."""
        timer = Timer(self.now() + delay, next(self._order), call, on_cancel)
        heapq.heappush(self._timers, timer)
        return timer

    def turn(self) -> None:
        """Wait until something is ready or due, then handle all of it, timers last."""
        while self._soon:
            self._soon.pop(0)()
        self._refresh_masks()
        for descriptor, events in self._poll.poll(self._patience()):
            # An earlier handler of this turn may have removed it, or put another in its place:
            # then the handlers below find nothing to read, which every source must bear.
            source = self._sources.get(descriptor)
            if source is not None and events & (READABLE | BROKEN):
                source.on_readable()
            if source is not None and events & WRITABLE and self._sources.get(descriptor) is source:
                source.on_writable()
                self._changed.add(descriptor)
        self._run_due()

    def _refresh_masks(self) -> None:
        for descriptor in (*self._unsteady, *self._changed):
            source = self._sources.get(descriptor)
            if source is None:
                continue
            mask = (READABLE if source.wants_read else 0) | (WRITABLE if source.wants_write else 0)
            registered = self._masks[descriptor]
            if mask == registered:
                continue
            if mask:
                self._poll.register(descriptor, mask)
            else:  # a mask of 0 would still report POLLHUP, turn after turn
                self._poll.unregister(descriptor)
            self._masks[descriptor] = mask
        self._changed.clear()

    def _patience(self) -> float | None:
        """Milliseconds until the next timer; None for ever."""
        if self._soon:
            return 0.0
        while self._timers and self._timers[0].call is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, (self._timers[0].when - self.now()) * 1000)

    def _run_due(self) -> None:
        now = self.now()
        while self._timers and self._timers[0].when <= now:
            timer = heapq.heappop(self._timers)
            call, timer.call = timer.call, None
            if call is not None:
                call()

    def close_in_child(self) -> None:
        """After a fork: give back what only the parent watches."""
        for source in self._sources.values():
            if isinstance(source, Owner):
                source.close()

    def close(self) -> None:
        """Forget everything; there is no descriptor of its own to give back."""
        self._sources.clear()
        self._masks.clear()
        self._unsteady.clear()
        self._changed.clear()
        self._timers.clear()
        self._soon.clear()
