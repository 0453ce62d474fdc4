"""Node's shape: a cluster that tells fork, online, listening and exit, and knows its workers.

The module-level names of `prefork.cluster` act on the one `Cluster` of the process,
which is also the one that `prefork.serve` runs. In a worker the same names tell
which worker this is.
"""

from __future__ import annotations

from typing import Any

from prefork.cluster.handles import WorkerHandle
from prefork.cluster.master import Master
from prefork.cluster.plan import Plan
from prefork.config import Settings
from prefork.emitter import Emitter
from prefork.errors import StartError
from prefork.process.signals import SignalInbox
from prefork.worker.main import Worker

# In the order in which one worker goes through them.
EVENTS = ("fork", "online", "listening", "exit")


class Cluster:
    """The workers of one server, in the master.

    Events, each exactly once per worker (listening once per address), in this order:
    fork(worker), online(worker), listening(worker, address), exit(worker, code, signal).
    Exactly one of *code* and *signal* is None; `worker.exit_cause` says why in a word.
    A listener that raises is logged and stops nothing. Listeners run in the master
    between two events, so they should be quick.
    """

    def __init__(self) -> None:
        self._emitter = Emitter(EVENTS)
        self.on, self.once, self.off = self._emitter.on, self._emitter.once, self._emitter.off
        self.workers: dict[int, WorkerHandle] = {}
        self.settings: Settings | None = None  # None until it runs
        self.worker: Worker | None = None  # in a worker: which one this process is

    @property
    def is_master(self) -> bool:
        return self.worker is None

    @property
    def is_worker(self) -> bool:
        return self.worker is not None

    def run(self, plan: Plan, inbox: SignalInbox) -> int:
        """The master's loop. Returns the exit code when the cluster has stopped."""
        if self.is_worker:
            raise StartError("a worker cannot be the master of the cluster that it belongs to")
        self.settings = plan.settings
        return Master(plan, self._emitter, self.workers, inbox).run()

    def become_worker(self, worker: Worker) -> None:
        """In a forked child: from here on this process is *worker*."""
        self.worker = worker
        self.workers = {}


the_cluster = Cluster()

# What `prefork.cluster` looks up anew on each access, because it changes.
LIVE = frozenset({"is_master", "is_worker", "worker", "workers", "settings"})


def live(name: str) -> Any:
    """The present value of a module-level name of `prefork.cluster`."""
    if name not in LIVE:
        raise AttributeError(f"module 'prefork.cluster' has no attribute {name!r}")
    return getattr(the_cluster, name)
