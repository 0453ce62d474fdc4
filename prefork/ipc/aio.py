"""A `Channel` driven by an asyncio event loop, uvloop included.

Messages go to a callback, in order, and what the callback does not take of their descriptors is
closed when it returns; a handle is the callback's from the call on. That the other side is gone is
told once; our own `close` is not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from prefork.errors import ChannelClosed, FrameError
from prefork.ipc.channel import Channel, Message
from prefork.ipc.frames import Kind

log = logging.getLogger("prefork")


class AsyncChannel:
    """Calls *on_message* for each message, and *on_closed* once when the other side is gone."""

    __slots__ = ("_drained", "_is_watching_writes", "_loop", "_on_closed", "_on_message", "_retry_timer", "channel")

    def __init__(
        self,
        channel: Channel,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[Message], None],
        on_closed: Callable[[], None],
    ) -> None:
        self.channel = channel
        self._loop = loop
        self._on_message = on_message
        self._on_closed = on_closed
        self._is_watching_writes = False
        self._retry_timer: asyncio.TimerHandle | None = None
        self._drained: list[asyncio.Future[None]] = []  # of those who wait
        channel.on_backlog = self._watch_writes
        loop.add_reader(channel.fileno(), self._readable)
        self._follow_up()

    @property
    def is_closed(self) -> bool:
        """By us, by the other side, or by a broken frame."""
        return self.channel.is_closed

    @property
    def is_backed_up(self) -> bool:
        """See `Channel.is_backed_up`."""
        return self.channel.is_backed_up

    def send(self, message: Any, *, kind: Kind = Kind.CONTROL, fds: Sequence[int] = (), keep: bool = False) -> bool:
        """See `Channel.send`."""
        return self.channel.send(message, kind=kind, fds=fds, keep=keep)

    def send_user(self, message: Any, handle: object = None, *, keep: bool = False, received: bytes = b"") -> bool:
        """See `Channel.send_user`."""
        is_below_high_water = self.channel.send_user(message, handle, keep=keep, received=received)
        if self.channel.wants_write is not self._is_watching_writes:
            self._watch_writes()
        return is_below_high_water

    async def drained(self) -> None:
        """Returns once less than the high-water mark waits to be sent. Raises ChannelClosed if the channel ends first."""
        if self.is_closed or self.channel.is_eof:
            raise ChannelClosed("the channel has ended")
        if self.channel.is_backed_up:
            waiting = self._loop.create_future()
            self._drained.append(waiting)
            await waiting

    def close(self) -> None:
        """Stop watching and close the channel at once; what is still queued is lost. May be repeated."""
        if self.channel.is_closed:
            return
        # Unwatched before it is closed: epoll forgets a closed descriptor, and the loop would not.
        self._loop.remove_reader(self.channel.fileno())
        self._loop.remove_writer(self.channel.fileno())
        self._is_watching_writes = False
        self.channel.on_backlog = None
        self.channel.close()
        self._watch_retry()
        self._tell_drained(ChannelClosed("the channel has ended"))

    def _readable(self) -> None:
        try:
            messages = self.channel.receive()
        except FrameError as exc:
            log.error("channel closed: %s", exc)
            messages = []
        for message in messages:
            if self.is_closed:  # by a callback; what came behind its message is nobody's
                message.discard()
            elif message.fds:
                with message.fds:
                    self._tell(self._on_message, message)
            else:
                self._tell(self._on_message, message)
        if not self.is_closed:
            if self.channel.is_eof:
                self.close()
                self._tell(self._on_closed)
            else:
                self._follow_up()

    def _writable(self) -> None:
        self.channel.flush()
        self._follow_up()

    def _retry(self) -> None:
        self._retry_timer = None
        self.channel.retry()
        self._follow_up()

    def _follow_up(self) -> None:
        """What reading or writing may have changed."""
        if self.channel.wants_write is not self._is_watching_writes:
            self._watch_writes()
        if self.channel.retry_at is not None or self._retry_timer is not None:
            self._watch_retry()
        if self._drained and not self.channel.is_backed_up:
            self._tell_drained(None)

    def _watch_writes(self) -> None:
        wanted = self.channel.wants_write
        if wanted is self._is_watching_writes:
            return
        if wanted:
            self._loop.add_writer(self.channel.fileno(), self._writable)
        else:
            self._loop.remove_writer(self.channel.fileno())
        self._is_watching_writes = wanted

    def _watch_retry(self) -> None:
        due = self.channel.retry_at
        if due is not None and self._retry_timer is None:
            self._retry_timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._retry)
        elif due is None and self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None

    def _tell_drained(self, error: ChannelClosed | None) -> None:
        waiting, self._drained = self._drained, []
        for future in waiting:
            if future.done():  # whoever waited was cancelled
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _tell(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            callback(*args)
        except Exception:
            log.exception("a callback of an IPC channel raised")
