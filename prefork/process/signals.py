"""Signals as events: caught in an inbox, read like any descriptor, put back when done.

A handler only appends a number; everything else happens when the owner of the
inbox gets round to it. The wake-up descriptor ends the owner's poll(2), and may
overflow without loss, because the numbers themselves are kept in the inbox.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class SignalInbox:
    """Catches *signals* from `open` to `close`; `fileno` is readable while `take` has something."""

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._signals = tuple(signals)
        self._pending: deque[signal.Signals] = deque()
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup = -1
        self._reader = -1
        self._writer = -1
        # Called by the handler itself, before the signal is kept; what it raises interrupts the main
        # thread wherever it is. For a time when nobody reads the inbox.
        self.on_caught: Callable[[signal.Signals], None] | None = None

    def open(self) -> None:
        """Start catching. Raises ValueError outside of the main thread. A SIGHUP ignored by nohup(1) stays ignored."""
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._previous_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        except ValueError:
            self.close_inherited()
            raise
        for number in self._signals:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._catch)

    def fileno(self) -> int:
        return self._reader

    def take(self) -> list[signal.Signals]:
        """All signals since the last call, in the order they were caught."""
        with suppress(BlockingIOError):  # empty: somebody else's wake-up
            while os.read(self._reader, 4096):
                pass
        taken = []
        while self._pending:
            taken.append(self._pending.popleft())
        return taken

    def close(self, *, is_last_act: bool = False) -> None:
        """Give the signals back to whoever had them; as the process's *is_last_act*, ignore them from here on."""
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be put back.
            given_back = signal.SIG_DFL if handler is None else handler
            signal.signal(number, signal.SIG_IGN if is_last_act else given_back)
        self._previous.clear()
        signal.set_wakeup_fd(self._previous_wakeup)
        self.close_inherited()

    def close_inherited(self) -> None:
        """In a forked child: drop the descriptors, whose other holder is the parent."""
        for descriptor in (self._reader, self._writer):
            os.close(descriptor)

    def _catch(self, number: int, _frame: object) -> None:
        caught = signal.Signals(number)
        if self.on_caught is not None:
            self.on_caught(caught)
        self._pending.append(caught)


@contextmanager
def blocked() -> Iterator[None]:
    """No signal is delivered to this thread inside; what arrived meanwhile is delivered after."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def reset_to_defaults(keep_ignored: Iterable[signal.Signals] = (signal.SIGPIPE, signal.SIGXFSZ)) -> None:
    """In a forked child: forget every Python handler and the parent's wake-up descriptor.

    SIGPIPE and SIGXFSZ stay ignored, as CPython sets them at start-up so that
    writes fail with an exception.
    """
    signal.set_wakeup_fd(-1)
    kept = set(keep_ignored)
    for number in signal.valid_signals() - kept - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
