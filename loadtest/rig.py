"""The rig: servers by name, started on a free port of the loopback interface, and wrk.

A `Launch` says how a server is started and how its log tells of a worker that comes.
`Rig` knows the environment that they are installed in and starts them; servers are
ended by their pid when their `with` ends, and wrk ends by itself.

prefork and its peers run on one interpreter, that of the environment given by
`--peers`, so that a difference is the servers' own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness.load import PREFORK
from tests.harness.server import Server

# From a server's start to its first answer, in seconds. Granian's four workers need about two.
START = 30.0

PACKAGES = ("prefork", "uvicorn", "gunicorn", "granian", "hypercorn", "h11", "httptools", "uvloop")


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a server."""

    name: str
    package: str
    arguments: str  # of `python -m package`; {port} is filled in
    arrival: str  # the log line of a worker that comes, with its pid in the group `pid`


def prefork(name: str, app: str, workers: int, more: str = "") -> Launch:
    arguments = f"serve loadtest.apps:{app} --bind 127.0.0.1:{{port}} --workers {workers} {more}"
    return Launch(name, "prefork", arguments, PREFORK)


def uvicorn(name: str, app: str, workers: int, more: str = "") -> Launch:
    # `--workers 1` is no supervisor and one process, which is its best case.
    arguments = f"loadtest.apps:{app} --port {{port}} --workers {workers} --no-access-log {more}"
    return Launch(name, "uvicorn", arguments, r"Started server process \[(?P<pid>\d+)\]")


def gunicorn(name: str, app: str, workers: int, more: str = "") -> Launch:
    arguments = f"loadtest.apps:{app} --bind 127.0.0.1:{{port}} --workers {workers} --no-control-socket {more}"
    # Only its ASGI worker says when it listens; the others say that they boot.
    line = r"\[(?P<pid>\d+)\] \[INFO\] " + ("ASGI server listening" if "asgi" in more else "Booting worker")
    return Launch(name, "gunicorn", arguments, line)


def granian(name: str, app: str, workers: int, more: str = "") -> Launch:
    arguments = f"loadtest.apps:{app} --port {{port}} --workers {workers} {more}"
    return Launch(name, "granian", arguments, r"Spawning worker-\d+ with PID: (?P<pid>\d+)")


def hypercorn(name: str, app: str, workers: int, more: str = "") -> Launch:
    arguments = f"loadtest.apps:{app} --bind 127.0.0.1:{{port}} --workers {workers} {more}"
    return Launch(name, "hypercorn", arguments, r"\[(?P<pid>\d+)\] \[INFO\] Running on ")


class Rig:
    """One environment with prefork and those of its peers that are installed in it."""

    def __init__(self, environment: Path | None) -> None:
        """*environment* is a virtual environment's directory; without one, our own interpreter's."""
        self._python = str(environment / "bin" / "python") if environment else sys.executable
        self.versions = self._ask_versions()

    @classmethod
    def from_arguments(cls, parser: argparse.ArgumentParser) -> tuple[Rig, argparse.Namespace]:
        """The rig that the command line asks for, after it has said where and with what it runs."""
        parser.add_argument("--peers", type=Path, metavar="DIR", help="virtual environment with prefork and its peers")
        arguments = parser.parse_args()
        rig = cls(arguments.peers)
        settings = {name: value for name, value in vars(arguments).items() if name != "peers"}
        rig._announce(settings)
        return rig, arguments

    def installed(self, launches: Iterable[Launch]) -> list[Launch]:
        """Those of *launches* that can be started; says which can not."""
        chosen = []
        for launch in launches:
            if launch.package in self.versions:
                chosen.append(launch)
            else:
                print(f"left out: {launch.name}, which is not installed for {self._python}")
        return chosen

    @contextmanager
    def start(self, launch: Launch, *, workers: int = 1, core: int | None = None) -> Iterator[Running]:
        """*launch*, once it answers and *workers* workers have come; on *core* only, if given."""
        port = _free_port()
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        command = [*pinned, self._python, "-m", launch.package, *launch.arguments.format(port=port).split()]
        with Server(None, command=command) as server:
            server.wait_for(launch.arrival, workers, START)
            _wait_until_answered(server, port)
            yield Running(launch, server, port)

    def _ask_versions(self) -> dict[str, str]:
        program = (
            "import json, sys\nfrom importlib import metadata\nfound = {}\n"
            f"for name in {PACKAGES!r}:\n"
            "    try: found[name] = metadata.version(name)\n"
            "    except metadata.PackageNotFoundError: pass\n"
            "print(json.dumps([sys.version.split()[0], found]))"
        )
        answer = subprocess.run(
            [self._python, "-c", program], capture_output=True, text=True, check=True, timeout=START
        )
        self._python_version, versions = json.loads(answer.stdout)
        return versions

    def _announce(self, settings: dict[str, object]) -> None:
        model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        load = os.getloadavg()[0]
        print(
            f"machine: {os.cpu_count()} cores, {model[1] if model else platform.machine()}, Linux {platform.release()}, "
            f"load average {load:.2f} before we began"
        )
        print("versions:", ", ".join(f"{k} {v}" for k, v in {"CPython": self._python_version, **self.versions}.items()))
        print("settings:", ", ".join(f"{name} {value}" for name, value in settings.items() if value != ""))


@dataclass(frozen=True, slots=True)
class Running:
    """A server that serves."""

    launch: Launch
    server: Server
    port: int


def wrk(port: int, *, seconds: int, connections: int, core: int, headers: Sequence[str] = ()) -> float:
    """Requests a second that wrk sees from one thread on *core*. Raises SystemExit if an answer was not a 2xx."""
    command = ["taskset", "-c", str(core), "wrk", "-t1", f"-c{connections}", f"-d{seconds}s"]
    command += [argument for header in headers for argument in ("-H", header)]
    command.append(f"http://127.0.0.1:{port}/")
    for tool, package in (("wrk", "wrk"), ("taskset", "util-linux")):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed: apt-get install {package}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + START, check=True)
    if "Non-2xx" in done.stdout:
        raise SystemExit(f"the server does not answer as it should\n{done.stdout}")
    if errors := re.search(r"Socket errors:.*", done.stdout):
        print(f"port {port}: {errors[0]}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    assert rate, done.stdout
    return float(rate[1])


def two_cores() -> tuple[int, int]:
    """One for the server and one for wrk."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed, one for the server and one for wrk, and this process may use one")
    return cores[0], cores[1]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print *rows* under *head*, the first column to the left and the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        first, *others = line
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]))


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait_until_answered(server: Server, port: int) -> None:
    """Some servers tell that a worker comes before it serves."""
    end = time.monotonic() + START
    while time.monotonic() < end and server.process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), START) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: rig\r\nConnection: close\r\n\r\n")
                if sock.recv(100).startswith(b"HTTP/1.1 200 "):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"the server on port {port} does not answer\n{server.log}")
