"""Counters and rate limits between real processes, and the calculation behind the limits alone."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork import counters as module
from prefork.counters import LEAST, MOST, NAME_SIZE, NANO, Counters, Rate
from prefork.errors import CounterBusy, CounterError, CounterOverflow, PreforkError
from prefork.scoreboard import ENTRIES, Scoreboard
from tests.harness.children import CHILD_LIFETIME, Child, in_processes
from tests.harness.server import ROOT, suspend


@pytest.fixture
def board():
    board = Scoreboard(4)
    yield board
    board.close()


@pytest.fixture
def shared(board):
    return Counters(board)


class Holder(Child):
    """A child that stops for ever in the middle of a change of *counter*: before or after the word is written."""

    def __init__(self, counter, *, writes=False):
        reader, writer = os.pipe()
        self._go_on, go_on = os.pipe()[::-1]

        def act():
            os.close(self._go_on)
            cell = counter._cell
            with cell.guard:
                if writes:
                    cell.words[cell.index] += 1
                os.write(writer, b"x")
                os.read(go_on, 1)

        super().__init__(act)
        os.close(writer)
        os.close(go_on)
        os.read(reader, 1)
        os.close(reader)

    def go_on(self):
        os.close(self._go_on)
        self.result()

    def kill(self):
        super().kill()
        os.close(self._go_on)


# ---- counters ----


def test_a_counter_starts_at_zero_and_tells_its_value_after_each_change(shared):
    """What `add` returns is a number that nobody else was given."""
    counter = shared.counter("hits")

    assert (counter.value, counter.add(), counter.add(5), counter.add(-2), counter.value) == (0, 1, 6, 4, 4)
    assert (counter.set(10), counter.value) == (4, 10)


def test_the_same_name_is_the_same_counter(board, shared):
    """Also through another view of the same board."""
    shared.counter("a").add(2)

    assert (shared.counter("a").value, shared.counter("b").value) == (2, 0)
    assert Counters(board).counter("a").value == 2


def test_take_stops_at_the_limit(shared):
    """A refused take leaves the counter as it was."""
    counter = shared.counter("seats")

    assert [counter.take(3) for _ in range(5)] == [True, True, True, False, False]
    assert (counter.take(10, 8), counter.take(10, 7), counter.value) == (False, True, 10)
    with pytest.raises(ValueError, match=r"give back with add\(-1\)"):
        counter.take(10, -1)


@given(st.integers(LEAST, MOST), st.integers(LEAST, MOST))
def test_a_sum_is_exact_or_an_error(start, n):
    """It never wraps: a counter that turns negative would pass every limit."""
    board = Scoreboard(1)
    try:
        counter = Counters(board).counter("x")
        counter.set(start)
        if LEAST <= start + n <= MOST:
            assert counter.add(n) == counter.value == start + n
        else:
            with pytest.raises(CounterOverflow, match="64 bits"):
                counter.add(n)
            assert counter.value == start
    finally:
        board.close()


@pytest.mark.parametrize("number", [LEAST - 1, MOST + 1])
def test_a_counter_cannot_be_set_beyond_its_range(shared, number):
    """The same error as from `add`, and not the memory's."""
    with pytest.raises(CounterOverflow, match=str(number)):
        shared.counter("x").set(number)
    shared.counter("x").set(MOST)
    with pytest.raises(CounterOverflow):
        shared.counter("x").take(MOST + 1)


def test_what_is_no_number_changes_nothing_and_leaves_no_lock(shared):
    """An error of the application's must not be the next caller's."""
    counter = shared.counter("x")
    with pytest.raises(TypeError):
        counter.add("1")
    with pytest.raises(TypeError):
        counter.add(0.5)

    assert Child(counter.add).result() == 1


# ---- names ----


