"""Reaping: by known pid and without waiting, and of orphans."""

from __future__ import annotations

import os

from prefork.process.reaping import reap
from tests.harness.server import wait_for_exit


def child(code):
    pid = os.fork()
    if pid == 0:
        os._exit(code)
    return pid


def test_a_child_that_has_ended_is_reaped():
    """With its status."""
    pid = child(5)
    assert wait_for_exit(pid)

    assert str(reap(pid)) == "exited with code 5"


def test_a_child_that_runs_is_not_waited_for():
    """The master never blocks on a worker."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)

    assert reap(pid) is None

    os.close(writer)
    os.close(reader)
    os.waitpid(pid, 0)


def test_a_child_that_somebody_else_reaped_has_an_unknown_status():
    """A program that embeds us may ignore SIGCHLD."""
    pid = child(5)
    os.waitpid(pid, 0)

    assert str(reap(pid)) == "exited with code 255"
