"""What to do about a worker that ended. Pure decisions: values in, values out.

A dead worker is replaced at once, unless its slot keeps dying: then each
replacement waits longer than the one before. A server none of whose workers has
ever booted is not a server that crashed but one that cannot start, and is given up
with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# The first replacement starts at once, the second after this many seconds, and each
# further one half as long again: einhorn's growth.
FIRST_DELAY = 0.75
GROWTH = 1.5
# Growth without a ceiling would leave a machine that recovered at 03:00 idle until noon.
LONGEST_DELAY = 30.0


class ExitCause(StrEnum):
    """Why a worker ended, in a word."""

    RETIRED = "retired"  # it was asked to leave, or left by itself, and did
    FINISHED = "finished"  # what it was forked for has returned
    CRASHED = "crashed"  # it ended by its own fault: an exit code, or a signal such as SIGSEGV
    KILLED = "killed"  # SIGKILL, SIGTERM ... from outside: an operator, the kernel's OOM killer
    BOOT_FAILED = "boot-failed"  # the application did not import or refused to start
    HUNG = "hung"  # it passed a deadline and was ended by the master


# Nothing that the application did wrong.
BLAMELESS = frozenset({ExitCause.RETIRED, ExitCause.FINISHED, ExitCause.KILLED})

# A life of this many seconds after it began to listen proves that the slot is sound, so the
# count of failures starts anew. A worker killed from outside is not at fault: only
# killing it as fast as it comes up counts as a loop. One that leaves by itself may have
# served its fill in a moment.
SOUND_AFTER: dict[ExitCause, float] = {
    ExitCause.RETIRED: 0.0,
    ExitCause.FINISHED: 1.0,
    ExitCause.KILLED: 1.0,
    ExitCause.CRASHED: 60.0,
    ExitCause.BOOT_FAILED: 60.0,
    ExitCause.HUNG: 60.0,
}

NEVER_BOOTED = "no worker has ever booted, so the next one would fail the same way"

# Signals a process does not send itself when it breaks. All others (SIGSEGV, SIGABRT, SIGBUS,
# SIGXCPU ...) are its own fault.
FROM_OUTSIDE = frozenset({"SIGKILL", "SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP"})


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known of a worker that ended."""

    code: int | None
    signal: str | None
    was_asked: bool = False  # it was retired, or said that it leaves
    passed_deadline: bool = False
    said_boot_failed: bool = False
    listened_for: float | None = None  # seconds; None: it never listened
    had_to_listen: bool = True  # otherwise it was forked for something that may end by itself


@dataclass(frozen=True, slots=True)
class StartAgain:
    """Start a replacement after *delay* seconds; *failures* is the slot's new count."""

    delay: float
    failures: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Stop everything: a replacement would fail the same way."""

    reason: str


def cause_of(ending: Ending) -> ExitCause:
    """The one word for an ending; the master's own doing comes before the look of it."""
    if ending.passed_deadline:
        return ExitCause.HUNG
    if ending.said_boot_failed:
        return ExitCause.BOOT_FAILED
    # SIGTERM is how a worker that still boots is asked.
    if ending.was_asked and (ending.code == 0 or ending.signal == "SIGTERM"):
        return ExitCause.RETIRED
    if ending.code == 0 and not ending.had_to_listen:
        return ExitCause.FINISHED
    if ending.code == 0 and ending.listened_for is not None:
        return ExitCause.RETIRED
    if ending.signal in FROM_OUTSIDE:
        return ExitCause.KILLED
    return ExitCause.CRASHED


def delay_after(failures: int) -> float:
    """Seconds to wait before the start that follows *failures* failures in a row: 0, 0.75, 1.1 ... 30."""
    if failures <= 1:
        return 0.0
    # The exponent is bounded, so that a slot that failed all night does not overflow a float.
    return min(LONGEST_DELAY, FIRST_DELAY * GROWTH ** min(failures - 2, 64))


def after_exit(ending: Ending, failures: int, anybody_booted: bool) -> StartAgain | GiveUp:
    """What follows the end of a worker whose slot had *failures* failures in a row before.

    *anybody_booted*: some worker of this server has listened since it was started.
    """
    cause = cause_of(ending)
    if not anybody_booted and cause not in BLAMELESS:
        return GiveUp(NEVER_BOOTED)
    was_sound = ending.listened_for is not None and ending.listened_for >= SOUND_AFTER[cause]
    if was_sound:
        failures = 0 if cause in BLAMELESS else 1
    else:
        failures += 1
    return StartAgain(delay_after(failures), failures)
