"""A file as a response: which of its bytes to send, and under which headers.

`select` is a pure function from the request's headers and the file's size and time to
a `Selection` (RFC 9110, sections 13 and 14): 200, 206, 304, 412 or 416. `open_file` blocks,
and is for a thread. The `send_` functions are for the loop and hold a piece in memory
at the most; what is large goes past the interpreter, by `Exchange.send_file`.

The path is opened as given. Whoever builds it from a request's path must keep it
inside the directory meant.
"""

from __future__ import annotations

import asyncio
import errno
import io
import math
import mimetypes
import os
import re
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from email.utils import formatdate, parsedate_to_datetime
from typing import Any, Final

from prefork.gateway.exchange import Exchange

# Up to this many bytes a file is read and leaves with the head in one write; beyond it, sendfile(2) is
# faster (measured: level at 64 to 128 KB), and holds nothing in memory.
SMALL = 64 * 1024

# Bytes read at a time from what is no regular file.
PIECE = 64 * 1024

# preadv(2) that never waits for a disk; 0 where the system has no such thing.
NOWAIT: Final[int] = getattr(os, "RWF_NOWAIT", 0)

# The forms of RFC 9110, section 14.1.1, with one range. Nineteen digits hold any file's size.
ONE_RANGE = re.compile(r"bytes=[ \t]*(\d{0,19})-(\d{0,19})[ \t]*", re.ASCII | re.IGNORECASE)
ENTITY_TAG = re.compile(r'(?:W/)?("[^"]*")')
STRONG_TAG = re.compile(r'(?<!W/)("[^"]*")(?=[ \t]*(?:,|$))')

# What a name's second ending says is the content: a browser would unpack what is declared
# as content-encoding, and save a .tar.gz as a .tar.
COMPRESSED = {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}


@dataclass(frozen=True, slots=True)
class File:
    """The body of `Response.file`: read when the response is sent."""

    path: str


@dataclass(frozen=True, slots=True)
class Part:
    """*count* bytes from *offset* of the descriptor *file*, which is somebody else's."""

    file: int
    offset: int
    count: int

    def first(self, count: int) -> Part:
        """Not more than *count* bytes of it."""
        return Part(self.file, self.offset, min(count, self.count))


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A regular file, open; *mtime_ns* is in nanoseconds since the epoch."""

    file: io.FileIO
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Selection:
    """What to answer: *length* bytes from *start*, with *headers* beside those of the application."""

    status: int
    start: int
    length: int
    headers: list[tuple[str, str]]


def open_file(path: str) -> OpenFile | None:
    """Open *path*; None if there is no regular file of that name. Raises OSError for what is there and unreadable."""
    try:
        file = io.FileIO(path, opener=_open_without_waiting)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except ValueError:  # a null character, which no name has
        return None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        return None
    return OpenFile(file, status.st_size, status.st_mtime_ns)


def read_cached(file: int, size: int, offset: int) -> bytes | None:
    """At most *size* bytes of the descriptor *file* if they are in memory; None where a read might wait, or fails."""
    if not NOWAIT:
        return None
    data = bytearray(size)
    try:
        count = os.preadv(file, [data], offset, NOWAIT)
    except OSError:
        return None
    return bytes(memoryview(data)[:count]) if count else None  # the end is for a plain read to tell


async def send_part(exchange: Exchange, part: Part, more: bool) -> None:
    """Send a range of a file as the next piece of a body. Raises as `Exchange.send_file`."""
    data = read_cached(part.file, part.count, part.offset) if part.count <= SMALL else None
    if data is None or len(data) < part.count:
        await exchange.send_file(part.file, part.offset, part.count, more)
    else:
        await exchange.write(data, more)


async def send_path(exchange: Exchange, path: str) -> None:
    """Send a whole file as the whole body. Raises FileNotFoundError if there is no regular file of that name."""
    opened = await asyncio.get_running_loop().run_in_executor(None, open_file, path)
    if opened is None:
        raise FileNotFoundError(errno.ENOENT, "no regular file of that name", path)
    with opened.file:
        await send_part(exchange, Part(opened.file.fileno(), 0, opened.size), False)


async def send_descriptor(exchange: Exchange, file: Any, offset: int | None, count: int | None, more: bool) -> None:
    """Send from *file*, a descriptor or what has one, as the next piece of a body.

    From its position unless *offset* is given, to its end unless *count* is. The file
    stays the caller's, and so does what lies in the buffer of a pipe's reader.
    """
    part = whole_part(file, offset, count)
    if part is None:
        await _send_stream(exchange, file if isinstance(file, int) else file.fileno(), offset, count, more)
        return
    await send_part(exchange, part, more)
    if offset is None:
        _move(file, part.offset + part.count)


def whole_part(file: Any, offset: int | None, count: int | None) -> Part | None:
    """The range of *file* that is meant; None if it has no size, so that reading it must tell."""
    descriptor: int = file if isinstance(file, int) else file.fileno()
    status = os.fstat(descriptor)
    # The files of /proc say that they are empty.
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        return None
    if offset is None:
        # A reader with a buffer has gone less far than its descriptor.
        offset = os.lseek(descriptor, 0, os.SEEK_CUR) if isinstance(file, int) else file.tell()
    return Part(descriptor, offset, max(0, status.st_size - offset) if count is None else count)


def _move(file: Any, position: int) -> None:
    if isinstance(file, int):
        os.lseek(file, position, os.SEEK_SET)
    else:
        file.seek(position)


async def _send_stream(exchange: Exchange, file: int, offset: int | None, count: int | None, more: bool) -> None:
    loop = asyncio.get_running_loop()
    left = math.inf if count is None else count
    while left:
        size = int(min(left, PIECE))
        if offset is None:
            data = await loop.run_in_executor(None, os.read, file, size)
        else:
            data = await loop.run_in_executor(None, os.pread, file, size, offset)
            offset += len(data)
        if not data:
            break
        left -= len(data)
        await exchange.write(data, True)
    await exchange.write(b"", more)


def guess_content_type(path: str) -> str:
    """By the name's ending. Text is taken for UTF-8."""
    kind, encoding = mimetypes.guess_type(path)
    if encoding is not None:
        return COMPRESSED.get(encoding, "application/octet-stream")
    if kind is None:
        return "application/octet-stream"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") else kind


