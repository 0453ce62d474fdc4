"""The keeper: so many workers, replaced when they end. What `prefork serve` runs on.

It decides nothing itself: `policy` does. Each place for a worker is a slot; the worker in it
changes, the slot stays, and its failures are counted there.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefork.cluster.handles import WorkerHandle
from prefork.cluster.policy import NEVER_BOOTED, GiveUp, StartAgain, after_exit, delay_after
from prefork.cluster.reactor import Timer
from prefork.errors import reason_of
from prefork.process.lifecycle import State
from prefork.process.status import BOOT_FAILED

if TYPE_CHECKING:
    from prefork.cluster.master import Master

log = logging.getLogger("prefork")

# After SIGABRT, which makes a hung worker write its stacks: the time to write them, in seconds.
ABORT_GRACE = 1.0


@dataclass(slots=True)
class SlotRecord:
    """A place for one worker."""

    index: int
    handle: WorkerHandle | None = None
    failures: int = 0  # in a row
    restart: Timer | None = None  # a replacement waits for its time


class Keeper:
    """Keeps *wanted* workers that run *target*."""

    def __init__(
        self,
        master: Master,
        wanted: int,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        boot_timeout: float = 0.0,
        ready: State = State.ONLINE,
    ) -> None:
        """A worker has *boot_timeout* seconds (0: no limit) from its fork to *ready*."""
        self._master = master
        self._wanted = wanted
        self._target = target
        self._args = args
        self._boot_timeout = boot_timeout
        self._ready = ready
        self._records: dict[int, SlotRecord] = {}
        self._anybody_booted = False

    def start(self) -> None:
        """Fill the slots that are wanted and empty."""
        while len(self._records) < self._wanted:
            index = self._master.reserve_slot()
            self._records[index] = SlotRecord(index)
        for record in list(self._records.values()):
            if record.handle is None and record.restart is None and not self._master.is_stopping:
                self._start(record)

    def scale(self, by: int) -> None:
        """One more, or one less."""
        wanted, most = self._wanted + by, len(self._master.board)
        if self._master.is_stopping:
            return
        if not 1 <= wanted <= most:
            log.warning("stays at %d workers: %d were asked for, 1 to %d are possible", self._wanted, wanted, most)
            return
        log.info("scaling from %d to %d workers", self._wanted, wanted)
        self._wanted = wanted
        self.start()
        for record in list(self._records.values())[wanted:]:
            self._cancel(record)
            if record.handle is None:
                self._vacate(record)
            else:
                record.handle.disconnect()

    # ---- what the master tells ----

    def hear_ready(self, handle: WorkerHandle) -> None:
        """It is online, or listens."""
        record = self._records.get(handle.slot)
        if record is None or record.handle is not handle or handle.state < self._ready:
            return
        handle.stats.deadline = 0.0
        if handle.listening_since is None:  # being online is all that was asked
            handle.listening_since = self._master.reactor.now()
        self._anybody_booted = True

    @property
    def anybody_booted(self) -> bool:
        return self._anybody_booted

    def replaces(self, handle: WorkerHandle) -> bool:
        """Whether another one will take the place of *handle*."""
        record = self._records.get(handle.slot)
        return record is not None and record.handle is handle and not self._master.is_stopping

    def hear_failed(self, handle: WorkerHandle) -> None:
        """It will exit, and has said why."""
        if not self._anybody_booted:
            self._give_up(NEVER_BOOTED, handle)

    def hear_exit(self, handle: WorkerHandle) -> None:
        record = self._records.get(handle.slot)
        if record is None or record.handle is not handle:
            return  # one that the program forked itself
        record.handle = None
        if self._master.is_stopping:
            return
        if record.index in list(self._records)[self._wanted :]:
            self._vacate(record)
            return
        ending = handle.ending(self._master.reactor.now())
        decision = after_exit(ending, record.failures, self._anybody_booted)
        if isinstance(decision, GiveUp):
            self._give_up(decision.reason, handle)
        else:
            self._start_again(record, handle, decision)

    def hear_stopping(self) -> None:
        for record in self._records.values():
            self._cancel(record)

    # ---- starting ----

    def _start(self, record: SlotRecord) -> None:
        record.restart = None
        # Before the fork: a child that is stuck in its first line is ended on time too.
        timeout = self._boot_timeout
        try:
            record.handle = self._master.fork(self._target, self._args, slot=record.index, boot_timeout=timeout)
        except OSError as error:
            record.failures += 1
            delay = delay_after(max(2, record.failures))
            log.error(
                "cannot start a worker in slot %d: %s; trying again in %.2g s", record.index, reason_of(error), delay
            )
            self._start_later(record, delay)
            return
        handle = record.handle
        handle.has_to_listen = self._ready is State.LISTENING
        if timeout:
            self._master.reactor.call_later(timeout, lambda: self._check_boot(handle))

    def _start_again(self, record: SlotRecord, dead: WorkerHandle, decision: StartAgain) -> None:
        record.failures = decision.failures
        if not decision.delay:
            self._start(record)
            return
        log.warning(
            "slot %d failed %d times in a row, last as %s: %s; starting another in %.2g s",
            record.index,
            record.failures,
            dead.describe(),
            dead.exit_cause,
            decision.delay,
        )
        self._start_later(record, decision.delay)

    def _start_later(self, record: SlotRecord, delay: float) -> None:
        record.restart = self._master.call_later(delay, lambda: self._start(record))

    def _cancel(self, record: SlotRecord) -> None:
        if record.restart is not None:
            record.restart.cancel()
            record.restart = None

    def _vacate(self, record: SlotRecord) -> None:
        del self._records[record.index]
        self._master.vacate_slot(record.index)

    # ---- failing ----

    def _check_boot(self, handle: WorkerHandle) -> None:
        if handle.state >= self._ready or handle.is_dead():
            return
        handle.passed_deadline = f"it did not boot within {self._boot_timeout:g} s (--boot-timeout)"
        log.error(
            "%s hangs: %s; its stacks follow on stderr, then it is killed", handle.describe(), handle.passed_deadline
        )
        handle.signal(signal.SIGABRT)
        self._master.reactor.call_later(ABORT_GRACE, lambda: handle.signal(signal.SIGKILL))

    def _give_up(self, reason: str, failed: WorkerHandle) -> None:
        if self._master.is_stopping:
            return
        failure = failed.boot_failure
        code = BOOT_FAILED if failure is None else failure.code
        log.error("giving up: %s", reason)
        self._master.stop_at_once(code)
