"""The rig: servers by name, started on a free port of the loopback interface, and the load.

A `Launch` says how a server is started and how its log tells of a worker that comes.
`Rig` knows the environments that they are installed in and starts them; servers are
ended by their pid when their `with` ends, and what makes the load ends by itself.

prefork and its peers run on one interpreter, each in its own environment (see
`peers`), so that a difference is the servers' own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loadtest.peers import Environments, add_arguments
from loadtest.results import Sample, aligned, parse_wrk
from loadtest.scenarios import Scenario
from tests.harness.load import PREFORK
from tests.harness.server import Server

# From a server's start to its first answer, in seconds. Granian's four workers need about two.
START = 30.0

PACKAGES = ("prefork", "uvicorn", "gunicorn", "granian", "hypercorn")

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(__file__).resolve().parent / "scripts"


# Below the range from which Linux takes the ports of outgoing connections (ip_local_port_range),
# and begun anywhere in it, since two races may run at once.
PORTS = iter(range(random.randrange(15000, 25000), 32000))


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
    """The environments of prefork and of those of its peers that are installed."""

    def __init__(self, environments: Environments) -> None:
        self.environments = environments

    @classmethod
    def from_arguments(cls, parser: argparse.ArgumentParser) -> tuple[Rig, argparse.Namespace]:
        """The rig that the command line asks for, after it has said where and with what it runs."""
        add_arguments(parser)
        arguments = parser.parse_args()
        rig = cls(Environments.of(arguments.python, arguments.peers))
        settings = {name: value for name, value in vars(arguments).items() if name not in ("peers", "python")}
        print("machine:", machine())
        print("versions:", rig.versions(dict.fromkeys(PACKAGES)))
        print("settings:", ", ".join(f"{name} {value}" for name, value in settings.items() if value != ""))
        return rig, arguments

    def versions(self, packages: Iterable[str]) -> str:
        """CPython's and those of what is installed of *packages*, with what each leans on."""
        told = [f"CPython {self.environments.version}"]
        for package in packages:
            first, *others = [f"{name} {version}" for name, version in self.environments.versions(package).items()] or [
                ""
            ]
            told += [f"{first} ({', '.join(others)})" if others else first] if first else []
        return ", ".join(told)

    def installed(self, launches: Iterable[Launch]) -> list[Launch]:
        """Those of *launches* that can be started; says which can not."""
        chosen = []
        for launch in launches:
            if self.environments.has(launch.package):
                chosen.append(launch)
            else:
                print(f"left out: {launch.name}, which is not in {self.environments.home}: see loadtest.peers")
        return chosen

    @contextmanager
    def start(self, launch: Launch, *, workers: int = 1) -> Iterator[Running]:
        """*launch*, once it answers and *workers* workers have come."""
        port = free_port()
        python = str(self.environments.python(launch.package))
        command = [python, "-m", launch.package, *launch.arguments.format(port=port).split()]
        with Server(None, command=command) as server:
            server.wait_for(launch.arrival, workers, START)
            wait_until_answered(server, port)
            yield Running(launch, server, port)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that serves."""

    launch: Launch
    server: Server
    port: int


def wrk(url: str, scenario: Scenario, *, seconds: int, core: int) -> Sample:
    """What wrk sees from one thread on *core*. Raises ValueError if it is no result, or not one of 2xx answers."""
    command = ["taskset", "-c", str(core), "wrk", "-t1", f"-c{scenario.connections}", f"-d{seconds}s", "--latency"]
    command += [argument for header in scenario.headers for argument in ("-H", header)]
    name, *arguments = scenario.script or ("",)
    if name:
        command += ["-s", str(SCRIPTS / f"{name}.lua")]
    command += [url, "--", *arguments]
    output, busy = _timed(command, seconds)
    return parse_wrk(output, busy)


def own_client(port: int, scenario: Scenario, *, seconds: int, core: int) -> Sample:
    """What client.py sees on *core*, in megabytes a second for a download. Raises ValueError if the server fails."""
    command = ["taskset", "-c", str(core), sys.executable, "-m", "loadtest.client", scenario.tool, str(port)]
    command += [f"--seconds={seconds}", f"--connections={scenario.connections}"]
    if scenario.size:
        command += [f"--size={scenario.size}", f"--window={scenario.window}"]
    result = json.loads(_timed(command, seconds)[0])
    rate = result["count"] / result["seconds"]
    return Sample(rate / 1e6 if scenario.tool == "download" else rate, result["p99"], result["busy"])


def _timed(command: list[str], seconds: int) -> tuple[str, float]:
    """What *command* printed, and the share of its time in which it had a processor; it should take *seconds*."""
    start = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + START, check=False, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise ValueError((done.stderr or done.stdout).strip().rpartition("\n")[2])
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, used / (time.monotonic() - start)


def need_tools() -> None:
    """Raises SystemExit for a tool that is missing."""
    for tool, package in (("wrk", "wrk"), ("taskset", "util-linux"), ("openssl", "openssl")):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed: apt-get install {package}")


def two_cores() -> tuple[int, int]:
    """One for the server and one for the load."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed, one for the server and one for the load, and this process may use one")
    return cores[0], cores[1]


def machine() -> str:
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return (
        f"{os.cpu_count()} cores, {model[1] if model else platform.machine()}, Linux {platform.release()}, "
        f"load average {os.getloadavg()[0]:.2f} before we began"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print *rows* under *head*."""
    print("\n".join(aligned([head, *rows])))


def free_port() -> int:
    """A port that is free now, was not given before, and is none that a client's connection takes by itself."""
    for port in PORTS:
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise SystemExit("no free port is left on 127.0.0.1")


def wait_until_answered(server: Server, port: int, *, answer: bytes = b"HTTP/1.1 200 ", tls: bool = False) -> None:
    """Until a request is answered: some servers tell that a worker comes before it serves.

    Raises ServerSilent if it ends, or gives no such answer in time.
    """
    end = time.monotonic() + START
    while time.monotonic() < end and server.process.poll() is None:
        with suppress(OSError):
            if _ask(port, tls).startswith(answer):
                return
        server.log  # noqa: B018 - reads it, so that the server is not held up by a full pipe
        time.sleep(0.05)
    raise ServerSilent(server.log)


class ServerSilent(Exception):
    """A server does not answer; the argument is its log."""


def _ask(port: int, tls: bool) -> bytes:
    with socket.create_connection(("127.0.0.1", port), START) as plain:
        sock = plain
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            sock = context.wrap_socket(plain)
        with sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: rig\r\nConnection: close\r\n\r\n")
            first = sock.recv(100)
            while sock.recv(1 << 20):  # to the end, so that nothing of it is left to do when the race begins
                pass
            return first
