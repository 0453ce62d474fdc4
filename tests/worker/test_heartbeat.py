"""The heartbeat, in real loops: it goes on by itself and tells of a loop that was held up."""

from __future__ import annotations

import asyncio
import time

import pytest

from prefork.scoreboard import BEAT_INTERVAL, Scoreboard
from prefork.worker.heartbeat import Heartbeat
from prefork.worker.loop import loop_factory
from tests.harness.worker import LOOPS


@pytest.fixture
def slot():
    board = Scoreboard(1)
    yield board[0]
    board.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_held_up_loop_says_by_how_much_it_was_late(slot, loop):
    """The beat after a handler that blocked is what tells of it."""

    async def run() -> list[float]:
        beats: asyncio.Queue[float] = asyncio.Queue()
        heartbeat = Heartbeat(asyncio.get_running_loop(), slot, beats.put_nowait)
        first = await beats.get()
        assert slot.beat == first
        time.sleep(BEAT_INTERVAL * 3)  # noqa: ASYNC251 - the loop shall stand still
        late = slot.lag_at(time.monotonic())
        await beats.get()
        heartbeat.close()
        return [late, slot.lag]

    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        now, told = runner.run(run())

    assert now >= BEAT_INTERVAL * 1.9, "seen from outside, while it lasts"
    assert told >= BEAT_INTERVAL * 1.9


def test_a_closed_heartbeat_stands_still(slot):
    """Or it would beat for a worker that has ended its loop's work."""

    async def run() -> None:
        beats: list[float] = []
        heartbeat = Heartbeat(asyncio.get_running_loop(), slot, beats.append)
        heartbeat.close()
        await asyncio.sleep(BEAT_INTERVAL * 2)
        assert not beats

    asyncio.run(run())


def test_a_slot_that_never_beat_is_not_late(slot):
    """Its worker boots, and has a deadline of its own."""
    assert slot.lag_at(time.monotonic()) == 0.0
