"""A `Channel` driven by an asyncio event loop, uvloop included.

Messages go to a callback, in order, and what the callback does not take of their descriptors is
closed when it returns. That the other side is gone is told once; our own `close` is not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from prefork.errors import FrameError
from prefork.ipc.channel import Channel, Message
from prefork.ipc.frames import Kind

log = logging.getLogger("prefork")


class AsyncChannel:
    """Calls *on_message* for each message, and *on_closed* once when the other side is gone."""

    __slots__ = ("_is_watching_writes", "_loop", "_on_closed", "_on_message", "channel")

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
        loop.add_reader(channel.fileno(), self._readable)
        self._watch_writes()

    @property
    def is_closed(self) -> bool:
        """By us, by the other side, or by a broken frame."""
        return self.channel.is_closed

    def send(self, message: Any, *, kind: Kind = Kind.CONTROL, fds: Sequence[int] = (), keep: bool = False) -> bool:
        """See `Channel.send`."""
        is_below_high_water = self.channel.send(message, kind=kind, fds=fds, keep=keep)
        self._watch_writes()
        return is_below_high_water

    def close(self) -> None:
        """Stop watching and close the channel at once; what is still queued is lost. May be repeated."""
        if self.channel.is_closed:
            return
        # Unwatched before it is closed: epoll forgets a closed descriptor, and the loop would not.
        self._loop.remove_reader(self.channel.fileno())
        self._loop.remove_writer(self.channel.fileno())
        self._is_watching_writes = False
        self.channel.close()

    def _readable(self) -> None:
        try:
            messages = self.channel.receive()
        except FrameError as exc:
            log.error("channel closed: %s", exc)
            messages = []
        for message in messages:
            with message.fds:
                # A callback may close us; what came behind its message is then nobody's.
                if not self.is_closed:
                    self._tell(self._on_message, message)
        if self.channel.is_eof and not self.is_closed:
            self.close()
            self._tell(self._on_closed)

    def _writable(self) -> None:
        self.channel.flush()
        self._watch_writes()

    def _watch_writes(self) -> None:
        wanted = self.channel.wants_write
        if wanted and not self._is_watching_writes:
            self._loop.add_writer(self.channel.fileno(), self._writable)
        elif self._is_watching_writes and not wanted:
            self._loop.remove_writer(self.channel.fileno())
        self._is_watching_writes = wanted

    def _tell(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            callback(*args)
        except Exception:
            log.exception("a callback of an IPC channel raised")
