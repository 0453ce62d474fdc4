"""A thousand workers forked and reaped by one master: the time each takes, and what the master keeps of it.

Workers come in waves that are alive together. Each says a word, hears one, and leaves. The
master's descriptors and resident memory are read after the first wave, which warms it up, and
after the last.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from prefork import cluster

PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.forks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--wave", type=int, default=100, help="workers alive together (default 100)")
    arguments = parser.parse_args()
    waves = Waves(arguments.workers, arguments.wave)
    waves.begin()
    code = cluster.run()
    waves.report()
    return code or len(waves.kept) > 0


class Waves:
    """Forks one wave after another; the next begins when the last worker of the one before was reaped."""

    def __init__(self, workers: int, wave: int) -> None:
        self._left = workers
        self._workers = workers
        self._wave = wave
        self._alive = 0
        self._took: list[float] = []  # seconds of each wave
        self._began = 0.0
        self._readings: list[tuple[int, int]] = []  # descriptors, bytes
        cluster.on("message", lambda worker, message, handle: worker.send(message))
        cluster.on("exit", self._on_exit)

    def begin(self) -> None:
        self._began = time.perf_counter()
        self._alive = min(self._wave, self._left)
        self._left -= self._alive
        for _ in range(self._alive):
            cluster.fork(work)

    def _on_exit(self, worker: object, code: int | None, signal: str | None) -> None:
        if code != 0:
            raise SystemExit(f"{worker} ended with {code or signal}")
        self._alive -= 1
        if self._alive:
            return
        self._took.append(time.perf_counter() - self._began)
        cluster.call_later(0.0, self._finish_wave)

    def _finish_wave(self) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        self._readings.append((len(os.listdir("/proc/self/fd")), resident))
        if self._left:
            self.begin()

    @property
    def kept(self) -> list[str]:
        """What the master has more of after the last wave than after the first."""
        (descriptors, memory), (later_descriptors, later_memory) = self._readings[0], self._readings[-1]
        kept = []
        if later_descriptors > descriptors:
            kept.append(f"{later_descriptors - descriptors} descriptors")
        if later_memory > memory + 1024 * 1024:  # an allocator's chunk is no leak of a thousand workers
            kept.append(f"{(later_memory - memory) // 1024} KiB")
        return kept

    def report(self) -> None:
        each = sorted(took / self._wave * 1000 for took in self._took)
        print(f"{self._workers} workers, {self._wave} at a time: {each[len(each) // 2]:.2f} ms each (median wave)")
        for when, (descriptors, memory) in (("first", self._readings[0]), ("last", self._readings[-1])):
            print(f"after the {when} wave: {descriptors} descriptors, {memory / 1024 / 1024:.1f} MiB resident")
        print(f"kept: {', '.join(self.kept) or 'nothing'}")


async def work() -> None:
    assert cluster.worker is not None
    cluster.worker.send("here")
    async for _ in cluster.worker.messages():
        return


if __name__ == "__main__":
    sys.exit(main())