def select(method: str, request: Mapping[str, str], own: Mapping[str, str], size: int, mtime_ns: int) -> Selection:
    """Which part of a file of *size* bytes answers a request with the headers *request*.

    *own* are the application's headers: its ETag and Last-Modified stand before ours.
    Both mappings find names whatever their case. Of several ranges the whole file is
    sent, which section 14.2 allows; so is it for a range that is no range.
    """
    etag = own.get("etag") or f'"{mtime_ns:x}-{size:x}"'
    # Section 8.8.2.1: not later than now, wherever the file comes from.
    modified = own.get("last-modified") or formatdate(min(mtime_ns // 1_000_000_000, int(time.time())), usegmt=True)
    headers = [("etag", etag), ("last-modified", modified), ("accept-ranges", "bytes")]
    if method not in ("GET", "HEAD"):
        return Selection(200, 0, size, [*headers, ("content-length", str(size))])
    if _has_changed(request, etag, modified):
        return Selection(412, 0, 0, [*headers, ("content-length", "0")])
    if _is_unchanged(request, etag, modified):
        return Selection(304, 0, 0, headers)
    wanted = request.get("range") if method == "GET" and _range_applies(request, etag, modified) else None
    bounds = _range(wanted, size) if wanted is not None else (0, size)
    if bounds is None:
        return Selection(416, 0, 0, [*headers, ("content-range", f"bytes */{size}"), ("content-length", "0")])
    start, stop = bounds
    headers.append(("content-length", str(stop - start)))
    if stop - start == size:
        return Selection(200, 0, size, headers)
    return Selection(206, start, stop - start, [*headers, ("content-range", f"bytes {start}-{stop - 1}/{size}")])


def _has_changed(request: Mapping[str, str], etag: str, modified: str) -> bool:
    """Section 13.2.2: If-Match, compared strongly, and If-Unmodified-Since only without it."""
    tags = request.get("if-match")
    if tags is not None:
        return tags.strip() != "*" and (etag.startswith("W/") or etag not in STRONG_TAG.findall(tags))
    since = _seconds(request.get("if-unmodified-since"))
    ours = _seconds(modified)
    return since is not None and ours is not None and ours > since


def _is_unchanged(request: Mapping[str, str], etag: str, modified: str) -> bool:
    """Section 13.2.2: If-None-Match, compared weakly, and If-Modified-Since only without it."""
    tags = request.get("if-none-match")
    if tags is not None:
        return tags.strip() == "*" or _opaque(etag) in ENTITY_TAG.findall(tags)
    since = _seconds(request.get("if-modified-since"))
    ours = _seconds(modified)
    return since is not None and ours is not None and ours <= since


def _range_applies(request: Mapping[str, str], etag: str, modified: str) -> bool:
    """Section 13.1.5: If-Range is compared strongly, a date to the letter."""
    condition = request.get("if-range")
    if condition is None:
        return True
    if condition == modified:
        # Section 8.8.2.2: within its second a file may change once more, and its date would not.
        changed = _seconds(modified)
        return changed is not None and changed + 1 < time.time()
    return condition == etag and not etag.startswith("W/")


def _range(wanted: str, size: int) -> tuple[int, int] | None:
    """Start and stop within *size*; None if the range cannot be satisfied (section 14.1.2)."""
    match = ONE_RANGE.fullmatch(wanted)
    whole = (0, size)
    if match is None or match.groups() == ("", ""):
        return whole
    first, last = match.groups()
    if not first:
        # The last bytes of an empty file are all of it: 206 has no way to say so.
        return (max(0, size - int(last)), size) if int(last) else None
    if last and int(last) < int(first):
        return whole
    if int(first) >= size:
        return None
    return int(first), min(int(last) + 1, size) if last else size


def _opaque(etag: str) -> str:
    return etag.removeprefix("W/")


def _seconds(date: str | None) -> float | None:
    if date is None:
        return None
    with suppress(ValueError):
        moment = parsedate_to_datetime(date)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return None


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a FIFO would wait for its writer; for a regular file the flag means nothing.
    return os.open(path, flags | os.O_NONBLOCK)
