"""The cluster: `cluster.fork(...)`, `cluster.on("exit", ...)`, `cluster.listen(...)` and their kin, as in Node."""

from typing import TYPE_CHECKING

from prefork.cluster.api import Cluster, the_cluster
from prefork.cluster.api import live as __getattr__  # noqa: F401 - PEP 562: attributes that change
from prefork.cluster.picks import sticky

if TYPE_CHECKING:
    from prefork.cluster.handles import WorkerHandle
    from prefork.cluster.settings import ClusterSettings
    from prefork.worker.main import Worker

    is_master: bool
    is_worker: bool
    worker: Worker | None
    workers: dict[int, WorkerHandle]
    settings: ClusterSettings

on, once, off = the_cluster.on, the_cluster.once, the_cluster.off
setup_master, fork, keep, run = the_cluster.setup_master, the_cluster.fork, the_cluster.keep, the_cluster.run
disconnect, broadcast, call_later = the_cluster.disconnect, the_cluster.broadcast, the_cluster.call_later
listen, listener = the_cluster.listen, the_cluster.listener
counter, rate_limit = the_cluster.counter, the_cluster.rate_limit

__all__ = [
    "Cluster",
    "broadcast",
    "call_later",
    "counter",
    "disconnect",
    "fork",
    "is_master",
    "is_worker",
    "keep",
    "listen",
    "listener",
    "off",
    "on",
    "once",
    "rate_limit",
    "run",
    "settings",
    "setup_master",
    "sticky",
    "worker",
    "workers",
]
