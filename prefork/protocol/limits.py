"""How much of a request is accepted before it is refused.

Every bound is on bytes as they stand on the wire, or on a count. Time is not
bounded here: this room has no clock.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one request; each default follows a server whose users have lived with it."""

    # Request line and fields together, bytes. nginx takes four buffers of 8 KiB.
    head_size: int = 32768

    # Field lines in a head, and in a trailer section. Apache's LimitRequestFields, and hyper's.
    field_count: int = 100

    # The request-target, bytes. Apache's LimitRequestLine; RFC 9112 section 3 asks for at least 8000.
    target_size: int = 8190

    # The body, bytes, transfer coding removed; 0 is no limit, as in Go, Node and gunicorn:
    # an upload's right size is the application's to know, and bodies are never held whole.
    body_size: int = 0

    # Empty lines before a request line. RFC 9112 section 2.2 asks for one at least; old
    # clients send one after a body. A peer that sends nothing else must not live for ever.
    empty_lines: int = 4

    # Chunk extensions of a whole message, bytes. They are read and dropped, so without a
    # bound they are free bandwidth to burn (CVE-2023-39326). hyper's CHUNKED_EXTENSIONS_LIMIT.
    extension_size: int = 16384

    # The trailer section, bytes. hyper's TRAILER_LIMIT.
    trailer_size: int = 16384
