"""How a process ended, in words: what waitpid(2) returned as code, signal and core flag."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

# The exit codes of a worker beside 0 (it was told to leave) and 1 (a bug of ours), and of a server
# that never came up because of them. 3 is uvicorn's and gunicorn's for what cannot boot, 4 gunicorn's
# for an application that cannot be loaded.
BOOT_FAILED = 3
LOAD_FAILED = 4


def signal_name(number: int) -> str:
    """ "SIGKILL" for 9; "signal 40" for one that Python has no name for (real-time signals)."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """Exactly one of *code* and *signal* is set."""

    code: int | None
    signal: str | None
    core_dumped: bool = False

    @classmethod
    def from_wait(cls, status: int) -> ExitStatus:
        """From the status word of waitpid(2)."""
        if os.WIFSIGNALED(status):
            return cls(None, signal_name(os.WTERMSIG(status)), os.WCOREDUMP(status))
        return cls(os.WEXITSTATUS(status), None)

    def __str__(self) -> str:
        if self.signal is None:
            return f"exited with code {self.code}"
        return f"killed by {self.signal}{', core dumped' if self.core_dumped else ''}"
