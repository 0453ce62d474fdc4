"""The dispatcher alone: whom it gives connections to, and what becomes of one that was not taken."""

from __future__ import annotations

import errno
import socket
from collections import Counter

import pytest

from prefork.cluster import dispatch
from prefork.cluster.dispatch import MOST_WAITING, PAUSE, Dispatcher
from prefork.cluster.peek import MOST_PEEKED, MOST_SEEN, PATIENCE, SHORT_PATIENCE
from prefork.cluster.picks import MOST_UNACKNOWLEDGED, LeastConnections, Pick, make_pick
from prefork.cluster.reactor import Reactor
from prefork.ipc.channel import Channel
from prefork.ipc.handoff import Verdict, decode_offers, encode_answer
from prefork.scoreboard import Scoreboard


class Handle:
    """What the dispatcher knows of a worker, with the worker's end of the channel."""

    def __init__(self, id, stats, slot=None):
        self.id, self.slot, self.stats = id, id - 1 if slot is None else slot, stats
        self.channel, self.theirs = Channel.pair()
        self.doors = []  # of all that was offered

    def describe(self):
        return f"worker {self.id}"

    def offers(self):
        """Numbers of the connections that came since the last look."""
        return [number for message in self.messages() for number in message]

    def messages(self):
        """The same, those of each message."""
        numbers = []
        while messages := self.theirs.receive():
            for message in messages:
                message.fds.close()
                door, came = decode_offers(message.body)
                self.doors += [door] * len(came)
                numbers.append(list(came))
        return numbers

    def die(self):
        self.theirs.close()


class House:
    """A dispatcher with *count* workers and one listener, and the clients' ends of what was connected."""

    def __init__(self, count):
        self.now = 1000.0
        self.board = Scoreboard(count + 2)
        self.reactor = Reactor(lambda: self.now)
        self.dispatcher = Dispatcher(self.reactor)
        self.clients = []
        self.addresses = {}
        self.open(0, LeastConnections())
        self.handles = [Handle(id, self.board[id - 1]) for id in range(1, count + 1)]
        for handle in self.handles:
            self.dispatcher.join(handle, 0)

    def open(self, index, pick):
        listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.addresses[index] = listening.getsockname()
        self.dispatcher.open(index, listening, pick)
        return listening

    def reopen(self, pick):
        """The one listener, with another pick."""
        self.dispatcher.shut(0)
        listening = self.open(0, pick)
        for handle in self.handles:
            self.dispatcher.join(handle, 0)
        return listening

    def connect(self, count=1, index=0, first=b""):
        """Clients that connect; the master has not had a turn."""
        clients = [socket.create_connection(self.addresses[index]) for _ in range(count)]
        for client in clients:
            client.sendall(first)
        self.clients += clients
        return clients

    def offer(self, count=1, index=0, first=b""):
        """Clients that connect, and are accepted as far as the dispatcher wants to."""
        clients = self.connect(count, index, first)
        self.turn()
        return clients

    def turn(self, seconds=0.0):
        """All that is ready or due after *seconds*."""
        self.now += seconds
        for _ in range(5):
            self.reactor.call_later(0, lambda: None)  # it must not wait
            self.reactor.turn()

    @property
    def accepts(self):
        return self.dispatcher._doors[0].wants_read

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
    client.settimeout(0.0)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


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


def test_connections_that_a_worker_got_elsewhere_count(house):
    """Its other listener may be shared in another way."""
    first, second = house.handles
    house.board[first.slot].opened = 10
    house.board[first.slot].closed = 7

    house.offer(3)

    assert (len(first.offers()), len(second.offers())) == (0, 3)


def test_load_is_counted_over_all_listeners(house):
    """Who is full of one listener's connections gets few of the other's."""
    first, second = house.handles
    house.open(1, LeastConnections())
    house.dispatcher.join(first, 1)
    house.offer(4, index=1)  # only the first listens there
    assert (len(first.offers()), first.doors) == (4, [1, 1, 1, 1])

    house.offer(4)

    assert (len(first.offers()), len(second.offers())) == (0, 4)


def test_a_worker_gets_nothing_of_a_listener_that_it_does_not_have(house):
    """And nothing is accepted there while nobody has it."""
    house.open(1, LeastConnections())
    clients = house.offer(3, index=1)
    assert [handle.offers() for handle in house.handles] == [[], []]

    house.dispatcher.join(house.handles[1], 1)
    house.turn()

    assert (len(house.handles[0].offers()), len(house.handles[1].offers())) == (0, len(clients))


