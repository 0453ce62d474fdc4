"""Who a process runs as, and what becomes of it when its parent dies."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import signal
from dataclasses import dataclass

from prefork.errors import ConfigError

PR_SET_PDEATHSIG = 1  # prctl(2)

# The parent-death signal, and the seconds between it and the end: see `end_with_parent`. Nothing but a
# debugger uses SIGTRAP.
DEATH_SIGNAL = signal.SIGTRAP
DEATH_GRACE = int(DEATH_SIGNAL)


@dataclass(frozen=True, slots=True)
class Identity:
    """User and group to become; None keeps what the process has."""

    uid: int | None = None
    gid: int | None = None
    user_name: str | None = None  # for the supplementary groups

    @property
    def is_current(self) -> bool:
        return self.uid in (None, os.geteuid()) and self.gid in (None, os.getegid())

    def describe(self) -> str:
        user = self.user_name or ("(unchanged)" if self.uid is None else self.uid)
        return f"user {user}, group {'(unchanged)' if self.gid is None else self.gid}"

    def assume(self) -> None:
        """Become this user and group for good. Raises PermissionError if not allowed to.

        Groups first: once the user is given up, there is no right left to change them.
        """
        if self.gid is not None and self.gid != os.getegid():
            os.setgid(self.gid)
        if self.uid is not None and self.uid != os.geteuid():
            if self.user_name is not None:
                os.initgroups(self.user_name, os.getegid())
            else:
                os.setgroups([])
            os.setuid(self.uid)


def end_with_parent(parent: int) -> bool:
    """Have the kernel end this process `DEATH_GRACE` seconds after process *parent*, whatever it does then.

    The grace is for a process that notices by itself and finishes what it has. One that
    cannot, because its code is stuck, even in C with the interpreter's lock held, is
    ended all the same: the signal's handler is alarm(3), which is safe in a handler
    (signal-safety(7)) and takes the signal's number for its seconds, and SIGALRM kills.
    False: *parent* is gone already, and nothing will come.

    To be called after `Identity.assume`, since setuid(2) clears the setting.
    """
    libc = ctypes.CDLL(None)
    libc.signal(int(DEATH_SIGNAL), ctypes.cast(libc.alarm, ctypes.c_void_p))
    libc.prctl(PR_SET_PDEATHSIG, int(DEATH_SIGNAL))
    return os.getppid() == parent


def resolve(user: str | None, group: str | None) -> Identity:
    """From names or numbers; a user alone brings its own group. Raises ConfigError for unknown ones."""
    if user is None:
        return Identity(gid=None if group is None else find_group(group))
    entry = _find_user(user)
    uid = int(user) if entry is None else entry.pw_uid
    name = None if entry is None else entry.pw_name
    if group is not None:
        gid: int | None = find_group(group)
    else:
        gid = None if entry is None else entry.pw_gid
    return Identity(uid, gid, name)


def find_group(group: str) -> int:
    """The number of *group*, which may be a number already."""
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"group {group!r} does not exist on this machine") from None


def owner(text: str) -> tuple[int, int]:
    """ "user:group", "user" or ":group" as the pair that chown(2) takes, -1 for what stays as it is."""
    user, _, group = text.partition(":")
    identity = resolve(user or None, group or None)
    return (
        -1 if identity.uid is None else identity.uid,
        -1 if identity.gid is None else identity.gid,
    )


def _find_user(user: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError:
        if user.isdecimal():  # a number needs no entry (containers often have none)
            return None
        raise ConfigError(f"user {user!r} does not exist on this machine") from None
