"""A file as a response: which of its bytes to send, and under which headers.

`select` is a pure function from the request's headers and the file's size and time to
a `Selection` (RFC 9110, sections 13 and 14): 200, 206, 304 or 416. `open_file` and
`read_file` block, and are for a thread.

The path is opened as given. Whoever builds it from a request's path must keep it
inside the directory meant.
"""

from __future__ import annotations

import io
import mimetypes
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from email.utils import formatdate, parsedate_to_datetime

# Bytes read at a time: large enough that the hop to a thread (some 50 us) is lost in the
# reading, small enough for some hundred downloads in a hundred megabytes.
READ_SIZE = 256 * 1024

# The forms of RFC 9110, section 14.1.1, with one range. Nineteen digits hold any file's size.
ONE_RANGE = re.compile(r"bytes=[ \t]*(\d{0,19})-(\d{0,19})[ \t]*", re.ASCII | re.IGNORECASE)
ENTITY_TAG = re.compile(r'(?:W/)?("[^"]*")')

# What a name's second ending says is the content: a browser would unpack what is declared
# as content-encoding, and save a .tar.gz as a .tar.
COMPRESSED = {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}


@dataclass(frozen=True, slots=True)
class File:
    """The body of `Response.file`: read when the response is sent."""

    path: str


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


def read_file(opened: OpenFile, offset: int, size: int) -> bytes:
    """At most *size* bytes from *offset*, b"" only if the file has become shorter than it was."""
    return os.pread(opened.file.fileno(), min(size, READ_SIZE), offset)


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
    modified = own.get("last-modified") or formatdate(mtime_ns // 1_000_000_000, usegmt=True)
    headers = [("etag", etag), ("last-modified", modified), ("accept-ranges", "bytes")]
    if method not in ("GET", "HEAD"):
        return Selection(200, 0, size, [*headers, ("content-length", str(size))])
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
    return condition == modified or (condition == etag and not etag.startswith("W/"))


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
