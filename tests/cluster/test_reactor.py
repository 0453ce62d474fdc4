"""The reactor: sources told once a turn, timers in order, no handler surprised by another."""

from __future__ import annotations

import os
import socket

from prefork.cluster.reactor import Reactor


class Ear:
    """A source that notes what it is told."""

    is_steady = False
    wants_read = True
    wants_write = False

    def __init__(self, sock):
        self.socket = sock
        self.fileno = sock.fileno
        self.heard = []
        self.written = 0

    def on_readable(self):
        self.heard.append(self.socket.recv(100))

    def on_writable(self):
        self.written += 1
        self.wants_write = False


def pair():
    one, other = socket.socketpair()
    one.setblocking(False)
    return Ear(one), other


def test_a_readable_source_is_told():
    """The plain case."""
    reactor = Reactor()
    ear, mouth = pair()
    reactor.add(ear)
    mouth.send(b"hello")

    reactor.turn()

    assert ear.heard == [b"hello"]
    ear.socket.close(), mouth.close()


def test_what_a_source_does_not_want_to_read_waits():
    """Under handoff the backlog holds the clients while no worker can take them."""
    reactor = Reactor()
    ear, mouth = pair()
    ear.wants_read = False
    reactor.add(ear)
    mouth.send(b"hello")
    reactor.call_later(0.0, lambda: None)

    reactor.turn()
    assert ear.heard == []

    ear.wants_read = True
    reactor.turn()
    assert ear.heard == [b"hello"]
    ear.socket.close(), mouth.close()


def test_a_source_that_replaces_another_on_its_descriptor_leaves_nothing_behind():
    """poll(2) used to keep the descriptor after both were gone, and reported it as invalid, turn after turn."""
    reactor = Reactor()
    ear, mouth = pair()
    reactor.add(ear)
    reactor.call_later(0.0, lambda: None)
    reactor.turn()
    fired = []
    reactor.call_later(0.05, lambda: fired.append(True))

    reactor.add(Ear(ear.socket))
    reactor.remove(ear)
    ear.socket.close(), mouth.close()
    reactor.turn()

    assert fired == [True]


def test_a_closed_peer_that_nobody_reads_from_does_not_spin():
    """poll(2) reports POLLHUP even for an empty mask, so such a descriptor is not registered at all."""
    reactor = Reactor()
    ear, mouth = pair()
    ear.wants_read = False
    reactor.add(ear)
    mouth.close()
    fired = []
    reactor.call_later(0.05, lambda: fired.append(True))

    reactor.turn()

    assert fired == [True]
    assert ear.heard == []
    ear.socket.close()


def test_a_source_that_wants_to_write_is_told_when_it_can():
    """Messages that did not fit leave as soon as there is room."""
    reactor = Reactor()
    ear, mouth = pair()
    reactor.add(ear)
    ear.wants_write = True

    reactor.turn()

    assert ear.written == 1
    ear.socket.close(), mouth.close()


def test_a_source_removed_by_an_earlier_handler_of_the_same_turn_is_not_told():
    """One worker's exit may take another source away; its number may be somebody else's by then."""
    reactor = Reactor()
    first, first_mouth = pair()
    second, second_mouth = pair()
    reactor.add(first)
    reactor.add(second)
    first_mouth.send(b"1")
    second_mouth.send(b"2")
    told = []

    def tell_and_remove(me, other):
        def on_readable():
            told.append(me)
            me.socket.recv(10)
            reactor.remove(other)

        return on_readable

    first.on_readable = tell_and_remove(first, second)
    second.on_readable = tell_and_remove(second, first)
    reactor.turn()

    assert len(told) == 1
    for ear, mouth in ((first, first_mouth), (second, second_mouth)):
        ear.socket.close(), mouth.close()


def test_timers_fire_in_the_order_of_their_instants():
    """Whatever the order in which they were set."""
    now = [0.0]
    reactor = Reactor(clock=lambda: now[0])
    fired = []
    reactor.call_later(3.0, lambda: fired.append("late"))
    reactor.call_later(1.0, lambda: fired.append("early"))
    cancelled = reactor.call_later(2.0, lambda: fired.append("cancelled"))
    cancelled.cancel()
    now[0] = 5.0

    reactor.turn()

    assert fired == ["early", "late"]


def test_a_timer_set_by_a_timer_waits_for_its_own_time():
    """A replacement that is due at once still lets the loop turn."""
    now = [0.0]
    reactor = Reactor(clock=lambda: now[0])
    fired = []
    reactor.call_later(0.0, lambda: reactor.call_later(1.0, lambda: fired.append("second")))

    reactor.turn()
    assert fired == []

    now[0] = 2.0
    reactor.turn()
    assert fired == ["second"]


def test_the_reactor_survives_a_child_that_closes_its_copies():
    """The reason for poll(2): with epoll the child would have made us deaf."""
    reactor = Reactor()
    ear, mouth = pair()
    reactor.add(ear)
    mouth.send(b"before")
    reactor.turn()
    pid = os.fork()
    if pid == 0:
        reactor.remove(ear)
        ear.socket.close()
        os._exit(0)
    os.waitpid(pid, 0)
    mouth.send(b"after")

    reactor.turn()

    assert ear.heard == [b"before", b"after"]
    ear.socket.close(), mouth.close()


def test_a_steady_source_is_looked_at_again_only_when_it_says_so():
    """A master with hundreds of workers must not ask each of them in every turn."""
    reactor = Reactor()
    ear, mouth = pair()
    ear.is_steady, ear.wants_read = True, False
    reactor.add(ear)
    mouth.send(b"hello")

    def turn():
        reactor.call_later(0.0, lambda: None)
        reactor.turn()
        return ear.heard

    assert turn() == []
    ear.wants_read = True
    assert turn() == []
    reactor.refresh(ear)
    assert turn() == [b"hello"]
    ear.socket.close(), mouth.close()


def test_what_is_called_soon_comes_before_what_arrives():
    """A worker's "fork" is told before its "online", however quick it is."""
    reactor = Reactor()
    ear, mouth = pair()
    reactor.add(ear)
    mouth.send(b"hello")
    told = []
    reactor.call_soon(lambda: told.append(list(ear.heard)))

    reactor.turn()

    assert told == [[]]
    assert ear.heard == [b"hello"]
    ear.socket.close(), mouth.close()
