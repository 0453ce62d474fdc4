"""How evenly do 64 connections spread over 4 workers, in one burst and one every 3 ms?

Each connection sends one request at once and stays open until all are answered; the
answers name the process. A share is told as connections per worker, the busiest first.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections import Counter
from contextlib import ExitStack
from statistics import median

from loadtest.rig import Rig, granian, gunicorn, hypercorn, prefork, table, uvicorn

# Between two connections of a paced round, in seconds.
PACE = 0.003

# An idle server has counted its closed connections within this time. Peers are not asked to
# count, but a round must not begin while the one before it is being cleaned up.
SETTLE = 0.2  # seconds

PATIENCE = 10.0  # seconds for an answer
REQUEST = b"GET / HTTP/1.1\r\nHost: spread\r\n\r\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.spread", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7, help="of each kind and server (default 7)")
    rig, arguments = Rig.from_arguments(parser)
    workers = arguments.workers
    launches = [
        uvicorn("uvicorn", "pid", workers),
        gunicorn("gunicorn asgi", "pid", workers, "-k asgi"),
        granian("granian asgi", "pid", workers, "--interface asgi"),
        hypercorn("hypercorn", "pid", workers),
        *(
            prefork(f"prefork {mode}", "pid", workers, f"--sharing {mode}")
            for mode in ("inherit", "reuseport", "handoff")
        ),
    ]
    rows, reference = [], {}
    for launch in rig.installed(launches):
        with rig.start(launch, workers=workers) as running:
            time.sleep(SETTLE * workers)  # a peer's worker may come a little later than its line
            row = [launch.name]
            for kind, pace in (("burst", 0.0), ("paced", PACE)):
                shares = [spread(running.port, arguments.connections, workers, pace) for _ in range(arguments.rounds)]
                shares.sort()
                typical, worst = shares[len(shares) // 2], shares[-1]
                busiest = median(share[0] for share in shares)
                reference.setdefault(kind, busiest)
                row += [" ".join(map(str, typical)), " ".join(map(str, worst)), f"{busiest / reference[kind]:.2f}"]
        rows.append(row)
    table(("server", "burst: typical", "worst", "ratio", "paced: typical", "worst", "ratio"), rows)
    print(f"ratio: connections of the busiest worker, median of the rounds, to those of {rows[0][0]}")


def spread(port: int, connections: int, workers: int, pace: float) -> list[int]:
    """Connections per worker, the busiest first."""
    with ExitStack() as leave:
        clients = []
        for _ in range(connections):
            client = leave.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
            client.sendall(REQUEST)
            clients.append(client)
            time.sleep(pace)
        shares = Counter(map(pid_of_answer, clients))
    time.sleep(SETTLE)
    counts = sorted(shares.values(), reverse=True)
    return counts + [0] * (workers - len(counts))


def pid_of_answer(client: socket.socket) -> bytes:
    received = b""
    # A pid is the whole body. It may come in a packet of its own, but never in two.
    while not received.partition(b"\r\n\r\n")[2]:
        data = client.recv(4096)
        if not data:
            raise SystemExit(f"a connection ended after {received!r}")
        received += data
    return received.partition(b"\r\n\r\n")[2]


if __name__ == "__main__":
    sys.exit(main())
