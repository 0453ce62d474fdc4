"""The same over cluster.fork() and send: python -m loadtest.ipc_cluster SERIALIZATION MODE SECONDS, which prints a rate."""

from __future__ import annotations

import sys
import time

from prefork import cluster

SMALL = "x" * 100
LARGE = "x" * 1_000_000

# Large messages on their way at any time.
WINDOW = 4

WARM_UP = 0.2  # seconds, before the count begins


def main() -> int:
    serialization, mode, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    message, window = (SMALL, 1) if mode == "trips" else (LARGE, WINDOW)
    cluster.setup_master(serialization=serialization)
    worker = cluster.fork(answer, mode)
    begun = time.perf_counter() + WARM_UP
    count = 0

    @worker.on("message")
    def ask_again(_message: object, _handle: object) -> None:
        nonlocal count, begun
        now = time.perf_counter()
        if now < begun:
            count = 0
        else:
            count += 1
        if now < begun + seconds:
            worker.send(message)
        elif worker.is_connected() and worker.exited_after_disconnect is None:
            print(count / (now - begun))
            worker.disconnect()

    for _ in range(window):
        worker.send(message)
    return cluster.run()


def answer(mode: str) -> None:
    worker = cluster.worker
    assert worker is not None
    worker.on("message", lambda message, _handle: worker.send(message if mode == "trips" else None))


if __name__ == "__main__":
    sys.exit(main())
