"""How a child of the master becomes a worker: the target it runs, or the program that takes its place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefork.cluster.listeners import SharedListener
from prefork.cluster.setup import ClusterSettings
from prefork.errors import ClusterError, reason_of
from prefork.ipc.channel import Channel
from prefork.process.identity import Identity, resolve
from prefork.process.stdio import Stdio
from prefork.scoreboard import Scoreboard
from prefork.worker.main import Seat, Shared, Worker, run

# In the environment of a fresh interpreter; taken out as soon as it is read, so that what the worker
# starts does not take itself for one.
SEAT_VARIABLE = "PREFORK_WORKER"

# As shells have it: the program was not found, or cannot be run.
CANNOT_EXEC = 127


@dataclass(frozen=True, slots=True)
class Start:
    """What to start, decided before the fork."""

    settings: ClusterSettings
    target: Callable[..., Any] | None  # None: a fresh interpreter
    args: tuple[Any, ...]
    env: Mapping[str, str]
    stdio: Stdio


@dataclass(frozen=True, slots=True)
class Beginning:
    """A child, from the fork on."""

    start: Start
    seat: Seat
    channel: Channel
    board: Scoreboard
    become: Callable[[Worker], None]  # tells the program which worker it is from here on

    def run(self, inherited: Sequence[SharedListener]) -> int:
        """The exit code."""
        settings = self.start.settings
        self.start.stdio.assume()
        os.environ.update(self.start.env)
        if settings.cwd is not None:
            os.chdir(settings.cwd)
        if self.start.target is None:
            return self._exec()
        worker = Worker(self.seat, self.channel, self.board)
        for shared in inherited:
            listening = None if shared.is_handed_off else shared.listener.socket_for(self.seat.slot)
            worker.inherited[shared.key] = Shared(
                shared.index, shared.listener.address, shared.listener.sharing, listening
            )
        self.become(worker)
        return run(worker, _identity(settings), self.start.target, self.start.args)

    def _exec(self) -> int:
        """Become another program, with the line to the master and the scoreboard in its hands."""
        settings = self.start.settings
        for descriptor in (self.channel.fileno(), self.board.fileno()):
            os.set_inheritable(descriptor, True)
        os.environ[SEAT_VARIABLE] = self.seat.to_text(self.channel.fileno(), self.board.fileno())
        try:
            _identity(settings).assume()
            options = settings.exec_argv
            if options is None:  # as multiprocessing does for its own
                options = tuple(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined]
            os.execv(sys.executable, [sys.executable, *options, *program(settings)])
        except OSError as error:
            sys.stderr.write(f"worker {self.seat.id} cannot be started: {reason_of(error)}\n")
        return CANNOT_EXEC


def program(settings: ClusterSettings) -> list[str]:
    """What a fresh interpreter runs: the script of the settings, or the program that runs now, as Node does."""
    if settings.exec:
        return [settings.exec, *settings.args]
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:  # python -m
        name = spec.name.removesuffix(".__main__")
        return ["-m", name, *(settings.args or sys.argv[1:])]
    path = getattr(main, "__file__", None)
    if path is None:
        raise ClusterError("fork() needs a target here, or setup_master(exec=...): this program is no file")
    return [os.path.abspath(path), *(settings.args or sys.argv[1:])]


def _identity(settings: ClusterSettings) -> Identity:
    """Who the worker is to be."""
    if isinstance(settings.uid, Identity):
        return settings.uid
    user, group = (None if who is None else str(who) for who in (settings.uid, settings.gid))
    return resolve(user, group)
