"""Numbers that all processes of a cluster share, by name: counters and rate limits.

They live behind the slots of the scoreboard, in a table that never grows, and stay until the
last process has gone. Any process may add a name at any time; none is ever removed.

A change is made under a record lock of fcntl(2) on the bytes of that entry, which the kernel
releases when the process ends, however it ends. What is written is one aligned word, so a
process killed at any instant leaves the old number or the new one. Not an open file
description's lock: forked processes share the description, and would share the lock.

A record lock belongs to a process, so the threads of one exclude each other with a lock of
their own. Nobody waits longer than `LONGEST_WAIT`.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from math import inf

from prefork.errors import CounterBusy, CounterError, CounterOverflow
from prefork.scoreboard import ENTRIES, ENTRY_SIZE, WORD, Scoreboard

# An entry: the name padded with zeros, then the kind, which says that the name is whole, then the value.
NAME_SIZE = ENTRY_SIZE - 2 * WORD  # bytes of UTF-8
KIND_AT = NAME_SIZE
VALUE_AT = NAME_SIZE + WORD

# There is no 0: an entry of zeros is free.
COUNTER = 1
RATE_LIMIT = 2
KINDS = {COUNTER: "counter", RATE_LIMIT: "rate limit"}

LEAST, MOST = -(2**63), 2**63 - 1

# A change takes microseconds. Whoever holds the lock for longer is stopped, or was not run for a while.
LONGEST_WAIT = 1.0  # seconds

# The holder is most likely at it on another CPU right now; if not, it needs ours.
YIELDS = 50  # attempts, before each is followed by a pause
PAUSE = 50e-6  # seconds

# struct flock of fcntl(2), on 64 bits: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")

NANO = 1_000_000_000

# So that an instant in nanoseconds and the span of a limit fit one word together.
LONGEST_SPAN = 1e9  # seconds

# One for each entry and one for the table, of whatever board: record locks go by process and file, so two
# views of one board have to meet here. Those that other threads hold at a fork stay locked in the child.
_mutexes = [threading.Lock() for _ in range(ENTRIES + 1)]


def _renew_mutexes() -> None:
    _mutexes[:] = [threading.Lock() for _ in range(ENTRIES + 1)]


os.register_at_fork(after_in_child=_renew_mutexes)


class Counters:
    """The named numbers of *board*, as this process sees them."""

    def __init__(self, board: Scoreboard) -> None:
        self._board = board
        self._cells: dict[str, tuple[int, Cell]] = {}  # those asked for here, with their kinds

    def counter(self, name: str) -> Counter:
        """The counter *name*, at 0 if nobody has asked for it yet.

        Raises CounterError for a name that is taken by a rate limit, empty or too long, or if the table is full.
        """
        return Counter(self._cell(name, COUNTER))

    def rate_limit(self, name: str, limit: int = 100, per: float = 60.0) -> RateLimit:
        """At most *limit* in any *per* seconds, and all of them at once if nothing was used before.

        The name is what processes share; each brings *limit* and *per* itself. Raises as `counter` does,
        ValueError for a limit below 1 or a span that is not above 0.
        """
        return RateLimit(self._cell(name, RATE_LIMIT), Rate(limit, per))

    def _cell(self, name: str, kind: int) -> Cell:
        known = self._cells.get(name)
        if known is None:
            index, found = self._find(name, kind)
            known = self._cells[name] = found, Cell(self._board, index, name)
        found, cell = known
        if found != kind:
            raise CounterError(f"{name!r} is a {KINDS.get(found, 'number of another kind')}, not a {KINDS[kind]}")
        return cell

    def _find(self, name: str, kind: int) -> tuple[int, int]:
        """Index and kind of the entry *name*; a new one of *kind* if there is none."""
        padded = _padded(name)
        board, start = self._board, self._board.entries_at
        # Looked up under the lock as well: some CPUs may show us the kind before all of the name.
        with Guard(board, start + ENTRIES * ENTRY_SIZE, ENTRIES, "the table of counters"):
            for index in range(ENTRIES):
                entry = start + index * ENTRY_SIZE
                found = board.words[(entry + KIND_AT) // WORD]
                if found == 0:
                    board.view[entry : entry + NAME_SIZE] = padded
                    board.words[(entry + KIND_AT) // WORD] = kind  # last: what is killed before leaves it free
                    return index, kind
                if board.view[entry : entry + NAME_SIZE] == padded:
                    return index, found
        raise CounterError(f"there is no room for {name!r}: all {ENTRIES} names are taken")


def _padded(name: str) -> bytes:
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise CounterError(f"{name!r} is not a name: {error}") from error
    if not encoded or b"\0" in encoded:
        raise CounterError(f"{name!r} is not a name: it must have 1 to {NAME_SIZE} bytes, none of them zero")
    if len(encoded) > NAME_SIZE:
        raise CounterError(f"the name {name!r} has {len(encoded)} bytes of UTF-8: {NAME_SIZE} are allowed")
    return encoded.ljust(NAME_SIZE, b"\0")


class Guard:
    """A place of the board that one thread of one process changes at a time: `with guard:`."""

    __slots__ = ("_board", "_mutex", "_start", "_what")

    def __init__(self, board: Scoreboard, start: int, mutex: int, what: str) -> None:
        self._board = board
        self._start = start  # of the locked word; locks may lie behind the end of a file
        self._mutex = mutex
        self._what = what

    def __enter__(self) -> None:
        mutex = _mutexes[self._mutex]
        if not mutex.acquire(blocking=False) and not mutex.acquire(timeout=LONGEST_WAIT):
            raise self._busy(os.getpid())
        try:
            try:
                fcntl.lockf(self._board.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, WORD, self._start)
            except (BlockingIOError, PermissionError):  # POSIX allows both
                self._wait()
        except BaseException:
            mutex.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            fcntl.lockf(self._board.fileno(), fcntl.LOCK_UN, WORD, self._start)
        finally:
            _mutexes[self._mutex].release()

    def _wait(self) -> None:
        # F_SETLKW would wait without an end, and a signal to interrupt it belongs to the application.
        deadline = time.monotonic() + LONGEST_WAIT
        attempts = 0
        while True:
            attempts += 1
            if attempts <= YIELDS:
                os.sched_yield()
            else:
                time.sleep(PAUSE)
            try:
                fcntl.lockf(self._board.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, WORD, self._start)
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= deadline and (holder := self._holder()) is not None:
                    raise self._busy(holder) from None
            else:
                return

    def _holder(self) -> int | None:
        """The process that has the lock (0 for one that cannot be named here), None if none has it by now."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, self._start, WORD, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(self._board.fileno(), fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else int(pid)

    def _busy(self, pid: int) -> CounterBusy:
        whose = f"another thread of this process (pid {pid})" if pid == os.getpid() else f"pid {pid}"
        return CounterBusy(f"{self._what} is locked by {whose} for more than {LONGEST_WAIT:g} s", pid)


