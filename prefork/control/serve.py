"""From settings to a running master: what `prefork serve` and `prefork.serve()` share.

Everything that can be wrong is tried before the first fork, in the order in which a
user can do something about it: the place, the names, the files, the addresses, the
application. What was made on the way is taken back, whatever ends the run.
"""

from __future__ import annotations

import errno
import gc
import inspect
import logging
import os
import threading
import traceback
from contextlib import ExitStack
from importlib import metadata
from typing import Any

from prefork import log as logs
from prefork.cluster.api import Cluster, the_cluster
from prefork.cluster.picks import Pick, make_pick
from prefork.config import Settings
from prefork.control.place import Stopped, alone, check_place, current_directory, prepare_environment, signals_caught
from prefork.errors import ConfigError, ImportFailed, ListenError, LoadError, TLSError
from prefork.log import AccessLog
from prefork.net.address import Address, TCPAddress, UDPAddress, absolute, parse_address
from prefork.net.listener import Listener
from prefork.net.sharing import Sharing
from prefork.net.tls import RENEWAL_INTERVAL, TLS
from prefork.process.identity import owner, resolve
from prefork.process.lifecycle import State
from prefork.process.pidfile import PidFile
from prefork.process.signals import SignalInbox
from prefork.process.status import LOAD_FAILED
from prefork.worker import main as worker_main
from prefork.worker.loop import loop_factory
from prefork.worker.main import Equipment

log = logging.getLogger("prefork")


def serve(app: Any, **settings: Any) -> None:
    """Serve *app* until told to stop; this process becomes the master.

    *app* is "module:attr" or the application itself; *settings* are those of
    `prefork serve`, spelt with underscores. Returns after a stop by TERM or INT, with
    signal handlers, current directory, environment and collector as they were.
    Raises ConfigError and its kin for what is wrong before the start, StartError in a
    running event loop or outside the main thread, and SystemExit with the exit code
    if the application cannot boot.
    """
    check_place()
    code = serve_command(Settings.load({"app": app, **settings}))
    if code:
        raise SystemExit(code)


def serve_command(settings: Settings, *, is_last_act: bool = False) -> int:
    """Run a master with *settings*; its exit code. Raises PreforkError for what is wrong before the first fork.

    With *is_last_act* the process ends next, and no late signal may change its exit code.
    """
    check_place()
    try:
        with alone(), signals_caught(is_last_act=is_last_act) as inbox, ExitStack() as leave:
            return _start(settings, the_cluster, inbox, leave)
    except Stopped as stopped:
        log.info("%s", stopped)
        return 0


def _start(settings: Settings, cluster: Cluster, inbox: SignalInbox, leave: ExitStack) -> int:
    """Make everything, run the master; *leave* takes back what was made."""
    directory = current_directory()
    identity = resolve(settings.user or None, settings.group or None)
    file_owner = (-1 if identity.uid is None else identity.uid, -1 if identity.gid is None else identity.gid)
    logs.configure(settings.log_level, settings.error_log, settings.log_format, owner=file_owner)
    access_log = AccessLog.open(settings.access_log, settings.log_format, owner=file_owner)
    if access_log is not None:
        leave.callback(access_log.close)
    tls = worker_main.load_tls(settings)
    loop_factory(settings.loop)  # refuses what is not installed
    listeners = _open_listeners(settings, leave)
    if settings.pidfile:
        pidfile = PidFile(settings.pidfile)
        pidfile.write()
        leave.callback(pidfile.remove)
    prepare_environment(settings, directory, leave)
    _announce(settings, [listener for _, listener in listeners])
    try:
        application = worker_main.load(settings) if settings.preload else None
    except LoadError as error:
        log.error("%s", _with_traceback(str(error), error))
        return LOAD_FAILED
    leave.callback(cluster.close)
    _call_hooks(settings.hooks, cluster)
    pick = _make_pick(settings)
    cluster.setup_master(
        uid=identity,
        sharing=settings.sharing,
        pick=pick,
        backlog=settings.backlog,
        graceful_timeout=settings.graceful_timeout,
    )
    for asked, listener in listeners:
        cluster.hold(asked, listener, pick)
    bind = tuple(str(asked) for asked, _ in listeners)
    equipment = Equipment(settings, bind, tls, application, access_log, is_alone=settings.worker_count == 1)
    cluster.keep(
        settings.worker_count,
        _be_worker,
        cluster,
        equipment,
        boot_timeout=settings.boot_timeout,
        ready=State.LISTENING,
    )
    if tls is not None:
        _renew_certificates(cluster, tls)
    _settle_memory(leave)
    return cluster.run(inbox)


def _make_pick(settings: Settings) -> Pick:
    pick = make_pick(settings.pick)
    if pick.needs_head and settings.certfile:
        raise ConfigError(
            f"pick {settings.pick!r} wants to see requests and certfile is set: the master cannot read what is encrypted"
        )
    return pick


