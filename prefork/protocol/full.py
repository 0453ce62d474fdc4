"""The full cycle: the body of any request, read by h11 behind a fence.

One `h11.Connection` per request reads the same head that `head.py` has checked,
and then the body. It never answers, and it is never given a byte that does not
belong to this request: a *fence* walks over the bytes first, keeps what follows
the body for the next request, and refuses what h11 would tolerate in chunked
coding (bare LF, white space after a size, endless extensions, framing fields in
trailers).

The fence and h11 find the body's end each on their own. If they ever differ, the
request is refused: two readings of one message are an attack or a bug.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Protocol

import h11

from prefork.protocol.events import Headers, Request
from prefork.protocol.head import TOKEN, HeadRefused, Refused, parse_field, shown
from prefork.protocol.limits import Limits

# Hexadecimal digits of a chunk's size: 64 bits, what peers in C can count to.
MAX_SIZE_DIGITS = 16

# RFC 9112 section 7.1.1, without the "bad white space" before a semicolon that it tolerates.
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_EXTENSION = rb";[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?" % (TOKEN, TOKEN, _QUOTED)
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,%d})((?:%b)*)\r\n" % (MAX_SIZE_DIGITS, _EXTENSION))

# RFC 9110 section 6.5.1: fields that say where a message ends, where it goes or how the
# connection lives come too late in a trailer. Some peer may obey them all the same.
_NOT_IN_TRAILERS = frozenset(
    {
        b"connection",
        b"content-length",
        b"content_length",
        b"expect",
        b"host",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"transfer_encoding",
        b"upgrade",
    }
)


class BodyRefused(Refused):
    """What was broken stands in a body."""


class BodyReader(Protocol):
    """The body of one request, transfer coding removed."""

    is_complete: bool
    left: int  # bytes of it that are still to be read, 0 if that is not known
    trailers: Headers

    def read(self, data: bytes, at: int) -> tuple[bytes, int]:
        """What the bytes of *data* from *at* on say of the body, and where in *data* they end to be the body's.

        There is at least one byte. Raises Refused.
        """


def always_full(request: Request, head: bytes, limits: Limits) -> BodyReader:
    """The reader of what follows *head*, which said *request*; h11 reads any request, with a body or without."""
    fence: Fence = ChunkedFence(limits) if request.chunked else LengthFence(request.content_length or 0)
    return FullBody(head, fence, limits)


class FullBody:
    """A body read by h11."""

    __slots__ = ("_fence", "_h11", "is_complete", "trailers")

    left = 0

    def __init__(self, head: bytes, fence: Fence, limits: Limits) -> None:
        # h11 holds incomplete lines up to this size; the fence refuses before, with a better reason.
        held = limits.extension_size + limits.trailer_size
        self.is_complete = False
        self.trailers: Headers = []
        self._fence = fence
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=held)
        self._h11.receive_data(head)
        self._next_event()
        if fence.is_complete:
            self._gather()

    def read(self, data: bytes, at: int) -> tuple[bytes, int]:
        end = self._fence.advance(data, at)
        self._h11.receive_data(data[at:end])
        return self._gather(), end

    def _gather(self) -> bytes:
        """All there is in one piece: a peer that sends chunks of one byte costs one event, not thousands."""
        pieces: list[bytes] = []
        while isinstance(event := self._next_event(), h11.Data):
            pieces.append(event.data)
        if isinstance(event, h11.EndOfMessage):
            self.is_complete = True
            self.trailers = list(event.headers)
        if self.is_complete != self._fence.is_complete:
            raise BodyRefused(400, "the body can be read in two ways that end at different bytes")
        return b"".join(pieces)  # h11 gives bytearrays

    def _next_event(self) -> object:
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as exc:
            raise BodyRefused(400, f"the message is not HTTP: {exc}") from exc


class Fence(Protocol):
    """Where a body ends, found without reading it."""

    @property
    def is_complete(self) -> bool: ...

    def advance(self, data: bytes, at: int) -> int:
        """Where the body ends in *data*, whose bytes from *at* on come next. Raises Refused."""


class LengthFence:
    """The end of a body of known length."""

    __slots__ = ("_left",)

    def __init__(self, length: int) -> None:
        self._left = length  # bytes

    @property
    def is_complete(self) -> bool:
        return self._left == 0

    def advance(self, data: bytes, at: int) -> int:
        size = min(self._left, len(data) - at)
        self._left -= size
        return at + size


class Line(Enum):
    """What the next line of a chunked body has to be, when it is not a chunk's data."""

    SIZE = "a chunk's size and extensions"
    FOOTER = "the CRLF after a chunk's data"
    TRAILER = "a trailer field, or the empty line after them"


