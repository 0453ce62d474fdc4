"""Node's shape: a cluster with its workers and events, in the master; which worker this is, in a worker.

The module-level names of `prefork.cluster` act on the one `Cluster` of the process, which is also
the one that `prefork.serve` runs.
"""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from prefork.cluster.handles import WorkerHandle
from prefork.cluster.keeper import Keeper
from prefork.cluster.master import CAUGHT, Master
from prefork.cluster.reactor import Timer
from prefork.cluster.setup import ClusterSettings
from prefork.cluster.start import SEAT_VARIABLE, program
from prefork.counters import Counter, Counters, RateLimit
from prefork.emitter import Emitter
from prefork.errors import ChannelClosed, ClusterError, ConfigError
from prefork.net.address import Address
from prefork.net.listener import Listener
from prefork.process.lifecycle import State
from prefork.process.signals import SignalInbox
from prefork.worker.main import Worker, join, listen

# In the order in which one worker goes through them.
EVENTS = ("setup", "fork", "online", "listening", "message", "draining", "disconnect", "exit")


class Cluster:
    """The workers of one program.

    Events: setup(settings), fork(worker), online(worker), listening(worker, address),
    message(worker, message, handle), draining(worker), disconnect(worker), exit(worker, code,
    signal). For one worker fork comes before online before listening, disconnect before exit, each
    of these once (listening once per address). Exactly one of *code* and *signal* is None;
    `worker.exit_cause` says why in a word. A listener that raises is logged and stops nothing.
    Listeners run in the master between two events, so they should be quick.
    """

    # In a worker: which one this process is. A process is a worker of one cluster, and the master of none then.
    _worker: ClassVar[Worker | None] = None

    def __init__(self) -> None:
        self._emitter = Emitter(EVENTS)
        self.on, self.once, self.off = self._emitter.on, self._emitter.once, self._emitter.off
        self.workers: dict[int, WorkerHandle] = {}
        self.settings = ClusterSettings()
        self._present: Master | None = None
        self._last_id = 0

    @property
    def worker(self) -> Worker | None:
        """The worker that this process is; None in a master."""
        return Cluster._worker

    @property
    def is_master(self) -> bool:
        return self.worker is None

    @property
    def is_worker(self) -> bool:
        return self.worker is not None

    # ---- in the master ----

    def setup_master(self, **settings: Any) -> None:
        """Change how workers are forked from now on; calls add up. Event: setup. Raises ConfigError."""
        self._check_master("setup_master")
        self.settings = self._master.settings = self.settings.merged(settings)
        told = self.settings
        self._master.reactor.call_soon(lambda: self._emitter.emit("setup", told))

    def fork(
        self, target: Callable[..., Any] | None = None, *args: Any, env: Mapping[str, str] | None = None
    ) -> WorkerHandle:
        """A new worker: *target* (a plain or coroutine function) in a forked child, with *args*.

        Without one a fresh interpreter runs `settings.exec`. *env* is added to the environment.
        Raises ClusterError, and OSError where the kernel refuses.
        """
        self._check_master("fork")
        if target is None:
            program(self.settings)
        elif not callable(target):
            raise ClusterError(f"fork() runs a function in the child, and {target!r} is none")
        elif inspect.isasyncgenfunction(target):
            raise ClusterError(f"fork() runs a function in the child, and {target!r} is an async generator")
        self.setup_master()
        return self._master.fork(target, args, env=env)

    def keep(
        self,
        workers: int,
        target: Callable[..., Any],
        *args: Any,
        boot_timeout: float = 0.0,
        ready: State = State.ONLINE,
    ) -> None:
        """Have that many *workers* run *target*, from `run` on: who ends is replaced.

        A slot that keeps failing is started less and less often; if no worker has ever been *ready*,
        `run` gives up with an exit code. TTIN and TTOU change the number.
        """
        self._check_master("keep")
        if self._master.keeper is not None:
            raise ClusterError("keep() was called before: one target is kept by one cluster")
        if not 1 <= workers <= len(self._master.board):
            raise ConfigError(f"keep() was asked for {workers} workers: 1 to {len(self._master.board)} are possible")
        self.setup_master()
        self._master.keeper = Keeper(self._master, workers, target, args, boot_timeout=boot_timeout, ready=ready)
        if self._master.is_running:
            self._master.keeper.start()

    def hold(self, asked: Address, listener: Listener, pick: Any) -> None:
        """Share *listener*, which was opened for *asked*, with all workers; ours from now on."""
        self._check_master("hold")
        self._master.listeners.hold(asked, listener, pick)

    def run(self, inbox: SignalInbox | None = None) -> int:
        """The master's loop: until no worker is left and no call is pending. Returns its exit code.

        TERM and INT stop it: workers finish what they have. *inbox* catches signals already, if given.
        """
        self._check_master("run")
        master = self._master
        if inbox is not None:
            return self._run(master, inbox)
        inbox = SignalInbox(CAUGHT)
        try:
            inbox.open()
        except ValueError as error:
            raise ClusterError("cluster.run() was called in a thread, but only the main thread gets signals") from error
        try:
            return self._run(master, inbox)
        finally:
            inbox.close()

    def close(self) -> None:
        """Give up what was begun without `run`: workers are killed, listeners closed. After `run` it has no effect."""
        if self._present is not None and self.worker is None:
            self._last_id = self._present.last_id
            self._present.close()
            self._present = None

    def _run(self, master: Master, inbox: SignalInbox) -> int:
        try:
            return master.run(inbox)
        finally:
            self._last_id = master.last_id
            if self.worker is None:
                self._present = None

    def call_later(self, delay: float, function: Callable[[], object]) -> Timer:
        """*function* once, in *delay* seconds, in the master; `run` waits for it."""
        self._check_master("call_later")
        return self._master.call_later(delay, function)

    def disconnect(self, callback: Callable[[], object] | None = None) -> None:
        """Disconnect every worker; *callback* is called once, when all have ended."""
        self._check_master("disconnect")
        left = {handle.id for handle in self.workers.values()}

        def leave(worker: WorkerHandle, *_: object) -> None:
            left.discard(worker.id)
            if not left:
                self.off("exit", leave)
                assert callback is not None
                callback()

        if callback is not None and left:
            self.on("exit", leave)
        elif callback is not None:
            self._master.call_later(0.0, callback)
        if self._master.keeper is not None:
            self._master.keeper.hear_stopping()
            self._master.is_stopping = True
        for handle in list(self.workers.values()):
            handle.disconnect()

    def broadcast(self, message: Any) -> None:
        """Send *message* to every worker that can be reached."""
        self._check_master("broadcast")
        for handle in list(self.workers.values()):
            try:
                if handle.is_connected():
                    handle.send(message)
            except ChannelClosed:  # it has just died, which its exit will tell
                continue

    # ---- in a worker ----

    def listen(self, app: Any, bind: Any, **settings: Any) -> None:
        """Serve *app* on *bind* (an address or a list) in this worker, until told to leave.

        All workers that ask for an address share one listener; the master makes it for the first.
        *settings* are those of `prefork serve`. Raises ConfigError, LoadError, and ListenError (an
        OSError) with the kernel's errno.
        """
        listen(self._this_worker("listen"), app, bind, settings)

    def listener(self, bind: str, *, sharing: str | None = None) -> socket.socket:
        """A socket that all workers share who ask for *bind*, for servers that are not HTTP.

        TCP and unix sockets listen, `udp://host:port` is bound. It does not block. Close it to give
        it back: the address is free again when its last user is gone. Raises ListenError.
        """
        return self._this_worker("listener").listener(bind, sharing)

    # ---- in both ----

    def counter(self, name: str) -> Counter:
        """A number that all processes of the cluster share: see docs/shared.md."""
        return self._counters.counter(name)

    def rate_limit(self, name: str, limit: int, per: float) -> RateLimit:
        """At most *limit* in *per* seconds, over all processes of the cluster: see docs/shared.md."""
        return self._counters.rate_limit(name, limit=limit, per=per)

    @property
    def _counters(self) -> Counters:
        return Counters(self._master.board if self.worker is None else self.worker.board)

    # ---- within ----

    @property
    def _master(self) -> Master:
        if self._present is None:
            self._present = Master(self._emitter, self.workers, self._become, self._last_id)
            self._present.settings = self.settings
        return self._present

    def _become(self, worker: Worker) -> None:
        """In a forked child: from here on this process is *worker*."""
        Cluster._worker = worker
        self.workers = {}

    def join(self) -> None:
        """In an interpreter that was started to be a worker."""
        text = os.environ.pop(SEAT_VARIABLE, None)
        if text is not None:
            self._become(join(text))

    def _check_master(self, what: str) -> None:
        if self.worker is not None:
            raise ClusterError(f"cluster.{what}() belongs to the master, and this is {self.worker.describe()}")

    def _this_worker(self, what: str) -> Worker:
        if self.worker is None:
            raise ClusterError(
                f"cluster.{what}() runs in a worker, and this is the master: call it in what fork() runs"
            )
        return self.worker


the_cluster = Cluster()
the_cluster.join()

# What `prefork.cluster` looks up anew on each access, because it changes.
LIVE = frozenset({"is_master", "is_worker", "worker", "workers", "settings"})


def live(name: str) -> Any:
    """The present value of a module-level name of `prefork.cluster`."""
    if name not in LIVE:
        raise AttributeError(f"module 'prefork.cluster' has no attribute {name!r}")
    return getattr(the_cluster, name)