@pytest.mark.parametrize("name", ["x" * NAME_SIZE, "\u00e9" * (NAME_SIZE // 2), " ", "a b", "\U0001f600"])
def test_a_name_may_be_any_text_that_fits(board, shared, name):
    """Found again by a process that reads it from the table."""
    shared.counter(name).add()

    assert Counters(board).counter(name).value == 1


@pytest.mark.parametrize("name", ["x" * (NAME_SIZE + 1), "\u00e9" * (NAME_SIZE // 2) + "x"])
def test_a_name_that_is_too_long_is_an_error(shared, name):
    """Cut off, two names would become one counter."""
    with pytest.raises(CounterError, match="49 bytes of UTF-8: 48 are allowed"):
        shared.counter(name)


@pytest.mark.parametrize("name", ["", "a\0", "\ud800"])
def test_what_is_no_name_is_an_error(shared, name):
    """Names are padded with zeros, so one that ends with a zero would be another's."""
    with pytest.raises(CounterError, match="is not a name"):
        shared.counter(name)


def test_a_full_table_is_an_error_that_says_so(shared):
    """And the names that are there stay."""
    for number in range(ENTRIES):
        shared.counter(f"n{number}").add(number)

    with pytest.raises(CounterError, match="no room for 'another': all 1024 names are taken"):
        shared.counter("another")
    assert [shared.counter(f"n{number}").value for number in range(ENTRIES)] == list(range(ENTRIES))


def test_a_counter_is_no_rate_limit(board, shared):
    """An instant taken for a count would be a number of nineteen digits; in whatever process it was made."""
    shared.counter("a"), shared.rate_limit("b")

    for seen in (shared, Counters(board)):
        with pytest.raises(CounterError, match="'b' is a rate limit, not a counter"):
            seen.counter("b")
        with pytest.raises(CounterError, match="'a' is a counter, not a rate limit"):
            seen.rate_limit("a")


def test_a_name_whose_maker_was_killed_before_it_was_whole_is_free(board, shared):
    """The kind is written last."""
    board.view[board.entries_at : board.entries_at + 5] = b"half "

    assert shared.counter("x").add() == 1
    assert Counters(board).counter("x").value == 1


def test_processes_that_make_the_same_names_at_once_agree(shared):
    """Two entries of one name would be two counters, each with half of the hits."""

    def act():
        for number in random.sample(range(50), 50):
            shared.counter(f"n{number}").add()

    in_processes(4, act)

    assert [shared.counter(f"n{number}").value for number in range(50)] == [4] * 50


# ---- between processes ----


def test_no_add_of_four_processes_is_lost(shared):
    """Two that read the same value would write the same sum."""
    counter = shared.counter("x")

    def act():
        for _ in range(10_000):
            counter.add()

    in_processes(4, act)

    assert counter.value == 40_000


def test_four_processes_take_exactly_the_limit(shared):
    """Asked first and added afterwards it would be a few more."""
    counter = shared.counter("x")

    taken = in_processes(4, lambda: sum(counter.take(10_000) for _ in range(5_000)))

    assert sum(taken) == counter.value == 10_000


def in_threads(act, count=4):
    """Run *act* in *count* threads that interrupt one another as often as the interpreter can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=act) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)


def test_threads_of_several_processes_lose_nothing(board, shared):
    """A record lock belongs to the process: one thread would release it under another. Each thread has a view of its own."""

    def act():
        counter = Counters(board).counter("x")
        for _ in range(2_000):
            counter.add()

    in_processes(3, lambda: in_threads(act))

    assert shared.counter("x").value == 24_000


def test_threads_share_a_rate_limit(shared):
    """A thread that calculates is interrupted in the middle."""
    limit = shared.rate_limit("x", limit=2_000, per=1e6)
    allowed = []

    in_threads(lambda: allowed.append(sum(limit.allow() for _ in range(2_000))))

    assert sum(allowed) == 2_000


def test_a_fresh_interpreter_attaches_by_descriptor(board, shared):
    """What `exec` starts has none of our memory, but may be given the descriptor."""
    shared.counter("old").add(7)
    board[2].requests = 3
    code = """
import sys
from prefork.counters import Counters
from prefork.scoreboard import Scoreboard
board = Scoreboard.attach(int(sys.argv[1]))
counters = Counters(board)
print(len(board), board[2].requests, counters.counter("old").add(), counters.counter("new").add(5))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(board.fileno())],
        pass_fds=[board.fileno()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=CHILD_LIFETIME,
    )

    assert (done.stdout, done.stderr) == ("4 3 8 5\n", "")
    assert (shared.counter("old").value, shared.counter("new").value) == (8, 5)


# ---- death and stopping ----


@pytest.mark.parametrize("writes", [False, True], ids=["before the word is written", "after it"])
def test_a_process_killed_in_the_middle_of_an_add_leaves_the_old_or_the_new_value(shared, writes):
    """Nothing is lost but that one add, and the next one does not wait."""
    counter = shared.counter("x")
    counter.add(10)
    Holder(counter, writes=writes).kill()

    assert counter.add() == 11 + writes


def test_a_process_killed_while_it_makes_a_name_blocks_nobody(board, shared):
    """The table has a lock as well."""
    go_on, wait = os.pipe()[::-1]
    reader, writer = os.pipe()

    def act():
        start = board.entries_at + ENTRIES * module.ENTRY_SIZE
        with module.Guard(board, start, ENTRIES, "the table"):
            os.write(writer, b"x")
            os.read(wait, 1)

    child = Child(act)
    os.read(reader, 1)
    child.kill()
    for descriptor in (go_on, wait, reader, writer):
        os.close(descriptor)

    assert shared.counter("x").add() == 1


def test_processes_killed_at_random_never_block_the_others_nor_corrupt_the_sum(board, shared):
    """Each writes down every add that returned; what was added beyond that is one for each that was killed."""
    counter = shared.counter("x")
    rounds = 40

    def begin(slot):
        def act():
            while True:
                counter.add()
                slot.requests += 1

        return Child(act)

    children = [begin(slot) for slot in board]
    own = 0
    try:
        for _ in range(rounds):
            goal = counter.value + random.randrange(1, 2_000)
            while counter.value < goal:
                os.sched_yield()
            victim = random.randrange(len(children))
            children[victim].kill()
            counter.add()  # CounterBusy, if the dead one had kept its lock
            own += 1
            children[victim] = begin(board[victim])
    finally:
        for child in children:
            child.kill()

    written_down = sum(slot.requests for slot in board) + own
    assert 0 <= counter.value - written_down <= rounds + len(children)


def test_a_stopped_holder_is_named_and_the_others_go_on(shared, monkeypatch):
    """Nobody waits for ever; and once it is continued all is as before."""
    counter, other = shared.counter("x"), shared.counter("y")
    counter.add(3)
    holder = Holder(counter)
    suspend(holder.pid)
    try:
        begun = time.monotonic()
        with pytest.raises(CounterBusy, match=rf"'x' is locked by pid {holder.pid} for more than 1 s") as caught:
            counter.add()
        waited = time.monotonic() - begun
        assert (counter.value, other.add()) == (3, 1)
    finally:
        os.kill(holder.pid, signal.SIGCONT)
    holder.go_on()

    assert caught.value.pid == holder.pid
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, PreforkError)
    assert waited >= 1.0
    assert counter.add() == 4


def test_a_thread_that_holds_the_lock_for_too_long_is_named_as_well(shared, monkeypatch):
    """A signal handler that counts in the middle of the same count would otherwise wait for itself."""
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.05)
    counter = shared.counter("x")
    with counter._cell.guard:
        with pytest.raises(CounterBusy, match="another thread of this process") as caught:
            counter.add()

    assert caught.value.pid == os.getpid()
    assert counter.add() == 1


def test_a_lock_that_a_thread_held_at_the_fork_is_free_in_the_child(shared):
    """In the child that thread does not exist, and would never release it."""
    counter = shared.counter("x")
    held, release = threading.Event(), threading.Event()

    def hold():
        with counter._cell.guard:
            held.set()
            release.wait(CHILD_LIFETIME)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(CHILD_LIFETIME)
    go_on, wait = os.pipe()[::-1]

    def act():
        os.close(go_on)
        os.read(wait, 1)
        return counter.add()

    child = Child(act)
    release.set()
    thread.join()
    os.close(go_on)
    os.close(wait)

    assert child.result() == 1


def test_a_lock_outlasts_what_other_processes_close(board, shared):
    """Closing any descriptor of the file drops a process's record locks: its own only."""
    counter = shared.counter("x")
    with counter._cell.guard:
        Child(board.close).result()
        subprocess.run([sys.executable, "-c", "import os; os.close(int(os.sys.argv[1]))", str(board.fileno())],
                       pass_fds=[board.fileno()], check=True, timeout=CHILD_LIFETIME)  # fmt: skip
        seen = Child(counter._cell.guard._holder).result()

    assert seen == os.getpid()
    assert Child(counter._cell.guard._holder).result() is None


# ---- rate limits ----

rates = st.builds(Rate, st.integers(1, 10**7), st.floats(1e-3, 1e6))


def use_up(rate, earned_at, now, cost=1):
    """Spend as often as it is allowed: how much that was, and the state after it."""
    total = 0
    while True:
        is_allowed, earned_at = rate.spend(earned_at, now, cost)
        if not is_allowed:
            return total, earned_at
        total += cost


def test_a_limit_is_given_out_at_once_and_earned_back_one_by_one():
    """100 in 60 seconds: one in 600 ms after the burst."""
    rate, now = Rate(100, 60), 5 * NANO
    allowed, earned_at = use_up(rate, 0, now)

    assert allowed == 100
    assert rate.wait(earned_at, now, 1) == 600_000_000
    assert use_up(rate, earned_at, now + 599_999_999)[0] == 0
    assert use_up(rate, earned_at, now + 600_000_000)[0] == 1


@given(st.integers(1, 300), st.floats(1e-6, 1e6), st.integers(0, 2**62), st.data())
def test_the_whole_limit_is_there_at_first_and_no_more(limit, per, now, data):
    """Rounded prices must not cost the last one; for each cost as many as the limit holds."""
    cost = data.draw(st.integers(1, limit))

    allowed, _ = use_up(Rate(limit, per), data.draw(st.integers(0, now)), now, cost)

    assert allowed == limit // cost * cost


@given(
    st.integers(1, 1000),
    st.floats(1e-3, 1e4),
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 3)), min_size=1, max_size=200),
)
def test_no_span_has_more_than_the_limit_and_what_it_earned(limit, per, steps):
    """The promise, over each stretch between two that were allowed."""
    rate, now, earned_at = Rate(limit, per), 10**12, 0
    allowed = []
    for pause, cost in steps:
        now += int(pause * rate.span / limit)
        is_allowed, earned_at = rate.spend(earned_at, now, cost)
        if is_allowed:
            allowed.append((now, cost))

    for first in range(len(allowed)):
        total = 0
        for instant, cost in allowed[first:]:
            total += cost
            # Costs that differ are rounded differently: below one in all, and so no whole one more.
            assert total * rate.span < (limit + 1) * rate.span + (instant - allowed[first][0]) * limit


