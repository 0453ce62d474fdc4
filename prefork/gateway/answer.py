"""What a WSGI application says: `start_response`, `write`, its iterable, and a file as one.

It is checked against PEP 3333 and goes to a `Sink`. Whether that happens in a thread
or in the event loop is neither known nor decided here.

The one fact: the head leaves with the first byte of the body, not before, since until
then an error may still replace it.

The reason phrase of a status line is not passed on (RFC 9112, section 4: clients
should ignore it); the number is. A response that is longer than its Content-Length is
cut there, as the PEP has it; a shorter one cuts the connection.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import Any, Protocol

from prefork.errors import GatewayError
from prefork.gateway.environ import Environ
from prefork.gateway.file import Part, whole_part
from prefork.protocol.memory import Memory
from prefork.protocol.response import FieldLines, field_lines

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]
WSGIApplication = Callable[[Environ, Callable[..., Callable[[bytes], None]]], Iterable[bytes]]
Piece = tuple[bytes | Part, bool]  # of a response's body, and whether more follows; a part of a file is the last
Pieces = Generator[Piece, None, None]

# Bytes that `wsgi.file_wrapper` reads at a time unless told: what a transport holds.
FILE_BLOCK = 64 * 1024

# What applications say again and again, encoded.
_STATUSES: Memory[str, int] = Memory()
_HEADERS: Memory[tuple[Any, ...], FieldLines] = Memory()


class Sink(Protocol):
    """Where an answer goes: a `Bridge`, or the `Exchange` itself."""

    def start(self, status: int, headers: FieldLines) -> None: ...
    def send_at_once(self) -> None: ...
    def send(self, data: bytes, more: bool) -> object: ...


class Answer:
    """What the application has said: `start_response`, `write`, its iterable."""

    # The class holds what every answer begins with: one is made for each request.
    _head: tuple[int, FieldLines] | None = None
    _has_sent_head = False
    _left: int | None = None  # bytes still to come of the announced length, if there is one

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def whole(self, iterable: Any) -> bytes | None:
        """The body, if *iterable* is the ordinary one, a list of one piece, and nothing was sent before.

        The head is with the sink then. None: *iterable* is for `pieces`.
        """
        if type(iterable) is not list or len(iterable) != 1 or self._head is None or self._has_sent_head:
            return None
        piece = iterable[0]
        if type(piece) is not bytes:
            return None
        status, headers = self._head
        self._has_sent_head = True
        self._sink.start(status, headers)
        return piece if headers.length is None else piece[: headers.length]

    def pieces(self, iterable: Any) -> Pieces:
        """Yield (piece, more) until nothing is left; *iterable* is closed with the generator."""
        try:
            # The one case where the length is known before the first byte leaves (the PEP, "Handling
            # the Content-Length Header").
            is_whole = isinstance(iterable, list | tuple) and len(iterable) == 1
            is_complete = False
            if isinstance(iterable, FileWrapper) and (part := iterable.part()) is not None:
                self._begin()
                yield part if self._left is None else part.first(self._left), False
                return
            for piece in _iterate(iterable):
                if not isinstance(piece, bytes):
                    raise GatewayError(f"the WSGI application yielded {_kind(piece)}, bytes were expected")
                if not piece:
                    continue
                self._begin()
                data = self._within_length(piece)
                if data:
                    is_complete = is_whole or self._left == 0
                    yield data, not is_complete
                if len(data) < len(piece):
                    break
            if not is_complete:
                self._begin()
                yield b"", False
        finally:
            close = getattr(iterable, "close", None)
            if close is not None:
                close()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None, /
    ) -> Callable[[bytes], None]:
        """The PEP's `start_response`: may replace what it said before only with *exc_info*, and only unsent."""
        if exc_info is not None:
            try:
                if self._has_sent_head:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # the PEP: "avoid dangling circular ref"
        elif self._head is not None:
            raise GatewayError(f"start_response was called again with {status!r}, and without exc_info")
        self._head = (_status(status), _headers(headers))
        return self.write

    def write(self, data: bytes, /) -> None:
        """The PEP's `write`, for applications that push."""
        if not isinstance(data, bytes):
            raise GatewayError(f"write() was given {_kind(data)}, bytes were expected")
        if not data:
            return
        if not self._has_sent_head:
            self._begin()
            self._sink.send_at_once()
        if self._within_length(data) != data:
            raise GatewayError(f"write() was given {len(data)} bytes, more than Content-Length announced")
        self._sink.send(data, True)

    def _begin(self) -> None:
        """The head leaves with the first byte, not before: until then an error may still replace it."""
        if self._has_sent_head:
            return
        if self._head is None:
            raise GatewayError("the WSGI application answered without calling start_response")
        self._sink.start(*self._head)
        self._left = self._head[1].length
        self._has_sent_head = True

    def _within_length(self, data: bytes) -> bytes:
        """As much of *data* as Content-Length has room for."""
        if self._left is None:
            return data
        data = data[: self._left]
        self._left -= len(data)
        return data


