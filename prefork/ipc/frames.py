"""Frames on an IPC channel: bytes and descriptors in, frames out.

Nothing here does I/O, and nothing closes a descriptor. `Decoder` is fed what one recvmsg(2)
returned and gives back whole frames; `encode` is its inverse.

Descriptors reach us no later than the first byte of the frame that owns them, because sendmsg(2)
ties them to that byte. They may come in the same read as earlier frames, so the decoder queues
them and each header claims its own. A read ends with the chunk that carries descriptors, so if they
were lost on arrival it is the one frame of that read which claims some that lost them.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from prefork.errors import FrameError

# Linux refuses more than 253 descriptors in one sendmsg(2) (SCM_MAX_FD). We stop far below, so
# that a sender's bug cannot fill the receiver's descriptor table.
MAX_FDS = 16

# Far above any message that makes sense to send in one piece: a length beyond it is more likely
# to be bytes that are no header at all, and the receiver would have to buffer it.
MAX_SIZE = 64 * 1024 * 1024  # bytes of payload

# What the length in a header can say.
LARGEST_SIZE = 0xFFFFFFFF  # bytes of payload

# Length of the payload, kind, number of descriptors. Network order, so that a dump reads well.
_HEADER = struct.Struct("!IBB")
HEADER_SIZE = _HEADER.size  # bytes

# Missing bytes from which on a payload is read straight into its place: below, a read that also
# takes what comes behind it saves more than the copy costs.
DIRECT_SIZE = 64 * 1024

# Stands in the queue of descriptors where a read has lost its own.
_LOST = -1


class Kind(IntEnum):
    """Whose frame it is. There is no 0: a run of zero bytes is not a frame."""

    CONTROL = 1  # between our own processes, never shown to an application
    USER = 2  # between an application's processes, as JSON
    HANDOFF = 3  # an accepted connection for the receiver to serve
    ACK = 4  # what became of a HANDOFF
    PUBLISH = 5  # a topic and what is published under it, passed on as it came
    PICKLED = 6  # USER, as a pickle; a `Message` says USER
    RECEIPT = 7  # whether the handle of a user's message arrived; no `Message` at all


# Whose size is for the application to limit; the limit of all others is ours.
USERS = frozenset({Kind.USER, Kind.PICKLED, Kind.PUBLISH})


class Frame(NamedTuple):
    """A payload and the descriptors that go with it."""

    kind: Kind
    payload: bytes | bytearray
    fds: tuple[int, ...] = ()
    is_lost: bool = False  # it had descriptors when it was sent


def encode(frame: Frame) -> bytes:
    """The bytes of *frame*. Its descriptors must ride with the first of them."""
    return header(frame.kind, len(frame.payload), len(frame.fds)) + frame.payload


def header(kind: Kind, size: int, count: int = 0, max_size: int = MAX_SIZE) -> bytes:
    """What stands before *size* bytes of payload that own *count* descriptors. Raises FrameError."""
    if size > max_size:
        raise FrameError(f"a payload of {size} bytes is too large for a frame: {max_size} are allowed")
    if count > MAX_FDS:
        raise FrameError(f"{count} descriptors are too many for a frame: {MAX_FDS} are allowed")
    return _HEADER.pack(size, kind, count)


class Decoder:
    """Whole frames out of reads that were cut anywhere. After a FrameError it is of no further use.

    The rest of a large payload may be read to where it belongs: if `room` gives a view, the next
    bytes go there, and `filled` says how many they were.
    """

    __slots__ = ("_fds", "_head", "_limits", "partial")

    def __init__(self, max_size: int = MAX_SIZE) -> None:
        self._limits = tuple(max_size if kind in USERS else MAX_SIZE for kind in (0, *Kind))
        self._head = b""  # the beginning of a header
        self.partial: _Partial | None = None  # whether there is one is for all to see, for speed
        self._fds: deque[int] = deque()  # those no header has claimed yet

    def feed(self, data: bytes, fds: Sequence[int] = (), *, is_lost: bool = False) -> list[Frame]:
        """The frames completed by *data*, which came together with *fds*, or with such as were lost.

        Raises FrameError. The descriptors of frames it would have returned are then among the `leftovers`.
        """
        if fds or is_lost:
            self._expect(fds, is_lost)
        frames: list[Frame] = []
        try:
            if self.partial is not None:
                data = self._fill(self.partial, data, frames)
            self._decode(self._head + data if self._head else data, frames)
            if self._fds:
                self._check_unclaimed()
        except FrameError:
            for frame in reversed(frames):
                self._fds.extendleft(reversed(frame.fds))
            raise
        return frames

    def lone(self, data: bytes) -> bytes | None:
        """The payload, if *data* is one whole USER frame, without descriptors, and nothing else is under way."""
        if self.partial is None and not self._head and not self._fds and len(data) > HEADER_SIZE:
            size, number, count = _HEADER.unpack_from(data)
            if size == len(data) - HEADER_SIZE and number == _USER and not count and size <= self._limits[_USER]:
                return data[HEADER_SIZE:]
        return None

    def room(self) -> memoryview | None:
        """Where the next bytes belong, if many of one payload are missing."""
        partial = self.partial
        if partial is None or len(partial.payload) - partial.have < DIRECT_SIZE:
            return None
        return memoryview(partial.payload)[partial.have :]

    def filled(self, count: int, fds: Sequence[int] = (), *, is_lost: bool = False) -> list[Frame]:
        """The frame that *count* bytes written to `room` complete, if they do. Raises FrameError."""
        assert self.partial is not None
        self._expect(fds, is_lost)
        self._check_unclaimed()
        frames: list[Frame] = []
        self.partial.have += count
        self._finish(self.partial, frames)
        return frames

    def leftovers(self) -> list[int]:
        """Give up the descriptors that no returned frame owns. The caller closes them."""
        claimed = self.partial.fds if self.partial is not None else ()
        left = [*claimed, *(fd for fd in self._fds if fd != _LOST)]
        self.partial = None
        self._fds.clear()
        return left

    def _expect(self, fds: Sequence[int], is_lost: bool) -> None:
        if fds:
            self._fds.extend(fds)
        if is_lost:
            self._fds.append(_LOST)

    def _fill(self, partial: _Partial, data: bytes, frames: list[Frame]) -> bytes:
        """Copy what belongs to *partial*, and return the rest."""
        count = min(len(partial.payload) - partial.have, len(data))
        partial.payload[partial.have : partial.have + count] = data[:count]
        partial.have += count
        self._finish(partial, frames)
        return data[count:]

    def _finish(self, partial: _Partial, frames: list[Frame]) -> None:
        if partial.have == len(partial.payload):
            frames.append(Frame(partial.kind, partial.payload, partial.fds, partial.is_lost))
            self.partial = None

    def _decode(self, data: bytes, frames: list[Frame]) -> None:
        start, end = 0, len(data)
        while end - start >= HEADER_SIZE:
            size, number, count = _HEADER.unpack_from(data, start)
            if not 0 < number < len(_KINDS):
                raise FrameError(f"frame is of kind {number}, known are {min(Kind)} to {max(Kind)}")
            if size > self._limits[number]:
                raise FrameError(f"frame claims {size} bytes, {self._limits[number]} are allowed")
            fds, is_lost = self._claim(count) if count else ((), False)
            start += HEADER_SIZE
            stop = start + size
            if stop > end:
                self.partial = _Partial(_KINDS[number], size, fds, is_lost, data[start:])
                start = end
            else:
                frames.append(_new(Frame, (_KINDS[number], data[start:stop], fds, is_lost)))
                start = stop
        self._head = data[start:] if start < end else b""

    def _claim(self, count: int) -> tuple[tuple[int, ...], bool]:
        if count > MAX_FDS:
            raise FrameError(f"frame claims {count} descriptors, {MAX_FDS} are allowed")
        if self._fds and self._fds[0] == _LOST:
            self._fds.popleft()
            return (), True
        arrived = self._fds.index(_LOST) if _LOST in self._fds else len(self._fds)
        if count > arrived:
            raise FrameError(f"frame claims {count} descriptors, {arrived} arrived")
        return tuple(self._fds.popleft() for _ in range(count)), False

    def _check_unclaimed(self) -> None:
        """Only a header that is still incomplete may yet claim what is queued."""
        if self._fds and not self._head:
            raise FrameError(f"{len(self._fds)} descriptors arrived that no frame claims")


class _Partial:
    """A frame whose header is known and whose payload is still coming."""

    __slots__ = ("fds", "have", "is_lost", "kind", "payload")

    def __init__(self, kind: Kind, size: int, fds: tuple[int, ...], is_lost: bool, data: bytes) -> None:
        self.kind = kind
        self.fds = fds
        self.is_lost = is_lost
        self.have = len(data)  # bytes
        self.payload = bytearray(size)
        self.payload[: self.have] = data


# A NamedTuple's own way to itself takes twice as long.
_new = tuple.__new__

_USER = int(Kind.USER)

# Indexed by its number, which is quicker than Kind(number). The first is none.
_KINDS = (Kind.CONTROL, *Kind)
