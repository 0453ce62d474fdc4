"""What all connections of one worker share: the gateway, the limits, the counters."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from typing import TYPE_CHECKING, Any

from prefork.gateway.make import Gateway
from prefork.log import AccessLog
from prefork.net.forwarded import Forwarding, Trusted
from prefork.protocol.limits import Limits
from prefork.scoreboard import LOAD, Slot
from prefork.worker.batch import Batch
from prefork.worker.deadlines import LINGER, NEVER, Awaited
from prefork.worker.sendfile import Sockets

if TYPE_CHECKING:
    from prefork.worker.connection import HTTPConnection
    from prefork.worker.gate import Gate
    from prefork.worker.websocket import WebSocketConnection, WebSockets

# Where the interpreter can, a task runs at once up to its first wait: whoever has to have one of its own costs the
# loop no turn.
EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


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
    forwarding: Forwarding = field(
        default_factory=lambda: Forwarding(Trusted.parse(()), ())
    )  # by default nobody is believed
    websockets: WebSockets | None = None  # None: the application takes none
    is_draining: bool = False
    ends_connections: bool = False  # answers may have to say `Connection: close`: while draining, or as the gate wants
    gate: Gate | None = None  # None: every connection is taken at once
    connections: set[HTTPConnection | WebSocketConnection] = field(default_factory=set)
    # Applications at work; a task outlives its response when the application goes on after it.
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    # Set whenever a connection or a task ends, for whoever waits until there is none.
    something_ended: asyncio.Event = field(default_factory=asyncio.Event)
    date: bytes = b""  # the line of that field
    _sockets: Sockets | None = None
    # What callbacks run in that begin a request: nothing of another request's context variables is in it.
    context: Context = field(default_factory=copy_context)

    # Makes a task of a coroutine, which may have ended already. One that has not is to be kept in `tasks`.
    start: Callable[..., asyncio.Task[None]] = field(init=False)
    batch: Batch = field(init=False)  # begins exchanges

    def __post_init__(self) -> None:
        self.start = partial(asyncio.Task, loop=self.loop, **EAGER)
        self.batch = Batch(self)
        self.tick()

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

    def keep(self, task: asyncio.Task[None]) -> None:
        """*task* has not ended: nobody else may hold it, and the drain waits for it."""
        self.tasks.add(task)
        task.add_done_callback(self.forget)

    def forget(self, task: asyncio.Task[None]) -> None:
        """*task* has ended."""
        self.tasks.discard(task)
        self.something_ended.set()

    def leave(self, connection: HTTPConnection | WebSocketConnection) -> None:
        """*connection* is lost, or has become another."""
        self.connections.discard(connection)
        self.something_ended.set()

    def count_closed(self) -> None:
        """A connection that was counted has ended."""
        self.slot.closed += 1
        self.put_down()

    def put_down(self) -> None:
        """A connection is no load any more."""
        self.slot.whole[LOAD] -= 1
        if self.gate is not None and self.gate.is_waiting:
            self.gate.on_left()

    def drain(self) -> None:
        """From the next instant on every answer says `Connection: close`."""
        self.is_draining = self.ends_connections = True

    def set_shedding(self, is_shedding: bool) -> None:
        """The gate wants kept-alive connections to end; it is asked for each."""
        self.ends_connections = is_shedding or self.is_draining

    def is_to_end(self, would_keep_alive: bool) -> bool:
        """Whether the answer in hand is its connection's last. Asked only while `ends_connections`."""
        return self.is_draining or (would_keep_alive and self.gate is not None and self.gate.sheds())

    @property
    def sockets(self) -> Sockets:
        """Made with the first file that is sent."""
        if self._sockets is None:
            self._sockets = Sockets(self.loop)
        return self._sockets

    def tick(self) -> None:
        """Called by the sweep: the `Date` (RFC 9110, section 6.6.1) of all responses until the next one."""
        self.date = b"date: %b\r\n" % formatdate(time.time(), usegmt=True).encode()


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
