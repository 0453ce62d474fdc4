"""From listeners to connections, and the way back: accept, adopt, drain.

With a shared or an own listening socket the worker accepts. With handoff the master
does, and each connection arrives as a descriptor to be adopted.

Accepting is not left to the event loop. Out of descriptors, uvloop closes what it
accepts without a word, and asyncio fills the log; and asyncio takes a whole burst
where the other workers would have had their share.

A connection without TLS begins without a task: one would cost a third of all that a
connection costs.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any

from prefork.errors import reason_of
from prefork.net.accepted import Accepted, Acceptor
from prefork.net.forwarded import Trusted
from prefork.net.proxy import ProxyHeader
from prefork.net.tls import TLS
from prefork.worker.connection import BegunConnection, HTTPConnection
from prefork.worker.deadlines import NEVER, Sweep
from prefork.worker.gate import Gate
from prefork.worker.greeting import Greeter
from prefork.worker.service import Service, endpoint

log = logging.getLogger("prefork")

# After an accept that failed, in seconds; as asyncio. Nearly always it is EMFILE or ENFILE, and what
# helps is that some connection ends.
ACCEPT_PAUSE = 1.0

# Connections a turn of the loop takes from a queue that is ours alone: each turn costs a system call, and
# more at once would hold up the requests of those that are open.
ACCEPTS_ALONE = 16

# Between "accept no more" and closing idle connections, in seconds: a request that is already
# in a socket's buffer is read and answered.
DRAIN_LINGER = 0.1

# Cancelled applications get this long to clean up, in seconds.
CANCEL_GRACE = 0.5

# For a TLS client to answer our close_notify, in seconds. Many never do; asyncio would wait 30.
TLS_SHUTDOWN_TIMEOUT = 2.0


class Server:
    """Serves one worker's connections from `open` to the end of `drain`."""

    def __init__(
        self,
        service: Service,
        tls: TLS | None,
        proxies: Trusted | None = None,
        *,
        is_alone: bool = False,
        gate: Gate | None = None,
    ) -> None:
        """*proxies*: who must begin a connection with a PROXY header; None, and nobody may.

        *is_alone*: nobody else accepts from our sockets. *gate*: who says when to accept; None, and it is at once.
        """
        self._service = service
        self._gate = service.gate = gate
        self._loop = service.loop
        self._tls = tls
        self._listening: set[Acceptor] = set()
        self._starts: set[Coroutine[Any, Any, Any]] = set()  # of connections without TLS
        self._handshakes: set[asyncio.Task[None]] = set()
        self._kinds: dict[int, tuple[int, int, int]] = {}  # by index: what sockets the master accepts there
        self._accepts = ACCEPTS_ALONE if is_alone else 1
        self._make = partial(HTTPConnection, service)
        self._begin = self._start if tls is None else self._start_tls
        # What becomes of an accepted connection.
        self._greeter: Greeter | None = None
        self._receive: Callable[[Accepted], None] = self._begin
        if tls is not None or proxies is not None:
            self._greeter = Greeter(service, self._begin, expects_tls=tls is not None, proxies=proxies)
            self._receive = self._greeter.greet
        self._sweep = Sweep(service.loop, service.connections, service.tick)

    def open(self, sockets: Iterable[socket.socket]) -> None:
        """Accept on *sockets*, which are listening already and do not block."""
        for listening in sockets:
            _send_at_once(listening)  # inherited by what is accepted
            acceptor = Acceptor(listening)
            self._listening.add(acceptor)
            self._watch(acceptor)

    def adopt(self, connection: socket.socket, received: bytes = b"") -> bool:
        """Serve *connection*, of which somebody has read *received* already. False, and it stays the caller's, while draining.

        Raises ValueError for *received* where a connection begins with something other than a request.
        """
        if received and self._greeter is not None:
            begins = "TLS" if self._tls is not None else "a PROXY header"
            raise ValueError(
                f"{len(received)} bytes of a connection were read, but connections begin with {begins} here, "
                "which has to be read from the socket itself"
            )
        if self._service.is_draining:
            return False
        accepted = Accepted.adopt(connection)
        _send_at_once(accepted)
        self._service.slot.load += 1
        if received:
            self._start(accepted, make=partial(BegunConnection, received, self._service, accepted))
        else:
            self._receive(accepted)
        return True

    def take_over(self, descriptor: int, listener: int) -> None:
        """Serve a connection of the *listener* with that index, which the master has accepted; ours from now on."""
        kind = self._kinds.get(listener)
        if kind is None:  # asked once: it costs as much as all the rest
            with socket.socket(fileno=descriptor) as known:
                kind = self._kinds[listener] = int(known.family), int(known.type), known.proto
                known.detach()
        self._service.slot.load += 1
        self._receive(Accepted.take(descriptor, kind))

    def stop_accepting(self) -> None:
        """From the next instant on, no connection is accepted, and every answer says `Connection: close`."""
        self._service.drain()
        if self._gate is not None:
            self._gate.close()
        while self._listening:
            acceptor = self._listening.pop()
            self._unwatch(acceptor)
            acceptor.socket.close()

    async def drain(self, timeout: float) -> None:
        """Accept nothing more, finish what is in flight for up to *timeout* seconds, cut off the rest."""
        self.stop_accepting()
        try:
            async with asyncio.timeout(timeout):
                if not self._is_idle:
                    await asyncio.sleep(min(DRAIN_LINGER, timeout))
                if self._greeter is not None:
                    self._greeter.drain()
                for connection in list(self._service.connections):
                    connection.drain_connection()
                await self._become_idle()
        except TimeoutError:
            await self._cut_off(timeout)
        if self._greeter is not None:
            self._greeter.close()
        self._sweep.close()

    # ---- accepting ----

    def _watch(self, acceptor: Acceptor) -> None:
        """Accept when there is something to accept, or when the gate says so."""
        if self._gate is None:
            self._loop.add_reader(acceptor.socket.fileno(), self._accept, acceptor)
        else:
            self._gate.watch(acceptor.socket.fileno(), partial(self._accept_one, acceptor))

    def _unwatch(self, acceptor: Acceptor) -> None:
        if self._gate is None:
            self._loop.remove_reader(acceptor.socket.fileno())
        else:
            self._gate.unwatch(acceptor.socket.fileno())

    def _accept(self, acceptor: Acceptor) -> None:
        """With siblings, one connection per turn of the loop: a busy worker leaves the rest of the queue to them."""
        for _ in range(self._accepts):
            if not self._accept_one(acceptor):
                return

    def _accept_one(self, acceptor: Acceptor) -> bool:
        """False if there is nothing to accept now."""
        try:
            connection = acceptor.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False  # a sibling was faster, or the client left the queue
        except OSError as error:
            log.error("cannot accept a connection: %s; trying again in %g s", reason_of(error), ACCEPT_PAUSE)
            self._unwatch(acceptor)
            self._loop.call_later(ACCEPT_PAUSE, self._accept_again, acceptor)
            return False
        self._service.slot.load += 1
        self._receive(connection)
        return True

    def _accept_again(self, acceptor: Acceptor) -> None:
        if acceptor in self._listening:  # not closed meanwhile
            self._watch(acceptor)

    # ---- from a socket to a transport ----

    def _start(
        self,
        connection: Accepted,
        origin: ProxyHeader | None = None,
        make: Callable[[], HTTPConnection] | None = None,
    ) -> None:
        """Give *connection* its transport.

        The loop's coroutine waits once, for the transport to be ready; a task is not needed to
        tell it so.
        """
        start = self._loop.connect_accepted_socket(make or partial(self._make, connection, origin), connection)
        try:
            ready = start.send(None)
        except OSError as error:
            self._lose(connection, error)
            return
        self._starts.add(start)
        ready.add_done_callback(partial(self._finish_start, start, connection))

    def _finish_start(
        self, start: Coroutine[Any, Any, Any], connection: Accepted, _ready: asyncio.Future[None]
    ) -> None:
        self._starts.discard(start)
        if self._service.is_draining:
            self._service.something_ended.set()
        try:
            start.send(None)
        except StopIteration:  # it has returned the transport, as it should
            pass
        except OSError as error:
            self._lose(connection, error)

    def _start_tls(self, connection: Accepted, origin: ProxyHeader | None = None) -> None:
        handshake = self._loop.create_task(self._shake_hands(connection, origin))
        self._handshakes.add(handshake)
        handshake.add_done_callback(self._forget)

    async def _shake_hands(self, connection: Accepted, origin: ProxyHeader | None) -> None:
        assert self._tls is not None
        timeout = self._service.timeouts.head
        try:
            await self._loop.connect_accepted_socket(
                partial(self._make, connection, origin),
                connection,
                ssl=self._tls.context,
                ssl_handshake_timeout=None if timeout == NEVER else timeout,
                ssl_shutdown_timeout=TLS_SHUTDOWN_TIMEOUT,
            )
        except OSError as error:
            if isinstance(error, ssl.SSLError):  # and not the client's leaving
                client = origin.client if origin is not None else endpoint(connection.peer)
                log.info("refused a TLS connection of %s: %s", client[0] if client else "an unknown client", error)
            self._lose(connection, error)

    def _lose(self, connection: Accepted, error: OSError) -> None:
        """The client left meanwhile, or TLS could not be agreed on."""
        log.debug("a connection was lost before it began: %s", error)
        connection.close()
        self._service.slot.opened += 1
        self._service.count_closed()
        self._service.something_ended.set()

    def _forget(self, handshake: asyncio.Task[None]) -> None:
        self._handshakes.discard(handshake)
        self._service.something_ended.set()

    # ---- draining ----

    @property
    def _is_idle(self) -> bool:
        is_greeting = self._greeter is not None and self._greeter.greetings
        return self._service.is_idle and not (self._starts or self._handshakes or is_greeting)

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
        for task in [*tasks, *self._handshakes]:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_GRACE)
        for connection in list(service.connections):
            connection.abort()
        await asyncio.sleep(0)  # connection_lost is called by the loop's next turn


def _send_at_once(sock: socket.socket) -> None:
    """Nagle's algorithm would hold back the end of an answer. asyncio's own attempt misses sockets that were accepted here."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
