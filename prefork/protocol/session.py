"""An open WebSocket (RFC 6455, RFC 7692), server side: bytes in, messages out, and the other way round. No I/O.

The library is `websockets`, without its I/O. For an echo, in microseconds on CPython
3.11 (3.13), its `Protocol` beside wsproto's:

                             125 B            64 KB
    websockets              5.5 (3.7)        9.1 (9.2)
    wsproto                17.1 (9.8)        136 (110)
    websockets, deflate    13.0 (13.0)       425 (327)
    wsproto, deflate       20.4 (31.9)       346 (349)
    here                    0.6 (0.6)        2.5 (2.8)

In `Protocol`, a small message costs as much as all the rest of the server. So the ordinary
frames never reach it: a message in one frame, a ping, a pong and a correct close are
cut and unmasked here, with the library's `apply_mask`. It reads what is left, which
is fragments and everything that is wrong, and answers that with the right close
code. It also negotiates compression, deflates and inflates (`deflate`). It gets frames in order
and from their first byte on, and is made when the first of them comes, so that most
connections never have one.

Two things it leaves to us: text is checked as it arrives, not when the message is
complete; and a deflate stream that ends within a connection (see `Deflate`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from websockets.exceptions import PayloadTooBig, ProtocolError
from websockets.frames import Close, Frame, Opcode
from websockets.protocol import OPEN, SERVER, Protocol

from prefork.protocol.deflate import Deflate, negotiate
from prefork.protocol.frames import (
    BINARY,
    BINARY_HEADS,
    CLOSE,
    COMPRESSED,
    COPIED,
    MASKED,
    MAX_CONTROL,
    NO_STATUS,
    PING,
    PONG,
    TEXT,
    TEXT_HEADS,
    Arriving,
    Fragments,
    close_frame,
    control_frame,
    message_frame,
    unmask,
)

# What `load_sessions` hands out: all that needs the library comes with this module.
__all__ = ["NO_STATUS", "Closed", "Session", "negotiate"]

PROTOCOL_ERROR = 1002
INVALID_DATA = 1007
TOO_BIG = 1009

_WHOLE = frozenset({TEXT, BINARY})
_SHORT = frozenset({PING, PONG})
_MESSAGES = _WHOLE | {TEXT | COMPRESSED, BINARY | COMPRESSED}


@dataclass(frozen=True, slots=True)
class Closed:
    """The peer closed, or broke the protocol: nothing is read after this, and the answer is in `take_replies`.

    *code* is the peer's, NO_STATUS if it gave none; of a broken protocol, the one that it was told.
    """

    code: int
    reason: str
    is_failure: bool = False


class _ReadOn(Enum):
    READ_ON = "a frame was read, and there is nothing to tell of it"


READ_ON = _ReadOn.READ_ON


class Session:
    """One open WebSocket. Bytes in and messages out; messages in and frames out."""

    __slots__ = (
        "_at",
        "_buffer",
        "_deflate",
        "_fragments",
        "_is_over",
        "_library",
        "_max_packed",
        "_max_size",
        "_message",
        "_owed",
        "_replies",
        "is_closing",
    )

    def __init__(self, max_size: int, deflate: Deflate | None = None) -> None:
        """*max_size* bounds a message in bytes, inflated; *deflate* is what `negotiate` returned."""
        self.is_closing = False  # our close frame was made: no message follows it
        self._max_size = max_size
        self._max_packed = max_size if deflate is None else deflate.allow_growth(max_size)  # of a compressed frame
        self._deflate = deflate
        self._buffer = b""
        self._at = 0  # what stands before it in the buffer has been read
        self._is_over = False  # nothing more is read
        self._message: Arriving | None = None  # a message in one frame, of which a part is here
        self._fragments: Fragments | None = None  # a message in several frames
        self._library: Protocol | None = None
        self._owed = 0  # bytes of a frame of which the library has the beginning
        self._replies: list[bytes] = []

    # ---- in ----

    def receive_data(self, data: bytes) -> None:
        """What the peer sent. Pull `next_event` after it, and send `take_replies`."""
        if not self._is_over:
            self._buffer = self._buffer[self._at :] + data if self._at < len(self._buffer) else data
            self._at = 0

    def next_event(self) -> str | bytes | Closed | None:
        """The next whole message; `Closed`, once; None: more bytes are needed. Pings are answered by the way."""
        if self._message is not None or self._owed:
            event = self._continue()
            if not isinstance(event, _ReadOn):
                return event
        buffer, at = self._buffer, self._at
        end = len(buffer)
        while end - at >= 2:
            first = buffer[at]
            size = buffer[at + 1] - MASKED  # negative for a frame without a mask, which is wrong
            body = at + 6
            if size >= 126:
                body += 2 if size == 126 else 8
                if end < body:
                    break
                size, shortest = int.from_bytes(buffer[at + 2 : body - 4], "big"), size
                if size < (126 if shortest == 126 else 65536):
                    return self._fail(PROTOCOL_ERROR, "a length is not in its shortest form")

            if first in _WHOLE and self._fragments is None and 0 <= size <= self._max_size and body + size <= end:
                self._at = at = body + size
                if size < COPIED:
                    payload = unmask(buffer[body:at], buffer[body - 4 : body])
                else:
                    payload = unmask(memoryview(buffer)[body:at], buffer[body - 4 : body])
                if self.is_closing:
                    continue
                if first == BINARY:
                    return payload
                try:
                    return payload.decode()
                except UnicodeDecodeError as exc:
                    return self._fail_text(exc)
            if first in _SHORT and 0 <= size <= MAX_CONTROL:
                if end < body + size:
                    break
                at = body + size
                if first == PING and not self.is_closing:
                    payload = unmask(buffer[body:at], buffer[body - 4 : body])
                    self._replies.append(control_frame(PONG, payload))
                continue
            self._at = at
            event = self._begin(first, size, body)
            if not isinstance(event, _ReadOn):
                return event
            buffer, at = self._buffer, self._at
            end = len(buffer)
        self._buffer, self._at = (b"", 0) if at == end else (buffer, at)  # an idle connection holds no memory
        return None

    def take_replies(self) -> bytes:
        """What the peer has to be told for what it sent: pongs, and our part of the closing."""
        if not self._replies:
            return b""
        replies, self._replies = self._replies, []
        return b"".join(replies)

    # ---- out ----

    def text(self, data: str) -> bytes | tuple[bytes, bytes]:
        """The frame of a text message, in two parts if it is large. UnicodeEncodeError for half a surrogate pair, which UTF-8 cannot say."""
        payload = data.encode()
        if self._deflate is not None:
            return message_frame(TEXT | COMPRESSED, self._deflate.deflate(payload))
        size = len(payload)
        return TEXT_HEADS[size] + payload if size < 126 else message_frame(TEXT, payload)

    def binary(self, data: bytes) -> bytes | tuple[bytes, bytes]:
        """The frame of a binary message, in two parts if it is large."""
        if self._deflate is not None:
            return message_frame(BINARY | COMPRESSED, self._deflate.deflate(data))
        size = len(data)
        return BINARY_HEADS[size] + data if size < 126 else message_frame(BINARY, data)

    def ping(self) -> bytes:
        """An empty ping. Whatever arrives after it answers it: a busy peer may have more to say than a pong."""
        return bytes((PING, 0))

    def close(self, code: int, reason: str) -> bytes:
        """Our close frame; no message may follow it. b"" if it was sent already. *reason* is cut to what fits."""
        if self.is_closing:
            return b""
        self.is_closing = True
        return close_frame(code, reason)

    # ---- what is not ordinary, or not here as a whole ----

    def _begin(self, first: int, size: int, body: int) -> str | bytes | Closed | _ReadOn | None:
        """A frame whose header says *first* and *size*, and ends at *body*."""
        is_ours = first in (_WHOLE if self._deflate is None else _MESSAGES) and self._fragments is None
        if is_ours and 0 <= size <= (self._max_packed if first & COMPRESSED else self._max_size):
            if len(self._buffer) < body:
                return None
            self._message = Arriving(first, size, self._buffer[body - 4 : body])
            self._at = body
            return self._continue()
        if first == CLOSE and 0 <= size <= MAX_CONTROL:
            return self._take_close(body, size) if len(self._buffer) >= body + size else None
        if first & 8 and size > MAX_CONTROL:  # the library would read it to its end before it says so
            return self._fail(PROTOCOL_ERROR, f"a control frame has {size} bytes, up to {MAX_CONTROL} are allowed")
        self._owed = body - self._at + max(size, 0)
        return self._hand_over()

    def _continue(self) -> str | bytes | Closed | _ReadOn | None:
        """Go on with the frame that the last bytes ended in."""
        message = self._message
        if message is None:
            return self._hand_over()
        try:
            message.add(self._take(message.missing))
            if message.missing:
                return None
            self._message = None
            return READ_ON if self.is_closing and not message.first & COMPRESSED else self._complete(message)
        except UnicodeDecodeError as exc:
            return self._fail_text(exc)
        except PayloadTooBig:
            return self._fail(TOO_BIG, f"a message is larger than {self._max_size} bytes")
        except ProtocolError as exc:
            return self._fail(PROTOCOL_ERROR, str(exc))

    def _complete(self, message: Arriving) -> str | bytes | _ReadOn:
        payload = bytes(message.data)
        if message.first & COMPRESSED:  # inflated also when nobody wants it: the next one builds upon it
            assert self._deflate is not None
            payload = self._deflate.inflate(payload, self._max_size)
        if self.is_closing:
            return READ_ON
        return payload.decode() if message.is_text else payload

    def _take_close(self, body: int, size: int) -> Closed:
        """Here, because the library takes a close frame between two fragments for an error (but section 5.4)."""
        payload = unmask(self._buffer[body : body + size], self._buffer[body - 4 : body])
        try:
            close = Close.parse(payload)
        except UnicodeDecodeError as exc:
            return self._fail_text(exc)
        except ProtocolError as exc:
            return self._fail(PROTOCOL_ERROR, str(exc))
        self._reply_last(control_frame(CLOSE, payload))
        return Closed(close.code, close.reason)

    def _take(self, size: int) -> bytes:
        """Up to *size* bytes off the buffer."""
        at = self._at
        data = self._buffer[at : at + size]
        self._at = at + len(data)
        if self._at == len(self._buffer):
            self._buffer, self._at = b"", 0
        return data

    # ---- the library's part ----

    def _hand_over(self) -> str | bytes | Closed | _ReadOn | None:
        """Give the library the frame it is owed, or what is here of it."""
        library = self._library
        if library is None:
            library = self._library = Protocol(SERVER, state=OPEN, max_size=self._max_packed)
            if self._deflate is not None:
                library.extensions = [self._deflate]  # type: ignore[list-item] # not one by descent
        data = self._take(self._owed)
        self._owed -= len(data)
        library.receive_data(data)
        if library.parser_exc is not None:
            return self._take_failure(library)
        for frame in library.events_received():
            assert isinstance(frame, Frame)
            return self._take_fragment(frame)
        return None if self._owed else READ_ON

    def _take_fragment(self, frame: Frame) -> str | bytes | Closed | _ReadOn:
        if frame.opcode is not Opcode.CONT:
            self._fragments = Fragments(is_text=frame.opcode is Opcode.TEXT)
        message = self._fragments
        assert message is not None
        try:
            message.add(bytes(frame.data), is_last=frame.fin)
        except UnicodeDecodeError as exc:
            return self._fail_text(exc)
        if not frame.fin:
            return READ_ON
        self._fragments = None
        if self.is_closing:
            return READ_ON
        return message.data.decode() if message.is_text else bytes(message.data)

    def _take_failure(self, library: Protocol) -> Closed:
        said = library.close_sent
        self._reply_last(b"".join(library.data_to_send()))
        if said is None:
            return Closed(PROTOCOL_ERROR, str(library.parser_exc), is_failure=True)
        return Closed(int(said.code), said.reason, is_failure=True)

    # ---- the end ----

    def _fail_text(self, error: UnicodeDecodeError) -> Closed:
        return self._fail(INVALID_DATA, f"what should be text is not UTF-8: {error.reason}")

    def _fail(self, code: int, reason: str) -> Closed:
        self._reply_last(close_frame(code, reason))
        return Closed(code, reason, is_failure=True)

    def _reply_last(self, frame: bytes) -> None:
        if not self.is_closing:
            self.is_closing = True
            self._replies.append(frame)
        self._is_over = True
        self._buffer, self._at, self._owed = b"", 0, 0
        self._message = self._fragments = None
