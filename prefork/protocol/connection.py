"""One HTTP/1.1 connection, server side: bytes in, events out; answers in, bytes out.

It owns no socket and no clock, and starts nothing by itself: the owner feeds what
arrives, pulls events until it gets a `Wait`, and sends the bytes it is handed.

A connection is a sequence of cycles, one request and its response each. Reading
and answering advance on their own within a cycle (an answer may begin before the
body has come, or be complete before it), and the next cycle begins only when both
are complete. Until then the next request stays, unparsed, in the buffer.
"""

from __future__ import annotations

import re
from enum import Enum

from prefork.errors import ResponseError
from prefork.protocol.events import (
    NEED_DATA,
    PAUSED,
    Closed,
    Data,
    EndOfMessage,
    Event,
    Headers,
    Refusal,
    Request,
)
from prefork.protocol.full import BodyReader, NoBody, body_reader
from prefork.protocol.head import HeadRefused, Refused, parse_head, too_large
from prefork.protocol.limits import Limits
from prefork.protocol.response import CONTINUE, Answer, Bodiless, BodyWriter, answer

_BARE_LF = re.compile(rb"(?<!\r)\n")


class Reading(Enum):
    """Where the request is."""

    HEAD = "waiting for a head, or in it"
    BODY = "after the head"
    COMPLETE = "its end was told"


class Answering(Enum):
    """Where the response is."""

    HEAD = "not begun"
    BODY = "after the head"
    COMPLETE = "its last byte was handed out"


