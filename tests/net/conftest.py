"""What the tests of this room share: a forked child, and a watch over descriptors."""

from __future__ import annotations

import gc
import json
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Seconds after which a child that hangs is killed; it has milliseconds of work.
CHILD_LIFETIME = 30


def run_in_child(function: Callable[[], Any]) -> Any:
    """What *function* returns (as JSON) when it runs in a fork, which leaves through os._exit."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(CHILD_LIFETIME)
            os.close(reader)
            answer = {"returned": function()}
        except BaseException:
            answer = {"raised": traceback.format_exc()}
        try:
            os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = json.loads(pipe.read() or b'{"raised": "the child died"}')
    os.waitpid(pid, 0)
    if "raised" in answer:
        raise AssertionError(answer["raised"])
    return answer["returned"]


@pytest.fixture
def in_child() -> Callable[[Callable[[], Any]], Any]:
    return run_in_child


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose path is short, as a unix socket's must be, and that every user may use."""
    with tempfile.TemporaryDirectory(prefix="prefork-", dir="/tmp") as path:
        os.chmod(path, 0o777)
        yield Path(path)


def open_descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the one listdir itself had open
            continue
    return found


@pytest.fixture(autouse=True)
def _no_descriptor_leaks() -> Iterator[None]:
    """Every test leaves as many descriptors open as it found, without the help of the collector."""
    gc.collect()
    before = open_descriptors()
    gc.disable()
    try:
        yield
        after = open_descriptors()
    finally:
        gc.enable()
    assert after.keys() == before.keys(), f"leaked: { {fd: after[fd] for fd in after.keys() - before.keys()} }"
