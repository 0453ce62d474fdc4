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
from collections.abc import Iterable
from enum import Enum

from prefork.errors import ResponseError
from prefork.protocol.events import (
    NEED_DATA,
    PAUSED,
    Closed,
    Data,
    EndOfMessage,
    Event,
    Refusal,
    Request,
)
from prefork.protocol.fast import NO_BODY, ChooseCycle, choose_cycle
from prefork.protocol.full import BodyReader
from prefork.protocol.head import HeadRefused, Refused, head_parser, too_large
from prefork.protocol.limits import Limits
from prefork.protocol.response import (
    BODILESS,
    CHUNKED,
    CONTINUE,
    WHOLE,
    BodyWriter,
    Field,
    FieldLines,
    answer,
    interim,
    last_chunk,
)

# Bytes of body above which it is not copied to stand behind its head: two writes cost less.
JOINED = 16 * 1024

TLS_HANDSHAKE = 0x16  # the content type of a client's first record (RFC 8446, section 5.1)

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
        "_at",
        "_buffer",
        "_choose",
        "_empty_lines",
        "_end",
        "_eof",
        "_is_ending",
        "_is_head",
        "_is_plain",
        "_is_ready",
        "_last",
        "_limits",
        "_over",
        "_parser",
        "_reader",
        "_reading",
        "_recall",
        "_request",
        "_scanned",
        "_server",
        "_wants_continue",
        "_writer",
    )

    def __init__(self, limits: Limits, *, server: bytes = b"prefork", choose: ChooseCycle = choose_cycle) -> None:
        """*server* is the value of that field, empty for none; *choose* says who reads the body of which request."""
        self._limits = limits
        self._parser = head_parser(limits)
        self._recall = self._parser.recall
        self._server = b"server: %b\r\n" % server if server else b""
        self._end = self._server + b"\r\n"  # of a head
        self._choose = choose
        self._buffer = b""
        self._at = 0  # what stands before it in the buffer has been read
        self._eof = False
        self._over = False  # refused or closed: nothing more is read
        self._last = False  # no cycle follows this one
        self._is_ending = False  # one of the three above, so that the ordinary case looks at one only
        self._is_ready = False  # for `receive_request`: nothing is in hand, and not ending
        self._is_plain = False  # for `send_whole`: what is in hand is a whole plain request, with nothing behind it
        self._is_head = False  # what was refused was to begin with that method
        self._scanned = 0  # where in the buffer the head's end may begin
        self._empty_lines = 0
        self._reader: BodyReader = NO_BODY
        self._writer: BodyWriter = BODILESS
        self._begin_cycle()

    def _begin_cycle(self) -> None:
        self._reading = Reading.HEAD
        self._answering = Answering.HEAD
        self._request: Request | None = None
        self._wants_continue = False
        self._is_plain = False
        if self._buffer:
            if self._at == len(self._buffer):  # an idle connection holds no memory of its last request
                self._buffer, self._at = b"", 0
            self._scanned = self._at
            self._empty_lines = 0
        self._is_ready = not (self._buffer or self._is_ending) and self._choose is choose_cycle

    def receive_data(self, data: bytes) -> None:
        """What the peer sent; b"" is its end of file. Pull `next_event` after it."""
        self._is_ready = self._is_plain = False
        if not data:
            self._eof = self._is_ending = True
        elif not self._over:
            self._scanned -= self._at
            self._buffer = self._buffer[self._at :] + data if self._at < len(self._buffer) else data
            self._at = 0

    def receive_request(self, data: bytes) -> tuple[Request, bytes] | None:
        """`receive_data`, then `next_request`; at once where *data* is a head seen before and all that is here."""
        if self._is_ready and data.endswith(b"\r\n\r\n"):  # anything else would be hashed in vain
            request = self._recall(data)
            if request is not None and not request.has_body:
                self._request = request
                self._reading = Reading.COMPLETE
                self._is_ready = False
                self._is_plain = request.is_plain
                return request, b""
        self.receive_data(data)
        return self.next_request()

    def next_request(self) -> tuple[Request, bytes] | None:
        """The next request and its body, if it is here as a whole, its length known; no event is told of them.

        None in any other case: pull `next_event`.
        """
        if self._reading is not Reading.HEAD or self._is_ending or self._choose is not choose_cycle:
            return None
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n", self._scanned) + 4
        if end < 4:
            return None
        try:
            request = self._parser.parse(buffer[self._at : end])
        except Refused:  # told as an event
            return None
        stop = end + (request.content_length or 0)
        if request.chunked or stop > len(buffer):
            return None
        self._request = request
        self._reading = Reading.COMPLETE
        body = buffer[end:stop]
        if stop == len(buffer):
            self._buffer, self._at, self._scanned, self._empty_lines = b"", 0, 0, 0
            self._is_plain = request.is_plain
        else:
            self._at = self._scanned = stop
        return request, body

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
            self._is_head = self._request is None and self._buffer.startswith(b"HEAD ", self._at)
            self._stop_reading()
            return Refusal(refused.status, refused.reason)
        return PAUSED if self._at < len(self._buffer) else self._await_data(clean=True)

    def send_continue(self) -> bytes:
        """The interim answer to `Expect: 100-continue`; b"" if none is awaited (any more)."""
        if not self.wants_continue or self._answering is not Answering.HEAD:
            return b""
        self._wants_continue = False
        return CONTINUE

    def send_interim(self, status: int, headers: Iterable[Field]) -> bytes:
        """An interim response, such as 103 (RFC 8297), before the final one; b"" for a client of HTTP/1.0.

        Raises ResponseError for what HTTP forbids, and after the final response has begun.
        """
        request = self._request
        if request is None or self._answering is not Answering.HEAD:
            raise ResponseError(f"interim status {status} has no place here: {self._describe()}")
        data = interim(status, headers)
        # RFC 9110 section 15.2: "A server MUST NOT send a 1xx response to an HTTP/1.0 client."
        return data if request.version == "1.1" else b""

    def send_head(
        self, status: int, headers: Iterable[Field], body: bytes, more: bool, *, date: bytes
    ) -> tuple[bytes, bytes]:
        """Begin the response with its head and first piece; *more* false completes it. *date* is the line of that field.

        The bytes to write, and more bytes to write after them, of a piece too large to be
        copied. Raises ResponseError for what HTTP forbids, and then nothing was begun:
        another response may be sent instead.
        """
        request = self._request
        if request is None or self._answering is not Answering.HEAD:
            raise ResponseError(f"status {status} answers no request: {self._describe()}")
        head, writer, keep_alive = answer(
            status,
            headers,
            whole=None if more else len(body),
            method=request.method,
            version=request.version,
            # A body that may or may not come cannot be told from a next request.
            keep_alive=(self.keep_alive if self._is_ending else request.keep_alive)
            and not (self._wants_continue and self.wants_continue),
            date=date,
            server=self._server,
        )
        if writer is not WHOLE:
            body = writer.write(body, more)
        self._writer = writer
        self._is_plain = False
        if not keep_alive:
            self._last = self._is_ending = True
        self._answering = Answering.BODY if more else Answering.COMPLETE
        if len(body) > JOINED:
            return b"".join(head), body
        head.append(body)
        return b"".join(head), b""

    def send_whole(self, status: int, headers: FieldLines, body: bytes, *, date: bytes) -> bytes:
        """The ordinary answer to the ordinary request, and on to the next one: what is returned is all that is to be written.

        b"" if anything is out of the ordinary, and then nothing was begun: `send_head` is for
        all. Raises ResponseError as that does.
        """
        size = len(body)
        if not self._is_plain or size > JOINED:
            return b""
        is_known = headers.status == status and headers.size == size
        head = headers.head if is_known else headers.begin_plain(status, size)
        if head:
            self._is_plain = False
            self._is_ready = True
            self._request = None
            self._reading = Reading.HEAD
            return b"".join((head, date, self._end, body))
        return b""

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
            self._last = self._is_ending = True
            raise
        if not more:
            self._answering = Answering.COMPLETE
        return piece

    def frame(self, size: int) -> tuple[bytes, bytes] | None:
        """For the next piece, of *size* bytes, that the caller sends itself: what to send before and after it.

        None if nothing is to be sent, as in answer to HEAD. Raises ResponseError as `send_body`.
        """
        if self._answering is not Answering.BODY:
            raise ResponseError(f"a piece of body has no place here: {self._describe()}")
        try:
            return self._writer.frame(size)
        except ResponseError:
            self._last = self._is_ending = True
            raise

    def send_trailers(self, trailers: Iterable[Field]) -> bytes:
        """The end of the response, with fields behind the body if that is chunked and the client takes trailers.

        Others may drop them (RFC 9110 section 6.5.1), and then so do we. Raises ResponseError as `send_body`.
        """
        request = self._request
        if request is None or self._writer is not CHUNKED or not takes_trailers(request):
            return self.send_body(b"", False)
        data = last_chunk(trailers)
        self.send_body(b"", False)
        return data

    def refuse(self, refusal: Refusal, *, date: bytes) -> bytes:
        """The whole answer to a request that is not served, and the end of the connection after it.

        b"" if a response has begun: nothing that the peer would understand can follow.
        """
        self._stop_reading()
        self._last = True
        if self._answering is not Answering.HEAD:
            return b""
        request = self._request
        # Its answer has no content, even if nothing else of it was understood (RFC 9110 section 9.3.2).
        method = request.method if request is not None else "HEAD" if self._is_head else ""
        body = refusal.reason.encode("ascii", "backslashreplace") + b"\n"
        head, writer, _ = answer(
            refusal.status,
            [(b"content-type", b"text/plain; charset=us-ascii")],
            whole=len(body),
            method=method,
            version=request.version if request is not None else "1.1",
            keep_alive=False,
            date=date,
            server=self._server,
        )
        self._answering = Answering.COMPLETE
        return b"".join(head) + writer.write(body, False)

    def close_after(self) -> None:
        """Drain: the answer in flight says `Connection: close` if its head is unsent; no request follows it."""
        self._last = self._is_ending = True
        self._is_ready = self._is_plain = False

    def start_next_cycle(self) -> bool:
        """Go on to the next request, which may be in the buffer already. False if the connection is to be closed instead.

        Raises ResponseError while this request or its response is incomplete.
        """
        if self._reading is not Reading.COMPLETE or self._answering is not Answering.COMPLETE:
            raise ResponseError(f"the next request has to wait: {self._describe()}")
        if self._is_ending and not self.keep_alive:
            return False
        if self._request is not None and not self._request.keep_alive:
            return False
        self._begin_cycle()
        return True

    def take_buffer(self) -> bytes:
        """What was received and not read, for whoever speaks on this connection after an upgrade: it is over here."""
        rest = self._buffer[self._at :]
        self._stop_reading()
        self._last = True
        self._answering = Answering.COMPLETE
        return rest

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
        return self._reading is Reading.HEAD and self._at == len(self._buffer) and not self._over

    @property
    def has_partial_head(self) -> bool:
        """A request has begun to arrive and its head is not complete."""
        return self._reading is Reading.HEAD and self._at < len(self._buffer)

    @property
    def keep_alive(self) -> bool:
        """Another request may follow, once both sides of this one are complete."""
        if self._last or self._over or (self._eof and self._at == len(self._buffer)):
            return False
        return self._request is None or self._request.keep_alive

    @property
    def unread(self) -> int:
        """Bytes of the request's body that were not told of, as far as that is known: 0 for a chunked one."""
        return self._reader.left if self._reading is Reading.BODY else 0

    @property
    def is_unexpected_end(self) -> bool:
        """The client asked to keep the connection, so another request of its may be on its way when we close."""
        return self._request is not None and self._request.keep_alive

    @property
    def wants_continue(self) -> bool:
        """`Expect: 100-continue` is unanswered, so whether the body will come is unknown."""
        return self._wants_continue and self._at == len(self._buffer)

    @property
    def buffered(self) -> int:
        """Bytes received and not yet told of."""
        return len(self._buffer) - self._at

    def _read_head(self) -> Event:
        end = self._find_head()
        if not end:
            return self._await_data(clean=self._at == len(self._buffer))
        head = self._buffer[self._at : end]
        request = self._parser.parse(head)
        self._at = end
        self._request = request
        self._reader = self._choose(request, head, self._limits)
        self._wants_continue = request.expect_continue
        self._reading = Reading.BODY
        return request

    def _find_head(self) -> int:
        """Where in the buffer the head ends, 0 while it is incomplete. Scans only what is new."""
        buffer = self._buffer
        if self._scanned == self._at and not self._find_first_line():
            return 0
        end = buffer.find(b"\r\n\r\n", self._scanned)
        if end >= 0:
            return end + 4
        # Without this a client that ends its lines with LF alone would wait for its deadline.
        if _BARE_LF.search(buffer, self._scanned):
            raise HeadRefused(400, "a line of the head ends in a bare LF")
        if len(buffer) - self._at > self._limits.head_size:
            raise too_large(buffer[self._at :], self._limits)
        self._scanned = max(len(buffer) - 3, self._at)
        return 0

    def _find_first_line(self) -> bool:
        """Skip the empty lines that RFC 9112 section 2.2 asks us to ignore. False: nothing else is here."""
        buffer = self._buffer
        while buffer.startswith(b"\r\n", self._at):
            self._empty_lines += 1
            if self._empty_lines > self._limits.empty_lines:
                raise HeadRefused(400, f"more than {self._limits.empty_lines} empty lines before a request")
            self._at += 2
        self._scanned = self._at
        first = buffer[self._at : self._at + 2]
        if first in (b"", b"\r"):
            return False
        if not 0x21 <= first[0] <= 0x7E:
            hint = ", it begins a TLS handshake" if first[0] == TLS_HANDSHAKE else ""
            raise HeadRefused(400, f"byte 0x{first[0]:02x} cannot begin a request{hint}")
        return True

    def _read_body(self) -> Event:
        reader = self._reader
        if self._at < len(self._buffer) and not reader.is_complete:
            self._wants_continue = False
            data, self._at = reader.read(self._buffer, self._at)
            if self._at == len(self._buffer):
                # Hold no piece longer than its reader does.
                self._buffer, self._at, self._scanned, self._empty_lines = b"", 0, 0, 0
            if data:
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
        self._over = self._is_ending = True
        self._is_ready = self._is_plain = False
        self._buffer, self._at = b"", 0

    def _describe(self) -> str:
        return (
            f"the request is {self._reading.name.lower()}, the response {self._answering.name.lower()}, "
            f"and another request {'may' if self.keep_alive else 'may not'} follow"
        )


def takes_trailers(request: Request) -> bool:
    """The client said `TE: trailers` (RFC 9110 section 10.1.4)."""
    return any(
        name == b"te" and b"trailers" in [member.strip(b" \t") for member in value.lower().split(b",")]
        for name, value in request.headers
    )
