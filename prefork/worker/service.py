"""What all connections of one worker share: the gateway, the limits, the counters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

from prefork.gateway.exchange import Exchange
from prefork.log import AccessLog
from prefork.protocol.limits import Limits
from prefork.scoreboard import Slot
from prefork.worker.deadlines import LINGER, NEVER, Awaited

if TYPE_CHECKING:
    from prefork.worker.connection import HTTPConnection

Gateway = Callable[[Exchange], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; `inf` for none."""

    head: float
    body: float
    keep_alive: float
    write: float


@dataclass(slots=True)
class Service:
    """One per worker."""

    loop: asyncio.AbstractEventLoop
    gateway: Gateway
    limits: Limits
    timeouts: Timeouts
    slot: Slot
    access_log: AccessLog | None
    server_header: bytes
    worker_id: int
    is_draining: bool = False
    connections: set[HTTPConnection] = field(default_factory=set)
    # Applications at work; a task outlives its response when the application goes on after it.
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    # Set whenever a connection or a task ends, for whoever waits until there is none.
    something_ended: asyncio.Event = field(default_factory=asyncio.Event)
    _date: bytes = b""
    _date_second: int = 0

    @property
    def is_idle(self) -> bool:
        return not (self.connections or self.tasks)

    def patience(self, awaited: Awaited) -> float:
        """How long a connection waits for *awaited*, in seconds."""
        match awaited:
            case Awaited.APPLICATION:
                return NEVER
            case Awaited.FIRST_REQUEST | Awaited.NEXT_REQUEST if self.is_draining:
                return LINGER
            case Awaited.FIRST_REQUEST | Awaited.HEAD:
                return self.timeouts.head
            case Awaited.NEXT_REQUEST:
                return self.timeouts.keep_alive
            case Awaited.BODY:
                return self.timeouts.body
            case Awaited.WRITING:
                return self.timeouts.write
            case Awaited.REST | Awaited.CLOSE:
                return LINGER

    def run(self, coroutine: Coroutine[object, object, None]) -> None:
        """Run *coroutine* in a task that is known here until it ends."""
        task = self.loop.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._forget)

    def leave(self, connection: HTTPConnection) -> None:
        """*connection* is lost."""
        self.connections.discard(connection)
        self.something_ended.set()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self.something_ended.set()

    def date(self) -> bytes:
        """The value of `Date` (RFC 9110, section 6.6.1), made once a second."""
        second = int(time.time())
        if second != self._date_second:
            self._date_second = second
            self._date = formatdate(second, usegmt=True).encode()
        return self._date


def endpoint(name: Any) -> tuple[str, int] | None:
    """ASGI's `client`: host and port, None for a unix socket."""
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None


def local_endpoint(name: Any) -> tuple[str, int | None] | None:
    """ASGI's `server`: host and port, or the path of a unix socket and None."""
    if isinstance(name, tuple):
        return str(name[0]), int(name[1])
    if isinstance(name, bytes):  # an abstract address
        return "@" + name[1:].decode("utf-8", "replace"), None
    return (str(name), None) if name else None
