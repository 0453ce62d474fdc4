"""From listeners to connections, and the way back: accept, adopt, drain.

With a shared or an own listening socket the worker accepts. With handoff the master
does, and each connection arrives as a descriptor to be adopted.

Accepting is not left to the event loop. Out of descriptors, uvloop closes what it
accepts without a word, and asyncio fills the log; and asyncio takes a whole burst
where the other workers would have had their share.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Iterable

from prefork.errors import reason_of
from prefork.worker.connection import HTTPConnection
from prefork.worker.deadlines import NEVER, Sweep
from prefork.worker.service import Service

log = logging.getLogger("prefork")

# After an accept that failed, in seconds; as asyncio. Nearly always it is EMFILE or ENFILE, and what
# helps is that some connection ends.
ACCEPT_PAUSE = 1.0

# Between "accept no more" and closing idle connections, in seconds: a request that is already
# in a socket's buffer is read and answered.
DRAIN_LINGER = 0.1

# Cancelled applications get this long to clean up, in seconds.
CANCEL_GRACE = 0.5

# For a TLS client to answer our close_notify, in seconds. Many never do; asyncio would wait 30.
TLS_SHUTDOWN_TIMEOUT = 2.0


class Server:
    """Serves one worker's connections from `open` to the end of `drain`."""

    def __init__(self, service: Service, tls: ssl.SSLContext | None) -> None:
        self._service = service
        self._loop = service.loop
        self._tls = tls
        self._listening: set[socket.socket] = set()
        self._adoptions: set[asyncio.Task[None]] = set()
        self._sweep = Sweep(service.loop, service.connections)

    def open(self, sockets: Iterable[socket.socket]) -> None:
        """Accept on *sockets*, which are listening already and do not block."""
        for listening in sockets:
            self._listening.add(listening)
            self._loop.add_reader(listening.fileno(), self._accept, listening)

    def adopt(self, connection: socket.socket) -> bool:
        """Serve *connection*. False, and it stays the caller's, while draining."""
        if self._service.is_draining:
            return False
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            # Also asyncio's default, but it looks at the protocol's number, which accept() does not tell.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._adopt(connection))
        self._adoptions.add(task)
        task.add_done_callback(self._forget)
        return True

    def stop_accepting(self) -> None:
        """From the next instant on, no connection is accepted, and every answer says `Connection: close`."""
        self._service.is_draining = True
        while self._listening:
            listening = self._listening.pop()
            self._loop.remove_reader(listening.fileno())
            listening.close()

    async def drain(self, timeout: float) -> None:
        """Accept nothing more, finish what is in flight for up to *timeout* seconds, cut off the rest."""
        self.stop_accepting()
        try:
            async with asyncio.timeout(timeout):
                if not self._is_idle:
                    await asyncio.sleep(min(DRAIN_LINGER, timeout))
                for connection in list(self._service.connections):
                    connection.drain_connection()
                await self._become_idle()
        except TimeoutError:
            await self._cut_off(timeout)
        self._sweep.close()

    # ---- accepting ----

    def _accept(self, listening: socket.socket) -> None:
        """One connection per turn of the loop: a busy worker leaves the rest of the queue to its siblings."""
        try:
            connection, _ = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # a sibling was faster, or the client left the queue
        except OSError as error:
            log.error("cannot accept a connection: %s; trying again in %g s", reason_of(error), ACCEPT_PAUSE)
            self._loop.remove_reader(listening.fileno())
            self._loop.call_later(ACCEPT_PAUSE, self._accept_again, listening)
            return
        if not self.adopt(connection):
            connection.close()

    def _accept_again(self, listening: socket.socket) -> None:
        if listening in self._listening:  # not closed meanwhile
            self._loop.add_reader(listening.fileno(), self._accept, listening)

    async def _adopt(self, connection: socket.socket) -> None:
        handshake_timeout = self._service.timeouts.head
        try:
            await self._loop.connect_accepted_socket(
                lambda: HTTPConnection(self._service),
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None or handshake_timeout == NEVER else handshake_timeout,
                ssl_shutdown_timeout=None if self._tls is None else TLS_SHUTDOWN_TIMEOUT,
            )
        except OSError as error:  # the client left meanwhile, or TLS could not be agreed on
            log.debug("a connection was lost before it began: %s", error)
            connection.close()
            self._service.slot.opened += 1
            self._service.slot.closed += 1

    def _forget(self, adoption: asyncio.Task[None]) -> None:
        self._adoptions.discard(adoption)
        self._service.something_ended.set()

    # ---- draining ----

    @property
    def _is_idle(self) -> bool:
        return self._service.is_idle and not self._adoptions

    async def _become_idle(self) -> None:
        while not self._is_idle:
            self._service.something_ended.clear()
            await self._service.something_ended.wait()

    async def _cut_off(self, timeout: float) -> None:
        service = self._service
        tasks = list(service.tasks)
        log.warning(
            "not finished within %g s (--graceful-timeout) and cut off: %d requests on %d connections",
            timeout,
            len(tasks),
            len(service.connections),
        )
        for task in [*tasks, *self._adoptions]:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_GRACE)
        for connection in list(service.connections):
            connection.abort()
        await asyncio.sleep(0)  # connection_lost is called by the loop's next turn
