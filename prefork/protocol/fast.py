"""The fast cycle: requests whose end is known from the head, and who reads which body.

A request without a body ends with its head. One of known length ends so many bytes
later, and its pieces are handed on as they came, uncopied. Everything else, which is
chunked coding, is the full cycle's.
"""

from __future__ import annotations

from collections.abc import Callable

from prefork.protocol.events import Headers, Request
from prefork.protocol.full import BodyReader, always_full
from prefork.protocol.limits import Limits

# The reader of what follows a head (its bytes, unchanged), which said the request.
ChooseCycle = Callable[[Request, bytes, Limits], BodyReader]


def choose_cycle(request: Request, head: bytes, limits: Limits) -> BodyReader:
    """Fast where it can be, full where it must."""
    if request.chunked:
        return always_full(request, head, limits)
    return KnownLength(request.content_length) if request.content_length else NO_BODY


NO_TRAILERS: Headers = []  # nobody writes to it


class NoBody:
    """A request that ends with its head: nothing to read, so nobody to read it."""

    __slots__ = ()

    is_complete = True
    left = 0
    trailers = NO_TRAILERS

    def read(self, data: bytes, at: int) -> tuple[bytes, int]:
        return b"", at


NO_BODY = NoBody()


class KnownLength:
    """As many bytes as Content-Length says."""

    __slots__ = ("is_complete", "left")

    trailers = NO_TRAILERS

    def __init__(self, length: int) -> None:
        self.left = length  # bytes, more than none
        self.is_complete = False

    def read(self, data: bytes, at: int) -> tuple[bytes, int]:
        size = min(self.left, len(data) - at)
        self.left -= size
        self.is_complete = self.left == 0
        return data[at : at + size], at + size  # all of *data* is *data* itself, not a copy
