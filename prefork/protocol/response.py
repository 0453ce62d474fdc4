"""Status line and fields of a response to bytes, and its body behind them.

Nothing an application passes can inject a line: names are tokens, values hold no
control byte, and everything that says where the message ends (Content-Length,
Transfer-Encoding, Connection, Keep-Alive) is written here and never copied.

The framing is chosen once, when the head is written: from then on the body's
writer knows how many bytes may follow and how they look on the wire.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Protocol

from prefork.errors import ResponseError
from prefork.protocol.head import MAX_LENGTH_DIGITS, TOKEN, shown
from prefork.protocol.memory import Memory

_NAME = re.compile(TOKEN)
_VALUE = re.compile(rb"[\t -~\x80-\xff]*")
_LENGTH = re.compile(rb"[0-9]{1,%d}" % MAX_LENGTH_DIGITS)

_LINES = {s.value: b"HTTP/1.1 %d %b\r\n" % (s.value, s.phrase.encode("ascii")) for s in HTTPStatus}
_STATUS_LINES = {status: line for status, line in _LINES.items() if status >= 200}
_INTERIM_LINES = {status: line for status, line in _LINES.items() if status > 101}

# Fields about this connection, which is ours (RFC 9110 section 7.6.1).
_DROPPED = frozenset({b"transfer-encoding", b"keep-alive", b"proxy-connection"})
_SPECIAL = _DROPPED | {b"connection", b"content-length", b"date", b"server", b"upgrade"}

_BODILESS = frozenset({204, 205, 304})
_CHUNKED = b"transfer-encoding: chunked\r\n"
_CLOSE = b"connection: close\r\n"
_UPGRADE = b"connection: upgrade\r\n"
_KEEP_ALIVE = b"connection: keep-alive\r\n"

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

Field = tuple[bytes, bytes]


class BodyWriter(Protocol):
    """The body of one response, with its transfer coding."""

    def write(self, data: bytes, more: bool) -> bytes:
        """*data* as it goes on the wire; *more* false completes it. Raises ResponseError."""

    def frame(self, size: int) -> tuple[bytes, bytes] | None:
        """What goes before and after *size* bytes, more than none, that are sent by others; None: they are not to be sent."""


class FieldLines:
    """An application's fields, checked: as lines, and what they say that is ours to decide.

    Responses repeat, so those with equal fields share one: nobody writes to it.
    Iterating gives the fields as the application had them.
    """

    __slots__ = (
        "close",
        "fields",
        "has_date",
        "has_server",
        "head",
        "is_plain",
        "length",
        "lines",
        "size",
        "status",
        "upgrade",
    )

    def __init__(self, fields: tuple[Field, ...]) -> None:
        self.fields = fields
        self.length: int | None = None
        self.close = self.has_date = self.has_server = self.upgrade = False
        self.lines = b"".join([_lines.get(field) or self._take(field) for field in fields])
        # They add nothing to the head but themselves, and leave nothing out of it.
        self.is_plain = not (self.close or self.has_date or self.has_server or self.upgrade)
        # The last that `begin_plain` has said, and for which status and size.
        self.head, self.status, self.size = b"", 0, 0

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)

    def begin_plain(self, status: int, size: int) -> bytes:
        """The head's beginning for a whole body of *size* bytes on a connection that lives on: all but Date and Server.

        b"" if the answer takes more thought: `answer` is for all. It is kept, since answers repeat.
        """
        if not self.is_plain or status in _BODILESS or self.length not in (None, size):
            return b""
        self.head = (_STATUS_LINES.get(status) or _status_line(status)) + self.lines + _length_line(size)
        self.status, self.size = status, size
        return self.head

    def _take(self, field: Field) -> bytes:
        """The line of a field not remembered, b"" if it is not to be copied."""
        name, value = _as_pair(field)
        name = name.lower()
        line = b"%b: %b\r\n" % (name, value)
        if name not in _SPECIAL:
            return _lines.remember(field, line, len(line))
        return line if self._is_copied(name, value) else b""

    def _is_copied(self, name: bytes, value: bytes) -> bool:
        """Remember what a special field says."""
        if name == b"content-length":
            self._take_length(value)
        elif name == b"connection":
            self.close |= b"close" in [option.strip(b" \t") for option in value.lower().split(b",")]
        elif name == b"date":
            self.has_date = True
            return True
        elif name == b"server":
            self.has_server = True
            return True
        elif name == b"upgrade":
            self.upgrade = True
            return True
        return False

    def _take_length(self, value: bytes) -> None:
        if self.length is not None:
            raise ResponseError("the response has two content-length fields")
        if not _LENGTH.fullmatch(value.strip(b" \t")):
            raise ResponseError(f"content-length {shown(value)} is not a decimal number of bytes")
        self.length = int(value)


_lines: Memory[Field, bytes] = Memory()
_field_lines: Memory[tuple[Field, ...], FieldLines] = Memory()


def field_lines(headers: Iterable[Field]) -> FieldLines:
    """*headers*, pairs of bytes, as lines. Raises ResponseError for what is no field."""
    if type(headers) is FieldLines:
        return headers
    fields = tuple(headers)
    try:
        known = _field_lines.get(fields)
    except TypeError:  # pairs that are lists, or parts that are no bytes
        fields = tuple(map(_as_pair, fields))
        known = None
    if known is None:
        known = FieldLines(fields)
        _field_lines.remember(fields, known, sum(len(name) + len(value) for name, value in fields))
    return known


def answer(
    status: int,
    headers: Iterable[Field],
    *,
    whole: int | None,
    method: str,
    version: str,
    keep_alive: bool,
    date: bytes,
    server: bytes,
) -> tuple[list[bytes], BodyWriter, bool]:
    """How to answer a request of *method* and *version*: the head's parts, its body's writer, and whether another may follow.

    *whole* is the size of the body if all of it is known now. *keep_alive* says
    whether the connection may live on; *date* and *server* are lines to add where the
    application gave none, or empty. Raises ResponseError.
    """
    fields = headers if type(headers) is FieldLines else field_lines(headers)
    head = [_STATUS_LINES.get(status) or _status_line(status), fields.lines]
    length = whole if fields.length is None else fields.length
    writer: BodyWriter
    if status in _BODILESS or method == "HEAD":
        head.append(_announce(status, fields.length, whole))
        writer = BODILESS
    elif length is not None:
        head.append(_length_lines.get(length) or _length_line(length))
        writer = WHOLE if length == whole else Counted(length)
    elif version == "1.1":
        head.append(_CHUNKED)
        writer = CHUNKED
    else:
        writer, keep_alive = WHOLE, False  # the connection's end is the body's

    if fields.upgrade:  # whoever sends the one must send the other (RFC 9110 section 7.8)
        head.append(_UPGRADE)
    if not keep_alive or fields.close:
        keep_alive = False
        head.append(_CLOSE)
    elif version == "1.0":
        head.append(_KEEP_ALIVE)
    if not fields.has_date:
        head.append(date)
    if not fields.has_server:
        head.append(server)
    head.append(b"\r\n")
    return head, writer, keep_alive


def interim(status: int, headers: Iterable[Field]) -> bytes:
    """An informational response (RFC 9110 section 15.2), such as 103 with its links. Raises ResponseError."""
    if not 102 <= status <= 199:
        raise ResponseError(f"status {status} is not an interim status, 102 to 199 are")
    line = _INTERIM_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    return line + field_lines(headers).lines + b"\r\n"


def last_chunk(trailers: Iterable[Field]) -> bytes:
    """The end of a chunked body, with fields behind it (RFC 9112 section 7.1.2). Raises ResponseError."""
    return b"0\r\n" + field_lines(trailers).lines + b"\r\n"


def _as_pair(field: Iterable[bytes]) -> Field:
    try:
        name, value = field
    except (TypeError, ValueError):
        raise ResponseError(f"a field is a pair of bytes, not {field!r}") from None
    _check(name, value)
    return name, value


def _check(name: bytes, value: bytes) -> None:
    if type(name) is not bytes or type(value) is not bytes:
        raise ResponseError(f"a field is a pair of bytes, not of {type(name).__name__} and {type(value).__name__}")
    if not _NAME.fullmatch(name):
        raise ResponseError(f"the field name {shown(name)} is not a token")
    if not _VALUE.fullmatch(value):
        # Without the value: it may be a secret, and errors are logged.
        raise ResponseError(f"the value of the field {shown(name)} holds a line end or a control byte")


_length_lines: Memory[int, bytes] = Memory()


def _length_line(length: int) -> bytes:
    line = b"content-length: %d\r\n" % length
    return _length_lines.remember(length, line, len(line))


def _status_line(status: int) -> bytes:
    if not 200 <= status <= 999:
        raise ResponseError(f"status {status} is not a final status, 200 to 999 are")
    return b"HTTP/1.1 %d \r\n" % status


def _announce(status: int, length: int | None, whole: int | None) -> bytes:
    """The length of a body that is not sent: what GET would have said, if we know it (RFC 9112 section 6.3)."""
    if status == 204:
        # RFC 9110 section 8.6: "MUST NOT send a Content-Length header field in any response with 204".
        return b""
    if status == 205:  # section 15.3.6: no content either, but said like this
        return _length_line(0)
    # An empty body says nothing of what GET would have had.
    announced = length if length is not None else (whole if status != 304 else None) or None
    return b"" if announced is None else _length_line(announced)


class Bodiless:
    """No body may follow the head; what the application gives is dropped."""

    __slots__ = ()

    def write(self, data: bytes, more: bool) -> bytes:
        return b""

    def frame(self, size: int) -> tuple[bytes, bytes] | None:
        return None


class Whole:
    """The body as it is: its size was known with the head, or the connection's end is its own."""

    __slots__ = ()

    def write(self, data: bytes, more: bool) -> bytes:
        return data

    def frame(self, size: int) -> tuple[bytes, bytes] | None:
        return b"", b""


