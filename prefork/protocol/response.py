"""Status line and fields of a response to bytes, and its body behind them.

Nothing an application passes can inject a line: names are tokens, values hold no
control byte, and everything that says where the message ends (Content-Length,
Transfer-Encoding, Connection, Keep-Alive) is written here and never copied.

The framing is chosen once, when the head is written: from then on the body's
writer knows how many bytes may follow and how they look on the wire.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from prefork.errors import ResponseError
from prefork.protocol.head import MAX_LENGTH_DIGITS, TOKEN, shown

_NAME = re.compile(TOKEN)
_VALUE = re.compile(rb"[\t -~\x80-\xff]*")
_LENGTH = re.compile(rb"[0-9]{1,%d}" % MAX_LENGTH_DIGITS)

_STATUS_LINES = {s.value: b"HTTP/1.1 %d %b\r\n" % (s.value, s.phrase.encode("ascii")) for s in HTTPStatus}

# Fields about this connection, which is ours (RFC 9110 section 7.6.1).
_DROPPED = frozenset({b"transfer-encoding", b"keep-alive", b"proxy-connection"})
_SPECIAL = _DROPPED | {b"connection", b"content-length", b"date", b"server"}

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class BodyWriter(Protocol):
    """The body of one response, with its transfer coding."""

    def write(self, data: bytes, more: bool) -> bytes:
        """*data* as it goes on the wire; *more* false completes it. Raises ResponseError."""


@dataclass(slots=True)
class Answer:
    """How one response goes out: its head, the writer of its body, and whether another may follow."""

    head: bytes
    writer: BodyWriter
    keep_alive: bool


def answer(
    status: int,
    headers: Iterable[tuple[bytes, bytes]],
    *,
    whole: int | None,
    method: str,
    version: str,
    keep_alive: bool,
    date: bytes,
    server: bytes,
) -> Answer:
    """The answer to a request of *method* and *version*.

    *whole* is the size of the body if all of it is known now. *keep_alive* says
    whether the connection may live on; *date* and *server* are added where the
    application gave none, unless empty. Raises ResponseError.
    """
    if not 200 <= status <= 999:
        raise ResponseError(f"status {status} is not a final status, 200 to 999 are")
    fields = _Fields(headers)
    framing, writer = _frame(status, fields.length, whole, method, version)
    keep_alive = keep_alive and not fields.close and not isinstance(writer, UntilClose)

    lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status, *fields.lines, framing]
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    elif version == "1.0":
        lines.append(b"connection: keep-alive\r\n")
    if date and not fields.has_date:
        lines.append(b"date: %b\r\n" % date)
    if server and not fields.has_server:
        lines.append(b"server: %b\r\n" % server)
    lines.append(b"\r\n")
    return Answer(b"".join(lines), writer, keep_alive)


class _Fields:
    """An application's fields, checked; what is ours to decide is taken out of the lines."""

    __slots__ = ("close", "has_date", "has_server", "length", "lines")

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.lines: list[bytes] = []
        self.length: int | None = None
        self.close = False
        self.has_date = False
        self.has_server = False
        for name, value in headers:
            _check(name, value)
            special = name.lower()
            if special not in _SPECIAL or not self._is_ours(special, value):
                self.lines.append(b"%b: %b\r\n" % (name, value))

    def _is_ours(self, name: bytes, value: bytes) -> bool:
        """Remember what a special field says. True if its line is not to be copied."""
        if name == b"content-length":
            self._take_length(value)
        elif name == b"connection":
            self.close |= b"close" in [option.strip(b" \t") for option in value.lower().split(b",")]
        elif name == b"date":
            self.has_date = True
            return False
        elif name == b"server":
            self.has_server = True
            return False
        return True

    def _take_length(self, value: bytes) -> None:
        if self.length is not None:
            raise ResponseError("the response has two content-length fields")
        if not _LENGTH.fullmatch(value.strip(b" \t")):
            raise ResponseError(f"content-length {shown(value)} is not a decimal number of bytes")
        self.length = int(value)


def _check(name: bytes, value: bytes) -> None:
    if type(name) is not bytes or type(value) is not bytes:
        raise ResponseError(f"a field is a pair of bytes, not of {type(name).__name__} and {type(value).__name__}")
    if not _NAME.fullmatch(name):
        raise ResponseError(f"the field name {shown(name)} is not a token")
    if not _VALUE.fullmatch(value):
        # Without the value: it may be a secret, and errors are logged.
        raise ResponseError(f"the value of the field {shown(name)} holds a line end or a control byte")


def _frame(status: int, length: int | None, whole: int | None, method: str, version: str) -> tuple[bytes, BodyWriter]:
    """The framing line and the writer, after RFC 9112 section 6.3."""
    if status == 204:
        # RFC 9110 section 8.6: "MUST NOT send a Content-Length header field in any response with 204".
        return b"", Bodiless()
    if status == 304 or method == "HEAD":
        # What GET would have said, if we know it. An empty body says nothing of that.
        announced = length if length is not None else (whole if status != 304 else None) or None
        return b"" if announced is None else b"content-length: %d\r\n" % announced, Bodiless()
    known = length if length is not None else whole
    if known is not None:
        return b"content-length: %d\r\n" % known, Counted(known)
    if version == "1.1":
        return b"transfer-encoding: chunked\r\n", Chunked()
    return b"", UntilClose()


class Bodiless:
    """No body may follow the head; what the application gives is dropped."""

    __slots__ = ()

    def write(self, data: bytes, more: bool) -> bytes:
        return b""


class Counted:
    """As many bytes as Content-Length has announced."""

    __slots__ = ("_left", "_length")

    def __init__(self, length: int) -> None:
        self._length = length
        self._left = length

    def write(self, data: bytes, more: bool) -> bytes:
        left = self._left - len(data)
        if left < 0:
            raise ResponseError(
                f"the body is longer than its content-length of {self._length} by {-left} bytes or more"
            )
        if left and not more:
            raise ResponseError(f"the body is shorter than its content-length of {self._length} by {left} bytes")
        self._left = left
        return data


class Chunked:
    """Pieces with their sizes, and an empty one at the end."""

    __slots__ = ()

    def write(self, data: bytes, more: bool) -> bytes:
        # An empty piece would read as the last one.
        chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        return chunk if more else chunk + b"0\r\n\r\n"


class UntilClose:
    """To a 1.0 client, of unknown length: the connection's end is the body's."""

    __slots__ = ()

    def write(self, data: bytes, more: bool) -> bytes:
        return data
