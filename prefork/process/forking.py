"""os.fork, done so that nothing of the parent can run twice.

The child can only leave through `os._exit`: an exception or a SystemExit that
climbed out of the fork would go on as a second copy of the parent, with the
parent's sockets in its hands and its `finally` blocks still to run.

Signals are blocked across the fork, so that none is handled by the parent's
handlers in the child.
"""

from __future__ import annotations

import atexit
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from prefork.process import signals


def fork(child: Callable[[], int]) -> int:
    """Fork; the child runs *child* and exits with its result. The parent gets the child's pid.

    The child starts with default signal handlers, its own `random` state and an
    empty atexit list (what it registers itself is run when it leaves). Raises
    OSError when the kernel refuses (EAGAIN: RLIMIT_NPROC or the cgroup's pids.max).
    """
    flush_standard_streams()  # or the child would write the parent's buffered text a second time
    with signals.blocked():
        pid = os.fork()
        if pid == 0:
            _run_child(child)
        return pid


def _run_child(child: Callable[[], int]) -> NoReturn:
    code = 1
    try:
        signals.reset_to_defaults()
        # The parent's exit handlers are the parent's: multiprocessing's children drop them too.
        atexit._clear()
        random.seed()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        code = child()
        atexit._run_exitfuncs()
    except SystemExit as leaving:
        code = exit_code(leaving)
    except BaseException:  # noqa: BLE001 - the door: nothing may climb out of the child
        traceback.print_exc()
    finally:
        flush_standard_streams()
        os._exit(code)


def exit_code(leaving: SystemExit) -> int:
    """What `sys.exit(value)` means: None is 0, a number itself, anything else is printed and 1."""
    if leaving.code is None:
        return 0
    if isinstance(leaving.code, int):
        return leaving.code & 0xFF
    with suppress(Exception):  # a message that cannot be printed must not keep the child alive
        sys.stderr.write(f"{leaving.code}\n")
    return 1


def flush_standard_streams() -> None:
    """Write out what Python holds back. A closed or full stream is not a reason to fail here."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # gone, closed, or None under pythonw-like hosts
            stream.flush()
