"""What the reactor watches for the master: a worker's channel, its end, and signals.

A source turns "readable" into a call; it decides nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from signal import Signals

from prefork.cluster.handles import WorkerHandle
from prefork.errors import ChannelClosed, FrameError
from prefork.ipc.channel import Message
from prefork.process.signals import SignalInbox

log = logging.getLogger("prefork")


class ChannelSource:
    """A worker's channel as the reactor sees it."""

    def __init__(
        self,
        handle: WorkerHandle,
        on_message: Callable[[WorkerHandle, Message], None],
        on_end: Callable[[ChannelSource], None],
    ) -> None:
        self.handle = handle
        self._on_message = on_message
        self._on_end = on_end

    def fileno(self) -> int:
        return self.handle.channel.fileno()

    wants_read = True

    @property
    def wants_write(self) -> bool:
        return self.handle.channel.wants_write

    def on_readable(self) -> None:
        try:
            messages = self.handle.channel.receive()
        except FrameError as error:
            log.error("%s cannot be understood any more: %s; it is killed", self.handle.describe(), error)
            self.handle.kill(Signals.SIGKILL)
            self._on_end(self)
            return
        for message in messages:
            with message.fds:
                self._on_message(self.handle, message)
        if self.handle.channel.is_eof:
            self._on_end(self)

    def on_writable(self) -> None:
        with suppress(ChannelClosed):  # its end is told by reading
            self.handle.channel.flush()


class ExitSource:
    """A worker's pidfd: readable once the process has ended, however it ended."""

    wants_read = True
    wants_write = False

    def __init__(self, handle: WorkerHandle, on_exit: Callable[[ExitSource], None]) -> None:
        self.handle = handle
        self._on_exit = on_exit

    def fileno(self) -> int:
        return self.handle.pidfd

    def on_readable(self) -> None:
        self._on_exit(self)

    def on_writable(self) -> None:
        raise AssertionError("a pidfd is never written")


class SignalSource:
    """The inbox of signals as the reactor sees it."""

    wants_read = True
    wants_write = False

    def __init__(self, inbox: SignalInbox, on_signal: Callable[[Signals], None]) -> None:
        self._inbox = inbox
        self._on_signal = on_signal
        self.fileno = inbox.fileno

    def on_readable(self) -> None:
        for number in self._inbox.take():
            self._on_signal(number)

    def on_writable(self) -> None:
        raise AssertionError("the inbox is never written")
