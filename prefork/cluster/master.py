"""The master: forks workers, listens to them, reaps them. It serves no request.

One thread, one event at a time, no asyncio: signals, messages from workers and exits all arrive
through the reactor. Nothing here waits for a worker; whoever must end in time gets a timer. How
many workers there are to be is for others to say: the program, or the `keeper`.

Order matters. An event is told when the state it tells of is there to be seen. A dead worker's
channel is read to its end before its exit is told, so that its last words come first, and
disconnect is told before exit.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from prefork import log as logs
from prefork.cluster.dispatch import Dispatcher
from prefork.cluster.handles import BootFailure, Output, Process, WorkerHandle
from prefork.cluster.keeper import Keeper
from prefork.cluster.listeners import Listeners
from prefork.cluster.policy import ExitCause, cause_of
from prefork.cluster.reactor import Reactor, Timer
from prefork.cluster.setup import ClusterSettings
from prefork.cluster.sources import ChannelSource, ExitSource, OutputSource, SignalSource
from prefork.cluster.start import Beginning, Start
from prefork.cluster.topics import Topics
from prefork.emitter import Emitter
from prefork.errors import ClusterError, ClusterStopping, PreforkError
from prefork.ipc.channel import Channel, Message
from prefork.ipc.frames import Kind
from prefork.process import forking
from prefork.process.lifecycle import State
from prefork.process.reaping import reap, reap_orphans
from prefork.process.signals import SignalInbox
from prefork.process.stdio import Stdio
from prefork.scoreboard import Scoreboard
from prefork.worker.main import Seat, Worker

log = logging.getLogger("prefork")

# A worker ends its own drain at the graceful timeout, cuts off the rest (1.5 s at the most) and then
# runs the application's shutdown (4 s). Only one that cannot even do that is killed, this many
# seconds after the graceful timeout.
KILL_GRACE = 7.0

# A worker that was asked to leave before its loop reads the channel has this long to come to it, in
# seconds. What was sent to it before is heard first then.
TIME_TO_HEAR = 1.0

# The scoreboard cannot grow after the first fork; a slot that was never used costs no memory.
MOST_WORKERS = 1024

# An error in every turn would only fill the disk with its tracebacks.
MOST_MISHAPS = 100

# An enum's members cost a look-up each time, and messages may be many.
USER, ACK, PUBLISH = Kind.USER, Kind.ACK, Kind.PUBLISH

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


# Of this process: a program may have more than one cluster.
_living: set[Master] = set()


class Master:
    """The processes of one cluster, from the first fork until all have ended."""

    def __init__(
        self,
        emitter: Emitter,
        workers: dict[int, WorkerHandle],
        become: Callable[[Worker], None],
        last_id: int = 0,
        slots: int = MOST_WORKERS,
    ) -> None:
        """*workers* is kept by id; an entry stays until its process is reaped. A child calls *become* first."""
        self.board = Scoreboard(slots)
        self.reactor = Reactor()
        self.dispatcher = Dispatcher(self.reactor)
        self.listeners = Listeners(self.dispatcher)
        self.keeper: Keeper | None = None
        self.is_stopping = False
        self.settings = ClusterSettings()  # of the next fork
        self.last_id = last_id  # of a worker
        self._become = become
        self._emitter = emitter
        self._workers = workers
        self._topics = Topics()
        self._reserved: set[int] = set()  # slots that the keeper fills
        self._inbox: SignalInbox | None = None
        self._pid = os.getpid()
        self._pending = 0  # calls of the program that are still to come
        self._exit_code = 0
        self._mishaps = 0  # turns in a row that ended in an error
        _living.add(self)

    @property
    def is_running(self) -> bool:
        """`run` was called."""
        return self._inbox is not None

    def run(self, inbox: SignalInbox) -> int:
        """Mind the workers until all have ended. Returns the process's exit code.

        *inbox* catches `CAUGHT` already, and is closed by whoever opened it.
        """
        self._inbox = inbox
        inbox.on_caught = None  # from here on they wait for our turn
        try:
            self.reactor.add(SignalSource(inbox, self._on_signal))
            if self.keeper is not None:
                self.keeper.start()
            while self._workers or (self._pending and not self.is_stopping):
                self._turn()
        finally:
            self.close()
        if not self._exit_code:  # otherwise the last line says why
            log.info("stopped")
        return self._exit_code

    def _turn(self) -> None:
        """One turn of the loop: a bug met on the way is logged, and must not take the server down."""
        try:
            self.reactor.turn()
            self._mishaps = 0
        except Exception:
            self._mishaps += 1
            log.exception("the master met an error of its own, and goes on")
            if self._mishaps > MOST_MISHAPS:
                raise

    def call_later(self, delay: float, call: Callable[[], object]) -> Timer:
        """*call* once, in *delay* seconds; until then `run` goes on, whatever becomes of the workers."""

        def run() -> None:
            self._pending -= 1
            call()

        def forget() -> None:
            self._pending -= 1

        self._pending += 1
        return self.reactor.call_later(delay, run, forget)

    def emit(self, event: str, *args: object, handle: WorkerHandle | None = None) -> bool:
        """Tell the listeners of *handle*, then those of the cluster, which get it first. Whether there was any."""
        if handle is None:
            return self._emitter.emit(event, *args)
        heard = handle.emit(event, *args)
        return self._emitter.emit(event, handle, *args) or heard

    # ---- forking ----

    def reserve_slot(self) -> int:
        """The lowest slot that nobody has; the keeper's until it is vacated."""
        slot = self._free_slot()
        self._reserved.add(slot)
        return slot

    def vacate_slot(self, slot: int) -> None:
        """The keeper wants it no more."""
        self._reserved.discard(slot)
        self.listeners.release(slot)

    def fork(
        self,
        target: Callable[..., Any] | None,
        args: tuple[Any, ...],
        *,
        env: Mapping[str, str] | None = None,
        slot: int | None = None,
        boot_timeout: float = 0.0,
    ) -> WorkerHandle:
        """A new worker. Raises ClusterError, and OSError where the kernel refuses."""
        if self.is_stopping:
            raise ClusterStopping("the cluster is stopping, and starts no worker any more")
        settings = self.settings
        slot = self._free_slot() if slot is None else slot
        now = self.reactor.now()
        stats = self.board[slot]
        stats.reset()
        stats.generation = 1
        stats.started_at = now
        stats.deadline = now + boot_timeout if boot_timeout else 0.0
        self.listeners.prepare(slot)
        stdio = Stdio(settings.stdio_of_child)
        try:
            handle = self._fork(Start(settings, target, args, env or {}, stdio), stats.index, now)
        except BaseException:
            stdio.close()
            raise
        stdio.release()
        stats.pid = handle.pid
        self._workers[handle.id] = handle
        self.reactor.add(ChannelSource(handle, self.reactor, self._on_message, self._on_channel_end))
        self.reactor.add(ExitSource(handle, self._on_exit))
        # Not now: who gets the handle shall see it too.
        self.reactor.call_soon(partial(self.emit, "fork", handle=handle))
        return handle

    def _free_slot(self) -> int:
        taken = self._reserved | {handle.slot for handle in self._workers.values()}
        for slot in range(len(self.board)):
            if slot not in taken:
                return slot
        raise ClusterError(f"there are {len(taken)} workers already, and no room for more")

    def _fork(self, start: Start, slot: int, now: float) -> WorkerHandle:
        settings = start.settings
        ours, theirs = Channel.pair(serialization=settings.serialization, max_size=settings.max_message)
        seat = Seat(
            self.last_id + 1,
            slot,
            self.board[slot].generation,
            os.getpid(),
            settings.serialization,
            settings.max_message,
            settings.graceful_timeout,
        )
        beginning = Beginning(start, seat, theirs, self.board, self._become)
        try:
            pid = forking.fork(lambda: self._be_worker(beginning, ours))
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self.last_id = seat.id
        try:
            process = Process(pid, *self._watch_outputs(start.stdio))
            return WorkerHandle(
                seat.id,
                self.board[slot],
                seat.generation,
                process,
                ours,
                now,
                self._retire,
                settings.graceful_timeout,
            )
        except OSError:  # no descriptor is left to watch it by: it must not live unwatched
            ours.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def _watch_outputs(self, stdio: Stdio) -> tuple[int | None, Output | None, Output | None]:
        outputs: list[Output | None] = []
        for descriptor in stdio.parents[1:]:
            output = None if descriptor is None else Output()
            if descriptor is not None and output is not None:
                self.reactor.add(OutputSource(descriptor, output, self.reactor.remove))
            outputs.append(output)
        return stdio.parents[0], outputs[0], outputs[1]

    def _be_worker(self, beginning: Beginning, masters_end: Channel) -> int:
        """In the child: let go of all that is the master's, then begin."""
        masters_end.close()
        for master in _living:
            master._let_go()
            if master is not self:
                master.listeners.close()
        _living.clear()
        return beginning.run(self.listeners.inherit(beginning.seat.slot))

    def _let_go(self) -> None:
        """In a child of this master, or of another one of the same program: close what only a master holds.

        A copy of a channel's end would hide the master's death from the worker at the other.
        """
        for handle in self._workers.values():
            handle.close()
        self.reactor.close_in_child()
        self.dispatcher.close()
        if self._inbox is not None:
            self._inbox.close_inherited()

    # ---- what workers say ----

    def _on_message(self, handle: WorkerHandle, message: Message) -> None:
        kind = message.kind
        if kind is USER:
            heard = handle.emit("message", message.body, message.handle)
            if not self._emitter.emit("message", handle, message.body, message.handle) and not heard:
                message.discard()
        elif kind is ACK:
            self.dispatcher.hear(handle, message.body)
        elif kind is PUBLISH:
            self._topics.publish(message.body)
        else:
            getattr(self, f"_hear_{message.body['type']}")(handle, message.body)

    def _hear_online(self, handle: WorkerHandle, _body: dict[str, Any]) -> None:
        if handle.advance(State.ONLINE):
            if self.keeper is not None:
                self.keeper.hear_ready(handle)
            self.emit("online", handle=handle)

    def _hear_attached(self, handle: WorkerHandle, _body: dict[str, Any]) -> None:
        """A loop of its reads the channel: it can be asked by a message."""
        handle.hears = True

    def _hear_listen(self, handle: WorkerHandle, question: dict[str, Any]) -> None:
        """It asks for a listener. What is wrong with it is the worker's to handle."""
        answer: dict[str, Any] = {"type": "listener", "question": question["question"]}
        descriptors: list[int] = []
        try:
            shared = self.listeners.ask(handle, question, self.settings)
            listener = shared.listener
            answer |= {"listener": shared.index, "address": str(listener.address), "sharing": listener.sharing}
            if not shared.is_handed_off:
                descriptors.append(shared.listener.socket_for(handle.slot).fileno())
        except (PreforkError, OSError) as error:
            number = getattr(error, "errno", None)
            answer |= {"error": str(error), "errno": number or errno.EINVAL}
        handle.tell(answer, descriptors)

    def _hear_listening(self, handle: WorkerHandle, body: dict[str, Any]) -> None:
        """It accepts on these listeners."""
        if handle.state is State.ONLINE:
            handle.advance(State.LISTENING)
            self._tell_that_it_listens(handle, body["application"])
        for index in body["listeners"]:
            shared = self.listeners.join(handle, index) if handle.state is State.LISTENING else None
            if shared is not None:
                self.emit("listening", shared.listener.address, handle=handle)

    def _tell_that_it_listens(self, handle: WorkerHandle, application: str | None) -> None:
        handle.listening_since = now = self.reactor.now()
        if self.keeper is not None:
            if application is not None and not self.keeper.anybody_booted:
                log.info("%s", application)
            self.keeper.hear_ready(handle)
        took = now - handle.started_at
        log.info("%s is listening, %.0f ms after its fork", handle.describe(), took * 1000)

    def _hear_unlisten(self, handle: WorkerHandle, body: dict[str, Any]) -> None:
        self.listeners.leave(handle, body["listener"])

    def _hear_subscribe(self, handle: WorkerHandle, body: dict[str, Any]) -> None:
        self._topics.subscribe(handle, body["topic"])

    def _hear_unsubscribe(self, handle: WorkerHandle, body: dict[str, Any]) -> None:
        self._topics.unsubscribe(handle, body["topic"])

    def _hear_failed(self, handle: WorkerHandle, body: dict[str, Any]) -> None:
        """It will exit, and says why."""
        handle.boot_failure = BootFailure(body["sentence"], body["traceback"], int(body["code"]))
        if not self.is_stopping:
            _log_boot_failure(handle.describe(), handle.boot_failure)
            if self.keeper is not None:
                self.keeper.hear_failed(handle)

    def _hear_draining(self, handle: WorkerHandle, _body: dict[str, Any]) -> None:
        """It leaves: by itself, or because it was asked to."""
        self._watch_leaving(handle)

    def _on_channel_end(self, source: ChannelSource) -> None:
        """Nothing more will be heard of it; its exit is told by its pidfd."""
        handle = source.handle
        self.reactor.remove(source)
        handle.channel.close()
        self._leave_listeners(handle)
        self._topics.forget(handle)
        # What it says after this, it says by its exit.
        handle.exited_after_disconnect = bool(handle.exited_after_disconnect)
        handle.advance(State.DISCONNECTED)
        self.emit("disconnect", handle=handle)

    # ---- how workers end ----

    def _on_exit(self, source: ExitSource) -> None:
        handle = source.handle
        self._hear_last_words(handle)
        status = reap(handle.pid)
        if status is None:  # a stale report
            return
        handle.exit_status = status
        if os.getpid() == 1:  # it may have stood before them in the line
            reap_orphans(self._pids())
        self.reactor.remove(source)
        self._forget(handle)
        ending = handle.ending(self.reactor.now())
        handle.exit_cause = cause_of(ending)
        handle.advance(State.EXITED)
        self._log_exit(handle)
        self.emit("exit", ending.code, ending.signal, handle=handle)
        if self.keeper is not None:
            self.keeper.hear_exit(handle)

    def _hear_last_words(self, handle: WorkerHandle) -> None:
        if not handle.channel.is_closed:
            source = ChannelSource(handle, self.reactor, self._on_message, self._on_channel_end)
            self.reactor.add(source)  # replaces the one that watches the same channel
            source.read_all()
            if not handle.channel.is_closed:  # a process that it started may hold the other end
                self._on_channel_end(source)

    def _pids(self) -> set[int]:
        return {handle.pid for handle in self._workers.values()}

    def _forget(self, handle: WorkerHandle) -> None:
        del self._workers[handle.id]
        handle.stats.pid = handle.stats.load = 0  # nobody is to wait for it
        self.dispatcher.lose(handle)
        self._leave_listeners(handle)
        handle.close()

    def _leave_listeners(self, handle: WorkerHandle) -> None:
        self.listeners.leave(handle, is_replaced=self.keeper is not None and self.keeper.replaces(handle))

    def _log_exit(self, handle: WorkerHandle) -> None:
        if self._exit_code:
            level = logging.DEBUG  # the reason was told; what follows from it would bury it
        elif handle.exit_cause in (ExitCause.RETIRED, ExitCause.FINISHED) or self.is_stopping:
            level = logging.INFO
        else:
            level = logging.ERROR
        log.log(
            level,
            "%s ended%s: %s%s",
            handle.describe(),
            " before it listened"
            if handle.has_to_listen and handle.exit_cause is ExitCause.CRASHED and handle.listening_since is None
            else "",
            handle.exit_status,
            f", {handle.passed_deadline}" if handle.passed_deadline else f" ({handle.exit_cause})",
        )

    # ---- signals ----

    def _on_signal(self, number: signal.Signals) -> None:
        match number:
            case signal.SIGTERM:
                self.stop("SIGTERM")
            case signal.SIGINT if self.is_stopping:
                self._quit("SIGINT while stopping")
            case signal.SIGINT:
                self.stop("SIGINT")
            case signal.SIGQUIT:
                self._quit("SIGQUIT")
            case signal.SIGUSR1:
                self._reopen_logs()
            case signal.SIGTTIN | signal.SIGTTOU if self.keeper is not None:
                self.keeper.scale(1 if number is signal.SIGTTIN else -1)
            case signal.SIGCHLD if os.getpid() == 1:
                reap_orphans(self._pids())
            case signal.SIGHUP | signal.SIGUSR2:
                log.warning("ignored %s: this version does not reload; stop it and start it again", number.name)

    def _reopen_logs(self) -> None:
        log.info("reopening the logs")
        logs.reopen()
        for handle in self._workers.values():
            handle.tell({"type": "reopen_logs"})

    # ---- leaving ----

    def _retire(self, handle: WorkerHandle) -> None:
        self._watch_leaving(handle)
        handle.tell({"type": "drain"})
        if handle.has_to_listen:  # it holds nothing yet, and whoever imports an application does not read
            self._remind(handle)
        else:
            self.reactor.call_later(TIME_TO_HEAR, lambda: self._remind(handle))

    def _remind(self, handle: WorkerHandle) -> None:
        """It does not read its channel: it is busy with code of its own."""
        if not handle.hears:
            handle.signal(signal.SIGTERM)

    def _watch_leaving(self, handle: WorkerHandle) -> None:
        """It accepts nothing more from now on, and has a bounded time to end."""
        self.dispatcher.leave(handle)
        is_news = handle.exited_after_disconnect is None
        handle.exited_after_disconnect = True
        if is_news and handle.grace:
            timeout = handle.grace + KILL_GRACE
            self.reactor.call_later(timeout, lambda: self._kill_late(handle, timeout))
        if handle.advance(State.DRAINING):
            newest = self.last_id
            self.emit("draining", handle=handle)
            # Without a user its listeners are closed: who comes is refused at once. But one that was forked in
            # answer to the event may ask for them, and until this one is disconnected clients wait for it.
            if self.last_id == newest:
                self._leave_listeners(handle)

    def _kill_late(self, handle: WorkerHandle, timeout: float) -> None:
        if not handle.is_dead():
            handle.passed_deadline = f"it did not end within {timeout:g} s of being asked to"
            handle.signal(signal.SIGKILL)

    # ---- stopping ----

    def stop(self, reason: str) -> None:
        """Accept nothing more, let the workers finish, end."""
        if self.is_stopping:
            return
        log.info("stopping (%s): what is in flight is finished, for up to %g s", reason, self.settings.graceful_timeout)
        self._close_doors()
        for handle in list(self._workers.values()):
            handle.disconnect()

    def stop_at_once(self, code: int = 0) -> None:
        """Kill all workers; `run` returns *code*."""
        self._exit_code = self._exit_code or code
        self._close_doors()
        for handle in self._workers.values():
            handle.signal(signal.SIGKILL)

    def _quit(self, reason: str) -> None:
        log.info("stopping at once (%s)", reason)
        self.stop_at_once()

    def _close_doors(self) -> None:
        self.is_stopping = True
        if self.keeper is not None:
            self.keeper.hear_stopping()
        self.listeners.close()

    def close(self) -> None:
        """Leave nothing behind, whatever ended the loop."""
        _living.discard(self)
        for handle in list(self._workers.values()):  # only after an error of our own
            handle.signal(signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(handle.pid, 0)
            self._forget(handle)
        self.listeners.close()
        self.dispatcher.close()
        self.reactor.close()
        self.board.close()


def _log_boot_failure(who: str, failure: BootFailure) -> None:
    log.error("%s cannot boot: %s%s", who, failure.sentence, f"\n{failure.traceback}" if failure.traceback else "")
