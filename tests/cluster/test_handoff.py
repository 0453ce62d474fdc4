"""--sharing handoff, with real clients: equal shares, and a connection outlives the worker it was meant for."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections import Counter
from contextlib import ExitStack

import pytest

from tests.harness.client import DEADLINE, Client
from tests.harness.server import Server, stopped, suspend

PLAIN = "tests.apps.plain:app"


@pytest.fixture
def leave():
    with ExitStack() as stack:
        yield stack


def ask(leave, address, path="/worker"):
    """A connection with a request on its way."""
    client = leave.enter_context(Client(address))
    client.send(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    return client


def worker_of(client):
    """Id of the worker that answers *client*."""
    return int(client.read().text.split()[0])


def first_answered(clients, count):
    """*count* or more of *clients*, as soon as so many have an answer."""
    end = time.monotonic() + DEADLINE
    poll = select.poll()
    for client in clients:
        poll.register(client.socket, select.POLLIN)
    while len(ready := {descriptor for descriptor, _ in poll.poll(0)}) < count:
        assert time.monotonic() < end, f"only {len(ready)} of {len(clients)} are answered, not {count}"
        os.sched_yield()
    return [client for client in clients if client.socket.fileno() in ready]


def ends(client):
    """Whether the server's side of *client* is closed once the client has said that it is done."""
    client.socket.shutdown(socket.SHUT_WR)
    return client.is_closed_by_peer()


def test_a_burst_is_shared_equally(leave):
    """64 connections, 4 workers, 16 each: counted, not left to luck."""
    with Server(PLAIN, workers=4, sharing="handoff") as server:
        server.wait_ready(4)
        clients = [ask(leave, server.port) for _ in range(64)]

        assert Counter(map(worker_of, clients)) == {1: 16, 2: 16, 3: 16, 4: 16}


def test_what_a_killed_worker_had_not_taken_is_answered_by_others(leave):
    """It stands still with eight connections before it, then it is killed: no client notices."""
    with Server(PLAIN, workers=2, sharing="handoff") as server:
        server.wait_ready(2)
        suspend(server.worker(1))
        clients = [ask(leave, server.port) for _ in range(16)]
        answered = first_answered(clients, 8)
        assert [worker_of(client) for client in answered] == [2] * 8
        os.kill(server.worker(1), signal.SIGKILL)

        assert {worker_of(client) for client in clients if client not in answered} <= {2, 3}


def test_a_replacement_holds_no_copy_of_other_workers_connections(leave):
    """It is forked while connections are with the master. A copy left in it would keep them open until it ends."""
    with Server(PLAIN, workers=3, sharing="handoff") as server:
        server.wait_ready(3)
        suspend(server.worker(1))
        clients = [ask(leave, server.port) for _ in range(12)]
        answered = first_answered(clients, 8)
        waiting = [client for client in clients if client not in answered]
        os.kill(server.worker(2), signal.SIGKILL)
        server.wait_for("worker 4 .* is listening")
        os.kill(server.worker(1), signal.SIGCONT)

        assert [worker_of(client) for client in waiting] == [1] * 4
        assert all(map(ends, waiting))


def test_a_worker_that_drains_refuses_and_others_serve(leave):
    """The master may hear of a drain after it has offered a connection; what it offered comes back to it."""
    with Server(PLAIN, workers=2, sharing="handoff") as server:
        server.wait_ready(2)
        # A worker that came late: in one turn the master looks at the clients first and at this worker after them.
        os.kill(server.worker(1), signal.SIGKILL)
        server.wait_ready(3)
        clients = [ask(leave, server.port) for _ in range(4)]
        slow, leaving = [client for client in clients if worker_of(client) == 3]
        slow.send(b"GET /announced?seconds=1 HTTP/1.1\r\nHost: test\r\n\r\n")
        server.wait_for("announced")
        with stopped(server):
            assert leaving.get("/leave").headers["connection"] == "close"  # so it drains
            clients = [ask(leave, server.port) for _ in range(8)]

        assert 3 not in {worker_of(client) for client in clients}
        assert slow.read().text == "announced"


def test_clients_wait_in_the_backlog_while_all_workers_are_dead(leave):
    """Nobody is refused for the moment that two replacements take."""
    with Server(PLAIN, workers=2, sharing="handoff") as server:
        server.wait_ready(2)
        with stopped(server):
            for number in (1, 2):
                os.kill(server.worker(number), signal.SIGKILL)
            clients = [ask(leave, server.port) for _ in range(8)]

        assert {worker_of(client) for client in clients} <= {3, 4}


def test_connections_of_a_unix_socket_are_handed_over_too(leave, tmp_path):
    """A proxy in front keeps its connections; an equal share matters most there."""
    path = str(tmp_path / "s.sock")
    with Server(PLAIN, workers=2, sharing="handoff", bind=f"unix:{path}") as server:
        server.wait_ready(2)
        clients = [ask(leave, path) for _ in range(8)]

        assert Counter(map(worker_of, clients)) == {1: 4, 2: 4}
