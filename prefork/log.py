"""The error log and the access log: one line per event, as text or as JSON.

    2026-11-21T01:09:59.123Z info  worker 3 (pid 4242, generation 2) exited: killed by SIGKILL
    2026-11-21T01:09:59.124Z 127.0.0.1 "GET /path?x=1 HTTP/1.1" 200 5 0.000412 worker 3

Time is UTC: the processes of one server, and the servers of one service, must sort
together. Nothing that a peer or an application says can forge a line: control
characters are escaped, and what follows a line break is indented.

A line is one write(2) to a descriptor opened with O_APPEND, so the lines of all
processes land whole in one file without a lock. No line ever stops the server: what
a full disk or a gone reader does not take is lost.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from select import PIPE_BUF

from prefork.errors import ConfigError, did_you_mean, reason_of

logger = logging.getLogger("prefork")

LEVELS = ("debug", "info", "warning", "error")

# Whoever reads our output through a non-blocking pipe may fall behind for a moment. Longer
# than this and the line is lost: a worker must not stand still for its log.
WRITE_PATIENCE = 100  # milliseconds

OPEN_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY


class Output:
    """Where lines go: a file, or a standard stream that was open before we came."""

    def __init__(self, path: str, stream: int, owner: tuple[int, int] | None = None) -> None:
        """Open *path* for appending; "-" is the descriptor *stream*. *owner* is given the file, if we may."""
        self.path = path
        self._owner = owner
        self._is_ours = path != "-"
        self._fd = self._open() if self._is_ours else stream

    def write(self, line: bytes) -> None:
        """Write *line*, whole if the kernel takes it whole; a file or a blocking pipe does."""
        with suppress(OSError):  # a full disk, a reader who left: there is nowhere left to complain
            while line:
                try:
                    line = line[os.write(self._fd, line) :]
                except BlockingIOError:
                    if not _is_writable_within(self._fd, WRITE_PATIENCE):
                        return

    def reopen(self) -> None:
        """Go on in a file of the same name, after somebody moved the old one away.

        The descriptor keeps its number, so no line falls between. Raises OSError and
        keeps the old file if the new one cannot be opened.
        """
        if self._is_ours:
            fresh = self._open()
            os.dup2(fresh, self._fd, inheritable=False)
            os.close(fresh)

    def close(self) -> None:
        if self._is_ours:
            os.close(self._fd)

    def _open(self) -> int:
        fd = os.open(self.path, OPEN_FLAGS, 0o644)
        if self._owner is not None:
            with suppress(PermissionError):  # a worker that dropped its privileges reopens its own file
                os.fchown(fd, *self._owner)
        return fd


def open_output(setting: str, path: str, stream: int, owner: tuple[int, int] | None = None) -> Output:
    """An `Output` for *setting*, which is named if its *path* cannot be opened. Raises ConfigError."""
    try:
        return Output(path, stream, owner)
    except OSError as exc:
        raise ConfigError(f"{setting} {path!r} cannot be opened: {reason_of(exc)}") from exc


# ---- the error log ----


def configure(
    log_level: str = "info", error_log: str = "-", log_format: str = "text", *, owner: tuple[int, int] | None = None
) -> None:
    """Send the "prefork" logger to *error_log* ("-" is standard error), instead of where it went before.

    *owner* (uid, gid) is given the file, for workers that drop their privileges and must
    reopen it later. Raises ConfigError if the file cannot be opened.
    """
    if log_level not in LEVELS:
        hint = did_you_mean(log_level, LEVELS)
        raise ConfigError(f"log_level is {log_level!r}, which must be one of {', '.join(LEVELS)}{hint}")
    handler = ErrorLog(open_output("error_log", error_log, 2, owner))
    handler.setFormatter(JSONLines() if log_format == "json" else TextLines())
    for old in [known for known in logger.handlers if isinstance(known, ErrorLog)]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.setLevel(log_level.upper())
    logger.propagate = False  # the application may have configured the root logger; every line would come twice


def reopen() -> None:
    """Reopen the error log's file and every open access log (USR1, after logrotate has moved them)."""
    outputs = [handler.output for handler in logger.handlers if isinstance(handler, ErrorLog)]
    for access_log in _access_logs:
        access_log.flush()
    for output in outputs + [log.output for log in _access_logs]:
        try:
            output.reopen()
        except OSError as exc:
            logger.error("log %s cannot be reopened, the old file is kept: %s", output.path, reason_of(exc))


class ErrorLog(logging.Handler):
    """The handler behind the "prefork" logger."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.output = output

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
        except Exception:  # noqa: BLE001 - a message that does not fit its arguments is shown, as logging does
            self.handleError(record)
        else:
            self.output.write(line.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        self.output.close()
        super().close()


class TextLines(logging.Formatter):
    """Time, level, who and what; whatever is longer than a line is indented below it."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        body = _CONTROL.sub(_escape, text.rstrip("\n")).replace("\n", "\n    ")
        return f"{timestamp(record.created)} {record.levelname.lower():5} {body}"


