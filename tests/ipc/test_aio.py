"""The channel under asyncio and uvloop: callbacks, back-pressure, the end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from prefork.errors import ChannelClosed
from prefork.ipc.aio import AsyncChannel
from prefork.ipc.channel import Channel, Message
from prefork.ipc.frames import Kind

LARGE = "x" * (4 * 1024 * 1024)

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]

# Seconds after which a test that waits for a callback has failed.
PATIENCE = 30


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine function to its end on each kind of loop."""

    def runner(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with asyncio.Runner(loop_factory=request.param) as running:
            running.run(asyncio.wait_for(main(), PATIENCE))

    return runner


@pytest.fixture(autouse=True, scope="module")
def _signal_pipe_of_uvloop() -> None:
    """uvloop opens a pipe for signals with its first loop and keeps it: not a leak of the test that is first."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as running:
        running.run(asyncio.sleep(0))


class End:
    """One end of a channel whose callbacks only take notes."""

    def __init__(self, channel: Channel, on_message: Callable[[Message], None] | None = None) -> None:
        self.heard: asyncio.Queue[Any] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.closed_count = 0
        self.channel = AsyncChannel(
            channel,
            asyncio.get_running_loop(),
            on_message or (lambda m: self.heard.put_nowait(m.body)),
            self._on_closed,
        )

    def _on_closed(self) -> None:
        self.closed_count += 1
        self.closed.set()


def test_messages_are_delivered_in_both_directions(run: Run):
    """A conversation."""

    async def main() -> None:
        one, other = map(End, Channel.pair())

        assert one.channel.send("question", kind=Kind.USER)
        assert await other.heard.get() == "question"
        assert other.channel.send("answer")
        assert await one.heard.get() == "answer"

        one.channel.close()
        other.channel.close()

    run(main)


def test_both_sides_may_send_more_than_fits_at_once(run: Run):
    """The loop writes the rest as room appears, in order."""

    async def main() -> None:
        one, other = map(End, Channel.pair())

        for end in (one, other):
            assert end.channel.send(LARGE) is False
            end.channel.send("behind")
        for end in (one, other):
            assert await end.heard.get() == LARGE
            assert await end.heard.get() == "behind"
            assert not end.channel.channel.wants_write

        one.channel.close()
        other.channel.close()

    run(main)


def test_what_was_queued_before_the_loop_is_written_by_it(run: Run):
    """A channel may be used before its process has a loop."""

    async def main() -> None:
        early, late = Channel.pair()
        early.send(LARGE)
        one, other = End(early), End(late)

        assert await other.heard.get() == LARGE

        one.channel.close()
        other.channel.close()

    run(main)


def test_descriptors_that_the_callback_does_not_take_are_closed(run: Run):
    """The watch over descriptors of every test here is half of the assertion."""

    async def main() -> None:
        taken: asyncio.Queue[int] = asyncio.Queue()
        sender, receiver = Channel.pair()
        one = End(sender)
        other = End(receiver, lambda message: taken.put_nowait(message.fds.take()))

        one.channel.send("take one", fds=[os.open("/dev/null", os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY)])
        fd = await taken.get()

        assert os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev
        os.close(fd)
        one.channel.close()
        other.channel.close()

    run(main)


def test_end_of_the_other_side_is_told_once_and_after_its_last_words(run: Run):
    """Then the channel is closed and says so to whoever still sends."""

    async def main() -> None:
        one, other = map(End, Channel.pair())
        one.channel.send("farewell")
        one.channel.close()

        await other.closed.wait()

        assert other.heard.get_nowait() == "farewell"
        assert other.channel.is_closed
        assert (one.closed_count, other.closed_count) == (0, 1)
        with pytest.raises(ChannelClosed):
            other.channel.send("too late")
        other.channel.close()

    run(main)


def test_callback_that_closes_the_channel_hears_nothing_more(run: Run):
    """And the descriptors of what it does not hear are closed."""

    async def main() -> None:
        heard = []
        sender, receiver = Channel.pair()

        def close_at_once(message: Message) -> None:
            heard.append(message.body)
            other.channel.close()
            done.set()

        done = asyncio.Event()
        for number in range(3):
            sender.send(number, fds=[os.open("/dev/null", os.O_RDONLY)])
        other = End(receiver, close_at_once)
        await done.wait()
        sender.close()
        await asyncio.sleep(0)

        assert heard == [0]
        assert other.closed_count == 0

    run(main)


def test_failing_callback_is_logged_and_costs_one_message_only(run: Run, caplog: pytest.LogCaptureFixture):
    """The channel carries more than the message that somebody could not handle."""

    async def main() -> None:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        sender, receiver = Channel.pair()

        def fail_first(message: Message) -> None:
            if message.body == "bad":
                raise RuntimeError("cannot handle this")
            heard.put_nowait(message.body)

        other = End(receiver, fail_first)
        sender.send("bad", fds=[os.open("/dev/null", os.O_RDONLY)])
        sender.send("good")

        assert await heard.get() == "good"
        sender.close()
        await other.closed.wait()

    with caplog.at_level(logging.ERROR, "prefork"):
        run(main)

    [record] = caplog.records
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "cannot handle this"


def test_broken_frame_closes_the_channel_and_is_logged(run: Run, caplog: pytest.LogCaptureFixture):
    """For its owner the other side is gone, which it might as well be."""

    async def main() -> None:
        sender, receiver = Channel.pair()
        other = End(receiver)
        other.channel.send(LARGE)  # a writer is being watched too
        os.write(sender.fileno(), b"not a frame at all")

        await other.closed.wait()

        assert other.channel.is_closed
        assert other.closed_count == 1
        sender.close()

    with caplog.at_level(logging.ERROR, "prefork"):
        run(main)

    assert [record.getMessage() for record in caplog.records] == [
        "channel closed: frame is of kind 97, known are 1 to 7"
    ]


def test_other_side_that_goes_with_our_queue_unsent_is_told(run: Run):
    """Whichever of the two callbacks learns first."""

    async def main() -> None:
        one, other = map(End, Channel.pair())
        one.channel.send(LARGE, fds=[os.open("/dev/null", os.O_RDONLY)])
        other.channel.close()

        await one.closed.wait()

        assert one.closed_count == 1

    run(main)


def test_drained_waits_until_less_is_queued_than_the_high_water_mark(run: Run):
    """And does not wait if that is so already."""

    async def main() -> None:
        one, other = map(End, Channel.pair())
        await one.channel.drained()
        assert one.channel.send_user(LARGE) is False
        assert one.channel.is_backed_up
        cancelled = asyncio.ensure_future(one.channel.drained())
        await asyncio.sleep(0)
        cancelled.cancel()

        await one.channel.drained()

        assert not one.channel.is_backed_up
        assert await other.heard.get() == LARGE
        one.channel.close()
        other.channel.close()

    run(main)


def test_drained_also_waits_for_handles_to_be_acknowledged(run: Run):
    """They are not in the queue of what can be written."""

    async def main() -> None:
        sender, receiver = Channel.pair()
        one = End(sender)
        while one.channel.send_user(None, os.open("/dev/null", os.O_RDONLY)):
            pass
        waiting = asyncio.ensure_future(one.channel.drained())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        other = End(receiver, Message.discard)

        await waiting

        one.channel.close()
        other.channel.close()

    run(main)


@pytest.mark.parametrize("closes", ["one", "other"])
def test_drained_raises_if_the_channel_ends_first(run: Run, closes: str):
    """Whoever ended it. What waits would wait for ever."""

    async def main() -> None:
        one, other = map(End, Channel.pair())
        one.channel.send_user(LARGE)
        waiting = asyncio.ensure_future(one.channel.drained())
        await asyncio.sleep(0)
        {"one": one, "other": other}[closes].channel.close()

        with pytest.raises(ChannelClosed, match="the channel has ended"):
            await waiting
        one.channel.close()
        with pytest.raises(ChannelClosed, match="the channel has ended"):
            await one.channel.drained()
        other.channel.close()

    run(main)


def test_handle_that_no_callback_was_given_is_closed(run: Run):
    """The callback before it has closed the channel; a handle that was given is the callback's, even if it fails."""

    async def main() -> None:
        given: asyncio.Queue[Message] = asyncio.Queue()
        reader, writer = os.pipe()
        sender, receiver = Channel.pair()

        def take_first(message: Message) -> None:
            given.put_nowait(message)
            other.channel.close()
            raise RuntimeError("too bad")

        sender.send_user("first", os.open("/dev/null", os.O_RDONLY))
        receiver._early += receiver.receive()
        sender.receive()
        sender.send_user("second", writer)
        other = End(receiver, take_first)
        message = await given.get()
        sender.close()

        assert message.handle is not None
        assert not message.handle.closed
        message.handle.close()
        assert os.read(reader, 1) == b""
        os.close(reader)

    run(main)
