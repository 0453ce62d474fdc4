"""One worker on one core beside other servers on the same one: hello, uploads, downloads, WebSockets, TLS and so on.

Each server is pinned to one core and the load to another. For each scenario those
servers that can do it are started first, then measured in turn, one short round after
the other, so that whatever else the machine does hits all alike; the first round only
warms up. The figures are medians. Compare ratios, not numbers: each is the median of
the rounds' own ratios.

A server that is not installed (see `peers`), does not start or does not answer as it
should is left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

from loadtest.apps import CHUNK, CHUNKS, DOWNLOAD, HELLO, LARGE
from loadtest.charts import draw
from loadtest.field import FIELD, Entry, Order
from loadtest.peers import add_arguments
from loadtest.results import BUSY, STARVED, Sample, aligned, reference_of, rows, verdicts
from loadtest.rig import (
    Environments,
    Rig,
    ServerSilent,
    free_port,
    machine,
    need_tools,
    own_client,
    two_cores,
    wait_until_answered,
    wrk,
)
from loadtest.scenarios import SCENARIOS, Scenario
from tests.harness.server import Server, pids_in_group

JSON_BODY = b'{"text":"' + b"x" * 1013 + b'"}'

Results = dict[str, dict[str, list[Sample]]]


def main() -> int:
    arguments = parse()
    if arguments.replay:
        saved = json.loads(arguments.replay.read_text())
        about = saved["about"]
        results: Results = {
            scenario: {name: [Sample(**sample) for sample in samples] for name, samples in rounds.items()}
            for scenario, rounds in saved["results"].items()
        }
        tell_about(about)
        for scenario in (scenario for scenario in SCENARIOS if scenario.name in results):
            report(scenario, results[scenario.name])
    else:
        about, results = run(arguments)
    if arguments.bars:
        print("\nbars")
        print("\n".join(aligned(verdicts(results, {entry.name: entry.interface for entry in FIELD}))))
    if arguments.json:
        plain = {s: {n: [asdict(one) for one in samples] for n, samples in r.items()} for s, r in results.items()}
        arguments.json.write_text(json.dumps({"about": about, "results": plain}, indent=1) + "\n")
    if arguments.chart and results:
        draw(arguments.chart, results, {scenario.name: (scenario.title, scenario.unit) for scenario in SCENARIOS})
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.race", description=(__doc__ or "").split("\n")[0])
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument(
        "--scenario", action="append", choices=names, metavar="NAME", help=f"may be repeated: {', '.join(names)}"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="servers whose name has this; semicolons between several"
    )
    parser.add_argument("--rounds", type=int, default=7, help="after the one that warms up (default 7)")
    parser.add_argument("--seconds", type=int, default=1, help="of each measurement (default 1)")
    parser.add_argument("--bars", action="store_true", help="say which ratios prefork is to reach, and does")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to it")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the result as a PNG; needs the extra [charts]")
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="measure nothing, but tell what an earlier --json says"
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.seconds < 1:
        parser.error("--rounds and --seconds must be 1 or more")
    return arguments


def run(arguments: argparse.Namespace) -> tuple[dict[str, str], Results]:
    need_tools()
    cores = two_cores()
    rig = Rig(Environments.of(arguments.python, arguments.peers))
    wanted = [entry for entry in FIELD if any(text in entry.name for text in arguments.only.split(";"))]
    programs = find(wanted, rig.environments)
    about = describe(rig, programs, arguments, cores)
    tell_about(about)
    results: Results = {}
    with tempfile.TemporaryDirectory(prefix="race-") as name:
        room = Path(name)
        prepare(room)
        for scenario in SCENARIOS:
            if not arguments.scenario or scenario.name in arguments.scenario:
                track = Track(scenario, room, cores, arguments.seconds)
                rounds = track.race([entry for entry in wanted if entry.name in programs], programs, arguments.rounds)
                if rounds:
                    results[scenario.name] = rounds
                    report(scenario, rounds)
    return about, results


def find(wanted: Sequence[Entry], environments: Environments) -> dict[str, str]:
    """The program of each of *wanted* that is installed; says which are not."""
    programs = {}
    for entry in wanted:
        if program := entry.program(environments):
            programs[entry.name] = program
        else:
            print(f"left out: {entry.name}: {entry.package} is not installed")
    return programs


def describe(
    rig: Rig, programs: dict[str, str], arguments: argparse.Namespace, cores: tuple[int, int]
) -> dict[str, str]:
    packages = dict.fromkeys(entry.package for entry in FIELD if entry.name in programs)
    versions = [rig.versions(packages)]
    for package, flag in (("nginx", "-v"), ("node", "--version")):
        if package in packages:
            done = subprocess.run([programs[package], flag], capture_output=True, text=True, check=True, timeout=10)
            versions.append(f"{package} {(done.stdout or done.stderr).strip().rpartition('/')[2].lstrip('v')}")
    return {
        "machine": machine(),
        "versions": ", ".join(versions),
        "settings": f"rounds {arguments.rounds}, seconds {arguments.seconds}, one worker on core {cores[0]}, load on core "
        f"{cores[1]}, access log off",
    }


def tell_about(about: dict[str, str]) -> None:
    for name, text in about.items():
        print(f"{name}: {text}", flush=True)


def prepare(room: Path) -> None:
    """What servers are given: a large file, a small one, and a certificate."""
    file = room / "download"
    with file.open("wb") as out:
        for _ in range(DOWNLOAD // len(LARGE)):
            out.write(LARGE)
    (room / "download.large").write_bytes(LARGE)
    os.environ["RACE_FILE"] = str(file)
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-keyout", room / "key.pem", "-out", room / "certificate.pem"],
        check=True,
        capture_output=True,
        timeout=30,
    )


@dataclass(frozen=True, slots=True)
class Runner:
    """A server that runs."""

    entry: Entry
    server: Server
    port: int
    log: Path


class Track:
    """One scenario, from the start of its servers to their end."""

    def __init__(self, scenario: Scenario, room: Path, cores: tuple[int, int], seconds: int) -> None:
        self._scenario = scenario
        self._room = room
        self._server_core, self._load_core = cores
        self._seconds = seconds

    def race(self, entries: Sequence[Entry], programs: dict[str, str], rounds: int) -> dict[str, list[Sample]]:
        """The samples of each server that came through all *rounds*."""
        scenario = self._scenario
        with ExitStack() as leave:
            field = [
                leave.enter_context(self._started(entry, programs[entry.name]))
                for entry in entries
                if (entry.name in scenario.only if scenario.only else scenario.app in entry.apps)
                and entry.name not in scenario.without
            ]
            field = [runner for runner in field if self._answers(runner)]
            if scenario.tool != "websocket":  # whose client looks at every byte
                field = [runner for runner in field if self._does_the_work(runner)]
            samples: dict[str, list[Sample]] = {runner.entry.name: [] for runner in field}
            for number in range(rounds + 1):
                # Back and forth, so that nobody always comes after the same neighbour.
                for runner in field if number % 2 else field[::-1]:
                    if runner.entry.name in samples and not self._measure(runner, samples, is_warm_up=not number):
                        del samples[runner.entry.name]
        return samples

    @contextmanager
    def _started(self, entry: Entry, program: str) -> Iterator[Runner]:
        port = free_port()
        room = Path(tempfile.mkdtemp(prefix=f"{self._scenario.name}-", dir=self._room))
        certificate = (self._room / "certificate.pem", self._room / "key.pem") if self._scenario.tls else None
        command = entry.command(program, Order(self._scenario.app, port, room, certificate))
        # What it says goes to a file: a pipe is full after a thousand lines that nobody reads in the midst of a round,
        # and then the server stands still. Some write a line for each piece of a download that a client has left.
        line = [
            "sh",
            "-c",
            'exec "$@" >"$0" 2>&1',
            str(room / "log"),
            "taskset",
            "-c",
            str(self._server_core),
            *command,
        ]
        try:
            with Server(None, command=line) as server:
                yield Runner(entry, server, port, room / "log")
        except AssertionError as exc:  # it left processes behind, which are gone now
            print(f"{entry.name}: {str(exc).partition(chr(10))[0]}")
        shutil.rmtree(room)  # an access log is large

    def _answers(self, runner: Runner) -> bool:
        # What answers WebSockets may have no other answer to a plain request than a refusal.
        answer = b"HTTP/1.1 " if self._scenario.app == "websocket" else b"HTTP/1.1 200 "
        try:
            wait_until_answered(runner.server, runner.port, answer=answer, tls=self._scenario.tls)
        except ServerSilent:
            lines = [line for line in runner.log.read_text(errors="replace").splitlines() if line.strip()] or [
                "no answer"
            ]
            print(f"left out: {runner.entry.name} in {self._scenario.name}: {lines[-1]}", flush=True)
            return False
        return True

    def _does_the_work(self, runner: Runner) -> bool:
        """Whether its answer is the whole one: what leaves out a part of the work is not faster. wrk does not look."""
        try:
            status, body = fetch(runner.port, self._scenario)
        except (OSError, HTTPException) as exc:
            status, body = 0, repr(exc).encode()
        right = status == 200 and body == expected(self._scenario)
        if not right:
            print(f"left out: {runner.entry.name} in {self._scenario.name}: {status}, {len(body)} bytes: {body[:60]!r}")
        return right

    def _measure(self, runner: Runner, samples: dict[str, list[Sample]], *, is_warm_up: bool) -> bool:
        """Whether it went well."""
        scenario = self._scenario
        before, start = processor_time(runner.server.group), time.monotonic()
        try:
            if scenario.tool == "wrk":
                url = f"{'https' if scenario.tls else 'http'}://127.0.0.1:{runner.port}/"
                sample = wrk(url, scenario, seconds=self._seconds, core=self._load_core)
            else:
                sample = own_client(runner.port, scenario, seconds=self._seconds, core=self._load_core)
        except (ValueError, subprocess.TimeoutExpired) as exc:
            print(f"left out: {runner.entry.name} in {scenario.name}: {exc}", flush=True)
            return False
        elapsed = time.monotonic() - start
        if not is_warm_up:
            used = processor_time(runner.server.group) - before
            samples[runner.entry.name].append(replace(sample, server=used / elapsed))
        return True


def processor_time(group: int) -> float:
    """Seconds of processor time that the processes of *group* have had, in steps of a hundredth."""
    ticks = 0
    for pid in pids_in_group(group):
        with suppress(OSError):  # it ended while we looked
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def fetch(port: int, scenario: Scenario) -> tuple[int, bytes]:
    """The status and the body of one answer."""
    if scenario.tls:
        connection = HTTPSConnection("127.0.0.1", port, timeout=30, context=ssl._create_unverified_context())
    else:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
    sends = {"echo": JSON_BODY, "upload": LARGE * 16}.get(scenario.app)
    with closing(connection):
        connection.request("POST" if sends else "GET", "/", sends, {"Connection": "close"})
        response = connection.getresponse()
        return response.status, response.read()


def expected(scenario: Scenario) -> bytes:
    """The body of a right answer to `fetch`."""
    return {
        "hello": lambda: HELLO,
        "echo": lambda: JSON_BODY,
        "large": lambda: LARGE,
        "upload": lambda: str(16 * len(LARGE)).encode(),
        "download": lambda: LARGE * (DOWNLOAD // len(LARGE)),
        "file": lambda: LARGE * (DOWNLOAD // len(LARGE)),
        "chunks": lambda: CHUNK * CHUNKS,
    }[scenario.app]()


def report(scenario: Scenario, rounds: dict[str, list[Sample]]) -> None:
    table = rows(rounds, scenario.unit)
    print(f"\n{scenario.name}: {scenario.title}, {scenario.connections} connections, ratio to {reference_of(rounds)}")
    print("\n".join(aligned(table)), flush=True)
    if any(row[-1].endswith("*") for row in table):
        print(f"*: the load was busy for more than {BUSY:.0%} of the time, so the server may be faster than that")
    if any("?" in row[-2] for row in table):
        print(f"?: the server had its core for less than {STARVED:.0%} of the time: others ran there, or it waited")
    for name, samples in rounds.items():
        if notes := [sample.note for sample in samples if sample.note]:
            print(f"{name}: in {len(notes)} of {len(samples)} rounds errors as: {notes[-1]}")


if __name__ == "__main__":
    sys.exit(main())