def test_a_worker_that_leaves_one_listener_stays_with_the_other(house):
    """`leave` with an index is about that one only."""
    first, second = house.handles
    house.open(1, LeastConnections())
    for handle in house.handles:
        house.dispatcher.join(handle, 1)

    house.dispatcher.leave(first, 0)
    house.offer(2)
    house.offer(2, index=1)

    assert (first.offers(), first.doors) == ([3, 4], [1, 1])
    assert len(second.offers()) == 2


def test_what_a_worker_refuses_goes_to_another(house):
    """It drains, and the master has not heard of it yet. It is not asked again and again."""
    first, second = house.handles
    house.offer(2)
    mine = first.offers()
    second.offers()

    house.dispatcher.settle(first, mine[0], accepted=False)

    assert (first.offers(), second.offers()) == ([], mine)


def test_what_a_dead_worker_did_not_acknowledge_goes_to_another(house):
    """And what it did acknowledge does not: it held that."""
    first, second = house.handles
    house.offer(4)
    taken, untaken = first.offers()
    second.offers()
    house.dispatcher.settle(first, taken, accepted=True)

    house.dispatcher.lose(first)

    assert second.offers() == [untaken]


def test_one_answer_may_be_about_several_connections(house):
    """As one message carried them. What is accepted is the worker's alone."""
    first, second = house.handles
    clients = house.offer(8)
    numbers = first.offers()
    second.offers()

    house.dispatcher.hear(first, encode_answer(Verdict.ACCEPTED, numbers))

    assert [has_ended(client) for client in clients] == [number in numbers for number in range(1, 9)]


def test_an_answer_that_was_not_asked_for_changes_nothing(house):
    """A worker that answers twice, or after its death was told."""
    first, second = house.handles
    [client] = house.offer()
    [number] = first.offers()
    house.dispatcher.settle(second, number, accepted=True)
    house.dispatcher.lose(first)
    house.dispatcher.settle(first, number, accepted=True)

    assert not has_ended(client)
    assert second.offers() == [number]


def test_with_nobody_to_take_them_connections_wait_for_the_next_worker(house):
    """All workers are dead for a moment: nobody is turned away."""
    house.offer(3)
    for handle in house.handles:
        house.dispatcher.lose(handle)
    assert not house.accepts
    third = Handle(3, house.board[2])
    house.handles.append(third)

    house.dispatcher.join(third, 0)

    assert sorted(third.offers()) == [1, 2, 3]


def test_a_worker_that_died_unheard_is_passed_over(house):
    """Its channel breaks before its exit is told."""
    first, second = house.handles
    first.die()

    house.offer(4)

    assert len(second.offers()) == 4


def test_full_workers_leave_the_rest_to_the_backlog(house):
    """And when there is room again accepting goes on."""
    first, second = house.handles
    house.offer(2 * MOST_UNACKNOWLEDGED + 10)
    numbers = first.offers()
    assert (len(numbers), len(second.offers())) == (MOST_UNACKNOWLEDGED, MOST_UNACKNOWLEDGED)
    assert not house.accepts

    house.dispatcher.hear(first, encode_answer(Verdict.ACCEPTED, numbers[:10]))
    house.turn()

    assert (len(first.offers()), second.offers()) == (10, [])
    assert not house.accepts


def test_one_full_worker_stops_nobody(house):
    """The others go on."""
    first, second = house.handles
    house.board[second.slot].opened = 1000

    house.offer(MOST_UNACKNOWLEDGED + 10)

    assert (len(first.offers()), len(second.offers())) == (MOST_UNACKNOWLEDGED, 10)


def test_without_descriptors_connections_wait_and_no_worker_is_blamed(house, monkeypatch):
    """It used to drop every worker, one after the other, and to serve nobody from then on."""

    def full(*_args, **_kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Channel, "send", full)
        house.offer(5)
        assert not house.accepts

    house.turn(PAUSE)

    assert house.accepts
    assert sorted(number for handle in house.handles for number in handle.offers()) == [1, 2, 3, 4, 5]


def test_an_accept_that_fails_is_tried_again_later(house, monkeypatch):
    """Not at once: the listener is still readable, and the error would come again, turn after turn."""

    def full(_self):
        raise OSError(errno.ENFILE, "Too many open files in system")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "_accept", full)
        house.offer(1)
    assert not house.accepts

    house.turn(PAUSE)

    assert len(house.handles[0].offers()) == 1


def test_a_worker_without_descriptors_is_spared_for_a_second(house):
    """What it could not take goes to the other, and so does what comes meanwhile."""
    first, second = house.handles
    house.offer(2)
    [mine] = first.offers()
    second.offers()

    house.dispatcher.settle(first, mine, accepted=False, is_exhausted=True)
    house.offer(3)
    assert (len(first.offers()), len(second.offers())) == (0, 4)
    house.turn(PAUSE)
    house.offer(3)

    assert (len(first.offers()), len(second.offers())) == (3, 0)