@given(rates, st.integers(0, 2**62), st.data())
def test_what_waits_as_long_as_told_is_allowed_and_a_moment_earlier_is_not(rate, now, data):
    """A client that obeys Retry-After is not refused a second time."""
    cost = data.draw(st.integers(1, rate.limit))
    earned_at = now + data.draw(st.integers(-(10**15), rate._most_ahead))
    wait = rate.wait(earned_at, now, cost)

    assert rate.spend(earned_at, now + wait, cost)[0]
    if wait:
        assert not rate.spend(earned_at, now + wait - 1, cost)[0]


@given(rates, st.integers(0, 2**62))
def test_a_limit_that_was_longer_before_keeps_nobody_out_for_longer_than_its_span(rate, now):
    """A reload may bring another limit under the same name: one per minute is not to wait for yesterday's per month."""
    earned_at = now + 10**17
    is_allowed, earned_at = rate.spend(earned_at, now, 1)

    assert not is_allowed
    assert rate.spend(earned_at, now + rate.wait(earned_at, now, 1), 1)[0]
    assert use_up(Rate(5, 1.0), Rate(5, 1.0).spend(now + 10**17, now, 1)[1], now + NANO)[0] == 5


@pytest.mark.parametrize(
    ("limit", "per", "sentence"),
    [(0, 60, "at least 1"), (-1, 60, "at least 1"), (1, 0, "above 0"), (1, inf, "at most"), (1, float("nan"), "above")],
)
def test_a_limit_that_makes_no_sense_is_an_error(shared, limit, per, sentence):
    """Before it refuses everybody."""
    with pytest.raises(ValueError, match=sentence):
        shared.rate_limit("x", limit, per)