class Cell:
    """The value of one entry."""

    __slots__ = ("guard", "index", "name", "words")

    def __init__(self, board: Scoreboard, entry: int, name: str) -> None:
        start = board.entries_at + entry * ENTRY_SIZE + VALUE_AT
        self.name = name
        self.words = board.words
        self.index = start // WORD
        self.guard = Guard(board, start, entry, repr(name))


class Counter:
    """A whole number of 64 bits, which all processes of the cluster see and change.

    Each change raises CounterBusy if another process was stopped in the middle of one, and is then not made.
    """

    __slots__ = ("_cell",)

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    @property
    def name(self) -> str:
        return self._cell.name

    @property
    def value(self) -> int:
        """What it is now. Never waits."""
        return self._cell.words[self._cell.index]

    def add(self, n: int = 1) -> int:
        """Add *n*, which may be negative; the value after. Raises CounterOverflow."""
        cell = self._cell
        with cell.guard:
            value = cell.words[cell.index] + n
            if not LEAST <= value <= MOST:
                raise _overflow(cell, value)
            cell.words[cell.index] = value
        return value

    def set(self, n: int) -> int:
        """Make it *n*; the value before. Raises CounterOverflow."""
        cell = self._cell
        if not LEAST <= n <= MOST:
            raise _overflow(cell, n)
        with cell.guard:
            before = cell.words[cell.index]
            cell.words[cell.index] = n
        return before

    def take(self, limit: int, n: int = 1) -> bool:
        """Add *n* if the result is at most *limit*; say whether it was added. Raises ValueError for a negative *n*."""
        if n < 0:
            raise ValueError(f"{n} cannot be taken from {self.name!r}: give back with add({n})")
        cell = self._cell
        with cell.guard:
            value = cell.words[cell.index] + n
            if value > limit:
                return False
            if value > MOST:
                raise _overflow(cell, value)
            cell.words[cell.index] = value
        return True

    def __repr__(self) -> str:
        return f"<Counter {self.name!r}: {self.value}>"


