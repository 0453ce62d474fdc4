"""The worker's part of publish and subscribe: what the master is told, and who gets what it brings."""

from __future__ import annotations

import asyncio

import pytest

from prefork.errors import ChannelClosed, FrameError
from prefork.ipc.frames import Kind
from prefork.ipc.publication import decode_publication, encode_publication
from prefork.worker.topics import Subscriptions
from tests.harness.server import DEADLINE


class Master:
    """The other end: what it was told, and whether it is there."""

    def __init__(self):
        self.told = []
        self.published = []
        self.is_gone = False
        self.has_room = True

    def send(self, message, *, kind=Kind.CONTROL):
        if self.is_gone:
            raise ChannelClosed("the other end of the channel is gone")
        if kind is Kind.PUBLISH:
            self.published.append(message)
        else:
            self.told.append((message["type"], message["topic"]))
        return self.has_room


@pytest.fixture
def master():
    return Master()


@pytest.fixture
def subscriptions(master):
    return Subscriptions(master.send)


def deliver(subscriptions, *messages, topic="t"):
    for message in messages:
        subscriptions.deliver(encode_publication(topic, message))


async def take(subscription, count):
    return [await anext(subscription) for _ in range(count)]


def run(coroutine):
    async def bounded():
        async with asyncio.timeout(DEADLINE):
            return await coroutine

    return asyncio.run(bounded())


def test_the_master_hears_of_the_first_subscription_and_of_the_last_close(master, subscriptions):
    """A chat has a subscription for each client, and the master one for each worker."""
    one, two = subscriptions.subscribe("t"), subscriptions.subscribe("t")
    three = subscriptions.subscribe("u")
    one.close()
    one.close()
    three.close()
    assert master.told == [("subscribe", "t"), ("subscribe", "u"), ("unsubscribe", "u")]

    two.close()
    subscriptions.subscribe("t")

    assert master.told[3:] == [("unsubscribe", "t"), ("subscribe", "t")]


def test_a_broadcast_goes_to_the_master_alone(master, subscriptions):
    """Also for the sender's own subscribers: so all hear it in the same order."""
    subscription = subscriptions.subscribe("t")

    assert subscriptions.broadcast("t", {"a": 1}) is True
    master.has_room = False
    assert subscriptions.broadcast("t", 2) is False

    assert [decode_publication(payload) for payload in master.published] == [("t", {"a": 1}), ("t", 2)]
    assert not subscription._messages


@pytest.mark.parametrize(
    ("topic", "message", "error"), [("t", b"x", TypeError), ("", 1, ValueError), ("x" * 65536, 1, ValueError)]
)
def test_what_cannot_be_published_is_an_error_at_once(master, subscriptions, topic, message, error):
    """Where it was asked for, and nothing is sent."""
    with pytest.raises(error):
        subscriptions.broadcast(topic, message)

    assert master.published == []


def test_each_subscription_gets_each_message_of_its_topic_in_order(subscriptions):
    """None takes another's away."""

    async def main():
        with (
            subscriptions.subscribe("t") as one,
            subscriptions.subscribe("t") as two,
            subscriptions.subscribe("u") as three,
        ):
            deliver(subscriptions, 1, 2)
            deliver(subscriptions, 3, topic="u")
            deliver(subscriptions, 4, topic="nobody's")
            return await take(one, 2), await take(two, 2), await take(three, 1)

    assert run(main()) == ([1, 2], [1, 2], [3])


def test_iterating_waits_for_messages_and_ends_when_it_is_closed(subscriptions):
    """Whoever closes it may be another task."""

    async def main():
        subscription = subscriptions.subscribe("t")
        got = []

        async def listen():
            async for message in subscription:
                got.append(message)
                came.set()

        came = asyncio.Event()
        task = asyncio.create_task(listen())
        for number in range(3):
            deliver(subscriptions, number)
            await came.wait()
            came.clear()
        subscription.close()
        await task
        return got

    assert run(main()) == [0, 1, 2]


