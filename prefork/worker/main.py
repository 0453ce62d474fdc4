"""A worker's life: boot, serve, drain, leave.

`run` is called in a freshly forked child and returns its exit code. The order of
the boot is the contract with the master: "online" before any code of the
application runs, "listening" once every address accepts, "failed" with the reason
instead of it.

A worker does not outlive its master. The end of the channel tells the event loop,
which drains; a worker that cannot notice is ended by the kernel soon after.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prefork import log as logs
from prefork.config import Settings
from prefork.errors import ChannelClosed, ImportFailed, LifespanFailed, LoadError, TLSError, reason_of
from prefork.gateway.lifespan import Lifespan
from prefork.gateway.load import Application, Interface, load_application, resolve
from prefork.gateway.make import make_gateway, make_websocket_gateway
from prefork.gateway.threads import Threads
from prefork.ipc.aio import AsyncChannel
from prefork.ipc.channel import Channel, Message
from prefork.ipc.frames import Kind
from prefork.log import AccessLog
from prefork.net.forwarded import Forwarding, Trusted
from prefork.net.listener import Listener
from prefork.net.sharing import Sharing
from prefork.net.tls import PEM, TLS
from prefork.process.identity import Identity, end_with_parent
from prefork.process.status import BOOT_FAILED, LOAD_FAILED
from prefork.protocol.limits import Limits
from prefork.scoreboard import Scoreboard, Slot
from prefork.worker.gate import Gate
from prefork.worker.heartbeat import Heartbeat
from prefork.worker.loop import loop_factory, loop_name
from prefork.worker.server import Server
from prefork.worker.service import Service, Timeouts
from prefork.worker.websocket import WebSockets

log = logging.getLogger("prefork")

FOR_THE_MASTER = (
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)

# When the master is gone nobody waits for us: drain this many seconds at the most, within the grace
# after which the kernel ends us (process.identity.DEATH_GRACE).
ORPHAN_TIMEOUT = 3.0

# The application's shutdown code may take this long after the drain, in seconds. The master kills
# a little later (see cluster.master.KILL_GRACE).
SHUTDOWN_TIMEOUT = 4.0

# Threads whose requests were cut off get this long to notice and clean up, in seconds.
THREADS_GRACE = 0.5

# Last words are small and the channel is empty at boot: they leave at once or never.
LAST_WORDS_TIMEOUT = 1.0


class Worker:
    """The worker that this process is: `prefork.cluster.worker`, and `request.worker` in handlers."""

    def __init__(self, id: int, slot: int, generation: int, master: int) -> None:
        self.id = id
        self.slot = slot
        self.generation = generation
        self.pid = os.getpid()
        self.master = master  # its pid
        self._leave: Callable[[], object] | None = None

    def describe(self) -> str:
        return f"worker {self.id} (pid {self.pid}, generation {self.generation})"

    __repr__ = __str__ = describe

    def disconnect(self) -> None:
        """Leave: accept nothing more, finish what is in flight, exit with 0. The master starts another.

        May be called from any thread, and again, without effect.
        """
        if self._leave is not None:
            self._leave()

    def on_disconnect(self, leave: Callable[[], object]) -> None:
        """Set by `run`: what `disconnect` does."""
        self._leave = leave


@dataclass(frozen=True, slots=True)
class Equipment:
    """What the master made before the fork and every worker inherits."""

    settings: Settings
    listeners: Sequence[Listener]
    identity: Identity
    tls: TLS | None
    application: Application | None  # None: to be loaded by the worker itself
    access_log: AccessLog | None
    board: Scoreboard


class BootFailed(Exception):
    """The worker cannot boot; carries what the master shall hear."""

    def __init__(self, sentence: str, application_traceback: str, code: int) -> None:
        super().__init__(sentence)
        self.traceback = application_traceback
        self.code = code


def load(settings: Settings) -> Application:
    """The application that *settings* name, with the interface they ask for. Raises LoadError."""
    return load_application(settings.app, settings.interface)


def load_function(target: str) -> tuple[str, Any]:
    """The function that "module:function" names, and its name for people. Raises LoadError."""
    return resolve(target)


def run(worker: Worker, channel: Channel, slot: Slot, equipment: Equipment) -> int:
    """Be *worker* until told to leave; the exit code."""
    # A terminal, or nohup's absence, sends these to the whole group; what they mean is for the master
    # to say. Not SIG_IGN, which programs that the application starts would inherit.
    for number in FOR_THE_MASTER:
        signal.signal(number, lambda *_: None)
    # The stacks of all threads on SIGSEGV, SIGABRT and their like. By its number: a program that embeds us
    # may have put something without a descriptor in sys.stderr's place.
    faulthandler.enable(file=2)
    try:
        channel.send({"type": "online"})
        return _boot_and_serve(worker, channel, slot, equipment)
    except ChannelClosed:
        return 0  # the master is gone, and with it everybody who could ask for something
    except BootFailed as failed:
        _say_last_words(channel, failed)
        return failed.code


def _boot_and_serve(worker: Worker, channel: Channel, slot: Slot, equipment: Equipment) -> int:
    settings = equipment.settings
    try:
        equipment.identity.assume()
    except OSError as error:
        who = f"user {settings.user or '(unchanged)'}, group {settings.group or '(unchanged)'}"
        raise BootFailed(f"cannot become {who}: {reason_of(error)}", "", BOOT_FAILED) from error
    if not end_with_parent(worker.master):
        return 0
    application = equipment.application or _load_or_fail(settings)
    loop = loop_factory(settings.loop)()
    asyncio.set_event_loop(loop)
    try:
        serving = Serving(worker, channel, slot, equipment, application, loop)
        return loop.run_until_complete(serving.run())
    finally:
        with suppress(RuntimeError):  # a thread of the application may still hold an async generator
            loop.run_until_complete(loop.shutdown_asyncgens())
        if equipment.access_log is not None:
            equipment.access_log.flush()


def _load_or_fail(settings: Settings) -> Application:
    try:
        return load(settings)
    except ImportFailed as error:
        raise BootFailed(str(error), error.traceback, LOAD_FAILED) from error
    except LoadError as error:
        raise BootFailed(str(error), "", LOAD_FAILED) from error
    except BaseException as error:
        sentence = f"application {settings.app!r} raised {type(error).__name__} while it was imported"
        raise BootFailed(sentence, traceback.format_exc(), LOAD_FAILED) from error


class Serving:
    """The part of a worker's life that an event loop carries."""

    def __init__(
        self,
        worker: Worker,
        channel: Channel,
        slot: Slot,
        equipment: Equipment,
        application: Application,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        settings = equipment.settings
        self._worker = worker
        self._slot = slot
        self._equipment = equipment
        self._application = application
        self._loop = loop
        self._leaving = asyncio.Event()
        self._drain_timeout = settings.graceful_timeout
        self._channel = AsyncChannel(channel, loop, self._on_message, self._on_orphaned)
        self._state: dict[str, Any] = {}
        self._threads = Threads(settings.threads, loop) if settings.threads else None
        self._server: Server | None = None

    async def run(self) -> int:
        """Start the application, serve, drain. Raises BootFailed."""
        self._catch_signals()
        self._worker.on_disconnect(self._leave_from_anywhere)
        lifespan = await self._start_application()
        self._listen()
        await self._leaving.wait()
        await self._drain()
        return await self._stop_application(lifespan)

    # ---- boot ----

    def _catch_signals(self) -> None:
        add = self._loop.add_signal_handler
        add(signal.SIGTERM, self._leave)
        add(signal.SIGINT, lambda: None)
        add(signal.SIGQUIT, os._exit, 0)
        add(signal.SIGUSR1, self._reopen_logs)

    async def _start_application(self) -> Lifespan | None:
        if self._application.interface is not Interface.ASGI:
            return None
        lifespan = Lifespan(self._application.target, self._state, self._equipment.settings.lifespan)
        startup = self._loop.create_task(lifespan.startup())
        leaving = self._loop.create_task(self._leaving.wait())
        await asyncio.wait({startup, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not startup.done():  # told to leave before the application was up
            startup.cancel()
        try:
            await startup
        except asyncio.CancelledError:
            return None
        except LifespanFailed as error:
            raise BootFailed(str(error), error.traceback, BOOT_FAILED) from error
        return lifespan

    def _listen(self) -> None:
        settings = self._equipment.settings
        proxies = Trusted.parse(settings.proxy_allow_ips) if settings.proxy_protocol else None
        is_alone = settings.workers == 1 or settings.sharing == "reuseport"
        service = self._make_service()
        gate = self._make_gate(service)
        self._heartbeat = Heartbeat(self._loop, self._slot, None if gate is None else gate.survey)
        self._server = Server(service, self._equipment.tls, proxies, is_alone=is_alone, gate=gate)
        sockets = [
            listener.socket_for(self._worker.slot)
            for listener in self._equipment.listeners
            if listener.sharing is not Sharing.HANDOFF
        ]
        try:
            self._server.open(sockets)
        except OSError as error:
            raise BootFailed(f"cannot accept connections: {error}", "", BOOT_FAILED) from error
        if not self._leaving.is_set():
            self._channel.send({"type": "listening", "application": self._describe_application()})

    def _make_gate(self, service: Service) -> Gate | None:
        """None where nobody else accepts from our sockets, or it is not wanted."""
        settings = self._equipment.settings
        threads = None if self._application.interface is Interface.ASGI else self._threads
        if not settings.accept_gate or settings.sharing != "inherit" or settings.worker_count == 1:
            return None
        gate = Gate(
            self._loop,
            self._equipment.board,
            self._slot,
            workers=settings.worker_count,
            is_full=None if threads is None else threads.is_full,
            set_shedding=service.set_shedding,
        )
        if threads is not None:
            threads.on_room = gate.on_room
        return gate

    def _make_service(self) -> Service:
        settings = self._equipment.settings
        if self._equipment.access_log is not None:
            self._equipment.access_log.defer = self._loop.call_soon
        gateway = make_gateway(
            self._application,
            run_in_thread=self._threads,
            worker=self._worker,
            state=self._state,
            root_path=settings.root_path,
        )
        return Service(
            loop=self._loop,
            gateway=gateway,
            limits=Limits(
                head_size=settings.limit_head,
                field_count=settings.limit_fields,
                target_size=settings.limit_target,
                body_size=settings.limit_body,
            ),
            timeouts=Timeouts(
                head=settings.head_timeout or float("inf"),
                body=settings.body_timeout or float("inf"),
                keep_alive=settings.keep_alive_timeout or float("inf"),
                write=settings.write_timeout or float("inf"),
            ),
            slot=self._slot,
            access_log=self._equipment.access_log,
            server_header=settings.server_header.encode("ascii"),
            worker_id=self._worker.id,
            forwarding=Forwarding(
                Trusted.parse(settings.forwarded_allow_ips),
                () if "off" in settings.forwarded_headers else settings.forwarded_headers,
            ),
            websockets=self._make_websockets(),
        )

    def _make_websockets(self) -> WebSockets | None:
        settings = self._equipment.settings
        gateway = make_websocket_gateway(
            self._application, worker=self._worker, state=self._state, root_path=settings.root_path
        )
        if gateway is None:
            return None
        return WebSockets(
            gateway=gateway,
            max_size=settings.ws_max_size,
            compression=settings.ws_compression,
            ping_interval=settings.ws_ping_interval or float("inf"),
            ping_timeout=settings.ws_ping_timeout or float("inf"),
            server=b"server: %b\r\n" % settings.server_header.encode("ascii") if settings.server_header else b"",
        )

    def _describe_application(self) -> str:
        application = self._application
        took = f"serving {application.name} as {INTERFACE_NAMES[application.interface]}"
        why = f" (guessed: {application.reason}; --interface overrides)" if application.guessed else ""
        return f"{took} on {loop_name(self._equipment.settings.loop)}{why}"

    # ---- serving ----

    def _on_message(self, message: Message) -> None:
        if message.kind is Kind.HANDOFF:
            self._take_over(message)
        elif message.kind is Kind.CONTROL:
            match message.body["type"]:
                case "drain":
                    self._leave()
                case "reopen_logs":
                    self._reopen_logs()
                case "certificates":
                    self._renew_certificates(message.body["pem"])

    def _take_over(self, message: Message) -> None:
        """A connection that the master accepted. What is refused is closed by the message's owner."""
        number, _listener = message.body
        accepted = self._server is not None and not self._leaving.is_set()
        if accepted:
            assert self._server is not None
            self._server.adopt(message.fds.take_socket())
        with suppress(ChannelClosed):  # the master is gone; that is told by the channel's end
            self._channel.send([number, accepted], kind=Kind.ACK)

    def _reopen_logs(self) -> None:
        logs.reopen()
        log.debug("%s reopened its logs", self._worker.describe())

    def _renew_certificates(self, pem: dict[str, Any]) -> None:
        assert self._equipment.tls is not None
        try:
            self._equipment.tls.adopt(PEM.from_message(pem))
        except TLSError as error:  # the master could, a moment ago
            log.error("%s keeps its old TLS certificates: %s", self._worker.describe(), error)

    # ---- leaving ----

    def _leave_from_anywhere(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._leave()
        else:
            self._loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        """Accept nothing from here on; the rest of leaving is done by `run`."""
        if not self._leaving.is_set():
            self._leaving.set()
            if self._server is not None:
                self._server.stop_accepting()
            with suppress(ChannelClosed):
                self._channel.send({"type": "draining"})

    def _on_orphaned(self) -> None:
        log.error("%s leaves: the channel to its master has ended", self._worker.describe())
        self._drain_timeout = min(self._drain_timeout, ORPHAN_TIMEOUT)
        self._leaving.set()

    async def _drain(self) -> None:
        assert self._server is not None
        if self._threads is not None:
            self._threads.drain()
        await self._server.drain(self._drain_timeout)
        if self._threads is not None:
            # Of requests that were cut off: what they send next fails, and then they clean up.
            await self._threads.wait(THREADS_GRACE)
            self._threads.close()

    async def _stop_application(self, lifespan: Lifespan | None) -> int:
        if lifespan is None:
            return 0
        try:
            async with asyncio.timeout(SHUTDOWN_TIMEOUT):
                await lifespan.shutdown()
        except TimeoutError:
            log.error("%s: the application's shutdown took over %g s", self._worker.describe(), SHUTDOWN_TIMEOUT)
        except LifespanFailed as error:
            log.error("%s: %s%s", self._worker.describe(), error, error.traceback and f"\n{error.traceback}")
        return 0


INTERFACE_NAMES = {
    Interface.NATIVE: "a native handler",
    Interface.ASGI: "an ASGI application",
    Interface.WSGI: "a WSGI application",
}


def _say_last_words(channel: Channel, failed: BootFailed) -> None:
    with suppress(ChannelClosed, OSError):
        channel.send({"type": "failed", "sentence": str(failed), "traceback": failed.traceback, "code": failed.code})
        channel.flush_blocking(LAST_WORDS_TIMEOUT)
