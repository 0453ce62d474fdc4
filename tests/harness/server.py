"""A real master in a process of its own, and what a test needs to know of it.

    with Server("tests.apps.plain:app", workers=2) as server:
        first = server.worker(1)              # its pid, once it listens
        os.kill(first, signal.SIGKILL)
        server.wait_for(r"worker 3 .* is listening")

Nothing sleeps: a test waits for lines of the error log, each with a deadline. On
failure the whole log is in the assertion.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[2]

# Long enough for two busy cores; a test that passes never waits it out.
DEADLINE = 20.0  # seconds


class Server:
    """`prefork serve` with *settings* as flags: workers=2 is --workers 2, preload=True is --preload."""

    stdin = subprocess.DEVNULL

    def __init__(
        self,
        app: str | None,
        *,
        command: list[str] | None = None,
        environ: dict[str, str] | None = None,
        cwd: Path | str = ROOT,
        bind: str | list[str] = "127.0.0.1:0",
        **settings: object,
    ) -> None:
        self._command = command or [sys.executable, "-m", "prefork", "serve", str(app), *_flags(bind=bind, **settings)]
        self._environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environ or {})}
        self._cwd = cwd
        self._text = ""
        self._read = 0
        self.returncode: int | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command,
            cwd=self._cwd,
            env=self._environ,
            stdin=self.stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that whatever it leaves behind can be found, and a Ctrl-C sent to all
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def __exit__(self, *_: object) -> None:
        """End it however it is, and prove that it left no process behind."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.returncode = self.process.returncode
        assert self.process.stdout is not None
        leftovers = wait_until_empty(self.group)
        for pid in leftovers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._drain()
        self.process.stdout.close()
        assert not leftovers, f"processes {leftovers} were left behind\n{self._text}"

    # ---- what it says ----

    @property
    def log(self) -> str:
        """Everything it has written so far."""
        self._drain()
        return self._text

    def wait_for(self, pattern: str, count: int = 1, deadline: float = DEADLINE) -> re.Match[str]:
        """The *count*-th match of *pattern* in the log, as soon as it is there."""
        end = time.monotonic() + deadline
        while True:
            self._drain()
            matches = list(re.finditer(pattern, self._text, re.MULTILINE))
            if len(matches) >= count:
                return matches[count - 1]
            left = end - time.monotonic()
            ended = self.process.poll() is not None
            if left <= 0 or ended:
                self._drain()
                matches = list(re.finditer(pattern, self._text, re.MULTILINE))
                if len(matches) >= count:
                    return matches[count - 1]
                why = f"it ended with {self.process.returncode}" if ended else f"not within {deadline:g} s"
                raise AssertionError(f"no match {count} of {pattern!r}: {why}\n{self._text}")
            select.select([self.process.stdout], [], [], min(left, 0.5))

    def wait_ready(self, workers: int) -> None:
        """Until *workers* workers have begun to listen."""
        self.wait_for(r"is listening, ", workers)

    def wait_exit(self, deadline: float = DEADLINE) -> int:
        """Its exit code, once it has ended."""
        end = time.monotonic() + deadline
        while self.process.poll() is None:
            if time.monotonic() > end:
                raise AssertionError(f"the master is still there after {deadline:g} s\n{self.log}")
            # A full pipe would keep it from ending.
            select.select([self.process.stdout], [], [], 0.05)
            self._drain()
        self._drain()
        return self.process.returncode

    # ---- where it is ----

    @property
    def port(self) -> int:
        """The (first) TCP port it listens on."""
        return int(self.wait_for(r"listening on https?://\S+?:(\d+)$")[1])

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def group(self) -> int:
        """The process group that the master leads and its workers belong to."""
        return self.process.pid

    def worker(self, number: int) -> int:
        """The pid of worker *number*, once it listens."""
        return int(self.wait_for(rf"worker {number} \(pid (\d+), generation \d+\) is listening")[1])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def _drain(self) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.closed:
            return
        while chunk := _read(self.process.stdout.fileno()):
            self._text += chunk.decode("utf-8", "replace")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return b""


def _flags(**settings: object) -> Iterator[str]:
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        for item in value if isinstance(value, list) else [value]:
            if item is True:
                yield flag
            elif item not in (None, False):
                yield from (flag, str(item))


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat (proc_pid_stat(5)) from the third, the state, on: a name before it may be anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def resident_memory(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pids_in_group(group: int) -> list[int]:
    """Processes of a process group that have not ended (zombies have)."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError, IndexError):  # it ended while we looked
                fields = stat(int(entry))
                if int(fields[2]) == group and fields[0] != "Z":
                    found.append(int(entry))
    return found


def wait_until_empty(group: int, deadline: float = DEADLINE) -> list[int]:
    """What is left of *group* at the deadline; empty as soon as nothing is."""
    end = time.monotonic() + deadline
    while True:
        left = pids_in_group(group)
        if not left or time.monotonic() > end:
            return left
        wait_for_exit(left[0], end - time.monotonic())


def wait_for_exit(pid: int, deadline: float = DEADLINE) -> bool:
    """Whether the process *pid* (of whomever) ended within *deadline* seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline) * 1000))
    finally:
        os.close(descriptor)


def suspend(pid: int) -> None:
    """SIGSTOP, and wait until it has come into effect: *pid* takes nothing more, until it is continued or killed."""
    os.kill(pid, signal.SIGSTOP)
    while stat(pid)[0] != "T":
        os.sched_yield()


@contextmanager
def halted(pid: int) -> Iterator[None]:
    """*pid* does not run inside: SIGSTOP before, SIGCONT after."""
    suspend(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """The master does not run inside."""
    with halted(server.pid):
        yield