def test_a_task_that_is_cancelled_while_it_waits_loses_nothing(subscriptions):
    """`asyncio.timeout` around the next message is how one waits for a while."""

    async def main():
        subscription = subscriptions.subscribe("t")
        task = asyncio.create_task(anext(subscription))
        await asyncio.sleep(0)
        deliver(subscriptions, 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        deliver(subscriptions, 2)
        return await take(subscription, 2)

    assert run(main()) == [1, 2]


def test_two_tasks_that_iterate_over_one_subscription_share_its_messages(subscriptions):
    """Each message goes to one of them, and both hear the end."""

    async def main():
        subscription = subscriptions.subscribe("t")
        got = []

        async def listen():
            got.extend([message async for message in subscription])

        tasks = [asyncio.create_task(listen()) for _ in range(2)]
        await asyncio.sleep(0)
        deliver(subscriptions, *range(10))
        subscriptions.close()
        await asyncio.gather(*tasks)
        return got

    assert sorted(run(main())) == list(range(10))


def test_a_slow_subscription_loses_the_oldest_and_counts_them(subscriptions):
    """The newest are worth more; and a quick one beside it loses nothing."""

    async def main():
        slow, quick = subscriptions.subscribe("t", max_queue=3), subscriptions.subscribe("t")
        deliver(subscriptions, *range(10))
        return await take(slow, 3), slow.dropped, await take(quick, 10), quick.dropped

    assert run(main()) == ([7, 8, 9], 7, list(range(10)), 0)


def test_a_thousand_messages_wait_where_nothing_is_said(subscriptions):
    """The documented bound."""
    subscription = subscriptions.subscribe("t")
    deliver(subscriptions, *range(1001))

    assert (subscription.dropped, len(subscription._messages)) == (1, 1000)


def test_a_listener_is_called_with_each_message_and_needs_no_loop(subscriptions, caplog):
    """One that fails is logged, and neither it nor the others miss the next one."""
    got = []

    def fail(message):
        raise RuntimeError(f"no {message}")

    subscriptions.subscribe("t", fail)
    listening = subscriptions.subscribe("t", got.append)
    deliver(subscriptions, 1, 2)
    listening.close()
    deliver(subscriptions, 3)

    assert got == [1, 2]
    assert "RuntimeError: no 2" in caplog.text


def test_a_listener_may_close_any_subscription_and_make_new_ones(subscriptions):
    """In the middle of a delivery."""
    got = []

    def first(message):
        got.append(("first", message))
        one.close()
        two.close()
        subscriptions.subscribe("t", lambda message: got.append(("third", message)))

    one = subscriptions.subscribe("t", first)
    two = subscriptions.subscribe("t", lambda message: got.append(("second", message)))
    deliver(subscriptions, 1, 2)

    assert got == [("first", 1), ("third", 2)]


def test_a_listener_is_a_plain_function_and_leaves_nothing_to_iterate(subscriptions):
    """A coroutine that nobody awaits would be lost in silence."""

    async def listener(message): ...

    with pytest.raises(TypeError, match="must be a plain function"):
        subscriptions.subscribe("t", listener)
    with pytest.raises(TypeError, match="none to iterate over"):
        aiter(subscriptions.subscribe("t", print))


def test_a_subscription_that_cannot_be_is_not_told_to_the_master(master, subscriptions):
    """Nor kept."""
    for topic, queue in [("", 1), ("x" * 65536, 1), ("\ud800", 1), ("t", 0)]:
        with pytest.raises(ValueError):
            subscriptions.subscribe(topic, max_queue=queue)

    assert master.told == []
    assert not subscriptions._by_topic


def test_without_a_master_nothing_is_subscribed_and_closing_is_quiet(master, subscriptions):
    """A worker that leaves because its master died closes what it has."""
    subscription = subscriptions.subscribe("t")
    master.is_gone = True

    subscription.close()
    with pytest.raises(ChannelClosed):
        subscriptions.subscribe("t")
    with pytest.raises(ChannelClosed):
        subscriptions.broadcast("t", 1)

    assert subscription.is_closed
    assert not subscriptions._by_topic


def test_closing_all_leaves_what_has_come_and_then_ends(master, subscriptions):
    """The worker ends: nobody waits for ever, and nothing that arrived is lost."""

    async def main():
        subscription = subscriptions.subscribe("t")
        deliver(subscriptions, 1, 2)
        subscriptions.close()
        return [message async for message in subscription]

    assert run(main()) == [1, 2]
    assert master.told == [("subscribe", "t")]


def test_what_comes_after_unsubscribing_goes_nowhere(subscriptions):
    """It was on its way."""
    subscription = subscriptions.subscribe("t")
    subscription.close()

    deliver(subscriptions, 1)

    assert not subscription._messages


def test_what_is_no_publication_is_a_frame_error(subscriptions):
    """The channel's driver logs it."""
    with pytest.raises(FrameError):
        subscriptions.deliver(b"\0")
