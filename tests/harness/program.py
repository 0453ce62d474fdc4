"""A program that uses the cluster, in a process of its own: what it tells, and what it is told to do.

    with Program("console") as master:                     # tests/programs/console.py
        master.do("cluster.fork(worker)")                  # in the master
        master.until("online", worker=1)
        assert master.do("cluster.worker.id", worker=1) == 1   # in the worker
        os.kill(master.pid_of(1), signal.SIGKILL)
        assert master.until("exit", worker=1)["signal"] == "SIGKILL"

The program speaks in lines of JSON (tests/programs/telling.py), its log stands between them. Nothing
sleeps; every wait has a deadline, and a failed one shows all that was said.
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any, Self

from tests.harness.server import DEADLINE, ROOT, Server

PROGRAMS = ROOT / "tests" / "programs"

# What every source given as text begins with.
PRELUDE = "from prefork import cluster\nfrom tests.programs.telling import *\n"


class Program(Server):
    """*source* is the name of a program in tests/programs, or the text of one (more than a line)."""

    stdin = subprocess.PIPE

    def __init__(
        self,
        source: str,
        *args: str,
        environ: dict[str, str] | None = None,
        cwd: Path | str = ROOT,
        options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(None, command=[sys.executable, *options], environ=environ, cwd=cwd)
        self._source = source
        self._args = args
        self._orders = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        if "\n" in self._source:
            self._folder = tempfile.TemporaryDirectory(prefix="program-")
            Path(self._folder.name).chmod(0o755)  # workers of another user start it, too
            path = Path(self._folder.name) / "program.py"
            path.write_text(PRELUDE + textwrap.dedent(self._source))
        else:
            path = PROGRAMS / f"{self._source}.py"
        self.path = path
        is_module = self._command[-1] == "-m"
        self._command += [f"tests.programs.{self._source}" if is_module else str(path), *self._args]
        super().start()

    def __enter__(self) -> Self:
        try:
            return super().__enter__()
        except BaseException:
            self._remove_folder()
            raise

    def __exit__(self, *error: object) -> None:
        self.hang_up()
        try:
            super().__exit__(*error)
        finally:
            self._remove_folder()

    # ---- what it is told ----

    def do(self, code: str, worker: int | None = None) -> Any:
        """The value of *code* (None for a statement) in the master, or in worker number *worker*."""
        number = self.tell(code, worker)
        answer = self.until("answer", number=number)
        assert "error" not in answer, f"{code}\n{answer.get('error')}\n{self.log}"
        return answer["value"]

    def tell(self, code: str, worker: int | None = None) -> int:
        """Have *code* run and wait for nothing; the number that its answer will have, if there is one."""
        self._orders += 1
        assert self.process.stdin is not None
        order = {"number": self._orders, "code": code, "worker": worker}
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        return self._orders

    def fork(self, call: str = "worker", **env: str) -> int:
        """The id of a new worker once it is online; *call* is what stands in cluster.fork(...).

        One that obeys (`worker`, or the whole program) has heard an order by then: it can be asked to leave.
        """
        number = self.do(f"cluster.fork({call}).id")
        self.until("online", worker=number)
        if call.partition(",")[0] in ("worker", ""):
            self.do("1", worker=number)
        return int(number)

    def hang_up(self) -> None:
        """No order will follow: without workers and timers, `cluster.run` returns."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            try:
                self.process.stdin.close()
            except BrokenPipeError:  # it has ended
                pass

    # ---- what it tells ----

    @property
    def events(self) -> list[dict[str, Any]]:
        """Everything told so far, in the order in which it was written."""
        lines = self.log.splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith('{"event": ') and line.endswith("\n")]

    def told(self, event: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """The events so far that are *event* and have these *fields*."""
        return [told for told in self.events if _fits(told, event, fields)]

    def names(self, worker: int, *but: str) -> list[str]:
        """What the cluster told of *worker*, in order, without the events *but*."""
        return [told["event"] for told in self.told(worker=worker, by="cluster") if told["event"] not in but]

    def until(self, event: str, count: int = 1, deadline: float = DEADLINE, **fields: Any) -> Any:
        """The *count*-th *event* with these *fields*, as soon as it is told."""
        end = time.monotonic() + deadline
        while True:
            ended = self.process.poll() is not None  # before the look, which then sees its last words
            found = self.told(event, **fields)
            if len(found) >= count:
                return found[count - 1]
            left = end - time.monotonic()
            if ended or left <= 0:
                wanted = ", ".join([event, *(f"{name}={value!r}" for name, value in fields.items())])
                why = f"it ended with {self.process.returncode}" if ended else f"not within {deadline:g} s"
                raise AssertionError(f"{wanted} (number {count}) was not told: {why}\n{self.log}")
            select.select([self.process.stdout], [], [], min(left, 0.5))

    def pid_of(self, worker: int) -> int:
        return int(self.until("fork", worker=worker)["pid"])

    def port_of(self, worker: int, count: int = 1) -> int:
        """The port of the *count*-th address that *worker* listens on."""
        return int(self.until("listening", count, worker=worker)["address"].rpartition(":")[2])

    def finish(self) -> int:
        """End it by its own rules: no more orders, all workers asked to leave; the exit code."""
        self.tell("cluster.disconnect()")
        self.hang_up()
        return self.wait_exit()

    def terminate(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait_exit()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def _fits(told: dict[str, Any], event: str | None, fields: dict[str, Any]) -> bool:
    return event in (None, told["event"]) and all(told.get(name) == value for name, value in fields.items())