class Connection:
    """One HTTP/1.1 connection, server side. Bytes in, events out; answers in, bytes out. No I/O."""

    __slots__ = (
        "_answering",
        "_buffer",
        "_empty_lines",
        "_eof",
        "_last",
        "_limits",
        "_over",
        "_reader",
        "_reading",
        "_request",
        "_scanned",
        "_server",
        "_wants_continue",
        "_writer",
    )

    def __init__(self, limits: Limits, *, server: bytes = b"prefork") -> None:
        self._limits = limits
        self._server = server
        self._buffer = bytearray()
        self._eof = False
        self._over = False  # refused or closed: nothing more is read
        self._last = False  # no cycle follows this one
        self._begin_cycle()

    def _begin_cycle(self) -> None:
        self._reading = Reading.HEAD
        self._scanned = 0  # bytes at the buffer's front known not to hold the head's end
        self._empty_lines = 0
        self._request: Request | None = None
        self._reader: BodyReader = NoBody()
        self._wants_continue = False
        self._answering = Answering.HEAD
        self._writer: BodyWriter = Bodiless()

    def receive_data(self, data: bytes) -> None:
        """What the peer sent; b"" is its end of file. Pull `next_event` after it."""
        if not data:
            self._eof = True
        elif not self._over:
            self._buffer += data

    def next_event(self) -> Event:
        """What happened next, or a `Wait`. `Refusal` and `Closed` are told once and nothing is read after them."""
        if self._over:
            return NEED_DATA
        try:
            if self._reading is Reading.HEAD:
                return self._read_head()
            if self._reading is Reading.BODY:
                return self._read_body()
        except Refused as refused:
            self._stop_reading()
            return Refusal(refused.status, refused.reason)
        return PAUSED if self._buffer else self._await_data(clean=True)

    def send_continue(self) -> bytes:
        """The interim answer to `Expect: 100-continue`; b"" if none is awaited (any more)."""
        if not self.wants_continue or self._answering is not Answering.HEAD:
            return b""
        self._wants_continue = False
        return CONTINUE

    def send_head(self, status: int, headers: Headers, body: bytes, more: bool, *, date: bytes) -> bytes:
        """Begin the response with its head and first piece; *more* false completes it.

        Raises ResponseError for what HTTP forbids, and then nothing was begun:
        another response may be sent instead.
        """
        if self._request is None or self._answering is not Answering.HEAD:
            raise ResponseError(f"status {status} answers no request: {self._describe()}")
        started = self._answer(status, headers, None if more else len(body), date)
        data = started.head + started.writer.write(body, more)
        self._begin_answer(started, more)
        return data

    def send_body(self, data: bytes, more: bool) -> bytes:
        """The next piece; *more* false completes the response.

        Raises ResponseError out of turn, and for more or fewer bytes than announced:
        then the response cannot be saved, and the connection has to be cut.
        """
        if self._answering is not Answering.BODY:
            raise ResponseError(f"a piece of body has no place here: {self._describe()}")
        try:
            piece = self._writer.write(data, more)
        except ResponseError:
            self._last = True
            raise
        if not more:
            self._answering = Answering.COMPLETE
        return piece

    def refuse(self, refusal: Refusal, *, date: bytes) -> bytes:
        """The whole answer to a request that is not served, and the end of the connection after it.

        b"" if a response has begun: nothing that the peer would understand can follow.
        """
        self._stop_reading()
        self._last = True
        if self._answering is not Answering.HEAD:
            return b""
        body = refusal.reason.encode("ascii", "backslashreplace") + b"\n"
        started = self._answer(refusal.status, [(b"content-type", b"text/plain; charset=us-ascii")], len(body), date)
        self._begin_answer(started, more=False)
        return started.head + started.writer.write(body, False)

    def close_after(self) -> None:
        """Drain: the answer in flight says `Connection: close` if its head is unsent; no request follows it."""
        self._last = True

    def start_next_cycle(self) -> None:
        """Go on to the next request, which may be in the buffer already."""
        if not (self.request_complete and self.response_complete and self.keep_alive):
            raise ResponseError(f"the next request has to wait: {self._describe()}")
        self._begin_cycle()

    @property
    def request_complete(self) -> bool:
        """`EndOfMessage` was told."""
        return self._reading is Reading.COMPLETE

    @property
    def response_complete(self) -> bool:
        """The response's last byte was handed out."""
        return self._answering is Answering.COMPLETE

    @property
    def is_idle(self) -> bool:
        """Between two cycles, and nothing of a next request is here."""
        return self._reading is Reading.HEAD and not self._buffer and not self._over

    @property
    def has_partial_head(self) -> bool:
        """A request has begun to arrive and its head is not complete."""
        return self._reading is Reading.HEAD and bool(self._buffer)

    @property
    def keep_alive(self) -> bool:
        """Another request may follow, once both sides of this one are complete."""
        if self._last or self._over or (self._eof and not self._buffer):
            return False
        return self._request is None or self._request.keep_alive

    @property
    def wants_continue(self) -> bool:
        """`Expect: 100-continue` is unanswered, so whether the body will come is unknown."""
        return self._wants_continue and not self._buffer

    @property
    def buffered(self) -> int:
        """Bytes received and not yet told of."""
        return len(self._buffer)

    def _read_head(self) -> Event:
        size = self._find_head()
        if not size:
            return self._await_data(clean=not self._buffer)
        head = bytes(self._buffer[:size])
        del self._buffer[:size]
        request = parse_head(head, self._limits)
        self._request = request
        self._reader = body_reader(request, head, self._limits)
        self._wants_continue = request.expect_continue
        self._reading = Reading.BODY
        return request

    def _find_head(self) -> int:
        """The size of the head at the buffer's front, 0 while it is incomplete. Scans only what is new."""
        buffer = self._buffer
        if self._scanned == 0 and not self._find_first_line():
            return 0
        end = buffer.find(b"\r\n\r\n", self._scanned)
        if end >= 0:
            return end + 4
        # Without this a client that ends its lines with LF alone would wait for its deadline.
        if _BARE_LF.search(buffer, self._scanned):
            raise HeadRefused(400, "a line of the head ends in a bare LF")
        if len(buffer) > self._limits.head_size:
            raise too_large(buffer, self._limits)
        self._scanned = max(len(buffer) - 3, 0)
        return 0

    def _find_first_line(self) -> bool:
        """Skip the empty lines that RFC 9112 section 2.2 asks us to ignore. False: nothing else is here."""
        buffer = self._buffer
        while buffer.startswith(b"\r\n"):
            self._empty_lines += 1
            if self._empty_lines > self._limits.empty_lines:
                raise HeadRefused(400, f"more than {self._limits.empty_lines} empty lines before a request")
            del buffer[:2]
        if not buffer or buffer == b"\r":
            return False
        if not 0x21 <= buffer[0] <= 0x7E:
            raise HeadRefused(400, f"byte 0x{buffer[0]:02x} cannot begin a request (TLS begins with 0x16)")
        return True

    def _read_body(self) -> Event:
        reader = self._reader
        if self._buffer and not reader.is_complete:
            self._wants_continue = False
            if data := reader.read(self._buffer):
                return Data(data)
        if not reader.is_complete:
            return self._await_data(clean=False)
        self._reading = Reading.COMPLETE
        return EndOfMessage(reader.trailers)

    def _await_data(self, *, clean: bool) -> Event:
        if not self._eof:
            return NEED_DATA
        self._stop_reading()
        return Closed(clean)

    def _stop_reading(self) -> None:
        self._over = True
        self._buffer.clear()

    def _answer(self, status: int, headers: Headers, whole: int | None, date: bytes) -> Answer:
        request = self._request
        return answer(
            status,
            headers,
            whole=whole,
            method=request.method if request is not None else "",
            version=request.version if request is not None else "1.1",
            # A body that may or may not come cannot be told from a next request.
            keep_alive=self.keep_alive and not self.wants_continue,
            date=date,
            server=self._server,
        )

    def _begin_answer(self, started: Answer, more: bool) -> None:
        self._writer = started.writer
        self._last |= not started.keep_alive
        self._answering = Answering.BODY if more else Answering.COMPLETE

    def _describe(self) -> str:
        return (
            f"the request is {self._reading.name.lower()}, the response {self._answering.name.lower()}, "
            f"and another request {'may' if self.keep_alive else 'may not'} follow"
        )
