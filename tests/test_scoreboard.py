"""The scoreboard, with real forks: what one process writes, another reads."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.errors import ConfigError
from prefork.scoreboard import SLOT_SIZE, Scoreboard, Slot

COUNTS = ["pid", "generation", "opened", "closed", "requests", "begun"]
INSTANTS = ["started_at", "deadline"]


@pytest.fixture
def board():
    board = Scoreboard(3)
    yield board
    board.close()


def in_child(act):
    """Run *act* in a forked child and wait for its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_new_slot_is_all_zero(board):
    """Zero means nobody and never, so nothing has to be initialised before the first fork."""
    assert [getattr(slot, name) for slot in board for name in COUNTS + INSTANTS] == [0] * 3 * len(COUNTS + INSTANTS)


def test_the_parent_sees_what_a_child_wrote(board):
    """The whole point: the master reads a worker's counters without asking it."""

    def act():
        board[1].requests += 41
        board[1].requests += 1
        board[1].deadline = 12345.678

    in_child(act)

    assert (board[1].requests, board[1].deadline) == (42, 12345.678)


def test_a_child_sees_what_the_parent_wrote_after_the_fork(board):
    """A private copy would pass every test that writes before it forks."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(reader, 1)
        os._exit(board[2].generation)
    board[2].generation = 7
    os.write(writer, b"x")
    os.close(reader)
    os.close(writer)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_what_a_killed_child_counted_stays_readable(board):
    """The master takes a dead worker's connections and requests from here, however it died."""
    pid = os.fork()
    if pid == 0:
        board[0].begun = 5
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)

    assert board[0].in_flight == 5


@pytest.mark.parametrize("name", COUNTS + INSTANTS)
def test_each_field_has_a_word_of_its_own(board, name):
    """Two fields at one index would be a worker overwriting its own deadline."""
    setattr(board[1], name, 9)
    others = [getattr(board[1], other) for other in COUNTS + INSTANTS if other != name]

    assert getattr(board[1], name) == 9
    assert others == [0] * (len(COUNTS + INSTANTS) - 1)


def test_slots_do_not_overlap(board):
    """A slot's neighbours belong to other writers."""
    for name in COUNTS + INSTANTS:
        setattr(board[1], name, 1)

    assert [getattr(board[index], name) for index in (0, 2) for name in COUNTS + INSTANTS] == [0] * 2 * len(
        COUNTS + INSTANTS
    )


def test_reset_clears_one_slot_only(board):
    """A replacement starts from zero while its siblings go on counting."""
    board[0].requests = board[1].requests = 3
    board[0].deadline = board[1].deadline = 1.5
    board[0].reset()

    assert (board[0].requests, board[0].deadline) == (0, 0.0)
    assert (board[1].requests, board[1].deadline) == (3, 1.5)


def test_connections_are_those_opened_and_not_closed(board):
    """Two counters that only grow, so that each has one writer."""
    board[0].opened, board[0].closed = 7, 3

    assert board[0].connections == 4


def test_slots_are_whole_pairs_of_cache_lines():
    """Two workers on one line would slow each other down with every request."""
    assert SLOT_SIZE % 128 == 0


@given(count=st.integers(-(2**63), 2**63 - 1), instant=st.floats(allow_nan=False))
def test_a_field_gives_back_what_was_stored(count, instant):
    """Eight bytes hold any count and any time exactly."""
    slot = Slot(0, memoryview(bytearray(SLOT_SIZE)))
    slot.requests = count
    slot.deadline = instant

    assert (slot.requests, slot.deadline) == (count, instant)


def test_a_board_knows_its_slots(board):
    """Slots are numbered from zero and know their number."""
    assert len(board) == 3
    assert [slot.index for slot in board] == [0, 1, 2]
    with pytest.raises(IndexError):
        board[3]


def test_a_board_without_slots_is_refused():
    """mmap(2) would fail with a bare EINVAL."""
    with pytest.raises(ConfigError, match="at least 1 slot, not 0"):
        Scoreboard(0)


def test_a_closed_board_lets_go_of_its_memory(board):
    """An exported view would keep the mapping, and BufferError would come at interpreter exit."""
    other = Scoreboard(2)
    slot = other[0]
    other.close()

    with pytest.raises(ValueError, match="released"):
        slot.pid