def test_what_costs_more_than_the_limit_is_never_allowed(shared):
    """And says so: to come again later would not help."""
    limit = shared.rate_limit("x", limit=10, per=60)

    assert (limit.allow(11), limit.retry_after(11)) == (False, inf)
    assert (limit.allow(10), limit.allow()) == (True, False)
    assert 0 < limit.retry_after() <= 6
    with pytest.raises(ValueError, match="a cost of 0"):
        limit.allow(0)


def test_a_refusal_costs_nothing(shared):
    """Who asks too often is not kept out for longer."""
    limit = shared.rate_limit("x", limit=5, per=3600)
    assert [limit.allow() for _ in range(5)] == [True] * 5
    wait = limit.retry_after()

    assert [limit.allow() for _ in range(100)] == [False] * 100
    assert limit.retry_after() <= wait


def test_four_processes_are_never_allowed_more_than_the_limit_and_what_time_earned(shared):
    """One bucket for all, however they interleave."""
    limit = shared.rate_limit("x", limit=200, per=0.5)
    begun = time.monotonic()

    def act():
        end = begun + 0.5
        allowed = 0
        while time.monotonic() < end:
            allowed += limit.allow()
        return allowed

    allowed = sum(in_processes(4, act))
    elapsed = time.monotonic() - begun

    assert 200 < allowed <= 200 + elapsed * 400


