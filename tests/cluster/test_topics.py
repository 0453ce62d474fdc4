"""The master's part of publish and subscribe: alone, and between forked workers."""

from __future__ import annotations

import asyncio
import logging
import select

import pytest

from prefork.cluster.topics import MOST_QUEUED, RESUMED_AT, Topics
from prefork.errors import ChannelClosed
from prefork.ipc.aio import AsyncChannel
from prefork.ipc.channel import Channel
from prefork.ipc.frames import Kind
from prefork.ipc.publication import decode_publication, encode_publication
from prefork.worker.topics import Subscriptions
from tests.harness.children import Child
from tests.harness.server import DEADLINE


class Outlet:
    """A channel that takes notes."""

    def __init__(self):
        self.queued = 0
        self.is_gone = False
        self.got = []

    def send(self, message, *, kind):
        assert kind is Kind.PUBLISH
        if self.is_gone:
            raise ChannelClosed("the other end of the channel is gone")
        self.got.append(decode_publication(message))
        return True


class Handle:
    def __init__(self, id, channel=None):
        self.id = id
        self.channel = channel or Outlet()

    def describe(self):
        return f"worker {self.id}"


@pytest.fixture
def topics():
    return Topics()


@pytest.fixture
def workers():
    return [Handle(id) for id in (1, 2, 3)]


def publish(topics, *messages, topic="t"):
    for message in messages:
        topics.publish(encode_publication(topic, message))


def heard(worker):
    return [message for _, message in worker.channel.got]


def test_subscribers_get_what_is_published_and_others_do_not(topics, workers):
    """By topic, in order, the bytes as they came."""
    one, two, three = workers
    topics.subscribe(one, "t")
    topics.subscribe(two, "t")
    topics.subscribe(two, "u")
    topics.subscribe(three, "u")

    publish(topics, 1, 2)
    publish(topics, 3, topic="u")
    publish(topics, 4, topic="nobody's")

    assert [heard(worker) for worker in workers] == [[1, 2], [1, 2, 3], [3]]
    assert two.channel.got == [("t", 1), ("t", 2), ("u", 3)]


def test_nothing_comes_after_unsubscribing(topics, workers):
    """And the others go on."""
    one, two, _ = workers
    for worker in (one, two):
        topics.subscribe(worker, "t")
    topics.unsubscribe(one, "t")

    publish(topics, 1)

    assert (heard(one), heard(two)) == ([], [1])


def test_a_worker_that_ended_is_forgotten_in_every_topic(topics, workers):
    """Otherwise the master would grow with each worker that was replaced."""
    one, two, _ = workers
    for topic in ("t", "u"):
        topics.subscribe(one, topic)
    topics.subscribe(two, "t")
    one.channel.queued = MOST_QUEUED + 1
    publish(topics, 1)

    topics.forget(one)
    topics.forget(two)

    assert not topics._subscribers
    assert not topics._lagging
    assert not topics._dropped


def test_what_was_never_subscribed_may_be_unsubscribed_and_forgotten(topics, workers):
    """A worker's last words and its end may cross."""
    topics.unsubscribe(workers[0], "t")
    topics.forget(workers[0])


def test_a_worker_that_died_unheard_costs_the_others_nothing(topics, workers):
    """Its channel breaks before its exit is told."""
    for worker in workers:
        topics.subscribe(worker, "t")
    workers[0].channel.is_gone = True

    publish(topics, 1)

    assert [heard(worker) for worker in workers] == [[], [1], [1]]


def test_what_has_no_topic_is_logged_and_dropped(topics, workers, caplog):
    """One worker's broken message is not the end of the master."""
    topics.subscribe(workers[0], "t")

    topics.publish(b"\0")

    assert heard(workers[0]) == []
    assert "a publication was dropped: a publication of 1 bytes does not begin with a topic" in caplog.text


