"""The master: starts workers, watches them, replaces the dead. It serves no request.

One thread, one event at a time, no asyncio: signals, messages from workers and
exits all arrive through the reactor, are decided upon in `policy`, and carried
out here. Nothing here waits for a worker; whoever must end in time gets a timer.

Order matters in two places. A worker's boot deadline runs from before its fork, so
that a child stuck in its first line is still ended. And a dead worker's channel is
read to its end before its exit is told, so that its last words come first.
"""

from __future__ import annotations

import logging
import os
import signal

from prefork import log as logs
from prefork.cluster.dispatch import Dispatcher
from prefork.cluster.handles import BootFailure, SlotRecord, WorkerHandle
from prefork.cluster.lifecycle import State
from prefork.cluster.plan import Plan, Seat
from prefork.cluster.policy import NEVER_BOOTED, ExitCause, GiveUp, StartAgain, after_exit, cause_of, delay_after
from prefork.cluster.reactor import Reactor
from prefork.cluster.sources import ChannelSource, ExitSource, SignalSource
from prefork.emitter import Emitter
from prefork.errors import TLSError, reason_of
from prefork.ipc.channel import Channel, Message
from prefork.ipc.frames import Kind
from prefork.net.sharing import Sharing
from prefork.net.tls import RENEWAL_INTERVAL
from prefork.process import forking
from prefork.process.reaping import reap, reap_orphans
from prefork.process.signals import SignalInbox
from prefork.process.status import BOOT_FAILED

log = logging.getLogger("prefork")

# After SIGABRT, which makes a hung worker write its stacks: the time to write them, in seconds.
ABORT_GRACE = 1.0

# A worker ends its own drain at the graceful timeout, cuts off the rest (1.5 s at the most) and then
# runs the application's shutdown (4 s). Only one that cannot even do that is killed, this many
# seconds after the graceful timeout.
KILL_GRACE = 7.0

# An error in every turn would only fill the disk with its tracebacks.
MOST_MISHAPS = 100

CAUGHT = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCHLD,
)