class JSONLines(logging.Formatter):
    """One object per line: time, level, pid, message and, for an exception, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


# ---- the access log ----


# The arguments of `AccessLog.log`.
Answered = tuple[tuple[str, int] | None, str, bytes, str, int, int, float, int]


class AccessLog:
    """One line per response. Made once per process; `log` is on the hot path, so it only takes note.

    Each line is written at once, or with a *defer* (`loop.call_soon`) those of one turn of
    the loop together, and with the time of the first. Then `flush` before the loop ends.
    """

    defer: Callable[[Callable[[], None]], object] | None = None

    def __init__(self, output: Output, log_format: str = "text") -> None:
        self.output = output
        self._lines = _access_json if log_format == "json" else _access_text
        self._responses: list[Answered] = []  # since the last flush
        self._now = ""  # of the first of them
        _access_logs.append(self)

    @classmethod
    def open(
        cls, access_log: str, log_format: str = "text", *, owner: tuple[int, int] | None = None
    ) -> AccessLog | None:
        """The log for the setting *access_log*: a path, "-" for standard output; None for "off".

        Raises ConfigError if the file cannot be opened.
        """
        if access_log == "off":
            return None
        return cls(open_output("access_log", access_log, 1, owner), log_format)

    def log(
        self,
        client: tuple[str, int] | None,
        method: str,
        target: bytes,
        version: str,
        status: int,
        size: int,
        seconds: float,
        worker: int,
    ) -> None:
        """A response left: *size* bytes of body, *seconds* after the head of its request was read.

        *client* is None on a unix socket; *target* is as it stood on the wire, *version* "1.1".
        """
        responses = self._responses
        responses.append((client, method, target, version, status, size, seconds, worker))
        if len(responses) == 1:
            self._now = timestamp(time.time())
            if self.defer is None:
                self.flush()
            else:
                self.defer(self.flush)

    def flush(self) -> None:
        """Write what was deferred, as many lines at once as the reader of a pipe gets whole (pipe(7), PIPE_BUF)."""
        responses, self._responses = self._responses, []
        pending: list[str] = []
        size = 0
        for line in self._lines(self._now, responses):
            size += len(line)
            if size > PIPE_BUF:
                self._write(pending)
                pending, size = [], len(line)
            pending.append(line)
        self._write(pending)

    def _write(self, lines: list[str]) -> None:
        if lines:
            self.output.write("".join(lines).encode("ascii", "backslashreplace"))

    def close(self) -> None:
        self.flush()
        _access_logs.remove(self)
        self.output.close()


# Every access log of this process, for `reopen`.
_access_logs: list[AccessLog] = []


def _access_text(now: str, responses: list[Answered]) -> list[str]:
    return [
        f"{now} {client[0] if client else '-'} {_said(method, target, version, status)} {size} {seconds:.6f} worker {worker}\n"
        for client, method, target, version, status, size, seconds, worker in responses
    ]


@lru_cache(maxsize=256)  # targets repeat; those that do not push one another out
def _said(method: str, target: bytes, version: str, status: int) -> str:
    asked = _UNQUOTABLE.sub(_escape, f"{method} {target.decode('latin-1')}")
    return f'"{asked} HTTP/{version}" {status}'


def _access_json(now: str, responses: list[Answered]) -> list[str]:
    return [
        json.dumps(
            {
                "time": now,
                "client": client[0] if client else "-",
                "method": method,
                "target": target.decode("latin-1"),
                "version": version,
                "status": status,
                "size": size,
                "seconds": round(seconds, 6),
                "worker": worker,
            }
        )
        + "\n"
        for client, method, target, version, status, size, seconds, worker in responses
    ]


# ---- both ----

# What could end a line, move a terminal's cursor or start one of its commands (C0 without
# the tab and the line feed, DEL, C1), and Unicode's own line ends, which some viewers obey.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")

# Everything but printable ASCII without the quote and the backslash: between quotes the
# rest is escaped, so the request can be read back exactly.
_UNQUOTABLE = re.compile(r"[^ !#-\[\]-~]")


def timestamp(now: float) -> str:
    """*now* (seconds since 1970) as `2026-11-21T01:09:59.123Z`."""
    global _second
    whole, milliseconds = divmod(int(now * 1000), 1000)
    if _second[0] != whole:
        _second = (whole, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)))
    return f"{_second[1]}.{milliseconds:03}Z"


# The last second that was formatted: a busy server writes thousands of lines in each. One
# tuple, replaced whole, so that threads cannot see half of a change.
_second = (-1, "")


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    if character in '"\\':
        return "\\" + character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _is_writable_within(fd: int, milliseconds: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(milliseconds))
