"""Workers are killed with -9 under load: what fails, and how soon is the replacement there?

64 keep-alive connections ask as fast as they get their answers while the oldest worker
is killed, again and again, each as soon as the replacement of the one before it listens
and half a second has passed. The half second spreads the kills over time: a worker killed
within a second of its start is a crash loop to prefork, and its replacement would wait.

A failed request is *in flight* if the killed worker gave the answer before it on its
connection, and *new* if it was the first of its connection and a worker was killed while
it waited: that one had just accepted it, since a connection that is only queued in the
kernel survives, the master holding the socket. Any other failure is *unexplained*, and
there must be none. See tests/harness/load.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median

from loadtest.rig import Rig, Running, gunicorn, prefork, table, uvicorn
from tests.harness.load import Kill, Load, Tally, Verdict, judge, kill_one_after_another

# From the kill to the line that says that the replacement listens, with a preloaded application.
BAR = 0.150  # seconds

SHARING = ("inherit", "reuseport", "handoff")

HEAD = (
    "server",
    "requests",
    "kills",
    "in flight",
    "new",
    "unexplained",
    "back after ms: min",
    "median",
    "max",
    "ratio",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.kill", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of load for each server (default 20)")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two kills, at least (default 0.5)")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--connections", type=int, default=64)
    rig, arguments = Rig.from_arguments(parser)
    workers = arguments.workers
    launches = [
        gunicorn("gunicorn asgi, preload", "pid", workers, "-k asgi --preload"),
        uvicorn("uvicorn (no preload)", "pid", workers),
        *(prefork(f"prefork {mode}", "pid", workers, f"--preload --sharing {mode}") for mode in SHARING),
    ]
    rows, reference, faults = [], 0.0, 0
    for launch in rig.installed(launches):
        with rig.start(launch, workers=workers) as running:
            tally, kills = kill_under_load(running, arguments)
        verdict = judge(tally, kills)
        reference = reference or median(kill.took for kill in kills)
        rows.append(row(launch.name, tally, kills, verdict, reference))
        if launch.package == "prefork":
            faults += len(verdict.unexplained)
            slowest = max(kill.took for kill in kills)
            print(
                f"{launch.name}: slowest replacement {slowest * 1000:.0f} ms, {'within' if slowest <= BAR else 'OVER'}"
                f" the bar of {BAR * 1000:.0f} ms"
            )
        for failure in verdict.unexplained[:5]:
            print(f"{launch.name}: unexplained: {failure}")
    table(HEAD, rows)
    print(f"ratio: median of the time, to that of {rows[0][0]}")
    return 1 if faults else 0


def kill_under_load(running: Running, arguments: argparse.Namespace) -> tuple[Tally, list[Kill]]:
    with Load(running.port, connections=arguments.connections, path="/") as load:
        kills = kill_one_after_another(
            running.server,
            running.launch.arrival,
            workers=arguments.workers,
            count=int(arguments.seconds / arguments.every),
            every=arguments.every,
            seconds=arguments.seconds,
        )
    return load.tally, kills


def row(name: str, tally: Tally, kills: Sequence[Kill], verdict: Verdict, reference: float) -> list[str]:
    times = [kill.took for kill in kills]
    failed = map(len, (verdict.in_flight, verdict.first, verdict.unexplained))
    return [
        name,
        str(tally.requests),
        str(len(kills)),
        *map(str, failed),
        *(f"{seconds * 1000:.0f}" for seconds in (min(times), median(times), max(times))),
        f"{median(times) / reference:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
