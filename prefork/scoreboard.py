"""Shared memory between the master and its workers: one slot of plain numbers per worker.

The memory is made before the first fork and never grows. Nothing here waits, locks
or notifies: whoever is curious reads, and a reader may see one field new and the
next one old.

Every field has one writer at a time. The master owns a slot while it has no
process and hands it over by forking.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from typing import Any

from prefork.errors import ConfigError

# Two cache lines of 64 bytes: CPUs fetch them in pairs, so a busy worker's counters would
# otherwise slow down its neighbour's.
SLOT_SIZE = 128  # bytes

# A field is read and written as one aligned machine word, so a reader never sees half a
# number. memoryview.cast copies whole words; struct's "<q" would go byte by byte.
WORD = 8  # bytes

# Room for named values behind the slots: `prefork.counters` says what an entry holds.
ENTRIES = 1024
ENTRY_SIZE = 64  # bytes

MFD_NOEXEC_SEAL = 0x0008  # linux/memfd.h; not in `os` before 3.13


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
    """A fixed number of slots in shared memory. It goes away with the last process that has it.

    The memory is a memfd, so that a fresh interpreter can have it too (`attach`), and so that parts of
    it can be locked: behind the slots lies room for named values, which `prefork.counters` keeps.

    No process may close a duplicate of the descriptor while it goes on using the board: fcntl(2) drops
    a process's record locks with any descriptor of the file that this process closes. What other
    processes close, forked ones included, does not matter.
    """

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ConfigError(f"a scoreboard needs at least 1 slot, not {slots}")
        self._map(_sealed_memory(slots * SLOT_SIZE + ENTRIES * ENTRY_SIZE))

    @classmethod
    def attach(cls, descriptor: int) -> Scoreboard:
        """The board behind an inherited *descriptor*, which belongs to it from now on."""
        board = cls.__new__(cls)
        board._map(descriptor)
        return board

    def _map(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        self._slots: dict[int, Slot] = {}  # those that somebody asked for
        self._count, rest = divmod(size - ENTRIES * ENTRY_SIZE, SLOT_SIZE)
        if self._count < 1 or rest:
            raise ConfigError(f"descriptor {descriptor} is not a scoreboard: it has {size} bytes")
        os.set_inheritable(descriptor, False)
        self._memory = mmap.mmap(descriptor, size)
        self._descriptor = descriptor
        self.view = memoryview(self._memory)
        self.words = self.view.cast("q")  # all of it; released by `close`
        self._loads = self.words[LOAD : self._count * SLOT_SIZE // WORD : SLOT_SIZE // WORD]

    def fileno(self) -> int:
        """The memory's descriptor, for a program that is to `attach` it; -1 once closed. Close-on-exec."""
        return self._descriptor

    @property
    def entries_at(self) -> int:
        """Where the room for named values begins, in bytes; slots lie before it."""
        return self._count * SLOT_SIZE

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Slot:
        slot = self._slots.get(index)
        if slot is None:
            if not 0 <= index < self._count:
                raise IndexError(f"slot {index} is out of range: there are {self._count}")
            slot = self._slots[index] = Slot(index, self.view[index * SLOT_SIZE : (index + 1) * SLOT_SIZE])
        return slot

    def __iter__(self) -> Iterator[Slot]:
        return map(self.__getitem__, range(self._count))

    @property
    def loads(self) -> memoryview:
        """The column of `Slot.load`, to be read as a whole: for 8 slots in a quarter of a microsecond, for 1000 in 16."""
        return self._loads

    def close(self) -> None:
        """Unmap this process's view; the other processes keep theirs. May be repeated."""
        if self._descriptor < 0:
            return
        for slot in self._slots.values():
            slot.release()
        self._slots.clear()
        self._loads.release()
        self.words.release()
        self.view.release()
        self._memory.close()
        os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)


def _sealed_memory(size: int) -> int:
    """The descriptor of *size* bytes of zeros that nobody can shrink: reading beyond the end would be SIGBUS."""
    try:
        # Some machines are set to refuse memory that could be executed.
        descriptor = os.memfd_create("prefork", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Linux before 6.3 does not know the flag
            raise
        descriptor = os.memfd_create("prefork", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
