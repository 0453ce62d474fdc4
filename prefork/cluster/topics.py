"""Publish and subscribe, the master's part: which workers want a topic, and passing on what is published.

A publication goes to every worker that subscribed, the sender's own included, in the order in
which it arrived: so those of one sender stay in their order. It is not parsed but for its topic.

A worker that does not read would have the master hold everything for it. Above `MOST_QUEUED` it
is passed over, until its channel has drained to `RESUMED_AT`: it loses publications, never
another kind of message, and nobody else loses any.
"""

from __future__ import annotations

import logging
from typing import Protocol

from prefork.errors import ChannelClosed, FrameError
from prefork.ipc.frames import Kind
from prefork.ipc.publication import topic_of

log = logging.getLogger("prefork")

# Bytes that wait in the channel of one worker. Some thousand chat messages, for a worker that
# computes for a moment; with a hundred workers that all do, 100 MiB in the master.
MOST_QUEUED = 1024 * 1024

# Far enough below that a slow worker is not passed over and taken back with each message;
# it is where `send` says true again.
RESUMED_AT = 128 * 1024  # bytes


class Outlet(Protocol):
    """A worker's channel."""

    @property
    def queued(self) -> int:
        """Bytes that the kernel has not taken yet."""

    def send(self, message: bytes, /, *, kind: Kind) -> bool: ...


class Subscriber(Protocol):
    """A worker's handle."""

    @property
    def id(self) -> int: ...

    @property
    def channel(self) -> Outlet: ...

    def describe(self) -> str: ...


class Topics:
    """Who subscribed to what, by worker."""

    def __init__(self) -> None:
        self._subscribers: dict[str, dict[int, Subscriber]] = {}  # by topic and worker id
        self._lagging: dict[int, int] = {}  # by worker id: what it missed in this episode
        self._dropped: dict[int, int] = {}  # by worker id: what it missed in all

    def subscribe(self, worker: Subscriber, topic: str) -> None:
        """*worker* has a first subscription of *topic*."""
        self._subscribers.setdefault(topic, {})[worker.id] = worker

    def unsubscribe(self, worker: Subscriber, topic: str) -> None:
        """*worker* has closed its last subscription of *topic*."""
        subscribers = self._subscribers.get(topic, {})
        subscribers.pop(worker.id, None)
        if not subscribers:
            self._subscribers.pop(topic, None)

    def forget(self, worker: Subscriber) -> None:
        """*worker* has ended."""
        for topic in list(self._subscribers):
            self.unsubscribe(worker, topic)
        self._lagging.pop(worker.id, None)
        self._dropped.pop(worker.id, None)

    def publish(self, payload: bytes) -> None:
        """Pass on a publication as it came. What has no topic is logged and goes nowhere."""
        try:
            topic = topic_of(payload)
        except FrameError as error:
            log.error("a publication was dropped: %s", error)
            return
        for worker in self._subscribers.get(topic, {}).values():
            if self._can_take(worker):
                try:
                    worker.channel.send(payload, kind=Kind.PUBLISH)
                except ChannelClosed as error:  # it is dead, which its exit will tell
                    log.debug("%s cannot be told of %r: %s", worker.describe(), topic, error)

    def dropped(self, worker: Subscriber) -> int:
        """Publications that *worker* missed because it did not read."""
        return self._dropped.get(worker.id, 0)

    def _can_take(self, worker: Subscriber) -> bool:
        queued, missed = worker.channel.queued, self._lagging.get(worker.id)
        if queued <= (MOST_QUEUED if missed is None else RESUMED_AT):
            if missed is not None:
                del self._lagging[worker.id]
                log.info("%s reads again: it missed %d publications", worker.describe(), missed)
            return True
        if missed is None:
            log.warning(
                "%s does not read what is published: it gets no more until the %d bytes that wait for it are down to %d",
                worker.describe(),
                queued,
                RESUMED_AT,
            )
        self._lagging[worker.id] = (missed or 0) + 1
        self._dropped[worker.id] = self._dropped.get(worker.id, 0) + 1
        return False
