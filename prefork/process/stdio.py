"""A child's descriptors 0, 1 and 2: made before the fork, put in place by the child.

Each is "inherit", "ignore" (/dev/null), "pipe" (the parent gets the other end), or a descriptor or
file of the parent's that the child shall share.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from prefork.errors import ConfigError

WORDS = ("inherit", "ignore", "pipe")


def check_stdio(entries: Sequence[Any]) -> None:
    """Raises ConfigError. One "ipc" among the entries is Node's spelling of what a worker has anyway."""
    if len([entry for entry in entries if entry != "ipc"]) != 3:
        raise ConfigError(f"stdio has {len(entries)} entries: three are needed, for descriptors 0, 1 and 2")
    for entry in entries:
        is_file = isinstance(entry, int) or hasattr(entry, "fileno")
        if entry != "ipc" and entry not in WORDS and not is_file:
            raise ConfigError(f"stdio entry {entry!r} is none of {', '.join(WORDS)}, a descriptor or a file")


class Stdio:
    """The descriptors of one child, in the parent until the fork and a little longer."""

    def __init__(self, entries: Sequence[Any]) -> None:
        """Raises OSError if no descriptor is left."""
        self._childs: list[int | None] = []  # None: inherited
        self.parents: list[int | None] = []  # the other ends of pipes
        self._made: list[int] = []
        try:
            for number, entry in enumerate(entries):
                self._open(number, entry)
        except BaseException:
            self.close()
            raise

    def _open(self, number: int, entry: Any) -> None:
        parents = None
        if entry == "inherit":
            childs = None
        elif entry == "ignore":
            childs = self._keep(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        elif entry == "pipe":
            reader, writer = os.pipe2(os.O_CLOEXEC)
            childs, parents = (reader, writer) if number == 0 else (writer, reader)
            os.set_blocking(parents, False)
            self._keep(childs)
        else:
            childs = entry if isinstance(entry, int) else entry.fileno()
        self._childs.append(childs)
        self.parents.append(parents)

    def _keep(self, descriptor: int) -> int:
        self._made.append(descriptor)
        return descriptor

    def assume(self) -> None:
        """In the child: put them in place."""
        # First out of the way: one of them may be 0, 1 or 2 itself.
        moved = [None if childs is None else os.dup(childs) for childs in self._childs]
        for number, descriptor in enumerate(moved):
            if descriptor is not None:
                os.dup2(descriptor, number, inheritable=True)
                os.close(descriptor)
        self.close()

    def release(self) -> None:
        """In the parent, after the fork: the child's ends are the child's."""
        while self._made:
            os.close(self._made.pop())

    def close(self) -> None:
        """Close both sides' ends."""
        self.release()
        for descriptor in self.parents:
            if descriptor is not None:
                with suppress(OSError):
                    os.close(descriptor)
        self.parents = [None] * len(self.parents)
