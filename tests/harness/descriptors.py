"""A forked child that answers, and a watch over descriptors: fixtures for the rooms that pass them about.

A conftest.py that imports `in_child` and `no_descriptor_leaks` has them.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
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


def open_descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the one listdir itself had open
            continue
    return found


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
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