class Master:
    """Runs a `Plan` until it is told to stop, or nothing of it can boot."""

    def __init__(self, plan: Plan, emitter: Emitter, workers: dict[int, WorkerHandle], inbox: SignalInbox) -> None:
        """*inbox* catches `CAUGHT` already, and is closed by whoever opened it."""
        self._plan = plan
        self._emit = emitter.emit
        self._workers = workers  # by id; an entry stays until its process is reaped
        self._reactor = Reactor()
        self._inbox = inbox
        self._dispatcher = Dispatcher(self._reactor)
        self._slots: list[SlotRecord] = []
        self._ids = 0
        self._wanted = plan.workers
        self._anybody_booted = False
        self._is_stopping = False
        self._exit_code = 0
        self._mishaps = 0  # turns in a row that ended in an error

    def run(self) -> int:
        """Start the workers and mind them until all have ended. Returns the process's exit code."""
        self._inbox.on_caught = None  # from here on they wait for our turn
        try:
            self._reactor.add(SignalSource(self._inbox, self._on_signal))
            self._open_doors()
            self._fill_slots()
            if self._plan.tls is not None:
                self._reactor.call_later(RENEWAL_INTERVAL, self._renew_certificates)
            while self._workers or not self._is_stopping:
                self._turn()
        finally:
            self._clean_up()
        if not self._exit_code:  # otherwise the last line says why
            log.info("stopped")
        return self._exit_code

    def _turn(self) -> None:
        """One turn of the loop: a bug met on the way is logged, and must not take the server down."""
        try:
            self._reactor.turn()
            self._mishaps = 0
        except Exception:
            self._mishaps += 1
            log.exception("the master met an error of its own, and goes on")
            if self._mishaps > MOST_MISHAPS:
                raise

    # ---- starting ----

    def _open_doors(self) -> None:
        for index, listener in enumerate(self._plan.listeners):
            if listener.sharing is Sharing.HANDOFF:
                self._dispatcher.open(index, listener.socket_for(0), self._plan.pick)

    def _fill_slots(self) -> None:
        while len(self._slots) < self._wanted:
            self._slots.append(SlotRecord(len(self._slots)))
        for record in self._slots[: self._wanted]:
            if record.handle is None and record.restart is None and not self._is_stopping:
                self._start(record)

    def _start(self, record: SlotRecord) -> None:
        record.restart = None
        now = self._reactor.now()
        timeout = self._plan.settings.boot_timeout
        slot = self._plan.board[record.index]
        slot.reset()
        slot.generation = self._plan.generation
        slot.started_at = now
        slot.deadline = now + timeout if timeout else 0.0
        try:
            handle = self._fork(record, now)
        except OSError as error:
            record.failures += 1
            delay = delay_after(max(2, record.failures))
            log.error(
                "cannot start a worker in slot %d: %s; trying again in %.2g s", record.index, reason_of(error), delay
            )
            record.restart = self._reactor.call_later(delay, lambda: self._start(record))
            return
        slot.pid = handle.pid
        record.handle = handle
        self._workers[handle.id] = handle
        self._reactor.add(ChannelSource(handle, self._on_message, self._on_channel_end))
        self._reactor.add(ExitSource(handle, self._on_exit))
        if timeout:
            self._reactor.call_later(timeout, lambda: self._check_boot(handle))
        self._emit("fork", handle)

    def _fork(self, record: SlotRecord, now: float) -> WorkerHandle:
        for listener in self._plan.listeners:
            listener.socket_for(record.index)  # a slot that is new under reuseport gets its socket here
        ours, theirs = Channel.pair()
        seat = Seat(self._ids + 1, record.index, self._plan.generation, os.getpid(), theirs)
        try:
            pid = forking.fork(lambda: self._be_worker(seat, ours))
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._ids = seat.id
        try:
            stats = self._plan.board[record.index]
            return WorkerHandle(seat.id, record.index, self._plan.generation, pid, ours, now, stats, self._retire)
        except OSError:  # no descriptor is left to watch it by: it must not live unwatched
            ours.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def _be_worker(self, seat: Seat, masters_end: Channel) -> int:
        """In the child: let go of all that is the master's, then be a worker."""
        masters_end.close()
        for handle in self._workers.values():
            handle.close()
        self._dispatcher.close()
        self._inbox.close_inherited()
        for listener in self._plan.listeners:
            if listener.sharing is Sharing.HANDOFF:
                listener.close()  # only the master accepts
            else:
                listener.close_others(seat.slot)
        return self._plan.target(seat)

    # ---- what workers say ----

    def _on_message(self, handle: WorkerHandle, message: Message) -> None:
        if message.kind is Kind.ACK:
            self._dispatcher.hear(handle, message.body)
        elif message.kind is Kind.CONTROL:
            getattr(self, f"_hear_{message.body['type']}")(handle, message.body)

    def _hear_online(self, handle: WorkerHandle, _body: dict[str, str]) -> None:
        if handle.advance(State.ONLINE):
            handle.emit("online")
            self._emit("online", handle)

    def _hear_listening(self, handle: WorkerHandle, body: dict[str, str]) -> None:
        """It accepts on all its addresses."""
        self._plan.board[handle.slot].deadline = 0.0
        if not handle.advance(State.LISTENING):
            return
        handle.listening_since = self._reactor.now()
        if not self._anybody_booted:
            log.info("%s", body["application"])
        self._anybody_booted = True
        for index, listener in enumerate(self._plan.listeners):
            if listener.sharing is Sharing.HANDOFF:
                self._dispatcher.join(handle, index)
        took = handle.listening_since - handle.started_at
        log.info("%s is listening, %.0f ms after its fork", handle.describe(), took * 1000)
        for listener in self._plan.listeners:
            handle.emit("listening", listener.address)
            self._emit("listening", handle, listener.address)

    def _hear_failed(self, handle: WorkerHandle, body: dict[str, str]) -> None:
        """It will exit, and says why."""
        handle.boot_failure = BootFailure(body["sentence"], body["traceback"], int(body["code"]))
        if not self._is_stopping:
            _log_boot_failure(handle.describe(), handle.boot_failure)
            if not self._anybody_booted:
                self._give_up(NEVER_BOOTED, handle)

    def _hear_draining(self, handle: WorkerHandle, _body: dict[str, str]) -> None:
        """It leaves: by itself, or because it was asked to."""
        self._watch_leaving(handle)

    def _on_channel_end(self, source: ChannelSource) -> None:
        """Nothing more will be heard of it; its exit is told by its pidfd."""
        self._reactor.remove(source)
        source.handle.channel.close()

    # ---- how workers end ----

    def _check_boot(self, handle: WorkerHandle) -> None:
        if handle.state >= State.LISTENING or not self._plan.board[handle.slot].deadline:
            return
        timeout = self._plan.settings.boot_timeout
        handle.passed_deadline = f"it did not boot within {timeout:g} s (--boot-timeout)"
        log.error(
            "%s hangs: %s; its stacks follow on stderr, then it is killed", handle.describe(), handle.passed_deadline
        )
        handle.kill(signal.SIGABRT)
        self._reactor.call_later(ABORT_GRACE, lambda: handle.kill(signal.SIGKILL))

    def _on_exit(self, source: ExitSource) -> None:
        handle = source.handle
        self._hear_last_words(handle)
        status = reap(handle.pid)
        if status is None:  # a stale report
            return
        handle.exit_status = status
        if os.getpid() == 1:  # it may have stood before them in the line
            reap_orphans(self._pids())
        self._reactor.remove(source)
        self._forget(handle)
        ending = handle.ending(self._reactor.now())
        handle.exit_cause = cause_of(ending)
        handle.advance(State.EXITED)
        self._log_exit(handle)
        handle.emit("exit", ending.code, ending.signal)
        self._emit("exit", handle, ending.code, ending.signal)

        record = self._slots[handle.slot]
        record.handle = None
        if self._is_stopping:
            return
        if record.index >= self._wanted:
            self._vacate(record)
            return
        decision = after_exit(ending, record.failures, self._anybody_booted)
        if isinstance(decision, GiveUp):
            self._give_up(decision.reason, handle)
        else:
            self._start_again(record, handle, decision)

    def _hear_last_words(self, handle: WorkerHandle) -> None:
        if not handle.channel.is_closed:
            source = ChannelSource(handle, self._on_message, self._on_channel_end)
            self._reactor.add(source)  # replaces the one that watches the same channel
            source.on_readable()
            if not handle.channel.is_closed:  # a process that it started may hold the other end
                self._on_channel_end(source)

    def _pids(self) -> set[int]:
        return {handle.pid for handle in self._workers.values()}

    def _forget(self, handle: WorkerHandle) -> None:
        del self._workers[handle.id]
        self._dispatcher.lose(handle)
        handle.close()

    def _log_exit(self, handle: WorkerHandle) -> None:
        if self._exit_code:
            level = logging.DEBUG  # the reason was told; what follows from it would bury it
        elif handle.exit_cause is ExitCause.RETIRED or self._is_stopping:
            level = logging.INFO
        else:
            level = logging.ERROR
        log.log(
            level,
            "%s ended%s: %s%s",
            handle.describe(),
            " before it listened" if handle.exit_cause is ExitCause.CRASHED and handle.listening_since is None else "",
            handle.exit_status,
            f", {handle.passed_deadline}" if handle.passed_deadline else f" ({handle.exit_cause})",
        )

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
        record.restart = self._reactor.call_later(decision.delay, lambda: self._start(record))

    # ---- signals ----

    def _on_signal(self, number: signal.Signals) -> None:
        match number:
            case signal.SIGTERM:
                self._stop("SIGTERM")
            case signal.SIGINT if self._is_stopping:
                self._stop_at_once("SIGINT while stopping")
            case signal.SIGINT:
                self._stop("SIGINT")
            case signal.SIGQUIT:
                self._stop_at_once("SIGQUIT")
            case signal.SIGUSR1:
                self._reopen_logs()
            case signal.SIGTTIN:
                self._scale(self._wanted + 1)
            case signal.SIGTTOU:
                self._scale(self._wanted - 1)
            case signal.SIGCHLD if os.getpid() == 1:
                reap_orphans(self._pids())
            case signal.SIGHUP | signal.SIGUSR2:
                log.warning("ignored %s: this version does not reload; stop it and start it again", number.name)

    def _scale(self, wanted: int) -> None:
        if self._is_stopping:
            return
        most = len(self._plan.board)
        if not 1 <= wanted <= most:
            log.warning("stays at %d workers: %d were asked for, 1 to %d are possible", self._wanted, wanted, most)
            return
        log.info("scaling from %d to %d workers", self._wanted, wanted)
        self._wanted = wanted
        self._fill_slots()
        for record in self._slots[wanted:]:
            if record.restart is not None:
                record.restart.cancel()
                record.restart = None
            if record.handle is None:
                self._vacate(record)
            elif not record.handle.exited_after_disconnect:
                self._retire(record.handle)

    def _vacate(self, record: SlotRecord) -> None:
        """Nobody will accept on this slot's own sockets again: the kernel must send them nothing."""
        for listener in self._plan.listeners:
            listener.release(record.index)

    def _retire(self, handle: WorkerHandle) -> None:
        self._watch_leaving(handle)
        handle.ask_to_leave()

    def _watch_leaving(self, handle: WorkerHandle) -> None:
        """It accepts nothing more from now on, and has a bounded time to end."""
        self._dispatcher.leave(handle)
        if not handle.exited_after_disconnect:
            handle.exited_after_disconnect = True
            timeout = self._plan.settings.graceful_timeout + KILL_GRACE
            self._reactor.call_later(timeout, lambda: self._kill_late(handle, timeout))
        if handle.state is State.LISTENING:
            handle.advance(State.DRAINING)

    def _kill_late(self, handle: WorkerHandle, timeout: float) -> None:
        if not handle.is_dead():
            handle.passed_deadline = f"it did not end within {timeout:g} s of being asked to"
            handle.kill(signal.SIGKILL)

    def _reopen_logs(self) -> None:
        log.info("reopening the logs")
        logs.reopen()
        for handle in self._workers.values():
            handle.tell({"type": "reopen_logs"})

    # ---- certificates ----

    def _renew_certificates(self) -> None:
        """Workers may not read the files any more, so they are told what is in them; those to come inherit it."""
        assert self._plan.tls is not None
        self._reactor.call_later(RENEWAL_INTERVAL, self._renew_certificates)
        try:
            pem = self._plan.tls.renew()
        except TLSError as error:
            log.error("the changed TLS files are not used, what they held before still is: %s", error)
            return
        if pem is not None:
            log.info("new connections get the renewed TLS certificates")
            for handle in self._workers.values():
                handle.tell({"type": "certificates", "pem": pem.to_message()})

    # ---- stopping ----

    def _stop(self, reason: str) -> None:
        """Accept nothing more, let the workers finish, end."""
        if self._is_stopping:
            return
        self._is_stopping = True
        log.info(
            "stopping (%s): what is in flight is finished, for up to %g s",
            reason,
            self._plan.settings.graceful_timeout,
        )
        self._close_doors()
        for handle in list(self._workers.values()):
            self._retire(handle)

    def _stop_at_once(self, reason: str) -> None:
        log.info("stopping at once (%s)", reason)
        self._kill_all()

    def _kill_all(self) -> None:
        self._is_stopping = True
        self._close_doors()
        for handle in self._workers.values():
            handle.kill(signal.SIGKILL)

    def _give_up(self, reason: str, failed: WorkerHandle) -> None:
        if self._is_stopping:
            return
        failure = failed.boot_failure
        self._exit_code = BOOT_FAILED if failure is None else failure.code
        log.error("giving up: %s", reason)
        self._kill_all()

    def _close_doors(self) -> None:
        for index, listener in enumerate(self._plan.listeners):
            self._dispatcher.shut(index)
            listener.close()
        for record in self._slots:
            if record.restart is not None:
                record.restart.cancel()

    def _clean_up(self) -> None:
        """Leave nothing behind, whatever ended the loop."""
        for handle in list(self._workers.values()):  # only after an error of our own
            handle.kill(signal.SIGKILL)
            os.waitpid(handle.pid, 0)
            self._forget(handle)
        self._dispatcher.close()
        for listener in self._plan.listeners:
            listener.close()
        self._reactor.close()


def _log_boot_failure(who: str, failure: BootFailure) -> None:
    log.error("%s cannot boot: %s%s", who, failure.sentence, f"\n{failure.traceback}" if failure.traceback else "")
