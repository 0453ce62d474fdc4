"""WorkerHandle: a worker as the master sees it, and the slot that it fills."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from signal import Signals, pidfd_send_signal
from typing import Any

from prefork.cluster.lifecycle import State, may_become
from prefork.cluster.policy import Ending, ExitCause
from prefork.cluster.reactor import Timer
from prefork.emitter import Emitter
from prefork.errors import ChannelClosed
from prefork.ipc.channel import Channel
from prefork.process.status import ExitStatus
from prefork.scoreboard import Slot

log = logging.getLogger("prefork")

WORKER_EVENTS = ("online", "listening", "exit")


@dataclass(frozen=True, slots=True)
class Process:
    """The process behind a worker, as Node spells it: `worker.process.pid`."""

    pid: int


class WorkerHandle:
    """One forked worker: who it is, what state it is in, how it ended.

    *id* counts up from 1 and is never used again; *slot* is the place it fills,
    which its replacement fills after it. Its own events are online, listening(address)
    and exit(code, signal), each told here before the cluster's event of the same name.
    """

    def __init__(
        self,
        id: int,
        slot: int,
        generation: int,
        pid: int,
        channel: Channel,
        started_at: float,
        stats: Slot,
        retire: Callable[[WorkerHandle], None],
    ) -> None:
        self.id = id
        self.slot = slot
        self.generation = generation
        self.process = Process(pid)
        self.state = State.FORKED
        self.exited_after_disconnect = False  # it was asked to leave, or said that it leaves
        self.exit_status: ExitStatus | None = None
        self.exit_cause: ExitCause | None = None
        self.boot_failure: BootFailure | None = None
        self.passed_deadline: str | None = None  # which one, in words
        self.channel = channel
        self.started_at = started_at  # seconds of the monotonic clock
        self.stats = stats  # what it writes about itself: connections, in_flight, requests, lag and so on
        self._retire = retire
        self.listening_since: float | None = None
        self._emitter = Emitter(WORKER_EVENTS)
        self.on, self.once, self.off = self._emitter.on, self._emitter.once, self._emitter.off
        self.emit = self._emitter.emit
        # Taken before anybody can reap the child: the number cannot have been used again.
        self.pidfd = os.pidfd_open(pid)

    @property
    def pid(self) -> int:
        return self.process.pid

    def describe(self) -> str:
        return f"worker {self.id} (pid {self.pid}, generation {self.generation})"

    __repr__ = __str__ = describe

    def is_connected(self) -> bool:
        """Whether its channel is up."""
        return not self.channel.is_closed

    def is_dead(self) -> bool:
        """Whether the process has ended and was reaped."""
        return self.state is State.EXITED

    def kill(self, signal: Signals | str = "SIGTERM") -> None:
        """Send a signal, by number or name. Through the pidfd, so it never hits a stranger."""
        number = Signals[signal] if isinstance(signal, str) else signal
        if self.is_dead():
            return
        with suppress(ProcessLookupError):  # it exited between our decision and our signal
            pidfd_send_signal(self.pidfd, number)

    def disconnect(self) -> None:
        """Retire it: it accepts nothing more, finishes what is in flight and exits with 0. Another takes its place."""
        if not self.exited_after_disconnect and not self.is_dead():
            self._retire(self)

    def ask_to_leave(self) -> None:
        """The asking alone, for the master, which sees to it that it is heard."""
        if self.state < State.LISTENING:
            # It holds no connection yet, and does not read its channel while it imports.
            self.kill(Signals.SIGTERM)
        else:
            self.tell({"type": "drain"})

    def tell(self, message: dict[str, Any]) -> bool:
        """A message of prefork's own. False: its channel is gone, its exit will be told."""
        try:
            self.channel.send(message)
        except ChannelClosed:
            return False
        return True

    def advance(self, state: State) -> bool:
        """Enter *state* if that is a step forward; False for a message that came too late."""
        if not may_become(self.state, state):
            return False
        self.state = state
        return True

    def ending(self, now: float) -> Ending:
        """What `policy` wants to know once `exit_status` is set."""
        assert self.exit_status is not None
        return Ending(
            code=self.exit_status.code,
            signal=self.exit_status.signal,
            was_asked=self.exited_after_disconnect,
            passed_deadline=self.passed_deadline is not None,
            said_boot_failed=self.boot_failure is not None,
            listened_for=None if self.listening_since is None else now - self.listening_since,
        )

    def close(self) -> None:
        """Give back its descriptors."""
        self.channel.close()
        os.close(self.pidfd)


@dataclass(frozen=True, slots=True)
class BootFailure:
    """What a worker said before it gave up booting."""

    sentence: str
    traceback: str  # the application's own, or empty
    code: int


@dataclass(slots=True)
class SlotRecord:
    """A place for one worker; the worker in it changes, the place stays."""

    index: int
    handle: WorkerHandle | None = None
    failures: int = 0  # in a row
    restart: Timer | None = None  # a replacement waits for its time
