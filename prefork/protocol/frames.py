"""What a WebSocket's frames are made of: those we write, and messages that arrive in parts.

No state of the connection is known here, and nothing is checked but that text is
UTF-8: what may come when, and what a client did wrong, is the business of `Session`.

The one fact: a first byte is FIN, RSV1 and the opcode together, since a whole message is
the ordinary case and is told by one look-up.
"""

from __future__ import annotations

import codecs
from typing import Final

try:
    from websockets.speedups import apply_mask
except ImportError:  # installed without its C part
    from websockets.utils import apply_mask

TEXT: Final = 0x81  # first byte of a whole message: FIN and the opcode
BINARY: Final = 0x82
CLOSE: Final = 0x88
PING: Final = 0x89
PONG: Final = 0x8A
COMPRESSED: Final = 0x40  # RSV1, of a whole message or its first fragment
MASKED: Final = 0x80

NO_STATUS = 1005

# Bytes above which a payload is not copied for what could do with a view of it, or with two writes.
COPIED = 16 * 1024

# RFC 6455, section 5.5. A close frame begins with two bytes of code.
MAX_CONTROL = 125  # bytes
MAX_REASON = MAX_CONTROL - 2

unmask = apply_mask  # the same XOR in both directions; (payload, mask) -> bytes

TEXT_HEADS = [bytes((TEXT, size)) for size in range(126)]
BINARY_HEADS = [bytes((BINARY, size)) for size in range(126)]


def message_frame(first: int, payload: bytes) -> bytes | tuple[bytes, bytes]:
    """In two parts if it is large."""
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    head = bytes((first, 126, size >> 8, size & 255)) if size < 65536 else bytes((first, 127)) + size.to_bytes(8, "big")
    return head + payload if size < COPIED else (head, payload)


def control_frame(first: int, payload: bytes) -> bytes:
    return bytes((first, len(payload))) + payload


def close_frame(code: int, reason: str) -> bytes:
    """*reason* is cut to what fits. NO_STATUS is said by saying nothing."""
    if code == NO_STATUS:
        return bytes((CLOSE, 0))
    words = reason.encode("utf-8", "replace")
    if len(words) > MAX_REASON:  # between two characters
        words = words[:MAX_REASON].decode("utf-8", "ignore").encode()
    return control_frame(CLOSE, code.to_bytes(2, "big") + words)


class Arriving:
    """A message in one frame, unmasked as it arrives. Of plain text, what cannot be UTF-8 is noticed at once.

    It is copied piece by piece, so that small pieces cost no more memory than large ones.
    """

    __slots__ = ("_decoder", "_mask", "data", "first", "is_text", "missing")

    def __init__(self, first: int, size: int, mask: bytes) -> None:
        self.first = first
        self.is_text = bool(first & 1)
        self.data = bytearray()
        self.missing = size
        self._mask = mask
        self._decoder = codecs.getincrementaldecoder("utf-8")() if first == TEXT else None

    def add(self, piece: bytes) -> None:
        plain = unmask(piece, self._mask)
        shift = len(piece) & 3
        if shift:
            self._mask = self._mask[shift:] + self._mask[:shift]
        self.data += plain
        self.missing -= len(piece)
        if self._decoder is not None:
            self._decoder.decode(plain, final=not self.missing)


class Fragments:
    """A message in several frames, inflated. What cannot be UTF-8 is noticed at once."""

    __slots__ = ("_decoder", "data", "is_text")

    def __init__(self, *, is_text: bool) -> None:
        self.is_text = is_text
        self.data = bytearray()
        self._decoder = codecs.getincrementaldecoder("utf-8")() if is_text else None

    def add(self, piece: bytes, *, is_last: bool) -> None:
        self.data += piece
        if self._decoder is not None:
            self._decoder.decode(piece, final=is_last)
