"""The cluster: `cluster.on("exit", ...)`, `cluster.workers`, `cluster.worker` and its kin."""

from typing import TYPE_CHECKING

from prefork.cluster.api import Cluster, the_cluster
from prefork.cluster.api import live as __getattr__  # noqa: F401 - PEP 562: attributes that change

if TYPE_CHECKING:
    from prefork.cluster.handles import WorkerHandle
    from prefork.config import Settings
    from prefork.worker.main import Worker

    is_master: bool
    is_worker: bool
    worker: Worker | None
    workers: dict[int, WorkerHandle]
    settings: Settings | None

on, once, off = the_cluster.on, the_cluster.once, the_cluster.off

__all__ = ["Cluster", "is_master", "is_worker", "off", "on", "once", "settings", "worker", "workers"]
