"""Every exception of prefork, rooted at `PreforkError`, and the words that their sentences share.

A message says what happened, to what, with the value, and what was allowed.
Errors are raised once, near the cause, and become a log line, a status or an
exit code at one boundary.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PreforkError(Exception):
    """The root: `except PreforkError` catches everything that prefork raises itself."""


class ConfigError(PreforkError):
    """A setting is unknown, of the wrong kind, or contradicts another."""


class StartError(PreforkError):
    """`serve` cannot start here: inside a running event loop, in a thread, on an unfit platform."""


class ClusterError(PreforkError):
    """Something of `prefork.cluster` was called in the wrong process, or at the wrong time."""


class ClusterStopping(ClusterError):
    """A worker was to be forked while the cluster stops. From a listener it is no mishap, and logged as such."""


class AddressError(PreforkError, ValueError):
    """An address to bind cannot be understood."""


class ListenError(PreforkError, OSError):
    """An address cannot be bound. `errno` is the kernel's, where it was the kernel that refused."""


class TLSError(PreforkError):
    """A certificate, a key or a TLS setting cannot be used."""


class ProxyRefused(PreforkError):
    """A connection does not begin with the PROXY header it must have, or with one that is malformed."""


class LoadError(PreforkError):
    """The application cannot be loaded."""


class NoSuchModule(LoadError):
    """The module of `module:attr` does not exist (nor one of its parents)."""


class NoSuchAttribute(LoadError):
    """The module was imported and lacks the attribute of `module:attr`."""


class ImportFailed(LoadError):
    """The module exists and raised while it was imported; `traceback` is the application's own."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


class LifespanFailed(PreforkError):
    """The application said `lifespan.startup.failed`, or raised where only that was allowed."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class FrameError(PreforkError):
    """The bytes on an IPC channel are not frames, or descriptors were lost on the way."""


class ChannelClosed(PreforkError, ConnectionError):
    """The other end of an IPC channel is gone, or this end was closed."""


class ResponseError(PreforkError):
    """The application's response breaks HTTP: an invalid header, too many or too few bytes."""


class GatewayError(PreforkError):
    """The application broke its interface (ASGI, WSGI, native): expected one thing, got another."""


# What would end the event loop, and with it the worker, if a task let it out.
EXITS = (SystemExit, KeyboardInterrupt)


class ApplicationExited(PreforkError):
    """The application called `sys.exit`, or raised what only the interpreter may, in the middle of a request."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"the application raised {type(cause).__name__}")


class ClientDisconnected(PreforkError, ConnectionError):
    """The client went away before the exchange was complete."""


class WebSocketDisconnected(ClientDisconnected):
    """The WebSocket is closed: *code* and *reason* of its closing; 1006 if the connection was lost without a word."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"the WebSocket is closed with {code}{reason and f': {reason}'}")
        self.code = code
        self.reason = reason


class MissingExtra(PreforkError, ImportError):
    """A package that only an extra installs is needed and is not there; the message names the extra."""


class UnknownEvent(PreforkError, ValueError):
    """A listener asked for an event that is never emitted here."""


class CounterError(PreforkError, ValueError):
    """A shared counter or rate limit cannot have this name, or there is no room for another one."""


class CounterOverflow(PreforkError, OverflowError):
    """A shared counter would leave the range of 64 bits. It stays as it was."""


class CounterBusy(PreforkError, TimeoutError):
    """A shared counter stayed locked for too long: process *pid* was stopped, or is stuck, in the middle of a change."""

    def __init__(self, message: str, pid: int) -> None:
        super().__init__(message)
        self.pid = pid


class MalformedBody(PreforkError, ValueError):
    """The body of a request is not the JSON it should be. Answered with 400 unless the handler catches it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" if one of *known* is close to *word*, otherwise nothing."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f", did you mean {near[0]!r}?" if near else ""


def reason_of(error: OSError) -> str:
    """The kernel's words for *error*, without its number: "permission denied"."""
    return (error.strerror or str(error)).lower()
