"""An application that leaves the worker in slot 0 only few descriptors, and the others enough."""

from __future__ import annotations

import os
import resource

from prefork import Request, cluster

if cluster.worker.slot == 0:
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(os.environ["FEW_FILES"]),) * 2)


async def app(request: Request) -> str:
    return str(request.worker.slot)