# ---- the board that holds them ----


def test_a_boards_memory_cannot_be_cut_off(board):
    """A process that reads behind the end of a file is killed by SIGBUS."""
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(board.fileno(), size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(board.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert not os.get_inheritable(board.fileno())


def test_what_is_no_board_is_not_attached():
    """A descriptor's number in the environment may be stale."""
    descriptor = os.memfd_create("x")
    try:
        with pytest.raises(PreforkError, match=f"descriptor {descriptor} is not a scoreboard: it has 0 bytes"):
            Scoreboard.attach(descriptor)
    finally:
        os.close(descriptor)


def test_a_closed_board_leaves_no_descriptor():
    """`serve` may be called more than once in a program."""

    def descriptors():
        return set(os.listdir("/proc/self/fd"))

    before = descriptors()
    board = Scoreboard(2)
    counter = Counters(board).counter("x")
    board.close()
    board.close()

    assert descriptors() == before
    assert board.fileno() == -1
    with pytest.raises(ValueError):
        counter.add()


def test_a_forgotten_board_gives_its_descriptor_back():
    """As it gave back its memory when that had no descriptor."""
    board = Scoreboard(1)
    descriptor = board.fileno()
    del board

    with suppress(OSError):
        assert "prefork" not in os.readlink(f"/proc/self/fd/{descriptor}")