def test_a_worker_without_descriptors_is_then_given_one_at_a_time(house):
    """Of what comes in one message it gets all or nothing, and with room for three it would never get any."""
    first, second = house.handles
    house.dispatcher.leave(second)
    house.offer(5)
    assert first.messages() == [[1, 2, 3, 4, 5]]
    house.dispatcher.hear(first, encode_answer(Verdict.EXHAUSTED, [1, 2, 3, 4, 5]))

    house.turn(PAUSE)
    assert first.messages() == [[1], [2], [3], [4], [5]]
    house.dispatcher.hear(first, encode_answer(Verdict.ACCEPTED, [1]))
    house.dispatcher.hear(first, encode_answer(Verdict.ACCEPTED, [2]))
    house.offer(5)
    assert first.messages() == [[6, 7, 8, 9], [10]]


def test_with_all_workers_out_of_descriptors_connections_wait(house):
    """Without a turn of the loop being spent on them: who is asked again at once refuses at once."""
    house.offer(2)
    for handle in house.handles:
        house.dispatcher.hear(handle, encode_answer(Verdict.EXHAUSTED, handle.offers()))
    house.dispatcher.hear(house.handles[1], encode_answer(Verdict.EXHAUSTED, house.handles[1].offers()))
    assert not house.accepts
    assert [handle.offers() for handle in house.handles] == [[], []]

    house.turn(PAUSE)

    assert sorted(number for handle in house.handles for number in handle.offers()) == [1, 2]


def test_a_shut_listener_keeps_nobody_waiting(house):
    """Its clients see the end, those of the other listener are not touched."""
    listening = house.open(1, LeastConnections())
    for handle in house.handles:
        house.dispatcher.join(handle, 1)
    staying, leaving = house.offer(1, index=0), house.offer(1, index=1)
    for handle in house.handles:
        handle.offers()
        house.dispatcher.lose(handle)

    house.dispatcher.shut(1)
    house.dispatcher.shut(1)

    assert listening.fileno() == -1
    assert (has_ended(leaving[0]), has_ended(staying[0])) == (True, False)


def test_what_is_refused_after_its_listener_was_shut_is_closed(house):
    """It has nowhere to go."""
    [client] = house.offer()
    numbers = house.handles[0].offers()
    house.dispatcher.shut(0)
    assert not has_ended(client)

    house.dispatcher.settle(house.handles[0], numbers[0], accepted=False)

    assert has_ended(client)


def test_closing_leaves_no_copy_of_a_connection_that_was_not_settled(house):
    """A forked child calls it, too: a copy in a child would keep the client waiting for the end."""
    house.offer(2)
    for handle in house.handles:
        handle.offers()
    assert not any(map(has_ended, house.clients))

    house.dispatcher.close()

    assert all(map(has_ended, house.clients))


# ---- sticky: the connection waits for the worker ----


class For(Pick):
    """Always the same worker, by its number among the candidates."""

    is_patient = True

    def __init__(self, which):
        self.which = which

    def choose(self, offer, candidates):
        return candidates[self.which]


def test_a_connection_waits_for_the_worker_that_it_must_go_to(house):
    """The other one is idle, and the wrong one."""
    first, second = house.handles
    house.reopen(For(0))
    house.offer(MOST_UNACKNOWLEDGED + 3)
    numbers = first.offers()
    assert len(numbers) == MOST_UNACKNOWLEDGED

    house.dispatcher.hear(first, encode_answer(Verdict.ACCEPTED, numbers))

    assert (len(first.offers()), second.offers()) == (3, [])


def test_who_waits_for_a_full_worker_does_not_hold_up_the_others(house):
    """Only when very many wait is nobody accepted any more."""
    first, second = house.handles
    pick = For(0)
    house.reopen(pick)
    house.offer(MOST_UNACKNOWLEDGED + 3)
    full = pick.choose
    pick.choose = lambda offer, candidates: full(offer, candidates) if offer.number <= 100 else candidates[1]

    house.offer(100 - MOST_UNACKNOWLEDGED - 3 + 5)

    assert (len(first.offers()), len(second.offers())) == (MOST_UNACKNOWLEDGED, 5)


def test_the_number_of_those_who_wait_is_bounded(house):
    """The rest is left to the backlog."""
    house.reopen(For(0))

    house.offer(MOST_UNACKNOWLEDGED + MOST_WAITING + 10)

    assert len(house.dispatcher._doors[0].waiting) == MOST_WAITING
    assert not house.accepts


