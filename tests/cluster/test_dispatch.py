"""The dispatcher alone: whom it chooses, and what becomes of a connection that was not taken."""

from __future__ import annotations

import errno
import socket
from collections import Counter

import pytest

from prefork.cluster.dispatch import MOST_UNACKNOWLEDGED, Dispatcher
from prefork.ipc.channel import Channel
from prefork.scoreboard import Scoreboard


class Handle:
    """What the dispatcher knows of a worker, with the worker's end of the channel."""

    def __init__(self, id):
        self.id, self.slot = id, id - 1
        self.channel, self.theirs = Channel.pair()

    def describe(self):
        return f"worker {self.id}"

    def offers(self):
        """Numbers of the connections that came since the last look."""
        numbers = []
        while messages := self.theirs.receive():
            for message in messages:
                message.fds.close()
                numbers.append(message.body[0])
        return numbers

    def die(self):
        self.theirs.close()


class Later:
    """Calls that the reactor would make."""

    def __init__(self):
        self.calls = []

    def __call__(self, delay, call):
        self.calls.append(call)


class House:
    """A dispatcher with *count* workers, and the clients' ends of what it was offered."""

    def __init__(self, count):
        self.board = Scoreboard(count)
        self.later = Later()
        self.dispatcher = Dispatcher(self.board, self.later)
        self.handles = [Handle(id) for id in range(1, count + 1)]
        self.clients = []
        for handle in self.handles:
            self.dispatcher.join(handle)

    def offer(self, count=1):
        for _ in range(count):
            client, connection = socket.socketpair()
            self.clients.append(client)
            self.dispatcher.offer(connection, 0)

    def close(self):
        self.dispatcher.close()
        for handle in self.handles:
            handle.channel.close()
            handle.theirs.close()
        for client in self.clients:
            client.close()
        self.board.close()


@pytest.fixture
def house(request):
    made = House(getattr(request, "param", 2))
    yield made
    made.close()


def has_ended(client):
    """Whether no process holds the other end any more."""
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False


@pytest.mark.parametrize("house", [4], indirect=True)
def test_a_burst_is_dealt_out_in_equal_shares(house):
    """Also though nothing was acknowledged yet: what is on its way counts."""
    house.offer(64)

    assert [len(handle.offers()) for handle in house.handles] == [16, 16, 16, 16]


def test_the_worker_whose_connections_ended_gets_the_next_ones(house):
    """Not in turn, but to the one with the fewest."""
    house.offer(6)
    first, second = house.handles
    first.offers(), second.offers()
    house.board[first.slot].closed = 2

    house.offer(2)

    assert (len(first.offers()), len(second.offers())) == (2, 0)


def test_what_a_worker_refuses_goes_to_another(house):
    """It drains, and the master has not heard of it yet."""
    first, second = house.handles
    house.offer(2)
    mine = first.offers() + second.offers()
    house.dispatcher.leave(first)

    house.dispatcher.settle(first, mine[0], accepted=False)

    assert second.offers() == [mine[0]]


def test_what_a_dead_worker_did_not_acknowledge_goes_to_another(house):
    """And what it did acknowledge does not: it held that."""
    first, second = house.handles
    house.offer(4)
    taken, untaken = first.offers()
    second.offers()
    house.dispatcher.settle(first, taken, accepted=True)

    house.dispatcher.lose(first)

    assert second.offers() == [untaken]


def test_with_nobody_to_take_them_connections_wait_for_the_next_worker(house):
    """All workers are dead for a moment: nobody is turned away."""
    for handle in house.handles:
        house.dispatcher.lose(handle)
    assert not house.dispatcher.can_take
    house.offer(3)
    third = Handle(1)
    house.handles.append(third)

    house.dispatcher.join(third)

    assert len(third.offers()) == 3


def test_a_worker_that_died_unheard_is_passed_over(house):
    """Its channel breaks before its exit is told."""
    first, second = house.handles
    first.die()

    house.offer(4)

    assert len(second.offers()) == 4


def test_a_worker_that_does_not_acknowledge_is_given_a_bounded_number(house):
    """The rest is left to the kernel's backlog."""
    house.offer(2 * MOST_UNACKNOWLEDGED)

    assert not house.dispatcher.can_take
    assert Counter(len(handle.offers()) for handle in house.handles) == {MOST_UNACKNOWLEDGED: 2}


def test_without_descriptors_connections_wait_and_no_worker_is_blamed(house, monkeypatch):
    """It used to drop every worker, one after the other, and to serve nobody from then on."""

    def full(*_args, **_kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Channel, "send", full)
        house.offer(1)
        assert not house.dispatcher.can_take

    house.later.calls.pop()()

    assert house.dispatcher.can_take
    assert sum(len(handle.offers()) for handle in house.handles) == 1
    assert house.later.calls == []


def test_closing_leaves_no_copy_of_a_connection_that_was_not_settled(house):
    """A forked child calls it, too: a copy in a child would keep the client waiting for the end."""
    first, second = house.handles
    house.offer(2)
    first.offers(), second.offers()
    assert not any(map(has_ended, house.clients))

    house.dispatcher.close()

    assert all(map(has_ended, house.clients))
