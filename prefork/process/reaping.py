"""waitpid(2), without ever waiting: for children known by their pid, and for orphans that PID 1 inherits."""

from __future__ import annotations

import os
from collections.abc import Collection

from prefork.process.status import ExitStatus


def reap(pid: int) -> ExitStatus | None:
    """The exit status of a child of ours; None if it has not ended."""
    try:
        reaped, status = os.waitpid(pid, os.WNOHANG)
        return ExitStatus.from_wait(status) if reaped else None
    except ChildProcessError:
        # A program that embeds us reaped it (SIGCHLD set to SIG_IGN does it too): the status is gone.
        return ExitStatus(code=255, signal=None)


def reap_orphans(ours: Collection[int]) -> None:
    """As PID 1 we inherit every orphan of the container: reap in silence those that are not *ours*.

    Ends at the first of ours that stands in the line: to be called again when that one was reaped.
    """
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in ours:
            return
        os.waitpid(ended.si_pid, 0)
