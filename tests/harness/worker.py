"""A worker without its process: its server runs in an event loop of the test's own, which sees all that it counts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import closing
from types import SimpleNamespace

from prefork.gateway.exchange import Exchange
from prefork.net.tls import TLS
from prefork.protocol.limits import Limits
from prefork.scoreboard import Scoreboard
from prefork.worker.loop import loop_factory
from prefork.worker.server import Server
from prefork.worker.service import Service, Timeouts
from tests.harness.client import DEADLINE

LOOPS = ["uvloop", "asyncio"]

Address = tuple[str, int]


def run_beside_worker(
    test: Callable[[Service, Address], Awaitable[None]],
    begin: Callable[[Exchange], Coroutine[object, object, None]],
    *,
    loop: str,
    tls: TLS | None = None,
) -> None:
    """Run *test* with the service of a worker whose gateway is *begin*, and where it listens; then drain it."""

    async def run() -> None:
        service = Service(
            loop=asyncio.get_running_loop(),
            gateway=SimpleNamespace(begin=begin),
            limits=Limits(),
            timeouts=Timeouts(head=5, body=5, keep_alive=5, write=5),
            slot=board[0],
            access_log=None,
            server_header=b"",
            worker_id=1,
        )
        server = Server(service, tls)
        server.open([listening])
        async with asyncio.timeout(DEADLINE):
            await test(service, listening.getsockname())
        await server.drain(1)

    with closing(Scoreboard(1)) as board, socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
            runner.run(run())


async def until(is_so: Callable[[], bool], service: Service) -> None:
    """As soon as *is_so*, which is asked whenever a connection or a task of *service* has ended."""
    while not is_so():
        service.something_ended.clear()
        await service.something_ended.wait()
