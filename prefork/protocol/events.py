"""What one HTTP/1.1 connection tells its owner: a request, its body, its end, or that it is over.

`Connection.next_event` returns these. Names and values of fields are bytes as they
stood on the wire, names in lower case. The classes are slotted and mutable only
because a frozen dataclass costs a microsecond a piece on the hottest path there
is; nobody writes to them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True, eq=False)
class Fields:
    """The field lines of one head, checked, and what they say about the message and its connection.

    Requests whose lines are equal byte for byte share one, so nobody writes to it,
    and what is derived from it can be kept by it.
    """

    headers: Headers
    host: bytes | None = None
    content_length: int | None = None
    transfer_encoding: bytes | None = None
    connection: tuple[bytes, ...] = ()  # its members, in lower case
    expect: bytes | None = None
    upgrade: bytes | None = None
    # A Host, and nothing that says more than a GET of HTTP/1.1 says without it.
    is_plain: bool = False
    # What proxies said in it, if somebody has looked.
    forwarded: object = None


@dataclass(slots=True)
class Request:
    """A complete, checked request head (RFC 9112, section 3).

    *method* is upper or mixed case as sent; *target* the request-target byte for
    byte; *path* and *query* its two halves, still percent-encoded, the absolute
    form already reduced to them; *version* "1.0" or "1.1". *headers* may be
    another request's too: copy what you change.
    """

    method: str
    target: bytes
    path: bytes
    query: bytes
    version: str
    headers: Headers
    content_length: int | None = None  # None: no such field
    chunked: bool = False
    keep_alive: bool = True  # what the client asked for
    expect_continue: bool = False
    upgrade: bytes | None = None  # the value of Upgrade, if Connection names it
    fields: Fields | None = field(default=None, repr=False, compare=False)  # None: not read from a wire
    has_body: bool = field(init=False, repr=False, compare=False)
    # Nothing in it asks for more than its answer, on a connection that lives on.
    is_plain: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.has_body = self.chunked or bool(self.content_length)
        self.is_plain = (
            self.keep_alive
            and self.version == "1.1"
            and self.method != "HEAD"
            and self.target.startswith(b"/")
            and self.upgrade is None
            and not self.expect_continue
        )


@dataclass(slots=True)
class Data:
    """A piece of the request's body, transfer coding removed, never empty."""

    data: bytes


@dataclass(slots=True)
class EndOfMessage:
    """The request is complete."""

    trailers: Headers = field(default_factory=list)


@dataclass(slots=True)
class Refusal:
    """The peer broke HTTP or a limit: answer *status*, then close. Nothing is read after it."""

    status: int
    reason: str  # one sentence for the log and the body: what was wrong, with the value


@dataclass(slots=True)
class Closed:
    """The peer has sent its last byte. *clean*: between two messages."""

    clean: bool


class Wait(Enum):
    """Why there is no event now."""

    NEED_DATA = "feed more bytes"
    PAUSED = "the response is unfinished; the next request stays in the buffer"


NEED_DATA = Wait.NEED_DATA
PAUSED = Wait.PAUSED

Event = Request | Data | EndOfMessage | Refusal | Closed | Wait
