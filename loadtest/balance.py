"""How evenly is work spread over the workers, and who waits because it is not?

Five scenarios, each with a bar, beside uvicorn, gunicorn, granian and Node's cluster:

    place   64 connections to 4 workers, in one burst and one every 3 ms: how many the fullest gets
    burst   100 requests at once, each blocks its worker for 10 ms, 8 workers: how even, and how late the last
    kept    64 kept-alive connections to 8 workers, mixed requests: who serves how many
    mixed   new connections at 60 % of what 8 workers can do, 95 % block for 5 ms, 5 % for 100: how late the short are
    new     new connections a second, each with one request, from wrk

In each round all servers of a scenario are measured in turn; figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median

from loadtest.rig import (
    ROOT,
    START,
    Launch,
    Rig,
    Running,
    free_port,
    granian,
    gunicorn,
    need_tools,
    prefork,
    table,
    two_cores,
    uvicorn,
    wait_until_answered,
    wrk,
)
from loadtest.scenarios import Scenario
from tests.harness.server import Server, pids_in_group

PLACED, PLACE_WORKERS = 64, 4
PACE = 0.003  # seconds between two connections

AT_ONCE, BURSTS, BLOCK, WORKERS = 100, 4, 10, 8
IDEAL = AT_ONCE / WORKERS * BLOCK / 1000  # seconds until the last of a burst could be answered

# 60 % of what eight workers can do, with 9.75 ms for a request on average.
RATE = 490

# Between two loads, in seconds: connections that have ended are cleaned up.
SETTLE = 0.15

PATIENCE = 10.0  # seconds for an answer
REQUEST = b"GET / HTTP/1.1\r\nHost: balance\r\n\r\n"

GATE, PLAIN, HANDOFF = "prefork", "prefork, no gate", "prefork, handoff"


@dataclass(frozen=True, slots=True)
class Kind:
    """A scenario: what is started, and what a round says of one server, by the names of its columns."""

    name: str
    workers: int
    launches: list[Launch]
    has_node: bool
    measure: Callable[[int, int], dict[str, float]]  # of the port and the round
    columns: tuple[str, ...]
    # All on one core, wrk on the other. Else the servers differ in whose core the load takes: without the gate most
    # connections go to one worker, which wrk leaves alone.
    is_pinned: bool = False


def ours(workers: int, app: str = "work", *, handoff: bool = True) -> list[Launch]:
    launches = [prefork(GATE, app, workers), prefork(PLAIN, app, workers, "--no-accept-gate")]
    return [*launches, prefork(HANDOFF, app, workers, "--sharing handoff")] if handoff else launches


def peers(workers: int) -> list[Launch]:
    return [
        uvicorn("uvicorn", "work", workers),
        gunicorn("gunicorn asgi", "work", workers, "-k asgi"),
        granian("granian asgi", "work", workers, "--interface asgi"),
    ]


# ---- the measures ----


def place(port: int, _round: int) -> dict[str, float]:
    found = {}
    for name, pace in (("burst", 0.0), ("paced", PACE)):
        with ExitStack() as leave:
            clients = []
            for _ in range(PLACED):
                client = leave.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
                client.sendall(REQUEST)
                clients.append(client)
                time.sleep(pace)
            shares = Counter(map(pid_of_answer, clients))
        found[name] = max(shares.values()) / (PLACED / PLACE_WORKERS)
        time.sleep(SETTLE)
    return found


def pid_of_answer(client: socket.socket) -> bytes:
    received = b""
    # A pid is the whole body. It may come in a packet of its own, but never in two.
    while not received.partition(b"\r\n\r\n")[2]:
        data = client.recv(4096)
        if not data:
            raise SystemExit(f"a connection ended after {received!r}")
        received += data
    return received.partition(b"\r\n\r\n")[2]


def burst(port: int, _round: int) -> dict[str, float]:
    shares: Counter[str] = Counter()
    p99 = []
    for _ in range(BURSTS):
        result = arrivals("burst", port, f"--connections={AT_ONCE}", f"--block={BLOCK}")
        shares.update(result["answers"])
        p99.append(result["p99"])
    mean = AT_ONCE * BURSTS / WORKERS
    counts = [*shares.values(), *[0] * (WORKERS - len(shares))]
    return {"fullest": max(counts) / mean, "idlest": min(counts) / mean, "p99/ideal": median(p99) / IDEAL}


def kept(port: int, number: int) -> dict[str, float]:
    result = arrivals("kept", port, "--connections=64", f"--rate={RATE}", "--seconds=2", f"--seed={number}")
    counts = list(result["answers"].values())
    counts += [0] * (WORKERS - len(counts))
    return {"busiest/idlest": max(counts) / max(1, min(counts)), "p99 ms": result["p99"] * 1000}


def mixed(port: int, number: int) -> dict[str, float]:
    result = arrivals("mixed", port, f"--rate={RATE}", "--seconds=2.5", f"--seed={number}")
    return {"short p99 ms": result["short_p99"] * 1000, "p50 ms": result["p50"] * 1000}


def new(port: int, _round: int) -> dict[str, float]:
    scenario = Scenario("new", "", "", headers=("Connection: close",))
    return {"connections/s": wrk(f"http://127.0.0.1:{port}/", scenario, seconds=1, core=two_cores()[1]).rate}


def arrivals(kind: str, port: int, *more: str) -> dict:
    time.sleep(SETTLE)
    command = [sys.executable, "-m", "loadtest.arrivals", kind, str(port), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout)


KINDS = [
    Kind("place", PLACE_WORKERS, [*ours(4), *peers(4)], True, place, ("burst", "paced")),
    Kind("burst", WORKERS, [*ours(8), *peers(8)], True, burst, ("fullest", "idlest", "p99/ideal")),
    Kind("kept", WORKERS, [*ours(8), *peers(8)], True, kept, ("busiest/idlest", "p99 ms")),
    Kind("mixed", WORKERS, [*ours(8), *peers(8)], True, mixed, ("short p99 ms", "p50 ms")),
    Kind("new", 4, ours(4), False, new, ("connections/s",), is_pinned=True),
]

Rows = list[dict[str, float]]  # what the rounds say of one server
Figures = dict[str, dict[str, float]]  # by server and column


def ratio_of(mine: Rows, theirs: Rows) -> float:
    """Round by round, since the machine may do something else in between."""
    return median(a["connections/s"] / b["connections/s"] for a, b in zip(mine, theirs, strict=True))


def verdicts(kind: str, figures: Figures, rounds: dict[str, Rows]) -> Iterator[tuple[str, float, str, float, bool]]:
    """What the bar is about, its figure, and what it has to be."""
    own = figures[GATE]
    others = {name: row for name, row in figures.items() if not name.startswith("prefork")}
    if kind == "place":
        for column in ("burst", "paced"):
            yield f"fullest to mean, {column}", own[column], "at most", 1.15, own[column] <= 1.15
    elif kind == "burst":
        yield "fullest to mean", own["fullest"], "at most", 1.1, own["fullest"] <= 1.1
        yield "idlest to mean", own["idlest"], "at least", 0.9, own["idlest"] >= 0.9
        yield "p99 to ideal", own["p99/ideal"], "at most", 1.4, own["p99/ideal"] <= 1.4
    elif kind == "kept":
        yield "busiest to idlest", own["busiest/idlest"], "at most", 1.5, own["busiest/idlest"] <= 1.5
    elif kind == "mixed" and others:
        name = min(others, key=lambda name: others[name]["short p99 ms"])
        ratio = own["short p99 ms"] / others[name]["short p99 ms"]
        yield f"short p99 to {name}'s", ratio, "at most", 0.5, ratio <= 0.5
    elif kind == "new":
        gate = ratio_of(rounds[GATE], rounds[PLAIN])
        handoff = ratio_of(rounds[HANDOFF], rounds[GATE])
        yield "gate to plain accept", gate, "at least", 0.9, gate >= 0.9
        yield "handoff to inherit", handoff, "at least", 0.7, handoff >= 0.7


# ---- the run ----


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.balance", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="of each scenario and server (default 7)")
    parser.add_argument("--scenario", choices=[kind.name for kind in KINDS], action="append")
    parser.add_argument("--only", default="", help="servers by name, with semicolons between")
    rig, arguments = Rig.from_arguments(parser)
    need_tools()
    is_missed = False
    for kind in KINDS:
        if arguments.scenario and kind.name not in arguments.scenario:
            continue
        rounds = run(rig, kind, arguments.rounds, arguments.only)
        figures = {
            name: {column: median(row[column] for row in rows) for column in kind.columns}
            for name, rows in rounds.items()
        }
        print(f"\n{kind.name}: {kind.workers} workers")
        table(
            ("server", *(text for column in kind.columns for text in (column, "range"))),
            [
                (name, *(text for column in kind.columns for text in told([row[column] for row in rows])))
                for name, rows in rounds.items()
            ],
        )
        if GATE in figures and not arguments.only:
            for what, figure, least, bar, is_met in verdicts(kind.name, figures, rounds):
                is_missed = is_missed or not is_met
                print(f"{'met   ' if is_met else 'MISSED'}: {what} {figure:.2f}, {least} {bar:g}")
    return int(is_missed)


def told(values: list[float]) -> tuple[str, str]:
    digits = 2 if max(values) < 10 else 0
    return f"{median(values):.{digits}f}", f"{min(values):.{digits}f}-{max(values):.{digits}f}"


def run(rig: Rig, kind: Kind, rounds: int, only: str) -> dict[str, list[dict[str, float]]]:
    """What each round says, by server."""
    found: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as leave:
        ports = {}
        for launch in rig.installed(kind.launches):
            if not only or launch.name in only.split(";"):
                running = leave.enter_context(rig.start(launch, workers=kind.workers))
                ports[launch.name] = running.port
                for pid in pids_in_group(running.server.group) if kind.is_pinned else ():
                    os.sched_setaffinity(pid, {two_cores()[0]})
        if kind.has_node and shutil.which("node") and (not only or "node cluster" in only.split(";")):
            ports["node cluster"] = leave.enter_context(node(kind.workers)).port
        time.sleep(SETTLE * 8)  # a peer's worker may come a little later than its line
        for number in range(rounds):
            for name, port in ports.items():
                found.setdefault(name, []).append(kind.measure(port, number))
    return found


@contextmanager
def node(workers: int) -> Iterator[Running]:
    port = free_port()
    launch = Launch("node cluster", "node", "", r"worker (?P<pid>\d+) listens")
    with Server(None, command=["node", "loadtest/cluster.mjs", str(port), str(workers)]) as server:
        server.wait_for(launch.arrival, workers, START)
        wait_until_answered(server, port)
        yield Running(launch, server, port)


if __name__ == "__main__":
    sys.exit(main())
