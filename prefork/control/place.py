"""Where a master is started: the process around it, and how it is left as it was found.

The caller may be a program with signal handlers, a directory and an environment of its own.
Everything that the start changes is undone when the master ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from asyncio import events
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from prefork.cluster.api import the_cluster
from prefork.cluster.master import CAUGHT
from prefork.config import Settings
from prefork.errors import ConfigError, StartError, reason_of
from prefork.process.signals import SignalInbox


class Stopped(BaseException):
    """A signal to stop came before the master was there to handle it.

    Not a SystemExit, which an application may raise itself while it is imported.
    """


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

# Held while this process is a master.
_running = threading.Lock()


def check_place() -> None:
    """Raises StartError where a master cannot be: in a worker, in a thread, in an event loop, on another system."""
    if not hasattr(os, "pidfd_open"):
        raise StartError(f"prefork runs on Linux 5.3 or later: it needs pidfd_open(2), which {sys.platform} lacks")
    if the_cluster.is_worker:
        raise StartError("serve() was called in a worker: put it under `if __name__ == '__main__':`")
    if threading.current_thread() is not threading.main_thread():
        name = threading.current_thread().name
        raise StartError(f"serve() was called in thread {name!r}, but only the main thread gets signals: call it there")
    if events._get_running_loop() is not None:
        raise StartError(
            "serve() was called inside a running event loop, which every fork would copy: "
            "call it from plain code, not from a coroutine"
        )


@contextmanager
def alone() -> Iterator[None]:
    """Signals, the error log and the cluster belong to one master at a time."""
    if not _running.acquire(blocking=False):
        raise StartError("serve() was called while this process serves already: call it again after it has returned")
    try:
        yield
    finally:
        _running.release()


@contextmanager
def signals_caught(*, is_last_act: bool) -> Iterator[SignalInbox]:
    """From before the first thing is made until the last is taken back, no signal has its default action.

    Until the master reads the inbox, those that stop interrupt the start; the others
    wait. With *is_last_act* the process is about to exit, and ignores them afterwards.
    """

    def interrupt(number: signal.Signals) -> None:
        if number in STOPPING:
            raise Stopped(f"stopped by {number.name} before anything was started")

    inbox = SignalInbox(CAUGHT)
    inbox.open()
    inbox.on_caught = interrupt
    try:
        yield inbox
    finally:
        inbox.on_caught = None
        inbox.close(is_last_act=is_last_act)


def current_directory() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        raise StartError("the current directory does not exist any more: change to one that does") from error


def prepare_environment(settings: Settings, directory: str, leave: ExitStack) -> None:
    """Where the application finds its modules, files and variables; *directory* is where we are."""
    if settings.chdir:
        directory = _change_directory(settings.chdir, directory, leave)
    for assignment in settings.env:
        name, _, value = assignment.partition("=")
        leave.callback(_set_variable, name, os.environ.get(name))
        os.environ[name] = value
    for entry in map(os.path.abspath, (*reversed(settings.pythonpath), directory)):
        sys.path.insert(0, entry)
        leave.callback(_forget_path, entry)


def _change_directory(target: str, before: str, leave: ExitStack) -> str:
    try:
        os.chdir(target)
    except OSError as error:
        raise ConfigError(f"chdir {target!r} is not possible: {reason_of(error)}") from error
    leave.callback(_return_to, before)
    return os.getcwd()


def _return_to(directory: str) -> None:
    with suppress(OSError):  # removed meanwhile: then here is as good as anywhere
        os.chdir(directory)


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _forget_path(entry: str) -> None:
    with suppress(ValueError):  # the application took it out
        sys.path.remove(entry)