def _overflow(cell: Cell, value: int) -> CounterOverflow:
    return CounterOverflow(f"counter {cell.name!r} cannot become {value}: it has 64 bits, {LEAST} to {MOST}")


class RateLimit:
    """How often something may happen, counted over all processes of the cluster.

    The generic cell rate algorithm: the one number that is kept is the instant at which all that was
    allowed so far will have been earned. It never stores who asked when, and nothing has to be reset.
    """

    __slots__ = ("_cell", "_rate")

    def __init__(self, cell: Cell, rate: Rate) -> None:
        self._cell = cell
        self._rate = rate

    @property
    def name(self) -> str:
        return self._cell.name

    def allow(self, cost: int = 1) -> bool:
        """Whether it may happen now, at *cost* of the limit. What is refused costs nothing. Raises CounterBusy."""
        cell = self._cell
        with cell.guard:
            is_allowed, cell.words[cell.index] = self._rate.spend(cell.words[cell.index], time.monotonic_ns(), cost)
        return is_allowed

    def retry_after(self, cost: int = 1) -> float:
        """Seconds until *cost* would be allowed, if nobody else comes first: 0 for now, infinity for never. Never waits."""
        wait = self._rate.wait(self._cell.words[self._cell.index], time.monotonic_ns(), cost)
        return inf if wait is None else wait / NANO

    def __repr__(self) -> str:
        return f"<RateLimit {self.name!r}: {self._rate.limit} in {self._rate.span / NANO:g} s>"


class Rate:
    """*limit* in *per* seconds, as a calculation: instants and spans are whole nanoseconds.

    Whatever is rounded is rounded against who asks: in no span is more allowed than the limit and what the span has earned.
    """

    __slots__ = ("_most_ahead", "_one", "limit", "span")

    def __init__(self, limit: int, per: float) -> None:
        if limit < 1:
            raise ValueError(f"a rate limit of {limit} would allow nothing: at least 1")
        if not 1e-9 <= per <= LONGEST_SPAN:
            raise ValueError(f"a rate limit per {per} seconds: above 0 and at most {LONGEST_SPAN:g} are allowed")
        self.limit = limit
        self.span = round(per * NANO)
        self._one = self._price(1)
        self._most_ahead = self._one[1]

    def spend(self, earned_at: int, now: int, cost: int) -> tuple[bool, int]:
        """Whether *cost* is allowed now, and the instant by which all that was allowed is earned."""
        price, ahead = self._one if cost == 1 else self._price(cost)
        earned_at = self._at_most_full(earned_at, now)
        after = earned_at + price
        return (True, after) if after - now <= ahead else (False, earned_at)

    def wait(self, earned_at: int, now: int, cost: int) -> int | None:
        """For how long *cost* is not allowed; None: for ever."""
        if cost > self.limit:
            return None
        price, ahead = self._one if cost == 1 else self._price(cost)
        return max(0, self._at_most_full(earned_at, now) + price - ahead - now)

    def _at_most_full(self, earned_at: int, now: int) -> int:
        """Never before now: what was not used is not saved up. Nor beyond the limit: it was a longer one then."""
        return min(max(earned_at, now), now + self._most_ahead)

    def _price(self, cost: int) -> tuple[int, int]:
        """How long it takes to earn *cost*, and how far ahead it may be spent: as many times as the limit holds it."""
        if cost < 1:
            raise ValueError(f"a cost of {cost}: at least 1")
        price = -(-cost * self.span // self.limit)
        times, rest = divmod(self.limit, cost)
        return price, times * price + rest * self.span // self.limit
