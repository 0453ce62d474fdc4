"""The listeners that the workers of one cluster share: made when the first asks, closed when the last leaves.

A listener is known by what was asked for, and by how often the same worker had asked for that
before: so the second port 0 of every worker is the same second port. One that the master *holds*
was made before the first fork; workers inherit it, and it stays until the cluster stops.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prefork.cluster.dispatch import Dispatcher
from prefork.cluster.handles import WorkerHandle
from prefork.cluster.picks import make_pick
from prefork.errors import ConfigError
from prefork.net.address import Address, fitting, parse_address
from prefork.net.listener import Listener
from prefork.net.sharing import Sharing

log = logging.getLogger("prefork")

# A socket for servers that are not HTTP: the worker accepts, whatever the cluster's sharing is.
RAW = "shared"


@dataclass(slots=True)
class SharedListener:
    """One listener, and who uses it."""

    index: int
    key: tuple[str, int]  # what was asked for, and how often before
    listener: Listener
    pick: Any
    is_held: bool = False
    users: set[int] = field(default_factory=set)  # ids of workers

    @property
    def is_handed_off(self) -> bool:
        return self.listener.sharing is Sharing.HANDOFF


class Listeners:
    """All of them, by their numbers."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._shared: dict[int, SharedListener] = {}
        self._by_key: dict[tuple[str, int], SharedListener] = {}
        self._numbers = 0

    def __iter__(self) -> Iterator[SharedListener]:
        return iter(self._shared.values())

    def get(self, index: int) -> SharedListener | None:
        return self._shared.get(index)

    # ---- making ----

    def hold(self, asked: Address, listener: Listener, pick: Any) -> SharedListener:
        """Take over *listener*, which was opened for *asked*, until the end."""
        index = 0
        while (str(asked), index) in self._by_key:
            index += 1
        shared = self._add((str(asked), index), listener, pick)
        shared.is_held = True
        return shared

    def ask(self, handle: WorkerHandle, question: dict[str, Any], defaults: Any) -> SharedListener:
        """The listener for a worker's *question*, made if it is the first. Raises ListenError."""
        key = question["address"], question["index"]
        shared = self._by_key.get(key)
        if shared is None:
            wishes = question["wishes"]
            asked = wishes.get("sharing", defaults.sharing)
            sharing = _raw(Sharing(defaults.sharing)) if asked == RAW else Sharing(asked)
            backlog = wishes.get("backlog", defaults.backlog)
            pick = make_pick(wishes.get("pick", defaults.pick))
            if sharing is Sharing.HANDOFF and pick.needs_head and wishes.get("is_encrypted"):
                raise ConfigError(
                    f"the pick for {key[0]} wants to see requests, and there they are encrypted (certfile)"
                )
            address = fitting(parse_address(key[0]))
            listener = Listener.open(address, sharing=sharing, slots=1, backlog=backlog, first=handle.slot)
            shared = self._add(key, listener, pick)
        shared.users.add(handle.id)
        return shared

    def _add(self, key: tuple[str, int], listener: Listener, pick: Any) -> SharedListener:
        self._numbers += 1
        shared = SharedListener(self._numbers, key, listener, pick)
        self._shared[shared.index] = self._by_key[key] = shared
        if shared.is_handed_off:
            self._dispatcher.open(shared.index, listener.socket_for(0), pick)
        return shared

    # ---- using ----

    def join(self, handle: WorkerHandle, index: int) -> SharedListener | None:
        """*handle* serves from here on; None if the listener is gone."""
        shared = self._shared.get(index)
        if shared is not None:
            shared.users.add(handle.id)
            if shared.is_handed_off:
                self._dispatcher.join(handle, index)
        return shared

    def leave(self, handle: WorkerHandle, index: int | None = None, *, is_replaced: bool = False) -> None:
        """*handle* uses one, or all, no more. Without a user, a listener that is not held is closed.

        Not if the worker *is_replaced*: its replacement will ask for the same, and clients wait for it meanwhile.
        """
        for shared in [s for s in self if index in (None, s.index) and handle.id in s.users]:
            shared.users.discard(handle.id)
            if shared.is_handed_off:
                self._dispatcher.leave(handle, shared.index)
            if is_replaced or shared.is_held:
                continue
            shared.listener.release(handle.slot)  # the kernel must send nothing there
            if not shared.users:
                self._close(shared)

    def release(self, slot: int) -> None:
        """Nobody will accept on this slot's own sockets again: the kernel must send them nothing."""
        for shared in self:
            shared.listener.release(slot)

    # ---- the fork, and the end ----

    def prepare(self, slot: int) -> None:
        """Before a fork: a slot that is new under reuseport gets its sockets. Raises OSError."""
        for shared in self:
            if shared.is_held:
                shared.listener.socket_for(slot)

    def inherit(self, slot: int) -> list[SharedListener]:
        """In a child: keep those that are held for all, close all others. Only the master accepts for handoff."""
        kept = []
        for shared in self:
            if shared.is_held and not shared.is_handed_off:
                shared.listener.close_others(slot)
                kept.append(shared)
            else:
                shared.listener.close()
                kept += [shared] if shared.is_held else []
        return kept

    def close(self) -> None:
        for shared in list(self):
            self._close(shared)

    def _close(self, shared: SharedListener) -> None:
        del self._shared[shared.index]
        if self._by_key.get(shared.key) is shared:
            del self._by_key[shared.key]
        if shared.is_handed_off:
            self._dispatcher.shut(shared.index)
        shared.listener.close()


def _raw(sharing: Sharing) -> Sharing:
    return Sharing.INHERIT if sharing is Sharing.HANDOFF else sharing
