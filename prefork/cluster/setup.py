"""How a cluster starts its workers: what `cluster.setup_master` takes, and `cluster.settings` tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from prefork.errors import ConfigError, did_you_mean
from prefork.ipc.frames import MAX_SIZE
from prefork.net.sharing import Sharing
from prefork.process.identity import Identity
from prefork.process.stdio import check_stdio

SERIALIZATIONS = ("json", "pickle")


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Affects the workers that are forked from now on. `env` is given to each fork."""

    exec: str = ""  # the script that a fork without a target runs; empty: the program that runs now
    args: tuple[str, ...] = ()  # its arguments
    exec_argv: tuple[str, ...] | None = None  # those of the interpreter; None: as this one was started
    cwd: str | None = None
    uid: int | str | Identity | None = None  # a user's number or name
    gid: int | str | None = None
    silent: bool = False  # stdout and stderr are pipes to the master: worker.process.stdout.on("data", ...)
    stdio: tuple[Any, ...] | None = (
        None  # for descriptors 0, 1 and 2: "inherit", "ignore", "pipe", a descriptor or file
    )
    serialization: str = "json"  # of messages: "json" or "pickle"
    max_message: int = MAX_SIZE  # bytes
    sharing: str = "inherit"  # of the listeners that workers ask for
    pick: Any = "least_connections"  # of a listener with sharing "handoff": see `prefork.cluster.picks`
    backlog: int = 2048  # connections that the kernel queues per listener
    graceful_timeout: float = 30.0  # seconds a worker has to end after it was asked to; 0: no limit

    def merged(self, changes: Mapping[str, Any]) -> ClusterSettings:
        """These settings with *changes*. Raises ConfigError."""
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                hint = "; give env to each fork()" if name == "env" else did_you_mean(name, known)
                raise ConfigError(f"setup_master() has no setting {name!r}{hint}")
        changed = replace(self, **{name: _as_tuple(name, value) for name, value in changes.items()})
        changed._check()
        return changed

    def _check(self) -> None:
        if self.serialization not in SERIALIZATIONS:
            raise ConfigError(f"serialization {self.serialization!r} is none of {', '.join(SERIALIZATIONS)}")
        if self.sharing not in list(Sharing):
            raise ConfigError(f"sharing {self.sharing!r} is none of {', '.join(Sharing)}")
        if not 1 <= self.max_message <= 2**32 - 1:
            raise ConfigError(f"max_message {self.max_message} is out of range: 1 byte to 4 GiB")
        if self.graceful_timeout < 0:
            raise ConfigError(f"graceful_timeout {self.graceful_timeout} is negative")
        if self.stdio is not None:
            check_stdio(self.stdio)

    @property
    def stdio_of_child(self) -> tuple[Any, ...]:
        """For descriptors 0, 1 and 2."""
        if self.stdio is not None:
            return tuple(entry for entry in self.stdio if entry != "ipc")
        return ("inherit", "pipe", "pipe") if self.silent else ("inherit",) * 3


def _as_tuple(name: str, value: Any) -> Any:
    if name in ("args", "exec_argv") and value is not None:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{name} {value!r} must be a list of strings")
        return tuple(map(str, value))
    if name == "backlog" and not (isinstance(value, int) and value > 0):
        raise ConfigError(f"backlog {value!r} is no number of connections: 1 or more")
    if name == "stdio" and value is not None:
        return (value,) * 3 if isinstance(value, str) else tuple(value)
    return value
