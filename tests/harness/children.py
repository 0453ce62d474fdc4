"""Forked children that run at the same time, and answer."""

from __future__ import annotations

import json
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import Any

# Seconds after which a child that hangs is ended.
CHILD_LIFETIME = 30


class Child:
    """A forked process that runs *act* and answers with what it returned, as JSON."""

    def __init__(self, act: Callable[[], Any]) -> None:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which some tests are about
            self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.alarm(CHILD_LIFETIME)
                os.close(reader)
                try:
                    answer = {"returned": act()}
                except BaseException:
                    answer = {"raised": traceback.format_exc()}
                with os.fdopen(writer, "wb") as pipe:
                    pipe.write(json.dumps(answer).encode())
            finally:
                os._exit(0)
        os.close(writer)
        self._reader = reader

    def result(self) -> Any:
        """What *act* returned. Call it, or `kill`, once."""
        with os.fdopen(self._reader, "rb") as pipe:
            answer = json.loads(pipe.read() or b'{"raised": "it died"}')
        os.waitpid(self.pid, 0)
        assert "raised" not in answer, answer["raised"]
        return answer["returned"]

    def kill(self) -> None:
        """With -9, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._reader)


def in_processes(count: int, act: Callable[[], Any]) -> list[Any]:
    """What *act* returned in each of *count* processes that ran at the same time."""
    return [child.result() for child in [Child(act) for _ in range(count)]]
