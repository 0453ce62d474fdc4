"""Forked children: nothing of the parent runs twice, whatever happens in the child."""

from __future__ import annotations

import atexit
import os
import random
import signal
import sys
import threading

import pytest

from prefork.process import forking
from prefork.process.signals import SignalInbox, blocked


def exit_code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(forking.fork(child), 0)[1])


def test_the_child_exits_with_its_result():
    """The plain case."""
    assert exit_code_of(lambda: 5) == 5


@pytest.mark.parametrize(("value", "code"), [(None, 0), (7, 7), ("sentence", 1), (256 + 3, 3)])
def test_sys_exit_in_the_child_ends_only_the_child(value, code):
    """A SystemExit that climbed out of the fork would go on as a second copy of the parent."""
    assert exit_code_of(lambda: sys.exit(value)) == code


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_an_exception_in_the_child_ends_only_the_child(error, capfd):
    """... and is shown."""

    def child():
        raise error

    assert exit_code_of(child) == 1
    assert type(error).__name__ in capfd.readouterr().err


def test_exit_handlers_of_the_parent_do_not_run_in_the_child_and_its_own_do():
    """The parent's would remove the parent's files; the child's flush what an application buffered."""
    reader, writer = os.pipe()
    atexit.register(os.write, writer, b"parent")

    def child():
        atexit.register(os.write, writer, b"child")
        return 0

    try:
        assert exit_code_of(child) == 0
    finally:
        atexit.unregister(os.write)
    os.close(writer)
    assert os.read(reader, 100) == b"child"
    os.close(reader)


def test_buffered_output_is_written_once(tmp_path):
    """A child inherits the parent's buffer, and would write it again."""
    path = tmp_path / "out"
    with open(path, "w") as file:
        sys.stdout, before = file, sys.stdout
        try:
            print("once", end="")
            exit_code_of(lambda: 0)
        finally:
            sys.stdout = before

    assert path.read_text() == "once"


def test_children_do_not_share_their_random_numbers():
    """Forked workers with one state would hand out the same session ids."""
    reader, writer = os.pipe()
    for _ in range(2):
        exit_code_of(lambda: os.write(writer, random.randbytes(16)) and 0)
    os.close(writer)

    drawn = os.read(reader, 100)
    os.close(reader)
    assert drawn[:16] != drawn[16:]


def test_the_child_starts_with_default_signal_handlers():
    """The parent's handlers only put a number into the parent's inbox."""
    inbox = SignalInbox([signal.SIGTERM, signal.SIGUSR1])
    inbox.open()
    try:
        code = exit_code_of(
            lambda: int(not all(signal.getsignal(n) is signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGUSR1)))
        )
    finally:
        inbox.close()

    assert code == 0


def test_a_signal_to_the_child_during_the_fork_is_delivered_after_it():
    """Blocked across the fork, not lost."""
    pid = forking.fork(lambda: signal.pause() or 0)
    os.kill(pid, signal.SIGTERM)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_the_child_blocks_no_signal():
    """A mask would be inherited by every program that it starts."""
    assert exit_code_of(lambda: len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))) == 0


def test_the_inbox_keeps_every_signal_in_order():
    """Different signals sent at once are all there."""
    inbox = SignalInbox([signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN])
    inbox.open()
    try:
        for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTTIN):
            os.kill(os.getpid(), number)
        assert inbox.take() == [signal.SIGUSR2, signal.SIGUSR1, signal.SIGTTIN]
        assert inbox.take() == []
    finally:
        inbox.close()


def test_a_storm_of_signals_overflows_nothing():
    """The wake-up pipe holds 64 KiB; the numbers themselves are kept elsewhere."""
    inbox = SignalInbox([signal.SIGUSR1])
    inbox.open()
    try:
        for _ in range(70_000):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert len(inbox.take()) == 70_000
    finally:
        inbox.close()


def test_a_closed_inbox_gives_the_signals_back():
    """A program that embeds the server gets its own handlers again."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        inbox = SignalInbox([signal.SIGUSR1])
        inbox.open()
        inbox.close()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_blocked_signals_arrive_afterwards():
    """What came inside is told at its end."""
    inbox = SignalInbox([signal.SIGUSR1])
    inbox.open()
    try:
        with blocked():
            # To this thread: another test may have left one behind, and the kernel would choose that.
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert inbox.take() == []
        assert inbox.take() == [signal.SIGUSR1]
    finally:
        inbox.close()
