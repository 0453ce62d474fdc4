"""The file that holds a server's process id, for scripts and init systems."""

from __future__ import annotations

import os
from contextlib import suppress

from prefork.errors import ConfigError, StartError, reason_of


class PidFile:
    """Made by `write`, removed by `remove` if it is still ours."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)

    def write(self) -> None:
        """Raises StartError if it belongs to a process that is alive, ConfigError if it cannot be written."""
        owner = self._read()
        if owner is not None and owner != os.getpid() and _is_alive(owner):
            raise StartError(
                f"pidfile {self._path!r} belongs to process {owner}, which is alive: stop it, "
                f"or remove the file if that process is another program"
            )
        draft = f"{self._path}.{os.getpid()}"
        try:
            with open(draft, "w") as file:
                file.write(f"{os.getpid()}\n")
            os.rename(draft, self._path)  # nobody reads a half-written one
        except OSError as error:
            with suppress(OSError):  # it may be what could not be made
                os.unlink(draft)
            raise ConfigError(f"pidfile {self._path!r} cannot be written: {reason_of(error)}") from error

    def remove(self) -> None:
        if self._read() == os.getpid():
            with suppress(OSError):  # the directory may be gone, or no longer ours to write
                os.unlink(self._path)

    def _read(self) -> int | None:
        try:
            with open(self._path) as file:
                return int(file.read(32))
        except (OSError, ValueError):  # none, or a stranger's file: then there is no process to respect
            return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