def test_a_worker_that_does_not_read_is_passed_over_until_it_has_drained(topics, workers, caplog):
    """The master holds a bounded number of bytes for it; the others miss nothing; it is said once."""
    caplog.set_level(logging.INFO, "prefork")
    slow, quick, _ = workers
    topics.subscribe(slow, "t")
    topics.subscribe(quick, "t")

    slow.channel.queued = MOST_QUEUED
    publish(topics, 1)
    slow.channel.queued = MOST_QUEUED + 1
    publish(topics, 2, 3)
    slow.channel.queued = RESUMED_AT + 1
    publish(topics, 4)
    slow.channel.queued = RESUMED_AT
    publish(topics, 5)

    assert heard(slow) == [1, 5]
    assert heard(quick) == [1, 2, 3, 4, 5]
    assert (topics.dropped(slow), topics.dropped(quick)) == (3, 0)
    assert [record.getMessage() for record in caplog.records] == [
        "worker 1 does not read what is published: it gets no more until the 1048577 bytes that wait for it are down to 131072",
        "worker 1 reads again: it missed 3 publications",
    ]


def test_each_episode_is_counted_and_told_anew(topics, workers, caplog):
    """An hour later it is news again."""
    slow = workers[0]
    topics.subscribe(slow, "t")
    for _ in range(2):
        slow.channel.queued = MOST_QUEUED + 1
        publish(topics, 1)
        slow.channel.queued = 0
        publish(topics, 2)

    assert topics.dropped(slow) == 2
    assert caplog.text.count("does not read what is published") == 2


# ---- between processes ----


def run_worker(channel, number, workers, count):
    """Subscribe; when told to, publish *count* messages; what was heard, until all of everybody's has come."""

    async def main():
        loop = asyncio.get_running_loop()
        told, gone = asyncio.Event(), asyncio.Event()

        def on_message(message):
            if message.kind is Kind.PUBLISH:
                subscriptions.deliver(message.body)
            else:
                told.set()

        end = AsyncChannel(channel, loop, on_message, gone.set)
        subscriptions = Subscriptions(end.send)
        heard = []
        async with asyncio.timeout(DEADLINE):
            with subscriptions.subscribe("t") as subscription:
                await told.wait()
                for index in range(count):
                    subscriptions.broadcast("t", [number, index])
                    await asyncio.sleep(0)
                async for message in subscription:
                    heard.append(message)
                    if len(heard) == workers * count:
                        break
            # The unsubscription says that this worker is done; the master closes then.
            await gone.wait()
        return heard

    return asyncio.run(main())


class Plain:
    """What `Topics` needs of a channel that never backs up."""

    queued = 0

    def __init__(self, channel):
        self.send = channel.send


def route(channels):
    """A master that does nothing but route, until every worker has unsubscribed."""
    topics = Topics()
    handles = {channel.fileno(): (Handle(id, Plain(channel)), channel) for id, channel in enumerate(channels)}
    poll = select.poll()
    subscribed = unsubscribed = 0
    while unsubscribed < len(channels):
        for descriptor, (_, channel) in handles.items():
            poll.register(descriptor, select.POLLIN | (select.POLLOUT if channel.wants_write else 0))
        ready = poll.poll(DEADLINE * 1000)
        assert ready
        for descriptor, _ in ready:
            handle, channel = handles[descriptor]
            channel.flush()
            for message in channel.receive():
                if message.kind is Kind.PUBLISH:
                    topics.publish(message.body)
                elif message.body["type"] == "subscribe":
                    topics.subscribe(handle, message.body["topic"])
                    subscribed += 1
                    if subscribed == len(channels):
                        for other in channels:
                            other.send({"type": "go"})
                else:
                    topics.unsubscribe(handle, message.body["topic"])
                    unsubscribed += 1
            assert not channel.is_eof
    assert not topics._subscribers


def test_workers_hear_one_another_and_themselves_in_the_same_order():
    """All through one master: so also messages of different senders come in one order to everybody."""
    workers, count = 3, 200
    pairs = [Channel.pair() for _ in range(workers)]

    def begin(number):
        def act():
            for index, (ours, theirs) in enumerate(pairs):
                ours.close()
                if index != number:
                    theirs.close()
            return run_worker(pairs[number][1], number, workers, count)

        return Child(act)

    children = [begin(number) for number in range(workers)]
    for _, theirs in pairs:
        theirs.close()
    try:
        route([ours for ours, _ in pairs])
    finally:
        for ours, _ in pairs:
            ours.close()
    heard = [child.result() for child in children]

    assert heard[0] == heard[1] == heard[2]
    for number in range(workers):
        assert [index for sender, index in heard[0] if sender == number] == list(range(count))