class FileWrapper:
    """`wsgi.file_wrapper`: a file as an iterable of blocks. Its `close` is the file's."""

    def __init__(self, filelike: Any, block_size: int = FILE_BLOCK) -> None:
        self.filelike = filelike
        self.block_size = block_size
        if hasattr(filelike, "close"):
            self.close = filelike.close

    def part(self) -> Part | None:
        """What is left of a real file, for sendfile; None if only reading can tell what `filelike` says."""
        if not _is_plain_file(self.filelike):
            return None
        try:
            return whole_part(self.filelike, None, None)
        except (OSError, ValueError):  # closed, or no file at all: reading it says so better
            return None

    def __iter__(self) -> FileWrapper:
        return self

    def __next__(self) -> bytes:
        data: bytes = self.filelike.read(self.block_size)
        if not data:
            raise StopIteration
        return data


def _iterate(iterable: Any) -> Iterable[Any]:
    if isinstance(iterable, bytes | str) or not hasattr(iterable, "__iter__"):
        raise GatewayError(f"the WSGI application returned {_kind(iterable)}, an iterable of bytes was expected")
    result: Iterable[Any] = iterable
    return result


def _status(status: object) -> int:
    if type(status) is str and (known := _STATUSES.get(status)):
        return known
    if isinstance(status, str) and status[:3].isascii() and status[:3].isdigit() and status[3:4] in ("", " "):
        code = int(status[:3])
        if code >= 200:
            return _STATUSES.remember(str(status), code, len(status))
    raise GatewayError(f"start_response was given the status {status!r}, one such as '200 OK' was expected")


def _headers(headers: object) -> FieldLines:
    if not isinstance(headers, list):
        raise GatewayError(
            f"start_response was given headers as {_kind(headers)}, a list of (name, value) was expected"
        )
    key = tuple(headers)
    try:
        known = _HEADERS.get(key)
    except TypeError:  # pairs that are lists
        known = None
    if known is None:
        known = field_lines([_field(field) for field in headers])
        _HEADERS.remember(key, known, 2 * len(known.lines))
    return known


def _field(field: object) -> tuple[bytes, bytes]:
    if not isinstance(field, tuple) or len(field) != 2 or not all(isinstance(part, str) for part in field):
        raise GatewayError(f"start_response was given the header {field!r}, a tuple of two str was expected")
    name, value = field
    try:
        return name.lower().encode("latin-1"), value.encode("latin-1")
    except UnicodeEncodeError:
        raise GatewayError(f"the header {name!r}: {value!r} has characters beyond latin-1") from None


_PLAIN_READS = (io.FileIO.read, io.BufferedReader.read, io.BufferedRandom.read)


def _is_plain_file(file: object) -> bool:
    """Whether reading *file* gives the bytes of its descriptor: a GzipFile has one too, and gives others."""
    if isinstance(file, io.BufferedReader | io.BufferedRandom) and not _is_plain_file(file.raw):
        return False
    return isinstance(file, io.IOBase) and getattr(type(file), "read", None) in _PLAIN_READS


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
