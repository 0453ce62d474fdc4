"""Exit statuses in words, from processes that really ended that way."""

from __future__ import annotations

import os
import signal

import pytest

from prefork.process.status import ExitStatus, signal_name


def ended(child):
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(99)
    return ExitStatus.from_wait(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("code", [0, 1, 3, 255])
def test_an_exit_code_is_told_as_it_was(code):
    """Exactly one of code and signal is set."""
    status = ended(lambda: os._exit(code))

    assert (status.code, status.signal, str(status)) == (code, None, f"exited with code {code}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_is_told_by_its_name(number):
    """Nobody should look up 9 in a table at night."""
    status = ended(lambda: os.kill(os.getpid(), number))

    assert (status.code, status.signal, str(status)) == (None, number.name, f"killed by {number.name}")


def test_a_signal_without_a_name_is_told_by_its_number():
    """Real-time signals have none in Python."""
    assert signal_name(40) == "signal 40"


def test_a_core_dump_is_mentioned():
    """It tells where to look next."""
    assert str(ExitStatus(None, "SIGSEGV", core_dumped=True)) == "killed by SIGSEGV, core dumped"
