"""Publish and subscribe, the worker's part: its subscriptions, and what the master brings for them.

The master is told of a topic's first subscription in this worker, and when the last one closes. All
of it belongs to one thread, that of the worker's channel.

A subscription holds a bounded number of messages for whoever iterates over it. One that is too slow
loses the oldest, and counts them: the newest are worth more, and nobody else waits for it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Protocol, Self

from prefork.errors import ChannelClosed
from prefork.ipc.frames import Kind
from prefork.ipc.publication import decode_publication, encode_publication, encode_topic

log = logging.getLogger("prefork")

MAX_QUEUE = 1000  # messages

Listener = Callable[[Any], object]


class Send(Protocol):
    """`AsyncChannel.send`."""

    def __call__(self, message: Any, /, *, kind: Kind = ...) -> bool: ...


class Subscriptions:
    """All of one worker."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._by_topic: dict[str, list[Subscription]] = {}

    def subscribe(self, topic: str, listener: Listener | None = None, *, max_queue: int = MAX_QUEUE) -> Subscription:
        """Get what is published under *topic* from now on: by `async for`, or *listener* is called with each message.

        Raises ValueError for a topic that cannot be or a *max_queue* below 1, ChannelClosed if the master is gone.
        """
        encode_topic(topic)
        subscription = Subscription(topic, listener, max_queue, self._leave)
        if topic not in self._by_topic:
            self._send({"type": "subscribe", "topic": topic})
            self._by_topic[topic] = []
        self._by_topic[topic].append(subscription)
        return subscription

    def broadcast(self, topic: str, message: Any) -> bool:
        """Publish *message* to the subscribers of *topic* in every worker, this one included. False advises to wait.

        Raises ValueError for a topic that cannot be, TypeError for a message that JSON cannot hold,
        FrameError for one that is too large, ChannelClosed if the master is gone.
        """
        return self._send(encode_publication(topic, message), kind=Kind.PUBLISH)

    def deliver(self, payload: bytes) -> None:
        """What the master brought. Raises FrameError for what is no publication.

        All subscriptions get the same message, and should only read it.
        """
        topic, message = decode_publication(payload)
        for subscription in tuple(self._by_topic.get(topic, ())):
            subscription.put(message)

    @property
    def is_awaited(self) -> bool:
        """Somebody subscribed."""
        return bool(self._by_topic)

    def close(self) -> None:
        """Nothing more will come: whoever iterates gets what is there, and then the end. The master is not told."""
        for subscriptions in self._by_topic.values():
            for subscription in subscriptions:
                subscription.end()
        self._by_topic.clear()

    def _leave(self, subscription: Subscription) -> None:
        subscriptions = self._by_topic.get(subscription.topic, [])
        if subscription not in subscriptions:
            return
        subscriptions.remove(subscription)
        if not subscriptions:
            del self._by_topic[subscription.topic]
            with suppress(ChannelClosed):  # the master is gone, and sends nothing more
                self._send({"type": "unsubscribe", "topic": subscription.topic})


class Subscription:
    """What is published under *topic*: `async for message in subscription`, until `close`.

        with worker.subscribe("news") as news:
            async for message in news: ...

    With a listener nothing is kept for iterating. *dropped* counts what was lost because nobody iterated in time.
    """

    def __init__(
        self,
        topic: str,
        listener: Listener | None,
        max_queue: int,
        leave: Callable[[Subscription], None],
    ) -> None:
        if max_queue < 1:
            raise ValueError(f"a queue for {max_queue} messages: at least 1")
        if inspect.iscoroutinefunction(listener):
            raise TypeError(f"a listener of {topic!r} must be a plain function; use `async for` to wait for something")
        self.topic = topic
        self.dropped = 0
        self._listener = listener
        self._messages: deque[Any] = deque(maxlen=max_queue)
        self._leave = leave
        self._is_ended = False
        self._changed = asyncio.Event()

    @property
    def is_closed(self) -> bool:
        """Nothing more will be put in."""
        return self._is_ended

    def close(self) -> None:
        """Get no more, not even what has come already. May be repeated."""
        self._leave(self)
        self._messages.clear()
        self.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[Any]:
        if self._listener is not None:
            raise TypeError(f"the messages of {self.topic!r} go to a listener, so there are none to iterate over")
        return self

    async def __anext__(self) -> Any:
        while not self._messages:
            if self._is_ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._messages.popleft()

    def put(self, message: Any) -> None:
        """A message has come."""
        if self._is_ended:  # by a listener of the same message
            return
        if self._listener is not None:
            try:
                self._listener(message)
            except Exception:
                log.exception("a listener of topic %r failed", self.topic)
            return
        if len(self._messages) == self._messages.maxlen:
            self.dropped += 1
        self._messages.append(message)
        self._changed.set()

    def end(self) -> None:
        """No message will come any more; what has come is still there."""
        self._is_ended = True
        self._changed.set()
