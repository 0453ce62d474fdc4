"""Messages between a parent and its child: prefork's cluster, Node's process.send, multiprocessing.Pipe.

Round trips: a string of 100 bytes goes to the child and back, one at a time. Large ones: strings of
1 MB go to the child, which answers each with a null; four are on their way at any time, so that a
process which can work while the other does may do so.

prefork's sides are a master and a worker of `prefork.cluster`, with listeners of "message"; Node's the same
of child_process.fork. multiprocessing.Pipe has no loop: its processes do nothing
but wait for the next message, so it is not a server's choice but a mark to compare with.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from loadtest.rig import machine, table

SMALL = "x" * 100
LARGE = "x" * 1_000_000

# Large messages on their way at any time.
WINDOW = 4

# Before the count begins, in seconds.
WARM_UP = 0.2

PROGRAM = Path(__file__).with_name("ipc.mjs")

# Seconds that a program may take beyond those of its measurement.
PATIENCE = 20.0


class Count:
    """How many answers came, and when it is enough."""

    def __init__(self, seconds: float) -> None:
        self._warm = time.perf_counter() + WARM_UP
        self._seconds = seconds
        self._start = 0.0
        self._count = 0
        self.rate = 0.0  # a second; 0 until the end

    def answer(self) -> bool:
        """One came; false if no more is wanted."""
        now = time.perf_counter()
        if not self._start:
            if now > self._warm:
                self._start = now
            return True
        self._count += 1
        if now < self._start + self._seconds:
            return True
        self.rate = self._count / (now - self._start)
        return False


def prefork(serialization: str) -> Callable[[str, float], float]:
    return _run([sys.executable, "-m", "loadtest.ipc_cluster", serialization])


def node(serialization: str) -> Callable[[str, float], float]:
    return _run(["node", str(PROGRAM), serialization])


def _run(command: list[str]) -> Callable[[str, float], float]:
    def measure(mode: str, seconds: float) -> float:
        whole = [*command, mode, str(seconds)]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=seconds + PATIENCE, check=True)
        return float(done.stdout)

    return measure


def pipe(mode: str, seconds: float) -> float:
    parent, child = multiprocessing.Pipe()
    with forked(lambda: _answer_on_pipe(parent, child, mode)):
        child.close()
        message, window = _load(mode)
        count = Count(seconds)
        for _ in range(window if mode == "trips" else 1):  # its send blocks: a window would be a deadlock
            parent.send(message)
        while parent.recv() is not False and count.answer():
            parent.send(message)
        parent.close()
    return count.rate


def _answer_on_pipe(parent: Connection, child: Connection, mode: str) -> None:
    parent.close()
    while True:
        try:
            message = child.recv()
            child.send(message if mode == "trips" else None)
        except (EOFError, OSError):
            return


def _load(mode: str) -> tuple[str, int]:
    return (SMALL, 1) if mode == "trips" else (LARGE, WINDOW)


class forked:  # noqa: N801 - used as a statement
    """A child that runs *function*, and is waited for when the block ends."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                function()
                code = 0
            finally:
                os._exit(code)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        os.waitpid(self._pid, 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.ipc", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement (default 1)")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    contenders: dict[str, Callable[[str, float], float]] = {}
    print("machine:", machine())
    if shutil.which("node"):
        version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
        print(f"versions: CPython {sys.version.split()[0]}, node {version}")
        contenders |= {"node json": node("json"), "node advanced": node("advanced")}
    else:
        print(f"versions: CPython {sys.version.split()[0]}")
        print("left out: node, which is not installed: apt-get install nodejs")
    contenders |= {"prefork json": prefork("json"), "prefork pickle": prefork("pickle"), "multiprocessing.Pipe": pipe}
    trips: dict[str, list[float]] = {name: [] for name in contenders}
    megabytes: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, measure in contenders.items():
            trips[name].append(measure("trips", arguments.seconds))
            megabytes[name].append(measure("large", arguments.seconds))
    reference = next(iter(contenders))
    head = ("", "round trips/s", "ratio", "MB/s", "ratio")
    rows = [
        (
            name,
            f"{median(trips[name]):.0f}",
            f"{_ratio(trips[name], trips[reference]):.2f}",
            f"{median(megabytes[name]):.0f}",
            f"{_ratio(megabytes[name], megabytes[reference]):.2f}",
        )
        for name in contenders
    ]
    table(head, rows)
    print(f"ratio: median of the rounds' own ratios to {reference}")
    return 0


def _ratio(rates: list[float], reference: list[float]) -> float:
    return median(rate / other for rate, other in zip(rates, reference, strict=True))


if __name__ == "__main__":
    sys.exit(main())