class Counted:
    """As many bytes as Content-Length has announced."""

    __slots__ = ("_left", "_length")

    def __init__(self, length: int) -> None:
        self._length = length
        self._left = length

    def write(self, data: bytes, more: bool) -> bytes:
        self.count(len(data), more)
        return data

    def frame(self, size: int) -> tuple[bytes, bytes] | None:
        self.count(size, True)
        return b"", b""

    def count(self, size: int, more: bool) -> None:
        """*size* bytes go on the wire; *more* false completes the body. Raises ResponseError."""
        left = self._left - size
        if left < 0:
            raise ResponseError(
                f"the body is longer than its content-length of {self._length} by {-left} bytes or more"
            )
        if left and not more:
            raise ResponseError(f"the body is shorter than its content-length of {self._length} by {left} bytes")
        self._left = left


class Chunked:
    """Pieces with their sizes, and an empty one at the end."""

    __slots__ = ()

    def write(self, data: bytes, more: bool) -> bytes:
        if not data:  # an empty piece would read as the last one
            return b"" if more else b"0\r\n\r\n"
        return (b"%x\r\n%b\r\n" if more else b"%x\r\n%b\r\n0\r\n\r\n") % (len(data), data)

    def frame(self, size: int) -> tuple[bytes, bytes] | None:
        return b"%x\r\n" % size, b"\r\n"


BODILESS = Bodiless()
WHOLE = Whole()
CHUNKED = Chunked()
