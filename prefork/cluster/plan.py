"""What a master is told before it starts: how to be a worker, and what was made before the first fork."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prefork.cluster.picks import LeastConnections, Pick
from prefork.config import Settings
from prefork.ipc.channel import Channel
from prefork.net.listener import Listener
from prefork.net.tls import TLS
from prefork.scoreboard import Scoreboard


@dataclass(frozen=True, slots=True)
class Seat:
    """Where and as whom a child runs: what `target` is called with."""

    id: int
    slot: int
    generation: int
    master: int  # the pid of the process that forks it
    channel: Channel


@dataclass(frozen=True, slots=True)
class Plan:
    """What a master needs: how to be a worker, and the things made before the first fork."""

    target: Callable[[Seat], int]
    settings: Settings
    workers: int
    listeners: Sequence[Listener]
    board: Scoreboard
    generation: int = 1
    tls: TLS | None = None
    pick: Pick = field(default_factory=LeastConnections)  # under handoff
