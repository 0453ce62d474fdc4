"""Ordered messages between two processes, over one end of a unix socket pair.

It never blocks (but for `flush_blocking`) and knows no loop: whoever drives it calls `receive` when
`fileno()` is readable, `flush` when it is writable and `wants_write` is true, and `retry` at
`retry_at`. That a write failed does not end it: the other side's last words may still wait to be
read, and `is_eof` follows.

A user's handle arrives exactly once. We keep our copy until the other side's receipt, and while one
is out, later messages of users wait behind it. A receiver that has no descriptor left drops message
and handle and says so; we send both again after each of `RETRIES`, and then the message alone.

A stream with our own framing rather than SOCK_SEQPACKET, which has no size that is safe everywhere,
reads an empty message as the end, and is missing on macOS.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prefork.errors import ChannelClosed, FrameError
from prefork.ipc import fds as descriptors
from prefork.ipc.fds import NO_FDS, Buffer, Fds, close_all
from prefork.ipc.frames import HEADER_SIZE, LARGEST_SIZE, MAX_SIZE, USERS, Decoder, Frame, Kind, header
from prefork.ipc.handles import Handle, pack, revive
from prefork.ipc.messages import from_json, from_pickle, to_json, to_pickle

log = logging.getLogger("prefork")

# Bytes queued above which `send` says false. Node's channel says so at the same size.
HIGH_WATER = 128 * 1024

# A handle that waits counts as this many bytes: descriptors are scarcer than memory.
HANDLE_WEIGHT = 8 * 1024

# Linux's default for net.core.wmem_default is about three of these.
READ_SIZE = 64 * 1024  # bytes

# Below this size one buffer for header and payload is cheaper than two.
JOINED_SIZE = 16 * 1024  # bytes

# unix(7): ETOOMANYREFS is more descriptors of this user in flight than RLIMIT_NOFILE. They become
# fewer as their receivers read, so it is a full buffer by another name, like a kernel short of memory.
_NOT_NOW = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)

# Their bodies are bytes, which the channel neither encodes nor decodes.
_RAW = frozenset({Kind.HANDOFF, Kind.ACK, Kind.PUBLISH})

# One peer that never stops writing must not keep the loop from all others.
READS_PER_CALL = 16

# A handle that found no room is sent again after so many seconds: a burst passes in the first, a
# server that closes idle connections gets the last. Node gives up after as many.
RETRIES = (0.05, 0.5, 2.0)

# Before a message with a handle: how many bytes the sender had already read from it.
_RECEIVED = struct.Struct("!I")

_ARRIVED, _LOST = b"\x01", b"\x00"


@dataclass(slots=True)  # and not frozen, which would triple its cost
class Message:
    """What came out of a channel. The receiver closes *fds*, best with `with message.fds:`.

    *handle* belongs to whoever is given the message; who gives it to nobody calls `discard`.
    """

    kind: Kind
    body: Any  # what was sent; the bytes as they came for kinds in `_RAW`
    fds: Fds = NO_FDS
    handle: Handle | None = None  # with Kind.USER
    is_lost: bool = False  # it came with descriptors, for which we had no room

    def discard(self) -> None:
        """Close its descriptors and its handle: nobody wants it."""
        self.fds.close()
        if self.handle is not None:
            self.handle.close()


class Channel:
    """One end of a conversation between two processes."""

    __slots__ = (
        "_decoder",
        "_dumps",
        "_early",
        "_held",
        "_is_broken",
        "_is_closed",
        "_is_eof",
        "_max_size",
        "_queue",
        "_queued",
        "_receipt",
        "_sock",
        "_unacked",
        "_user_kind",
        "_why_not",
        "on_backlog",
        "retry_at",
    )

    def __init__(self, sock: socket.socket, *, serialization: str = "json", max_size: int = MAX_SIZE) -> None:
        if serialization not in _SERIALIZATIONS:
            raise ValueError(f"serialization is {serialization!r}, known are {' and '.join(_SERIALIZATIONS)}")
        if not 0 < max_size <= LARGEST_SIZE:
            raise ValueError(f"the largest message cannot be {max_size} bytes, 1 to {LARGEST_SIZE} are allowed")
        sock.setblocking(False)
        self._sock = sock
        self._user_kind, self._dumps = _SERIALIZATIONS[serialization]
        self._max_size = max_size
        self._decoder = Decoder(max_size)
        self._queue: deque[_Outgoing] = deque()  # to be written, in this order
        self._held: deque[_Letter] = deque()  # users' messages behind the handle that is out
        self._queued = 0  # bytes in both
        self._unacked: _Letter | None = None  # the handle that is out
        self._receipt: _Outgoing | None = None  # ours for their last handle
        self._early: list[Message] = []  # read while nobody asked
        self._why_not = ""  # nothing can be sent any more
        self._is_eof = False
        self._is_closed = False
        self._is_broken = False  # writing failed: nobody will read what we send
        self.on_backlog: Callable[[], object] | None = None  # called when `wants_write` becomes true
        self.retry_at: float | None = None  # when `retry` is to be called, on the monotonic clock

    @classmethod
    def pair(cls, *, serialization: str = "json", max_size: int = MAX_SIZE) -> tuple[Channel, Channel]:
        """Two ends, both close-on-exec. After a fork each process closes the one that is not its own."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return (
            cls(one, serialization=serialization, max_size=max_size),
            cls(other, serialization=serialization, max_size=max_size),
        )

    def fileno(self) -> int:
        """The descriptor to wait on, -1 once closed."""
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        """Messages wait for room: call `flush` when the descriptor is writable."""
        return bool(self._queue)

    @property
    def has_unsent(self) -> bool:
        """Something is still to be written, or a handle has not been acknowledged."""
        return bool(self._queue) or self._unacked is not None

    @property
    def queued(self) -> int:
        """Bytes that wait to be written."""
        return self._queued

    @property
    def is_backed_up(self) -> bool:
        """More waits than the high-water mark: better send no more for now."""
        return self._queued > HIGH_WATER

    @property
    def is_eof(self) -> bool:
        """Nothing more will come: the other side is gone and was heard to the end, or it broke the frames."""
        return self._is_eof

    @property
    def is_closed(self) -> bool:
        """`close` was called on this end. It never closes by itself: a loop may still watch its descriptor."""
        return self._is_closed

    def send(self, message: Any, *, kind: Kind = Kind.CONTROL, fds: Sequence[int] = (), keep: bool = False) -> bool:
        """Send *message* as JSON (bytes as they are for kinds in `_RAW`), or queue it behind what waits; false advises to send no more for now.

        The channel owns *fds* from this call on, even if it raises, and closes them once they have
        left; with *keep* it sends duplicates and the caller's stay his. Raises ChannelClosed, TypeError
        or ValueError for what JSON cannot hold, FrameError for what no frame can, OSError for a
        descriptor that is not open. Users' messages carry handles, see `send_user`, and no *fds*.
        """
        if not fds:
            return self.send_user(message) if kind is Kind.USER else self._post(kind, _payload(kind, message))
        owned = _duplicates(fds) if keep else list(fds)
        try:
            if kind is Kind.USER:
                raise ValueError("a user's message carries a handle, not descriptors")
            _check_open(owned)
            return self._post(kind, _payload(kind, message), owned)
        except BaseException:
            close_all(owned)
            raise

    def send_user(self, message: Any, handle: object = None, *, keep: bool = False, received: bytes = b"") -> bool:
        """Send a user's *message* in the channel's serialization; false advises to send no more for now.

        *handle* (a socket, a file, a descriptor's number) is moved: the caller's object is detached or
        closed at once; with *keep* a duplicate travels. *received* is what the caller has read of a
        socket, for the receiver to begin with. If it raises, nothing was sent and *handle* is still the
        caller's. Raises ChannelClosed, what the serialization raises, TypeError for what is no handle,
        OSError or ValueError for one that is not open, FrameError for too large a message.
        """
        body = self._dumps(message)
        if handle is None and self._unacked is None and not received:
            return self._post(self._user_kind, body)
        if handle is not None:
            return self._send_handle(body, handle, keep, bytes(received))
        if received:
            raise TypeError("bytes that were received go with the handle that they came from, and there is none")
        return self._hold(_Letter(self._user_kind, [body], self._max_size))

    def receive(self) -> list[Message]:
        """What can be read now; more may be left, and the end is read by a call of its own. Sets `is_eof` then.

        Raises FrameError if the other side does not keep to the frames. What came before is lost with
        it, and nothing is left to do but to `close`.
        """
        messages: list[Message] = []
        if self._early:
            messages, self._early = self._early, messages
        frames: list[Frame] = []
        pending = iter(frames)
        try:
            for _ in range(READS_PER_CALL):
                if not self._read_into(frames, messages):
                    break
            for frame in pending:
                if frame.kind is Kind.USER and not frame.fds and not frame.is_lost:  # by far the most
                    messages.append(Message(Kind.USER, from_json(frame.payload)))
                    continue
                message = self._open(frame)
                if message is not None:
                    messages.append(message)
        except FrameError:
            for message in messages:
                message.discard()
            for frame in pending:
                close_all(frame.fds)
            self._end()
            raise
        return messages

    def flush(self) -> None:
        """Write what the kernel takes. If the other side is gone the queue is dropped and `is_eof` will follow."""
        while self._queue and self._write(self._queue[0]):
            self._queue.popleft()

    def flush_blocking(self, timeout: float) -> bool:
        """Wait at most *timeout* seconds until everything is written and every handle has arrived; say whether it did.

        For last words. What comes in meanwhile is kept for `receive`.
        """
        deadline = time.monotonic() + timeout
        self.flush()
        while self._queue or self._unacked is not None:
            now = time.monotonic()
            if now >= deadline:
                return False
            if self.retry_at is not None and now >= self.retry_at:
                self.retry()
            self._wait((deadline if self.retry_at is None else min(deadline, self.retry_at)) - now)
            self.flush()
            if self._why_not:  # and what waited was dropped
                return False
        return not self._is_broken

    def retry(self) -> None:
        """Send the handle again for which the other side had no room, or, after `RETRIES`, its message alone."""
        letter = self._unacked
        if self.retry_at is None or letter is None:
            return
        self.retry_at = None
        self._enqueue(letter.to_frame())
        self.flush()

    def close(self) -> None:
        """Close this end, with the descriptors that were not sent and those of unfinished frames. May be repeated."""
        self._is_closed = True
        self._why_not = "this end of the channel was closed"
        self._drop()
        close_all(self._decoder.leftovers())
        for message in self._early:
            message.discard()
        self._early = []
        self._sock.close()

    # ---- sending ----

    def _check_writable(self) -> None:
        if self._why_not:
            raise ChannelClosed(self._why_not)

    def _post(self, kind: Kind, body: Buffer, fds: list[int] | None = None) -> bool:
        """Send a frame, or queue it."""
        size = len(body)
        head = header(kind, size, len(fds) if fds else 0, self._max_size if kind in USERS else MAX_SIZE)
        if self._why_not:
            raise ChannelClosed(self._why_not)
        pieces: list[Buffer]
        if size > JOINED_SIZE:
            pieces = [head, body]
        else:
            frame = head + body
            if not (fds or self._queue):  # by far the most
                try:
                    count = self._sock.send(frame, descriptors.SEND_FLAGS)
                except OSError:
                    count = 0  # the way below says what it is
                if count == len(frame):
                    return self._queued <= HIGH_WATER
                if count:
                    outgoing = _Outgoing([frame], None)
                    outgoing.advance(count)
                    self._enqueue(outgoing)
                    return self._queued <= HIGH_WATER
            pieces = [frame]
        if self._queue:
            self._enqueue(_Outgoing(pieces, fds))
            return self._queued <= HIGH_WATER
        count = self._push(pieces, fds)
        if count == size + HEADER_SIZE and not fds:
            return self._queued <= HIGH_WATER
        if count and fds:
            close_all(fds)
            fds = None
        if count < size + HEADER_SIZE:
            self._check_writable()
            outgoing = _Outgoing(pieces, fds)
            outgoing.advance(count)
            self._enqueue(outgoing)
        return self._queued <= HIGH_WATER

    def _send_handle(self, body: Buffer, handle: object, keep: bool, received: bytes) -> bool:
        letter = _Letter(self._user_kind, [_RECEIVED.pack(len(received)), received, body], self._max_size)
        self._check_writable()
        parcel = pack(handle, keep=keep)
        letter.handle = parcel.fd
        letter.owns_handle = parcel.is_copy
        if self._unacked is not None:
            self._hold(letter)
        else:
            self._unacked = letter
            self._enqueue(letter.to_frame())
            self.flush()
            self._check_writable()
        letter.owns_handle = True
        parcel.let_go()
        return self._queued <= HIGH_WATER

    def _hold(self, letter: _Letter) -> bool:
        self._check_writable()
        self._held.append(letter)
        self._queued += letter.weight
        return self._queued <= HIGH_WATER

    def _release(self) -> None:
        """Their receipt came: send what waited for it, up to the next handle."""
        while self._held and self._unacked is None:
            letter = self._held.popleft()
            self._queued -= letter.weight
            if letter.handle is not None:
                self._unacked = letter
            self._enqueue(letter.to_frame())
        self.flush()

    def _enqueue(self, outgoing: _Outgoing) -> None:
        self._queue.append(outgoing)
        self._queued += outgoing.left
        if len(self._queue) == 1 and self.on_backlog is not None:
            self.on_backlog()

    def _write(self, outgoing: _Outgoing) -> bool:
        """True once all of *outgoing* has left."""
        while outgoing.left:
            count = self._push(outgoing.pieces, outgoing.fds)
            if not count:
                return False
            if outgoing.fds:
                if outgoing.owns_fds:
                    close_all(outgoing.fds)
                outgoing.fds = None
            outgoing.advance(count)
            self._queued -= count
        return True

    def _push(self, pieces: list[Buffer], fds: list[int] | None) -> int:
        """How many bytes the kernel took. With none and `_is_broken` there is nobody to take them."""
        try:
            return descriptors.send(self._sock, pieces, fds or ())
        except BlockingIOError:
            return 0
        except OSError as exc:
            if exc.errno not in _NOT_NOW:
                self._is_broken = True
                self._why_not = "the other end of the channel is gone"
                self._drop()
            return 0

    # ---- receiving ----

    def _read_into(self, frames: list[Frame], messages: list[Message]) -> bool:
        """One read; false if there is no point in another. A lone message takes a short way, past *frames*."""
        if self._is_eof or self._is_closed:
            return False
        room = self._decoder.room() if self._decoder.partial is not None else None
        try:
            if room is None:
                data, fds, is_lost = descriptors.receive(self._sock, READ_SIZE)
                size, count = READ_SIZE, len(data)
            else:
                count, fds, is_lost = descriptors.receive_into(self._sock, room)
                size = len(room)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # it closed with messages of ours unread
            self._end()
            return False
        if not count:
            self._end()
            return False
        if room is None:
            if not (frames or fds or is_lost):
                payload = self._decoder.lone(data)
                if payload is not None:
                    messages.append(Message(Kind.USER, from_json(payload)))
                    return False
            frames += self._decoder.feed(data, fds, is_lost=is_lost)
        else:
            frames += self._decoder.filled(count, fds, is_lost=is_lost)
        # A read also ends with the chunk that carries descriptors, and then there may be more.
        return count == size or bool(fds) or is_lost

    def _open(self, frame: Frame) -> Message | None:
        """What *frame* says to the receiver; None if it was for the channel itself."""
        kind, payload, fds, is_lost = frame
        try:
            if kind is Kind.USER or kind is Kind.PICKLED:
                if fds or is_lost:
                    return self._open_parcel(frame)
                return Message(Kind.USER, self._load(kind, payload))
            if kind is Kind.RECEIPT:
                if fds or is_lost:
                    raise FrameError("a receipt claims descriptors")
                self._settle(bytes(payload))
                return None
            body = bytes(payload) if kind in _RAW else from_json(payload)
        except _Unreadable:
            return None
        except FrameError:
            close_all(fds)
            raise
        return Message(kind, body, Fds(fds) if fds else NO_FDS, None, is_lost)

    def _open_parcel(self, frame: Frame) -> Message | None:
        """A user's message with a handle. We answer with a receipt."""
        if self._receipt is not None and self._receipt.left:
            raise FrameError("a second handle came before the first was acknowledged")
        if frame.is_lost:
            self._answer(_LOST)
            return None
        if len(frame.fds) != 1:
            raise FrameError(f"a user's message claims {len(frame.fds)} descriptors, 1 is allowed")
        payload = memoryview(frame.payload)
        size = _RECEIVED.unpack_from(payload)[0] if len(payload) >= _RECEIVED.size else LARGEST_SIZE
        start = _RECEIVED.size + size
        if start > len(payload):
            raise FrameError(f"a user's message with a handle is cut short: it has {len(payload)} bytes")
        self._answer(_ARRIVED)
        try:
            body = self._load(frame.kind, payload[start:])
        except _Unreadable:
            close_all(frame.fds)
            raise
        return Message(Kind.USER, body, NO_FDS, revive(frame.fds[0], bytes(payload[_RECEIVED.size : start])))

    def _load(self, kind: Kind, payload: Buffer) -> Any:
        if kind is Kind.USER:
            return from_json(payload)
        if self._user_kind is not Kind.PICKLED:
            raise FrameError("the other side sent a pickle, and this channel's serialization is json")
        try:
            return from_pickle(payload)
        except Exception as exc:  # the application's objects raise what they like
            log.exception("a message of %d bytes is dropped: it cannot be unpickled", len(payload))
            raise _Unreadable from exc

    def _answer(self, receipt: bytes) -> None:
        """Overtakes what waits, so that two sides with handles on their way do not wait for one another for ever."""
        if self._why_not:
            return
        self._receipt = _Outgoing([header(Kind.RECEIPT, len(receipt)) + receipt], None)
        self._queue.insert(1 if self._queue and self._queue[0].has_begun else 0, self._receipt)
        self._queued += self._receipt.left
        if len(self._queue) == 1 and self.on_backlog is not None:
            self.on_backlog()
        self.flush()

    def _settle(self, receipt: bytes) -> None:
        """Their receipt for the handle that is out."""
        if self._is_broken:  # what it is about was dropped
            return
        letter = self._unacked
        is_due = letter is not None and self.retry_at is None and letter.has_left
        if letter is None or not is_due or receipt not in (_ARRIVED, _LOST):
            raise FrameError("the other side acknowledges a handle that was not sent")
        if receipt == _LOST and letter.failures < len(RETRIES):
            self.retry_at = time.monotonic() + RETRIES[letter.failures]
            letter.failures += 1
            return
        letter.close()
        self._unacked = None
        if receipt == _LOST:
            log.warning("a handle is given up after %d attempts: the receiver had no room for it", letter.failures + 1)
            self._enqueue(letter.to_frame())
        self._release()

    def _wait(self, seconds: float) -> None:
        """Until the socket can be written, if something waits for that, or read; and read it."""
        poll = select.poll()
        # A receipt is all that is wanted from reading. Without a handle that is out, the peer may talk on.
        mask = (select.POLLOUT if self._queue else 0) | (select.POLLIN if self._unacked is not None else 0)
        poll.register(self.fileno(), mask)
        if any(events & select.POLLIN for _, events in poll.poll(seconds * 1000)):
            with suppress(FrameError):  # told by the end
                self._early = self.receive()

    # ---- the end ----

    def _end(self) -> None:
        self._is_eof = True
        self._why_not = self._why_not or "the other end of the channel is gone"
        self._drop()
        close_all(self._decoder.leftovers())

    def _drop(self) -> None:
        for outgoing in self._queue:
            if outgoing.owns_fds and outgoing.fds:
                close_all(outgoing.fds)
        self._queue.clear()
        for letter in (self._unacked, *self._held):
            if letter is not None:
                letter.close()
        self._unacked = None
        self._held.clear()
        self._queued = 0
        self.retry_at = None


