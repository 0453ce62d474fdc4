"""The body of a request as a file, over the pieces in which it came.

Nothing is joined beforehand. What is read is copied once, but for the end of a piece
that a read goes beyond: a BufferedReader copies more, and is slower line by line.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator


class BodyFile(io.BufferedIOBase):
    """A binary file that cannot seek. Its methods are those of the piece in hand, as long as that is enough."""

    def __init__(self, next_piece: Callable[[], bytes]) -> None:
        """*next_piece* returns b"" at the end, however often it is called there. It may block."""
        self._next_piece = next_piece
        self._piece = io.BytesIO()

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """*size* bytes, fewer only at the end of the body; all that is left if it is negative or None."""
        data = self._piece.read(size)
        return data if len(data) == size else self._read_on(data, size)

    def read1(self, size: int = -1, /) -> bytes:
        """What is left of one piece, *size* bytes at the most; b"" only at the end of the body."""
        data = self._piece.read(size)
        if data or size == 0 or not self._advance():
            return data
        return self._piece.read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        """To the next line feed, with it; *size* bytes at the most."""
        line = self._piece.readline(size)
        return line if line.endswith(b"\n") or len(line) == size else self._read_line_on(line, size)

    def __iter__(self) -> Iterator[bytes]:
        """Lines, at a quarter of what each costs by `readline`."""
        while True:
            piece = self._piece
            for line in piece:
                yield line if line.endswith(b"\n") else self._read_line_on(line, None)
            if self._piece is piece and not self._advance():
                return

    def close(self) -> None:
        self._piece.close()
        super().close()

    def _advance(self) -> bool:
        """Take the next piece in hand; False at the end of the body."""
        piece = self._next_piece()
        self._piece = io.BytesIO(piece)
        return bool(piece)

    def _read_on(self, data: bytes, size: int | None) -> bytes:
        """*data* and what follows it, *size* bytes together: pieces that are wanted whole are not touched."""
        missing = _missing(data, size)
        parts = [data] if data else []
        while missing and (piece := self._next_piece()):
            if len(piece) > missing:
                self._piece = io.BytesIO(piece)
                piece = self._piece.read(missing)
            parts.append(piece)
            missing -= len(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_line_on(self, line: bytes, size: int | None) -> bytes:
        missing = _missing(line, size)
        parts = [line]
        while missing and not parts[-1].endswith(b"\n") and self._advance():
            parts.append(self._piece.readline(missing))
            missing -= len(parts[-1])
        return b"".join(parts)


def _missing(data: bytes, size: int | None) -> int:
    """How many bytes *data* is short of *size*."""
    return sys.maxsize if size is None or size < 0 else size - len(data)
