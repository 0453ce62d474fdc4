"""Ordered messages between two processes, over one end of a unix socket pair.

It never blocks (but for `flush_blocking`) and knows no loop: whoever drives it calls `receive` when
`fileno()` is readable, and `flush` when it is writable and `wants_write` is true. That a write
failed does not end it: the other side's last words may still wait to be read, and `is_eof` follows.

A stream with our own framing rather than SOCK_SEQPACKET, which has no size that is safe everywhere,
reads an empty message as the end, and is missing on macOS.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prefork.errors import ChannelClosed, FrameError
from prefork.ipc import fds as descriptors
from prefork.ipc.fds import Fds, close_all
from prefork.ipc.frames import Decoder, Frame, Kind, encode

# Bytes queued above which `send` says false. Node's channel says so at the same size.
HIGH_WATER = 128 * 1024

# Linux's default for net.core.wmem_default is about three of these.
READ_SIZE = 64 * 1024  # bytes

# unix(7): ETOOMANYREFS is more descriptors of this user in flight than RLIMIT_NOFILE. They become
# fewer as their receivers read, so it is a full buffer by another name, like a kernel short of memory.
_NOT_NOW = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)

# Their bodies are bytes, which the channel neither encodes nor decodes.
_RAW = frozenset({Kind.HANDOFF, Kind.ACK, Kind.PUBLISH})

# One peer that never stops writing must not keep the loop from all others.
READS_PER_CALL = 16


@dataclass(frozen=True, slots=True)
class Message:
    """What came out of a channel. The receiver closes *fds*, best with `with message.fds:`."""

    kind: Kind
    body: Any  # what JSON can hold; the bytes as they came for kinds in `_RAW`
    fds: Fds = field(default_factory=Fds)


class Channel:
    """One end of a conversation between two processes."""

    __slots__ = ("_decoder", "_is_broken", "_is_eof", "_queue", "_queued", "_sock")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = Decoder()
        self._queue: deque[_Outgoing] = deque()
        self._queued = 0  # bytes in the queue
        self._is_eof = False
        self._is_broken = False  # writing failed: nobody will read what we send

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Two ends, both close-on-exec. After a fork each process closes the one that is not its own."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(one), cls(other)

    def fileno(self) -> int:
        """The descriptor to wait on, -1 once closed."""
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        """Messages wait for room: call `flush` when the descriptor is writable."""
        return bool(self._queue)

    @property
    def is_eof(self) -> bool:
        """Nothing more will come: the other side is gone and was heard to the end, or it broke the frames."""
        return self._is_eof

    @property
    def is_closed(self) -> bool:
        """`close` was called on this end. It never closes by itself: a loop may still watch its descriptor."""
        return self._sock.fileno() < 0

    def send(self, message: Any, *, kind: Kind = Kind.CONTROL, fds: Sequence[int] = (), keep: bool = False) -> bool:
        """Send *message* as JSON (bytes as they are for kinds in `_RAW`), or queue it behind what waits; false advises to send no more for now.

        The channel owns *fds* from this call on, even if it raises, and closes them once they have
        left; with *keep* it sends duplicates and the caller's stay his. Raises ChannelClosed, TypeError
        or ValueError for what JSON cannot hold, FrameError for what no frame can, OSError for a
        descriptor that is not open.
        """
        owned = _duplicates(fds) if keep else list(fds)
        try:
            self._check_writable()
            _check_open(owned)
            data = encode(Frame(kind, message if kind in _RAW else _to_json(message), tuple(owned)))
        except BaseException:
            close_all(owned)
            raise
        self._queue.append(_Outgoing(memoryview(data), owned))
        self._queued += len(data)
        if len(self._queue) == 1:
            self.flush()
            self._check_writable()
        return self._queued <= HIGH_WATER

    def receive(self) -> list[Message]:
        """What can be read now; more may be left if it is much. Sets `is_eof` at the end.

        Raises FrameError if the other side does not keep to the frames, or if descriptors were lost. What
        came before is lost with it, and nothing is left to do but to `close`.
        """
        frames: list[Frame] = []
        try:
            for _ in range(READS_PER_CALL):
                if not self._read_into(frames):
                    break
            return [Message(frame.kind, _body(frame), Fds(frame.fds)) for frame in frames]
        except FrameError:
            for frame in frames:
                close_all(frame.fds)
            self._end()
            raise

    def flush(self) -> None:
        """Write what the kernel takes. If the other side is gone the queue is dropped and `is_eof` will follow."""
        while self._queue and self._write(self._queue[0]):
            self._queue.popleft()

    def flush_blocking(self, timeout: float) -> bool:
        """Wait at most *timeout* seconds until everything is written; say whether it was. For last words."""
        deadline = time.monotonic() + timeout
        poll = select.poll()
        if self._queue:
            poll.register(self.fileno(), select.POLLOUT)
        while True:
            self.flush()
            if not self._queue:
                return not self._is_broken
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll.poll(left * 1000)

    def close(self) -> None:
        """Close this end, with the descriptors that were not sent and those of unfinished frames. May be repeated."""
        self._drop_queue()
        close_all(self._decoder.leftovers())
        self._sock.close()

    def _check_writable(self) -> None:
        if self.is_closed:
            raise ChannelClosed("this end of the channel was closed")
        if self._is_broken or self._is_eof:
            raise ChannelClosed("the other end of the channel is gone")

    def _write(self, outgoing: _Outgoing) -> bool:
        """True once all of *outgoing* has left."""
        while outgoing.data:
            try:
                count = descriptors.send(self._sock, outgoing.data, outgoing.fds)
            except BlockingIOError:
                return False
            except OSError as exc:
                if exc.errno in _NOT_NOW:
                    return False
                self._is_broken = True
                self._drop_queue()
                return False
            outgoing.advance(count)
            self._queued -= count
        return True

    def _read_into(self, frames: list[Frame]) -> bool:
        """One read; false if there is no point in another."""
        if self.is_closed or self._is_eof:
            return False
        try:
            data, fds = descriptors.receive(self._sock, READ_SIZE)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # it closed with messages of ours unread
            data, fds = b"", []
        if not data:
            self._end()
            return False
        frames += self._decoder.feed(data, fds)
        return True

    def _end(self) -> None:
        self._is_eof = True
        self._drop_queue()
        close_all(self._decoder.leftovers())

    def _drop_queue(self) -> None:
        while self._queue:
            close_all(self._queue.popleft().fds)
        self._queued = 0


class _Outgoing:
    """A frame on its way: the bytes still to be sent, and the descriptors until the first byte has left."""

    __slots__ = ("data", "fds")

    def __init__(self, data: memoryview, fds: list[int]) -> None:
        self.data = data
        self.fds = fds

    def advance(self, count: int) -> None:
        self.data = self.data[count:]
        close_all(self.fds)
        self.fds = []


def _duplicates(fds: Sequence[int]) -> list[int]:
    copies: list[int] = []
    try:
        copies.extend(map(os.dup, fds))
    except OSError:
        close_all(copies)
        raise
    return copies


def _check_open(fds: list[int]) -> None:
    """Found out here it is the caller's error; found out while flushing it would be nobody's."""
    for fd in fds:
        os.fstat(fd)


def _body(frame: Frame) -> Any:
    return frame.payload if frame.kind in _RAW else _from_json(frame.payload)


def _to_json(message: Any) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode("ascii")


def _from_json(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except ValueError as exc:
        raise FrameError(f"a frame of {len(payload)} bytes does not hold JSON: {exc}") from exc
