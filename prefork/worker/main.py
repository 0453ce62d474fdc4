"""A worker's life, whatever it does: begin, call what it is for, flush, leave.

`run` is called in a freshly forked child and returns its exit code; `join` does the same for a
fresh interpreter that was started to be a worker. "online" is said before any code of the program
runs in it.

A worker does not outlive its master: the line's end tells it, and one that cannot notice is
ended by the kernel soon after.
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from prefork.errors import ChannelClosed, reason_of
from prefork.ipc.channel import Channel
from prefork.process.identity import Identity, end_with_parent
from prefork.process.status import BOOT_FAILED
from prefork.scoreboard import Scoreboard
from prefork.worker.link import Seat, Shared, Worker
from prefork.worker.loop import loop_factory
from prefork.worker.serving import BootFailed, Equipment, listen, load, load_function, load_tls, serve

# A terminal, or nohup's absence, sends these to the whole group; what they mean is for the master
# to say.
FOR_THE_MASTER = (
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)

# Last words are small and the channel is empty at boot: they leave at once or never.
LAST_WORDS_TIMEOUT = 1.0


def run(worker: Worker, identity: Identity, target: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Be *worker*: call *target*, and go on while it listens for messages. The exit code."""
    try:
        if not _begin(worker, identity):
            return 0
        code = _call(worker, target, args)
        if worker.is_awaited and worker.is_connected():
            worker.run()
        return code
    except ChannelClosed:
        if worker.is_connected():
            raise  # some other channel, of the program's
        return 0  # the master is gone, and with it everybody who could ask for something
    except BootFailed as failed:
        _say_last_words(worker, failed)
        return failed.code
    finally:
        worker.finish()


def join(text: str) -> Worker:
    """In an interpreter that was started to be a worker: take the seat that *text* describes."""
    seat, channel, board = Seat.from_text(text)
    for descriptor in (channel, board):
        os.set_inheritable(descriptor, False)  # it was, to get here; nobody else is to have it
    line = Channel(socket.socket(fileno=channel), serialization=seat.serialization, max_size=seat.max_message)
    worker = Worker(seat, line, Scoreboard.attach(board))
    if not _begin(worker, Identity()):
        os._exit(0)
    return worker


def _begin(worker: Worker, identity: Identity) -> bool:
    """False if the master is gone already."""
    # Not SIG_IGN, which programs that it starts would inherit.
    for number in FOR_THE_MASTER:
        signal.signal(number, lambda *_: None)
    # The stacks of all threads on SIGSEGV, SIGABRT and their like. By its number: a program that embeds us
    # may have put something without a descriptor in sys.stderr's place.
    faulthandler.enable(file=2)
    worker.tell({"type": "online"})
    try:
        identity.assume()
    except OSError as error:
        raise BootFailed(f"cannot become {identity.describe()}: {reason_of(error)}", "", BOOT_FAILED) from error
    return end_with_parent(worker.master)


def _call(worker: Worker, target: Callable[..., Any], args: tuple[Any, ...]) -> int:
    if inspect.iscoroutinefunction(target):
        returned = _run_in_loop(worker, target, args)
    else:
        returned = target(*args)
    return returned if isinstance(returned, int) and not isinstance(returned, bool) else 0


def _run_in_loop(worker: Worker, target: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    loop = loop_factory("auto")()
    asyncio.set_event_loop(loop)
    worker.attach(loop)
    # Until it is heard, TERM is the default's: a program may handle it as it likes.
    loop.add_signal_handler(signal.SIGTERM, worker.disconnect)
    try:
        return loop.run_until_complete(target(*args))
    finally:
        with suppress(RuntimeError):  # a thread may still hold an async generator
            loop.run_until_complete(loop.shutdown_asyncgens())


def _say_last_words(worker: Worker, failed: BootFailed) -> None:
    worker.tell({"type": "failed", "sentence": str(failed), "traceback": failed.traceback, "code": failed.code})
    worker.finish(LAST_WORDS_TIMEOUT)


__all__ = [
    "Equipment",
    "Seat",
    "Shared",
    "Worker",
    "join",
    "listen",
    "load",
    "load_function",
    "load_tls",
    "run",
    "serve",
]
