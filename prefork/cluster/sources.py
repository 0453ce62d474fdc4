"""What the reactor watches for the master: a worker's channel, its end, and signals.

A source turns "readable" into a call; it decides nothing.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable
from contextlib import suppress
from signal import Signals

from prefork.cluster.handles import Output, WorkerHandle
from prefork.cluster.reactor import Reactor, Timer
from prefork.errors import ChannelClosed, FrameError
from prefork.ipc.channel import Message
from prefork.process.signals import SignalInbox

log = logging.getLogger("prefork")

# What is read at a time of a worker's stdout or stderr: as much as a pipe holds, in bytes.
OUTPUT_SIZE = 64 * 1024


class ChannelSource:
    """A worker's channel as the reactor sees it."""

    is_steady = True
    wants_read = True

    def __init__(
        self,
        handle: WorkerHandle,
        reactor: Reactor,
        on_message: Callable[[WorkerHandle, Message], None],
        on_end: Callable[[ChannelSource], None],
    ) -> None:
        self.handle = handle
        self._reactor = reactor
        self._on_message = on_message
        self._on_end = on_end
        self._retry: Timer | None = None
        handle.channel.on_backlog = self._on_backlog

    def fileno(self) -> int:
        return self.handle.channel.fileno()

    @property
    def wants_write(self) -> bool:
        return self.handle.channel.wants_write

    def on_readable(self) -> None:
        channel = self.handle.channel
        try:
            messages = channel.receive()
        except FrameError as error:
            log.error("%s cannot be understood any more: %s; it is killed", self.handle.describe(), error)
            self.handle.signal(Signals.SIGKILL)
            self._on_end(self)
            return
        for message in messages:
            if message.fds:
                with message.fds:
                    self._on_message(self.handle, message)
            else:
                self._on_message(self.handle, message)
        self._look_after()
        if channel.is_eof:
            self._on_end(self)

    def read_all(self) -> None:
        """What is there, to the last byte: its worker has ended."""
        readable = select.poll()
        while not self.handle.channel.is_closed:
            readable.register(self.handle.channel.fileno(), select.POLLIN)
            if not readable.poll(0):
                return
            self.on_readable()

    def on_writable(self) -> None:
        with suppress(ChannelClosed):  # its end is told by reading
            self.handle.channel.flush()
        self._look_after()

    def _on_backlog(self) -> None:
        """The kernel did not take all of a message."""
        self._reactor.refresh(self)

    def _look_after(self) -> None:
        """Tell who waits for room; see to it that a handle that did not arrive is sent again in its time."""
        handle, channel = self.handle, self.handle.channel
        if handle.is_behind and not channel.is_backed_up:
            handle.is_behind = False
            handle.emit("drain")
        if channel.retry_at is not None and self._retry is None:
            self._retry = self._reactor.call_later(channel.retry_at - self._reactor.now(), self._send_again)

    def _send_again(self) -> None:
        self._retry = None
        if not self.handle.channel.is_closed:
            self.handle.channel.retry()
            self._look_after()


class OutputSource:
    """The pipe that a worker writes its stdout or stderr into."""

    is_steady = True
    wants_read = True
    wants_write = False

    def __init__(self, descriptor: int, output: Output, remove: Callable[[OutputSource], None]) -> None:
        self._descriptor = descriptor
        self._output = output
        self._remove = remove

    def fileno(self) -> int:
        return self._descriptor

    def on_readable(self) -> None:
        try:
            data = os.read(self._descriptor, OUTPUT_SIZE)
        except BlockingIOError:
            return
        if data:
            self._output.emit("data", data)
            return
        self._remove(self)
        self.close()
        self._output.emit("end")

    def on_writable(self) -> None:
        raise AssertionError("this end of the pipe is never written")

    def close(self) -> None:
        os.close(self._descriptor)


class ExitSource:
    """A worker's pidfd: readable once the process has ended, however it ended."""

    is_steady = True
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

    is_steady = True
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