def test_who_waits_for_a_worker_that_leaves_goes_to_another(house):
    """Nobody waits for the dead."""
    first, second = house.handles
    house.reopen(For(0))
    house.offer(MOST_UNACKNOWLEDGED + 3)

    house.dispatcher.leave(first)

    assert (len(first.offers()), len(second.offers())) == (MOST_UNACKNOWLEDGED, 3)


# ---- the head is looked at first ----


@pytest.fixture
def by_header(house):
    house.reopen(make_pick("sticky:header:x-key"))
    return house


HEAD = b"GET / HTTP/1.1\r\nHost: a\r\nX-Key: 1\r\n\r\n"


def numbers(house):
    return sorted(number for handle in house.handles for number in handle.offers())


def test_a_head_that_is_there_is_seen_at_once(by_header):
    """And it stays in the socket for the worker."""
    by_header.connect(3, first=HEAD)
    by_header.turn()

    assert numbers(by_header) == [1, 2, 3]


def test_a_client_that_says_nothing_is_placed_after_a_while(by_header):
    """By its address."""
    by_header.offer(3)
    by_header.turn(PATIENCE - 0.1)
    assert numbers(by_header) == []

    by_header.turn(0.2)

    assert numbers(by_header) == [1, 2, 3]


def test_a_head_that_comes_byte_by_byte_is_waited_for(by_header):
    """Between the bytes the socket is readable all the time, and must not wake the master."""
    [client] = by_header.offer()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for at in range(len(HEAD) - 4):
        client.sendall(HEAD[at : at + 1])
        by_header.turn(0.02)
        assert numbers(by_header) == []
    assert not any(source.wants_read for source in by_header.reactor._sources.values() if hasattr(source, "offer"))

    client.sendall(b"\r\n")
    by_header.turn(0.2)

    assert numbers(by_header) == [1]


def test_a_head_that_is_too_long_is_not_waited_for(by_header):
    """16 KiB are looked at, as far as they go."""
    [client] = by_header.offer(first=b"GET / HTTP/1.1\r\nX-Fill: ")
    client.sendall(b"x" * MOST_SEEN)
    by_header.turn(0.2)

    assert numbers(by_header) == [1]


def test_a_client_that_leaves_before_its_head_is_dropped(by_header):
    """There is nobody to be served."""
    [client] = by_header.offer()
    client.shutdown(socket.SHUT_WR)
    by_header.turn()

    assert numbers(by_header) == []
    assert has_ended(client)


def test_the_number_of_those_who_are_looked_at_is_bounded(by_header):
    """Beyond it the backlog holds the clients; who is silent then has little time."""
    for _ in range(MOST_PEEKED // 64 + 1):
        by_header.offer(64)
    assert not by_header.accepts
    by_header.connect(first=HEAD)
    last = len(by_header.clients)  # its number
    by_header.turn(SHORT_PATIENCE / 2)
    assert numbers(by_header) == []

    came, began = [], by_header.now
    while last not in came:
        by_header.turn(SHORT_PATIENCE)
        for handle in by_header.handles:
            came += (taken := handle.offers())
            by_header.dispatcher.hear(handle, encode_answer(Verdict.ACCEPTED, taken))

    assert by_header.now - began < PATIENCE / 2


def test_closing_ends_also_those_who_are_looked_at(by_header):
    """No timer of theirs is left, no source, and no copy."""
    [client] = by_header.offer()

    by_header.dispatcher.close()
    by_header.turn(PATIENCE + 1)

    assert has_ended(client)
    assert not by_header.reactor._sources


def test_a_listener_without_tcp_is_no_different(house, tmp_path):
    """Its clients have no address."""
    seen = []

    class Watching(LeastConnections):
        needs_head = True

        def choose(self, offer, candidates):
            seen.append((offer.client, offer.listener, offer.head))
            return super().choose(offer, candidates)

    path = str(tmp_path / "s")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    house.dispatcher.open(1, listening, Watching())
    house.dispatcher.join(house.handles[0], 1)
    client = socket.socket(socket.AF_UNIX)
    house.clients.append(client)
    client.connect(path)
    client.sendall(HEAD)
    house.turn()

    assert seen == [(None, path, HEAD)]
    assert len(house.handles[0].offers()) == 1


def test_the_budget_of_accepts_in_one_turn_is_kept(house):
    """A flood of connections must not keep the master from its workers."""
    house.connect(dispatch.ACCEPT_BUDGET + 5)
    house.reactor.turn()

    assert Counter(len(handle.offers()) for handle in house.handles) == {dispatch.ACCEPT_BUDGET // 2: 2}