class _Outgoing:
    """A frame on its way: the bytes still to be sent, and the descriptors until the first byte has left."""

    __slots__ = ("fds", "has_begun", "left", "owns_fds", "pieces")

    def __init__(self, pieces: list[Buffer], fds: list[int] | None, owns_fds: bool = True) -> None:
        self.pieces = pieces
        self.left = sum(map(len, pieces))  # bytes
        self.has_begun = False  # nothing may be written before the rest of it
        self.fds = fds
        self.owns_fds = owns_fds

    def advance(self, count: int) -> None:
        """*count* bytes have left."""
        if not count:
            return
        self.has_begun = True
        self.left -= count
        while self.pieces and count >= len(self.pieces[0]):
            count -= len(self.pieces.pop(0))
        if count:
            self.pieces[0] = memoryview(self.pieces[0])[count:]


class _Letter:
    """A user's message that is kept: it waits for its turn, or its handle is not acknowledged."""

    __slots__ = ("_kind", "_max_size", "_outgoing", "_payload", "failures", "handle", "owns_handle")

    def __init__(self, kind: Kind, payload: list[Buffer], max_size: int) -> None:
        header(kind, sum(map(len, payload)), 0, max_size)  # too large is the caller's error
        self._kind = kind
        self._payload = payload  # the last is the message, before it what goes with a handle
        self._max_size = max_size
        self._outgoing: _Outgoing | None = None
        self.handle: int | None = None
        self.owns_handle = True
        self.failures = 0

    @property
    def weight(self) -> int:
        """What it adds to the queue while it waits."""
        return sum(map(len, self._payload)) + (0 if self.handle is None else HANDLE_WEIGHT)

    @property
    def has_left(self) -> bool:
        return self._outgoing is not None and not self._outgoing.left

    def to_frame(self) -> _Outgoing:
        """It as it is sent, with its handle if it has one. The handle stays the letter's."""
        fds = [] if self.handle is None else [self.handle]
        payload = self._payload if fds else self._payload[-1:]
        head = header(self._kind, sum(map(len, payload)), len(fds), self._max_size)
        self._outgoing = _Outgoing([head, *payload], fds, owns_fds=False)
        return self._outgoing

    def close(self) -> None:
        """Give up the handle; the message stays."""
        if self.handle is not None and self.owns_handle:
            close_all([self.handle])
        self.handle = None


class _Unreadable(Exception):
    """A message that is dropped alone."""


_SERIALIZATIONS = {"json": (Kind.USER, to_json), "pickle": (Kind.PICKLED, to_pickle)}


def _payload(kind: Kind, message: Any) -> bytes:
    return message if kind in _RAW else to_json(message)


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
