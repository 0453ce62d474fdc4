"""WorkerHandle: a worker as the master sees it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from signal import Signals, pidfd_send_signal
from typing import Any

from prefork.cluster.policy import Ending, ExitCause
from prefork.emitter import Emitter
from prefork.errors import ChannelClosed, did_you_mean
from prefork.ipc.channel import Channel
from prefork.process.lifecycle import State, may_become
from prefork.process.status import ExitStatus
from prefork.scoreboard import Slot

log = logging.getLogger("prefork")

WORKER_EVENTS = ("fork", "online", "listening", "message", "drain", "draining", "disconnect", "exit")

# Those that do not end a process, or may not: whoever sends one has not ended the worker.
HARMLESS = frozenset({Signals.SIGCHLD, Signals.SIGCONT, Signals.SIGSTOP, Signals.SIGTSTP, Signals.SIGTTIN,
                      Signals.SIGTTOU, Signals.SIGURG, Signals.SIGUSR1, Signals.SIGUSR2, Signals.SIGWINCH,
                      Signals.SIGHUP, Signals.SIGINT})  # fmt: skip


class Output:
    """What a worker writes into a pipe of its stdio. Events: data(bytes), end()."""

    def __init__(self) -> None:
        self._emitter = Emitter(("data", "end"))
        self.on, self.once, self.off = self._emitter.on, self._emitter.once, self._emitter.off
        self.emit = self._emitter.emit


@dataclass(frozen=True, slots=True)
class Process:
    """The process behind a worker, as Node spells it: `worker.process.pid`, and its pipes, where it has some."""

    pid: int
    stdin: int | None = None  # a descriptor, not blocking
    stdout: Output | None = None
    stderr: Output | None = None


class WorkerHandle:
    """One forked worker: who it is, what state it is in, how it ended.

    *id* counts up from 1 and is never used again; *slot* is the place it fills, which its
    replacement may fill after it. It has the cluster's events without their first argument, each
    told here before the cluster's of the same name; and drain(), when a channel whose `send` said
    false has caught up.
    """

    def __init__(
        self,
        id: int,
        stats: Slot,
        generation: int,
        process: Process,
        channel: Channel,
        started_at: float,
        retire: Callable[[WorkerHandle], None],
        grace: float = 30.0,
    ) -> None:
        self.id = id
        self.slot = stats.index
        self.stats = stats  # what the worker counts: connections, in_flight, lag ...
        self.generation = generation
        self.process = process
        self.state = State.FORKED
        self.exited_after_disconnect: bool | None = None  # None while it lives, unasked
        self.exit_status: ExitStatus | None = None
        self.exit_cause: ExitCause | None = None
        self.boot_failure: BootFailure | None = None
        self.passed_deadline: str | None = None  # which one, in words
        self.channel = channel
        self.started_at = started_at  # seconds of the monotonic clock
        self.listening_since: float | None = None
        self.is_behind = False  # its channel is backed up, and somebody was told so
        self.has_to_listen = False  # one that ends before is no worker
        self.hears = False  # a loop of the worker reads its channel
        self.grace = grace  # seconds it has to end after it was asked to; 0: no limit
        self._retire = retire
        self._emitter = Emitter(WORKER_EVENTS)
        self.on, self.once, self.off = self._emitter.on, self._emitter.once, self._emitter.off
        self.emit = self._emitter.emit
        # Taken before anybody can reap the child: the number cannot have been used again.
        self.pidfd = os.pidfd_open(process.pid)

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

    # ---- what the master's program may do ----

    def send(self, message: Any, handle: Any = None, *, keep: bool = False, received: bytes = b"") -> bool:
        """Send *message*; false advises to wait for the event drain (it is sent all the same).

        *handle* (a socket, a listener, a pipe, a file, a descriptor) goes with it, and is moved
        unless *keep*; *received* are bytes that were read from it already. Raises ChannelClosed,
        and TypeError or ValueError for what cannot be sent.
        """
        has_room = self.channel.send_user(message, handle, keep=keep, received=received)
        self.is_behind |= not has_room
        return has_room

    def disconnect(self) -> WorkerHandle:
        """Retire it: it accepts nothing more, finishes what is in flight and ends."""
        if self.exited_after_disconnect is None:
            self._retire(self)
        return self

    def kill(self, signal: Signals | str = "SIGTERM") -> None:
        """Send a signal, by number or name. One that ends it makes `exited_after_disconnect` true."""
        number = _signal(signal)
        if self.exited_after_disconnect is None and number not in HARMLESS:
            self.exited_after_disconnect = True
        self.signal(number)

    destroy = kill

    # ---- what the master does ----

    def signal(self, number: Signals) -> None:
        """Through the pidfd, so it never hits a stranger."""
        if not self.is_dead():
            with suppress(ProcessLookupError):  # it exited between our decision and our signal
                pidfd_send_signal(self.pidfd, number)

    def tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> bool:
        """A message of prefork's own, with duplicates of *fds*. False: its channel is gone, its exit will be told."""
        try:
            self.channel.send(message, fds=fds, keep=True)
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
            was_asked=bool(self.exited_after_disconnect),
            passed_deadline=self.passed_deadline is not None,
            said_boot_failed=self.boot_failure is not None,
            listened_for=None if self.listening_since is None else now - self.listening_since,
            had_to_listen=self.has_to_listen,
        )

    def close(self) -> None:
        """Give back its descriptors."""
        self.channel.close()
        os.close(self.pidfd)
        if self.process.stdin is not None:
            os.close(self.process.stdin)


def _signal(signal: Signals | str) -> Signals:
    try:
        return Signals[signal] if isinstance(signal, str) else Signals(signal)
    except (KeyError, ValueError):
        hint = did_you_mean(str(signal), Signals.__members__)
        raise ValueError(f"there is no signal {signal!r}{hint}") from None


@dataclass(frozen=True, slots=True)
class BootFailure:
    """What a worker said before it gave up booting."""

    sentence: str
    traceback: str  # the application's own, or empty
    code: int
