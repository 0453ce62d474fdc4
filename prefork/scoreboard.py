"""Shared memory between the master and its workers: one slot of plain numbers per worker.

The memory is made before the first fork and never grows. Nothing here waits, locks
or notifies: whoever is curious reads, and a reader may see one field new and the
next one old.

Every field has one writer at a time. The master owns a slot while it has no
process and hands it over by forking.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

from prefork.errors import ConfigError

# Two cache lines of 64 bytes: CPUs fetch them in pairs, so a busy worker's counters would
# otherwise slow down its neighbour's.
SLOT_SIZE = 128  # bytes

# A field is read and written as one aligned machine word, so a reader never sees half a
# number. memoryview.cast copies whole words; struct's "<q" would go byte by byte.
WORD = 8  # bytes


class Count:
    """A field that holds a whole number."""

    __slots__ = ("_index",)

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, slot: Slot, owner: Any = None) -> int:
        return slot.whole[self._index]

    def __set__(self, slot: Slot, value: int) -> None:
        slot.whole[self._index] = value


class Instant:
    """A field that holds seconds of CLOCK_MONOTONIC (`time.monotonic`), which all processes share; 0 is none."""

    __slots__ = ("_index",)

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, slot: Slot, owner: Any = None) -> float:
        return slot.real[self._index]

    def __set__(self, slot: Slot, value: float) -> None:
        slot.real[self._index] = value


# Indices of the two that are counted with each request, for whoever cannot afford the descriptor.
BEGUN = 7
REQUESTS = 6

# Of the three that workers compare with their siblings'.
BEAT = 8
LOAD = 10

# What the load of a worker that accepts has been lowered by. So it is far below zero, and the least of a whole column
# is the least loaded of those that accept: a slot that is empty, or whose worker leaves, holds zero or a little more.
ACCEPTING = 1 << 62

# A worker's event loop writes `beat` this often, in seconds.
BEAT_INTERVAL = 0.1


class Slot:
    """What is known of one worker. The comments say who writes the field."""

    __slots__ = ("index", "real", "whole")

    pid = Count(0)  # master; 0: nobody lives here
    generation = Count(1)  # master
    started_at = Instant(2)  # master
    deadline = Instant(3)  # master: by when it has to listen
    opened = Count(4)  # worker: connections since it started
    closed = Count(5)  # worker: those of them that have ended
    requests = Count(REQUESTS)  # worker: answered since it started
    begun = Count(BEGUN)  # worker: requests whose head was read since it started
    beat = Instant(8)  # worker: when its event loop last ran the heartbeat
    lag = Instant(9)  # worker: by how many seconds that heartbeat came too late
    load = Count(LOAD)  # worker: connections it has taken, greeted or not; minus ACCEPTING while it accepts

    def __init__(self, index: int, memory: memoryview) -> None:
        self.index = index
        self.whole = memory.cast("q")
        self.real = memory.cast("d")

    @property
    def connections(self) -> int:
        """Open now."""
        return self.opened - self.closed

    @property
    def in_flight(self) -> int:
        """Requests without a complete response."""
        return self.begun - self.requests

    def lag_at(self, now: float) -> float:
        """By how many seconds its event loop is late *now*, which may be more than when it last said so."""
        return max(self.lag, now - self.beat - BEAT_INTERVAL) if self.beat else 0.0

    def reset(self) -> None:
        """Back to zero, for the slot's next process. The last one must have been reaped."""
        for index in range(SLOT_SIZE // WORD):
            self.whole[index] = 0

    def release(self) -> None:
        """Let go of the memory; the slot cannot be used any more."""
        self.whole.release()
        self.real.release()


class Scoreboard:
    """A fixed number of slots in anonymous shared memory. It goes away with the last process that has it."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ConfigError(f"a scoreboard needs at least 1 slot, not {slots}")
        self._memory = mmap.mmap(-1, slots * SLOT_SIZE)
        self._view = memoryview(self._memory)
        self._words = self._view.cast("q")
        self._loads = self._words[LOAD :: SLOT_SIZE // WORD]
        self._slots = [Slot(index, self._view[index * SLOT_SIZE : (index + 1) * SLOT_SIZE]) for index in range(slots)]

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> Slot:
        return self._slots[index]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    @property
    def loads(self) -> memoryview:
        """The column of `Slot.load`, to be read as a whole: for 8 slots in a quarter of a microsecond, for 1000 in 16."""
        return self._loads

    def close(self) -> None:
        """Unmap this process's view; the other processes keep theirs."""
        for slot in self._slots:
            slot.release()
        self._slots = []
        self._loads.release()
        self._words.release()
        self._view.release()
        self._memory.close()
