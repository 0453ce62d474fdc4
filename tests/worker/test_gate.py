"""Who accepts, when several could: the decisions, the gate on a clock of the test's own, and real workers."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.scoreboard import ACCEPTING, Scoreboard
from prefork.worker import gate as module
from prefork.worker.gate import (
    EXPECTATION,
    GLANCES,
    LONG_TURN,
    LONGEST_WAIT,
    LOOK,
    SILENCE,
    STALE,
    TOO_MANY,
    TOO_MUCH,
    Gate,
    Verdict,
    decide,
    excess,
)
from tests.harness.client import Client
from tests.harness.server import DEADLINE, Server
from tests.harness.worker import LOOPS

PLAIN = "tests.apps.plain:app"

LOADS = st.integers(0, 10_000)


# ---- the decisions ----


def test_who_is_full_never_takes_and_nobody_else_waits_longer_than_the_longest_wait():
    """Every combination: full stands above the wait's end, and that above all else."""
    for load, least, full, expecting, turn, waited in product(
        (0, 1, 15, 16, 17, 400), (0, 1, 16, 400), (True, False), (True, False), (0.0, 1.0), (0.0, LONGEST_WAIT)
    ):
        verdict = decide(load, least, full, expecting, turn, waited)
        if full:
            assert verdict is Verdict.FULL
        elif waited:
            assert verdict is Verdict.TAKE
        elif expecting or turn > LONG_TURN:
            assert verdict is Verdict.WAIT
        else:
            assert (verdict is Verdict.TAKE) == (load <= least + least // 16)


@given(load=LOADS, least=LOADS)
def test_the_least_loaded_always_takes(load, least):
    """Whatever the numbers, the connection is left to somebody who will have it."""
    least = min(load, least)

    assert decide(least, least, False, False, 0.0, 0.0) is Verdict.TAKE


@given(workers=st.integers(1, 40), connections=st.integers(0, 600), seed=st.integers())
def test_connections_that_are_left_to_the_least_spread_evenly(workers, connections, seed):
    """Whoever wakes first, nobody ends with more than one, or a sixteenth, above another."""
    wakes, loads = Random(seed), [0] * workers
    while connections:
        who = wakes.randrange(workers)
        if decide(loads[who], min(loads), False, False, 0.0, 0.0) is Verdict.TAKE:
            loads[who] += 1
            connections -= 1

    assert max(loads) <= min(loads) + min(loads) // 16 + 1


@given(loads=st.lists(LOADS, min_size=1, max_size=50))
def test_only_who_is_clearly_above_the_mean_gives_up_connections_and_never_falls_below_it(loads):
    """Else two workers would close connections for each other for ever."""
    mean = sum(loads) / len(loads)
    for load in loads:
        too_many = excess(load, loads)
        assert bool(too_many) == (load > mean * TOO_MUCH and load >= mean + TOO_MANY)
        assert load - too_many >= mean or not too_many


def test_a_worker_alone_has_no_excess():
    """Before it has joined, and when all others hang, there is nobody to give to."""
    assert excess(100, []) == excess(100, [100]) == 0


# ---- the gate, on a clock of ours ----


class Loop:
    """As much of an event loop as the gate uses; its turns take no time, and its clock is ours."""

    def __init__(self) -> None:
        self.now = time.monotonic() + 1000  # of a turn that has just begun
        self.readers: dict[int, Callable[[], object]] = {}
        self.timers: list[tuple[float, Timer]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        timer = Timer(callback)
        self.timers.append((self.now + delay, timer))
        return timer

    def add_reader(self, descriptor: int, callback: Callable[..., object], *arguments: object) -> None:
        self.readers[descriptor] = lambda: callback(*arguments)

    def remove_reader(self, descriptor: int) -> None:
        del self.readers[descriptor]

    def advance(self, seconds: float) -> None:
        """The time passes, a tenth of a millisecond a turn, and timers that are due are called."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.0001
            for entry in [entry for entry in self.timers if entry[0] <= self.now]:
                self.timers.remove(entry)
                if not entry[1].is_cancelled:
                    entry[1].callback()

    @property
    def pending(self) -> int:
        return sum(not timer.is_cancelled for _, timer in self.timers)


class Timer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Door:
    """A gate with one listening socket, in front of which *waiting* connections wait."""

    def __init__(self, board: Scoreboard, index: int = 0, **settings: object) -> None:
        self.loop = Loop()
        self.slot = board[index]
        self.waiting = self.taken = 0
        self.slot.beat = 1000.0
        self.sheds: list[bool] = []
        self.gate = Gate(self.loop, board, self.slot, workers=len(board), set_shedding=self.sheds.append, **settings)
        self.gate.watch(7, self.take)

    def take(self) -> bool:
        if not self.waiting:
            return False
        self.waiting -= 1
        self.taken += 1
        self.slot.load += 1
        return True

    def turn(self, count: int = 1) -> None:
        """The loop looks at its sockets."""
        for _ in range(count):
            self.loop.now += 0.00001
            if self.waiting and 7 in self.loop.readers:
                self.loop.readers[7]()


@pytest.fixture
def board() -> Scoreboard:
    return Scoreboard(4)


def sibling(board: Scoreboard, index: int, load: int, beat: float = 1000.0) -> None:
    board[index].load = load - ACCEPTING
    board[index].beat = beat


def test_the_gate_takes_what_a_level_worker_finds(board):
    """Without a delay of any kind."""
    sibling(board, 1, 0)
    door = Door(board)
    door.waiting = 1
    door.turn()

    assert door.taken == 1


def test_the_gate_takes_one_connection_until_its_first_request_is_read(board):
    """The second might have to wait for the first one's handler while another worker is free."""
    sibling(board, 1, 5)
    door = Door(board)
    door.waiting = 2
    door.turn(GLANCES)
    assert door.taken == 1

    door.gate.on_first_request()
    door.turn()
    assert door.taken == 2


def test_a_silent_client_is_not_expected_for_longer_than_two_milliseconds(board):
    """Else one that connects and says nothing would close the door for everybody behind it."""
    sibling(board, 1, 5)
    door = Door(board)
    door.waiting = 2
    door.turn(GLANCES + 2)
    door.loop.advance(EXPECTATION + 2 * LOOK)

    assert door.taken == 2


def test_who_holds_more_waits_three_milliseconds_and_takes_the_connection_then(board):
    """The least loaded may be stopped, or at work: a connection is never lost between two workers."""
    sibling(board, 1, 0)
    door = Door(board)
    door.slot.load += 1
    door.waiting = 1
    door.turn(GLANCES + 1)
    assert 7 not in door.loop.readers, "the loop would spin"
    door.loop.advance(LONGEST_WAIT / 2)
    assert door.taken == 0

    door.loop.advance(LONGEST_WAIT / 2 + 2 * LOOK)
    assert door.taken == 1


def test_a_worker_that_let_its_turn_pass_is_not_waited_for_again_until_it_moves(board):
    """A stopped worker costs three milliseconds a few times, not for each connection."""
    sibling(board, 1, 0)
    door = Door(board)
    door.slot.load += 1
    start = door.loop.now
    while door.loop.now < start + SILENCE + 3 * LONGEST_WAIT:
        door.waiting = 1
        door.turn(GLANCES + 1)
        door.loop.advance(LONGEST_WAIT + 2 * LOOK)
        door.gate.on_first_request()
    taken = door.taken

    door.waiting = 1
    door.turn()
    assert door.taken == taken + 1

    board[1].beat += 0.1
    door.gate.on_first_request()
    door.waiting = 1
    door.turn(GLANCES + 1)
    assert door.taken == taken + 1, "it beats again, so it counts"


def test_a_connection_that_a_sibling_took_is_not_taken_for_the_next_one(board):
    """Nobody tells us that it is gone; the next one has not waited since then."""
    sibling(board, 1, 0)
    door = Door(board)
    door.slot.load += 1
    door.waiting = 1
    door.turn()
    door.waiting = 0
    door.loop.advance(LONGEST_WAIT * 2)
    door.waiting = 1
    door.turn()

    assert door.taken == 0


def test_a_waiting_worker_takes_up_at_once_when_it_is_level(board):
    """Its own connection ended: nobody has less now."""
    sibling(board, 1, 0)
    door = Door(board)
    door.slot.load += 1
    door.waiting = 1
    door.turn(GLANCES + 1)
    door.slot.load -= 1
    door.gate.on_left()
    door.turn()

    assert door.taken == 1


@pytest.mark.parametrize(
    ("load", "beat"),
    [(0, 1000.0), (3, 1000.0), (-ACCEPTING, 1000.0 - STALE - 0.1)],
    ids=["an empty slot, or one that boots", "one that drains", "a dead one, or one that hangs"],
)
def test_who_does_not_accept_is_not_waited_for(board, load, beat):
    """Each would have the least, and never come."""
    board[1].load, board[1].beat = load, beat
    sibling(board, 2, 1)
    door = Door(board)
    door.slot.load += 1
    door.gate.survey(1000.0)
    door.waiting = 1
    door.turn()

    assert door.taken == 1


def test_who_has_no_thread_left_takes_nothing_and_is_not_waited_for(board):
    """However long it lasts; with the first free thread it is back."""
    is_full = True
    door = Door(board, is_full=lambda: is_full)
    door.waiting = 1
    door.turn()
    door.loop.advance(1.0)
    assert (door.taken, door.slot.load) == (0, 0)

    door.gate.on_room()
    assert door.slot.load == 0, "there is no room yet"
    is_full = False
    door.gate.on_room()
    door.turn()
    assert (door.taken, door.slot.load) == (1, 1 - ACCEPTING)


@pytest.mark.parametrize("turns", range(GLANCES + 2))
def test_a_closed_gate_leaves_no_timer_and_no_reader(board, turns):
    """Whatever it was about to do; siblings do not wait for it from then on."""
    sibling(board, 1, 0)
    door = Door(board)
    door.slot.load += 1
    door.waiting = 1
    door.turn(turns)
    door.gate.close()

    assert (door.loop.pending, door.loop.readers, door.slot.load) == (0, {}, 1)
    door.gate.close()
    door.gate.survey(2000.0)
    door.gate.on_left()
    door.gate.on_first_request()
    door.gate.on_room()
    assert (door.loop.pending, door.loop.readers, door.slot.load) == (0, {}, 1)


def test_a_socket_that_is_paused_stays_out_while_the_gate_opens(board):
    """Out of descriptors, the server pauses one; the gate's comings and goings do not wake it."""
    sibling(board, 1, 0)
    door = Door(board)
    door.slot.load += 1
    door.waiting = 1
    door.turn(GLANCES + 1)
    door.gate.unwatch(7)
    door.loop.advance(LONGEST_WAIT + 2 * LOOK)
    assert (door.taken, door.loop.readers) == (0, {})

    door.gate.watch(7, door.take)
    assert 7 in door.loop.readers


def test_a_slot_that_came_into_use_later_counts(board):
    """After TTIN there are more workers than at first."""
    sibling(board, 1, 1)
    sibling(board, 3, 0)
    loop = Loop()
    gate = Gate(loop, board, board[0], workers=2)
    board[0].load += 1
    board[0].beat = 1000.0
    taken: list[bool] = []
    gate.watch(7, lambda: taken.append(True) or True)
    gate.survey(1000.0)
    loop.readers[7]()

    assert not taken


# ---- kept-alive connections ----


def test_too_many_connections_are_closed_a_few_with_each_beat(board, monkeypatch):
    """Clients come back at once: all at a time would be a burst."""
    monkeypatch.setattr(module.random, "random", lambda: 0.5)
    sibling(board, 1, 0)
    door = Door(board)
    door.slot.load += 100
    door.gate.survey(1000.0)

    assert door.sheds == [True]
    assert [door.gate.sheds() for _ in range(10)] == [True] * 5 + [False] * 5
    assert door.sheds == [True, False], "so that answers are not asked for in vain"


def test_a_level_worker_closes_nothing(board):
    """Up to a quarter above the mean, and one or two connections, is level."""
    sibling(board, 1, 8)
    door = Door(board)
    door.slot.load += 10
    door.gate.survey(1000.0)

    assert door.sheds == [False]
    assert not door.gate.sheds()


# ---- real workers ----


def open_one_by_one(port: int, count: int, leave: ExitStack) -> Counter[str]:
    """Connections by worker; all stay open."""
    shares: Counter[str] = Counter()
    for _ in range(count):
        shares[leave.enter_context(Client(port)).get("/worker").text] += 1
    return shares


def best_of(fullest: Callable[[], int], wanted: int) -> int:
    """The lowest of some rounds: on a busy machine a worker may get no processor when it is its turn."""
    best = fullest()
    for _ in range(7):
        if best > wanted:
            best = min(best, fullest())
    return best


@pytest.mark.parametrize("loop", LOOPS)
def test_connections_one_after_the_other_spread_evenly(loop):
    """Without the gate the worker that slept last wakes first: it gets two thirds of them or more."""
    with Server(PLAIN, workers=4, loop=loop) as server:
        server.wait_ready(4)

        def fullest() -> int:
            with ExitStack() as leave:
                return max(open_one_by_one(server.port, 48, leave).values())

        assert best_of(fullest, 16) <= 16


@pytest.mark.parametrize("loop", LOOPS)
def test_connections_at_once_spread_evenly(loop):
    """A burst is in the queue before anybody has woken."""
    with Server(PLAIN, workers=4, loop=loop) as server:
        server.wait_ready(4)

        def fullest() -> int:
            with ExitStack() as leave:
                clients = [leave.enter_context(Client(server.port)) for _ in range(64)]
                for client in clients:
                    client.send(b"GET /worker HTTP/1.1\r\nHost: t\r\n\r\n")
                return max(Counter(client.read().text for client in clients).values())

        assert best_of(fullest, 17) <= 17


def test_a_stopped_worker_with_the_fewest_connections_stops_nobody():
    """It counts as the least until its heart is missed; the others wait three milliseconds and go on."""
    with Server(PLAIN, workers=3) as server, ExitStack() as leave:
        server.wait_ready(3)
        stopped = server.worker(1)
        os.kill(stopped, signal.SIGSTOP)
        try:
            shares = open_one_by_one(server.port, 30, leave)
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert len(shares) == 2
        assert max(shares.values()) <= 22, shares


def test_a_killed_worker_is_not_waited_for_and_its_replacement_is_filled():
    """Nobody clears what it wrote but the master, and only when it starts another."""
    with Server(PLAIN, workers=3) as server, ExitStack() as leave:
        server.wait_ready(3)
        open_one_by_one(server.port, 30, leave)
        os.kill(server.worker(2), signal.SIGKILL)
        server.worker(4)
        shares = open_one_by_one(server.port, 12, leave)
        assert shares[f"4 {server.worker(4)}"] >= 6, shares


def test_a_draining_worker_is_not_waited_for():
    """It holds one connection, and would be the least for as long as that lasts."""
    with Server(PLAIN, workers=3, graceful_timeout=2) as server, ExitStack() as leave:
        server.wait_ready(3)
        clients = [leave.enter_context(Client(server.port)) for _ in range(9)]
        for client in clients:
            client.send(b"GET /announced?seconds=2 HTTP/1.1\r\nHost: t\r\n\r\n")
        server.wait_for("announced", 9)
        draining = server.worker(3)
        os.kill(draining, signal.SIGTERM)
        shares = open_one_by_one(server.port, 30, leave)
        assert shares.pop(f"3 {draining}", 0) <= 3, "it was told by a signal, and may have taken one meanwhile"
        assert len(shares) == 2
        assert max(shares.values()) <= 22
        for client in clients:
            client.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_silent_clients_stop_nobody(loop):
    """Each is expected to ask for something, for two milliseconds."""
    with Server(PLAIN, workers=2, loop=loop) as server, ExitStack() as leave:
        server.wait_ready(2)
        for _ in range(10):
            leave.enter_context(Client(server.port))
        shares = open_one_by_one(server.port, 10, leave)
        assert sum(shares.values()) == 10
        assert max(shares.values()) <= 8, shares


def test_kept_alive_connections_move_to_a_worker_that_came_later():
    """They are placed once; only closing some, now and then, ever gives a new worker its share."""
    with Server(PLAIN, workers=2) as server, ExitStack() as leave:
        server.wait_ready(2)
        clients = [leave.enter_context(Client(server.port)) for _ in range(40)]
        server.signal(signal.SIGTTIN)
        third = f"3 {server.worker(3)}"
        end = time.monotonic() + DEADLINE
        share = 0
        while share < 6 and time.monotonic() < end:
            share = 0
            for number, client in enumerate(clients):
                answer = client.get("/worker")
                share += answer.text == third
                if answer.headers.get("connection") == "close":
                    clients[number] = leave.enter_context(Client(server.port))
        assert share >= 6
