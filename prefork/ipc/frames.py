"""Frames on an IPC channel: bytes and descriptors in, frames out.

Nothing here does I/O, and nothing closes a descriptor. `Decoder` is fed what one recvmsg(2)
returned and gives back whole frames; `encode` is its inverse.

Descriptors reach us no later than the first byte of the frame that owns them, because sendmsg(2)
ties them to that byte. They may come in the same read as earlier frames, so the decoder queues
them and each header claims its own.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from prefork.errors import FrameError

# Linux refuses more than 253 descriptors in one sendmsg(2) (SCM_MAX_FD). We stop far below, so
# that a sender's bug cannot fill the receiver's descriptor table.
MAX_FDS = 16

# Far above any message that makes sense to send in one piece: a length beyond it is more likely
# to be bytes that are no header at all, and the receiver would have to buffer it.
MAX_SIZE = 64 * 1024 * 1024  # bytes of payload

# Length of the payload, kind, number of descriptors. Network order, so that a dump reads well.
_HEADER = struct.Struct("!IBB")
HEADER_SIZE = _HEADER.size  # bytes


class Kind(IntEnum):
    """Whose frame it is. There is no 0: a run of zero bytes is not a frame."""

    CONTROL = 1  # between our own processes, never shown to an application
    USER = 2  # between an application's processes
    HANDOFF = 3  # an accepted connection for the receiver to serve
    ACK = 4  # what became of a HANDOFF
    PUBLISH = 5  # a topic and what is published under it, passed on as it came


@dataclass(frozen=True, slots=True)
class Frame:
    """A payload and the descriptors that go with it."""

    kind: Kind
    payload: bytes
    fds: tuple[int, ...] = ()


def encode(frame: Frame) -> bytes:
    """The bytes of *frame*. Its descriptors must ride with the first of them."""
    size, count = len(frame.payload), len(frame.fds)
    if size > MAX_SIZE:
        raise FrameError(f"a payload of {size} bytes is too large for a frame: {MAX_SIZE} are allowed")
    if count > MAX_FDS:
        raise FrameError(f"{count} descriptors are too many for a frame: {MAX_FDS} are allowed")
    return _HEADER.pack(size, frame.kind, count) + frame.payload


class Decoder:
    """Whole frames out of reads that were cut anywhere. After a FrameError it is of no further use."""

    __slots__ = ("_buffer", "_claimed", "_fds", "_header", "_max_size")

    def __init__(self, max_size: int = MAX_SIZE) -> None:
        self._max_size = max_size
        self._buffer = bytearray()
        self._header: tuple[int, Kind] | None = None  # size and kind of the frame being received
        self._claimed: tuple[int, ...] = ()  # its descriptors
        self._fds: deque[int] = deque()  # those no header has claimed yet

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[Frame]:
        """The frames completed by *data*, which came together with *fds*.

        Raises FrameError. The descriptors of frames it would have returned are then among the `leftovers`.
        """
        self._buffer += data
        self._fds.extend(fds)
        frames: list[Frame] = []
        try:
            while (frame := self._next_frame()) is not None:
                frames.append(frame)
            self._check_unclaimed()
        except FrameError:
            for frame in reversed(frames):
                self._fds.extendleft(reversed(frame.fds))
            raise
        return frames

    def leftovers(self) -> list[int]:
        """Give up the descriptors that no returned frame owns. The caller closes them."""
        left = [*self._claimed, *self._fds]
        self._claimed = ()
        self._fds.clear()
        return left

    def _next_frame(self) -> Frame | None:
        if self._header is None and not self._take_header():
            return None
        assert self._header is not None
        size, kind = self._header
        if len(self._buffer) < size:
            return None
        frame = Frame(kind, bytes(memoryview(self._buffer)[:size]), self._claimed)
        del self._buffer[:size]
        self._header, self._claimed = None, ()
        return frame

    def _take_header(self) -> bool:
        if len(self._buffer) < HEADER_SIZE:
            return False
        size, number, count = _HEADER.unpack_from(self._buffer)
        if number not in _KINDS:
            raise FrameError(f"frame is of kind {number}, known are {min(Kind)} to {max(Kind)}")
        if size > self._max_size:
            raise FrameError(f"frame claims {size} bytes, {self._max_size} are allowed")
        if count > MAX_FDS:
            raise FrameError(f"frame claims {count} descriptors, {MAX_FDS} are allowed")
        if count > len(self._fds):
            raise FrameError(f"frame claims {count} descriptors, {len(self._fds)} arrived")
        del self._buffer[:HEADER_SIZE]
        self._header = size, Kind(number)
        self._claimed = tuple(self._fds.popleft() for _ in range(count))
        return True

    def _check_unclaimed(self) -> None:
        """Only a header that is still incomplete may yet claim what is queued."""
        header_is_pending = self._header is None and bool(self._buffer)
        if self._fds and not header_is_pending:
            raise FrameError(f"{len(self._fds)} descriptors arrived that no frame claims")


_KINDS = frozenset(Kind)
