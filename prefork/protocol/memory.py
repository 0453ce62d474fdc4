"""What was read before and need not be checked again: a dict with a ceiling.

Header lines repeat, in requests and in responses. What a line means is looked up by
its bytes; only lines not seen before are parsed.

A flood of lines that never repeat empties the dict now and then instead of
growing it, and costs little more than having none. Nothing is evicted singly: to
know what was used least would cost every look-up, and the lines that matter are
back after one request each.
"""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

# Entries of one dict. Twelve header lines from each of some eighty kinds of clients.
ENTRIES = 1024

# Bytes of a key above which it is not remembered: whoever sends such a line rarely sends it twice.
LONGEST_KEY = 4096

# Bytes of all keys of one dict together. What hangs on them is about three times as large.
TOTAL = 512 * 1024


class Memory(dict[K, V]):
    """Look up with `get`, add with `remember`."""

    __slots__ = ("_total",)

    def __init__(self) -> None:
        super().__init__()
        self._total = 0

    def remember(self, key: K, value: V, size: int) -> V:
        """*value*, kept under *key*, of *size* bytes, if that is not too large."""
        if size > LONGEST_KEY:
            return value
        if len(self) >= ENTRIES or self._total + size > TOTAL:
            self.clear()
        self._total += size
        self[key] = value
        return value

    def clear(self) -> None:
        super().clear()
        self._total = 0
