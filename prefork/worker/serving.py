"""Serving HTTP in a worker: boot the application, open its listeners, serve, drain.

"listening" is said once every address accepts; what stands in the way is raised as `BootFailed`,
with the reason for the master.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from prefork import log as logs
from prefork.config import Settings
from prefork.errors import ClusterError, ConfigError, ImportFailed, LifespanFailed, ListenError, LoadError, TLSError
from prefork.gateway.lifespan import Lifespan
from prefork.gateway.load import Application, Interface, load_application, resolve
from prefork.gateway.make import make_gateway, make_websocket_gateway
from prefork.gateway.threads import Threads
from prefork.ipc.channel import Message
from prefork.ipc.handoff import Verdict, decode_offers, encode_answer
from prefork.log import AccessLog
from prefork.net.forwarded import Forwarding, Trusted
from prefork.net.sharing import Sharing
from prefork.net.tls import PEM, RENEWAL_INTERVAL, TLS, TLSFiles
from prefork.process.status import BOOT_FAILED, LOAD_FAILED
from prefork.protocol.limits import Limits
from prefork.worker.gate import Gate
from prefork.worker.heartbeat import Heartbeat
from prefork.worker.link import Shared, Worker
from prefork.worker.loop import loop_factory, loop_name
from prefork.worker.server import Server
from prefork.worker.service import Service, Timeouts
from prefork.worker.websocket import WebSockets

log = logging.getLogger("prefork")

# When the master is gone nobody waits for us: drain this many seconds at the most, within the grace
# after which the kernel ends us (process.identity.DEATH_GRACE).
ORPHAN_TIMEOUT = 3.0

# The application's shutdown code may take this long after the drain, in seconds. The master kills
# a little later (see cluster.master.KILL_GRACE).
SHUTDOWN_TIMEOUT = 4.0

# Threads whose requests were cut off get this long to notice and clean up, in seconds.
THREADS_GRACE = 0.5


@dataclass(frozen=True, slots=True)
class Equipment:
    """What serving needs beside the settings. Made before the fork, all workers share it."""

    settings: Settings
    bind: tuple[str, ...]  # as the master is asked for it
    tls: TLS | None
    application: Application | None  # None: to be loaded by the worker itself
    access_log: AccessLog | None
    wishes: Mapping[str, Any] = field(default_factory=dict)  # about the listeners, if the master has not made them yet
    is_alone: bool = False  # there is one worker, and will be: nobody else accepts from its sockets
    renews_tls: bool = False  # by itself; otherwise the master tells what the changed files hold


class BootFailed(Exception):
    """The worker cannot boot; carries what the master shall hear."""

    def __init__(self, sentence: str, application_traceback: str, code: int) -> None:
        super().__init__(sentence)
        self.traceback = application_traceback
        self.code = code


def load(settings: Settings) -> Application:
    """The application that *settings* name, with the interface they ask for. Raises LoadError."""
    return load_application(settings.app, settings.interface)


def load_tls(settings: Settings) -> TLS | None:
    """What the certificates of *settings* make, if there are any. Raises TLSError."""
    if not settings.certfile:
        return None
    is_required = settings.client_cert == "required"
    files = TLSFiles.named(settings.certfile, settings.keyfile, settings.client_ca or None, is_required)
    return TLS(files, settings.keyfile_password or None)


def load_function(target: str) -> tuple[str, Any]:
    """The function that "module:function" names, and its name for people. Raises LoadError."""
    return resolve(target)


# What only the master can do, or has done before a worker begins.
OF_THE_MASTER = ("workers", "preload", "chdir", "pythonpath", "env", "hooks", "user", "group", "pidfile")


def listen(worker: Worker, app: Any, bind: Any, keywords: Mapping[str, Any]) -> None:
    """Serve *app* on *bind* in this worker, until told to leave. Raises ConfigError, ListenError, LoadError.

    *keywords* are the settings of `prefork serve`, but for those of the master.
    """
    for name in OF_THE_MASTER:
        if name in keywords:
            raise ConfigError(f"{name} is a setting of the master: cluster.listen() runs in a worker")
    settings = Settings.load({"app": app, "bind": bind, "workers": 1, **keywords})
    wishes = {name: keywords[name] for name in ("sharing", "pick", "backlog") if name in keywords}
    wishes["is_encrypted"] = bool(settings.certfile)
    tls = load_tls(settings)
    access_log = AccessLog.open(settings.access_log, settings.log_format)
    try:
        serve(worker, Equipment(settings, settings.bind, tls, load(settings), access_log, wishes, renews_tls=True))
    except BootFailed as failed:
        if isinstance(failed.__cause__, ListenError):
            raise failed.__cause__ from None
        raise
    finally:
        if access_log is not None:
            access_log.close()


def serve(worker: Worker, equipment: Equipment) -> int:
    """Serve until told to leave; the exit code. Raises BootFailed."""
    settings = equipment.settings
    if worker.server is not None:
        raise ClusterError("this worker serves already: one cluster.listen() takes several addresses in a list")
    application = equipment.application or _load_or_fail(settings)
    loop = loop_factory(settings.loop)()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(Serving(worker, equipment, application, loop).run())
    finally:
        worker.server = None
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
    """The part of a worker's life in which its event loop serves HTTP."""

    def __init__(
        self, worker: Worker, equipment: Equipment, application: Application, loop: asyncio.AbstractEventLoop
    ) -> None:
        settings = equipment.settings
        self._worker = worker
        self._slot = worker.board[worker.slot]
        self._equipment = equipment
        self._application = application
        self._loop = loop
        self._leaving = asyncio.Event()
        self._drain_timeout = settings.graceful_timeout
        self._state: dict[str, Any] = {}
        self._threads = Threads(settings.threads, loop) if settings.threads else None
        self._server: Server | None = None
        self._shared: list[Shared] = []

    async def run(self) -> int:
        """Start the application, serve, drain. Raises BootFailed."""
        self._catch_signals()
        self._join_the_line()
        lifespan = await self._start_application()
        self._listen()
        await self._leaving.wait()
        await self._drain()
        self._worker.end_line()
        return await self._stop_application(lifespan)

    # ---- boot ----

    def _catch_signals(self) -> None:
        add = self._loop.add_signal_handler
        add(signal.SIGTERM, self._worker.disconnect)
        add(signal.SIGINT, lambda: None)
        add(signal.SIGQUIT, os._exit, 0)
        add(signal.SIGUSR1, self._reopen_logs)

    def _join_the_line(self) -> None:
        worker = self._worker
        worker.controls |= {
            "reopen_logs": lambda _: self._reopen_logs(),
            "certificates": lambda body: self._renew_certificates(PEM.from_message(body["pem"])),
            "orphaned": lambda _: self._on_orphaned(),
        }
        worker.server = self
        worker.attach(self._loop)
        if not worker.is_connected():
            self._on_orphaned()

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
        if self._leaving.is_set():
            return
        try:
            self._shared = [self._worker.share(bind, **self._equipment.wishes) for bind in self._equipment.bind]
        except OSError as error:
            raise BootFailed(f"cannot accept connections: {error}", "", BOOT_FAILED) from error
        service = self._make_service()
        gate = self._make_gate(service)
        self._heartbeat = Heartbeat(self._loop, self._slot, None if gate is None else gate.survey)
        proxies = Trusted.parse(settings.proxy_allow_ips) if settings.proxy_protocol else None
        is_alone = self._equipment.is_alone or self._is_shared_by(Sharing.REUSEPORT)
        self._server = Server(service, self._equipment.tls, proxies, is_alone=is_alone, gate=gate)
        try:
            self._server.open(shared.socket for shared in self._shared if shared.socket is not None)
        except OSError as error:
            raise BootFailed(f"cannot accept connections: {error}", "", BOOT_FAILED) from error
        if self._equipment.tls is not None and self._equipment.renews_tls:
            self._loop.call_later(RENEWAL_INTERVAL, self._look_for_certificates)
        self._worker.tell_listening(self._shared, self._describe_application())

    def _is_shared_by(self, sharing: Sharing) -> bool:
        return all(shared.sharing is sharing for shared in self._shared)

    def _make_gate(self, service: Service) -> Gate | None:
        """None where nobody else accepts from our sockets, or it is not wanted."""
        settings = self._equipment.settings
        threads = None if self._application.interface is Interface.ASGI else self._threads
        is_wanted = settings.accept_gate and not self._equipment.is_alone
        if not is_wanted or not any(shared.sharing is Sharing.INHERIT for shared in self._shared):
            return None
        gate = Gate(
            self._loop,
            self._worker.board,
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

    def take_over(self, message: Message) -> None:
        """Connections that the master accepted. What is refused is closed by the message's owner."""
        listener, numbers = decode_offers(message.body)
        if len(message.fds) < len(numbers):  # no descriptor was left for them here
            verdict = Verdict.EXHAUSTED
        elif self._server is None or self._leaving.is_set():
            verdict = Verdict.REFUSED
        else:
            verdict = Verdict.ACCEPTED
            for _ in numbers:
                self._server.take_over(message.fds.take(), listener)
        self._worker.acknowledge(encode_answer(verdict, numbers))

    def adopt(self, connection: socket.socket, received: bytes) -> bool:
        return self._server is not None and self._server.adopt(connection, received)

    def _reopen_logs(self) -> None:
        logs.reopen()
        log.debug("%s reopened its logs", self._worker.describe())

    def _look_for_certificates(self) -> None:
        assert self._equipment.tls is not None
        self._loop.call_later(RENEWAL_INTERVAL, self._look_for_certificates)
        try:
            self._equipment.tls.renew()
        except TLSError as error:
            log.error("the changed TLS files are not used, what they held before still is: %s", error)

    def _renew_certificates(self, pem: PEM) -> None:
        assert self._equipment.tls is not None
        try:
            self._equipment.tls.adopt(pem)
        except TLSError as error:  # the master could, a moment ago
            log.error("%s keeps its old TLS certificates: %s", self._worker.describe(), error)

    # ---- leaving ----

    def leave(self) -> None:
        """Accept nothing from here on; the rest of leaving is done by `run`."""
        self._leaving.set()
        if self._server is not None:
            self._server.stop_accepting()

    def leave_at_once(self) -> None:
        self._drain_timeout = 0.0
        self.leave()

    def _on_orphaned(self) -> None:
        log.error("%s leaves: the channel to its master has ended", self._worker.describe())
        self._drain_timeout = min(self._drain_timeout, ORPHAN_TIMEOUT)
        self.leave()

    async def _drain(self) -> None:
        if self._threads is not None:
            self._threads.drain()
        if self._server is not None:
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