def _be_worker(cluster: Cluster, equipment: Equipment) -> int:
    """In a worker: serve."""
    assert cluster.worker is not None
    return worker_main.serve(cluster.worker, equipment)


def _renew_certificates(cluster: Cluster, tls: TLS) -> None:
    """Workers may not read the files any more, so they are told what is in them; those to come inherit it."""
    cluster.call_later(RENEWAL_INTERVAL, lambda: _renew_certificates(cluster, tls))
    try:
        pem = tls.renew()
    except TLSError as error:
        log.error("the changed TLS files are not used, what they held before still is: %s", error)
        return
    if pem is not None:
        log.info("new connections get the renewed TLS certificates")
        for handle in cluster.workers.values():
            handle.tell({"type": "certificates", "pem": pem.to_message()})


# ---- before the start ----


def _open_listeners(settings: Settings, leave: ExitStack) -> list[tuple[Address, Listener]]:
    addresses = [parse_address(text) for text in settings.bind]
    listeners: list[tuple[Address, Listener]] = []
    for address in addresses:
        asked = absolute(address)
        if isinstance(address, UDPAddress):
            raise ConfigError(f"bind {address} is for datagrams, and HTTP needs connections")
        try:
            listener = Listener.open(
                address,
                sharing=Sharing(settings.sharing),
                slots=settings.worker_count,
                backlog=settings.backlog,
                unix_mode=settings.unix_mode,
                unix_owner=owner(settings.unix_owner) if settings.unix_owner else None,
            )
        except ListenError as error:
            if error.errno == errno.EADDRINUSE and isinstance(address, TCPAddress):
                raise _in_use(address, [ours for _, ours in listeners], error) from error
            raise
        leave.callback(listener.close)
        listeners.append((asked, listener))
    return listeners


def _in_use(address: TCPAddress, ours: list[Listener], error: ListenError) -> Exception:
    """Who has the port, or how to find out."""
    for listener in ours:
        if isinstance(listener.address, TCPAddress) and _overlap(address, listener.address):
            return ConfigError(f"bind names {address} and {listener.address}, which overlap: one of them is enough")
    hint = f"(to see which: ss -ltnp 'sport = :{address.port}'); choose another with --bind"
    refusal = ListenError(f"{error} {hint}")
    refusal.errno = error.errno
    return refusal


def _overlap(wanted: TCPAddress, bound: TCPAddress) -> bool:
    """Whether *bound* is what keeps *wanted* from being bound too. IPv4 and IPv6 do not stand in each other's way."""
    if wanted.port != bound.port or (":" in wanted.host) != (":" in bound.host):
        return False
    return wanted.host in (bound.host, "localhost") or bool({"0.0.0.0", "::"} & {wanted.host, bound.host})


def _announce(settings: Settings, listeners: list[Listener]) -> None:
    scheme = "https" if settings.certfile else "http"
    count = settings.worker_count
    log.info(
        "prefork %s (pid %d) starts %d worker%s, sharing %s",
        version(),
        os.getpid(),
        count,
        "" if count == 1 else "s",
        settings.sharing,
    )
    for listener in listeners:
        log.info("listening on %s", listener.address.url(scheme))


def version() -> str:
    """The installed distribution's; a source tree that was only put on the path has none."""
    try:
        return metadata.version("prefork")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _call_hooks(target: str, cluster: Cluster) -> None:
    """Let the function that *target* names register its listeners."""
    if not target:
        return
    try:
        name, function = worker_main.load_function(target)
    except LoadError as error:
        raise ConfigError(_with_traceback(f"hooks: {error}", error)) from error
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"hooks {name!r} is async, but must be a plain function: the master runs no event loop")
    if not callable(function):
        raise ConfigError(f"hooks {name!r} is of type {type(function).__name__}, but must be a function of the cluster")
    try:
        function(cluster)
    except Exception as error:
        # Without the frame of this function, and without any if it could not even be called.
        own = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        sentence = f"hooks {name!r} failed: {''.join(traceback.format_exception_only(own)).strip()}"
        lines = traceback.format_exception(own) if own.__traceback__ else []
        raise ConfigError("\n".join([sentence, *"".join(lines).splitlines()])) from error


def _with_traceback(sentence: str, error: LoadError) -> str:
    """*sentence*, and below it the application's own traceback if it was the application that failed."""
    return f"{sentence}\n{error.traceback.rstrip()}" if isinstance(error, ImportFailed) else sentence


def _settle_memory(leave: ExitStack) -> None:
    """Before the first fork: what exists now is shared with the workers, and the collector leaves it alone."""
    if threading.active_count() > 1:
        others = ", ".join(repr(t.name) for t in threading.enumerate() if t is not threading.main_thread())
        log.warning(
            "forking while other threads run (%s): a lock that one of them holds is never released in workers", others
        )
    gc.collect()
    if not gc.get_freeze_count():  # otherwise the caller froze something, which must stay so
        leave.callback(gc.unfreeze)
    gc.freeze()


__all__ = ["serve", "serve_command", "version"]