class ChunkedFence:
    """The end of a chunked body (RFC 9112 section 7.1), lines checked and data skipped."""

    __slots__ = (
        "_awaited",
        "_extensions",
        "_left",
        "_limits",
        "_line",
        "_size",
        "_trailer_size",
        "_trailers",
        "is_complete",
    )

    def __init__(self, limits: Limits) -> None:
        self.is_complete = False
        self._limits = limits
        self._awaited = Line.SIZE
        self._line = bytearray()  # what has come of the awaited line
        self._left = 0  # bytes of the current chunk's data still to come
        self._size = 0  # bytes of data announced so far
        self._extensions = 0  # bytes
        self._trailers = 0
        self._trailer_size = 0  # bytes

    def advance(self, data: bytes, at: int) -> int:
        while at < len(data) and not self.is_complete:
            if self._left:
                size = min(self._left, len(data) - at)
                self._left -= size
                at += size
            else:
                at = self._advance_line(data, at)
        return at

    def _advance_line(self, data: bytes, at: int) -> int:
        end = data.find(b"\n", at) + 1 or len(data)
        self._line += data[at:end]
        self._check_room()
        if self._line.endswith(b"\n"):
            line = bytes(self._line)
            self._line.clear()
            self._take(line)
        return end

    def _check_room(self) -> None:
        """Refuse a line as soon as it is too long, whole or not."""
        limits, size = self._limits, len(self._line)
        if self._awaited is Line.SIZE and size > MAX_SIZE_DIGITS + limits.extension_size - self._extensions + 2:
            raise BodyRefused(400, f"chunk extensions are too long: {limits.extension_size} bytes are allowed")
        if self._awaited is Line.FOOTER and bytes(self._line[:3]) not in (b"\r", b"\r\n"):
            raise BodyRefused(400, f"a chunk's data is followed by {shown(bytes(self._line))}, not by CRLF")
        if self._awaited is Line.TRAILER and size + self._trailer_size > limits.trailer_size:
            raise HeadRefused(431, f"the trailer section is too long: {limits.trailer_size} bytes are allowed")

    def _take(self, line: bytes) -> None:
        if self._awaited is Line.SIZE:
            self._take_size(line)
        elif self._awaited is Line.FOOTER:
            self._awaited = Line.SIZE
        else:
            self._take_trailer(line)

    def _take_size(self, line: bytes) -> None:
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise BodyRefused(400, f"the line {shown(line)} is not a chunk's size with extensions")
        self._extensions += len(match[2])
        self._left = int(match[1], 16)
        self._size += self._left
        self._awaited = Line.FOOTER if self._left else Line.TRAILER
        if 0 < self._limits.body_size < self._size:
            raise BodyRefused(413, f"the body has {self._size} bytes or more, {self._limits.body_size} are allowed")

    def _take_trailer(self, line: bytes) -> None:
        if line == b"\r\n":
            self.is_complete = True
            return
        name, _ = parse_field(line.removesuffix(b"\r\n"))
        if name in _NOT_IN_TRAILERS:
            raise HeadRefused(400, f"the field {name.decode()} is not allowed in a trailer section")
        self._trailers += 1
        self._trailer_size += len(line)
        if self._trailers > self._limits.field_count:
            raise HeadRefused(431, f"too many trailer fields: {self._limits.field_count} are allowed")
