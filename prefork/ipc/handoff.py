"""What the frames of a handoff say: which connections, by which door, and what became of them.

Not JSON: reading and writing that would be a good part of all that a handoff costs. One
frame carries as many connections as it may have descriptors, and so does the answer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum

from prefork.errors import FrameError

_DOOR = struct.Struct("!H")
_NUMBER_SIZE = 8  # bytes; a number is never used again


class Verdict(IntEnum):
    """What a worker made of connections."""

    REFUSED = 0  # it does not serve that listener (any more)
    ACCEPTED = 1
    EXHAUSTED = 2  # they never arrived, since it had no descriptor left


_VERDICTS = tuple(Verdict)


def encode_offers(listener: int, numbers: Sequence[int]) -> bytes:
    """Connections of one listener, in the order of their descriptors."""
    return struct.pack(f"!H{len(numbers)}Q", listener, *numbers)


def decode_offers(body: bytes) -> tuple[int, tuple[int, ...]]:
    """The listener's index and the numbers. Raises FrameError."""
    count = _count(body, _DOOR.size)
    listener, *numbers = struct.unpack(f"!H{count}Q", body)
    return listener, tuple(numbers)


def encode_answer(verdict: Verdict, numbers: Sequence[int]) -> bytes:
    return struct.pack(f"!B{len(numbers)}Q", verdict, *numbers)


def decode_answer(body: bytes) -> tuple[Verdict, tuple[int, ...]]:
    """What became of which. Raises FrameError."""
    count = _count(body, 1)
    verdict, *numbers = struct.unpack(f"!B{count}Q", body)
    if verdict >= len(_VERDICTS):
        raise FrameError(f"the answer to a handoff is {verdict}, known are 0 to {len(_VERDICTS) - 1}")
    return _VERDICTS[verdict], tuple(numbers)


def _count(body: bytes, start: int) -> int:
    count, rest = divmod(len(body) - start, _NUMBER_SIZE)
    if count < 0 or rest:
        raise FrameError(f"{len(body)} bytes are no list of connections")
    return count
