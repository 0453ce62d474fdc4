"""--sharing reuseport: a queue per slot that outlives the slot's worker, and a port that nobody else can join."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.client import DEADLINE, Client, get
from tests.harness.server import Server, suspend

PLAIN = "tests.apps.plain:app"

# So many connections that the kernel's hash leaves no slot without one: (1/2)^64 and (2/3)^64.
MANY = 64


def workers_of(port):
    """Ids of the workers that answer `MANY` connections, made at once."""
    with ExitStack() as leave:
        clients = [leave.enter_context(Client(port)) for _ in range(MANY)]
        for client in clients:
            client.send(b"GET /worker HTTP/1.1\r\nHost: test\r\n\r\n")
        return {int(client.read().text.split()[0]) for client in clients}


def listening_sockets(port):
    """How many sockets of this machine listen on *port* of an IPv4 address."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(local.split(":")[1], 16) == port and state == "0A" for _, local, _, state, *_ in rows)


def wait_for_listening_sockets(port, count):
    """Until the master has closed the others; nothing tells of it but the kernel."""
    end = time.monotonic() + DEADLINE
    while listening_sockets(port) > count:
        assert time.monotonic() < end
        os.sched_yield()


def test_a_replacement_takes_over_its_predecessors_queue():
    """The master keeps each slot's socket open, so what a dead worker had not accepted waits for the next."""
    with Server(PLAIN, workers=2, sharing="reuseport") as server, ExitStack() as leave:
        server.wait_ready(2)
        suspend(server.worker(1))
        clients = [leave.enter_context(Client(server.port)) for _ in range(MANY)]
        for client in clients:
            client.send(b"GET /worker HTTP/1.1\r\nHost: test\r\n\r\n")
        os.kill(server.worker(1), signal.SIGKILL)

        assert {int(client.read().text.split()[0]) for client in clients} == {2, 3}


def test_one_more_worker_gets_a_socket_of_its_own():
    """TTIN: the kernel spreads over it, too."""
    with Server(PLAIN, workers=2, sharing="reuseport") as server:
        server.wait_ready(2)
        assert listening_sockets(server.port) == 2
        server.signal(signal.SIGTTIN)
        server.wait_ready(3)

        assert listening_sockets(server.port) == 3
        assert workers_of(server.port) == {1, 2, 3}


def test_the_socket_of_a_slot_that_is_given_up_goes_with_it():
    """A socket that nobody accepts from would swallow its share of the clients."""
    with Server(PLAIN, workers=3, sharing="reuseport") as server:
        server.wait_ready(3)
        server.signal(signal.SIGTTOU)
        server.wait_for(r"worker 3 .* ended: exited with code 0 \(retired\)")
        wait_for_listening_sockets(server.port, 2)

        assert workers_of(server.port) == {1, 2}


@pytest.mark.parametrize("first", ["inherit", "reuseport"])
def test_a_second_server_on_the_same_port_is_refused(first):
    """SO_REUSEPORT would let it in, and the kernel would give it half of our clients."""
    with Server(PLAIN, workers=2, sharing=first) as server:
        server.wait_ready(2)
        with Server(PLAIN, workers=2, sharing="reuseport", bind=f"127.0.0.1:{server.port}") as second:
            assert second.wait_exit() != 0
        assert "it is in use, another process listens there" in second.log
        assert workers_of(server.port) <= {1, 2}


def test_a_slot_that_is_given_up_while_it_waits_to_restart_gets_no_connections():
    """Its own socket would collect a share of the clients, and nobody would come for them."""
    with Server("tests.apps.hooks:slot_one_dies()", workers=2, sharing="reuseport") as server:
        server.wait_for("slot 1 failed 3 times in a row")
        server.signal(signal.SIGTTOU)
        wait_for_listening_sockets(server.port, 1)

        assert {get(server.port).text for _ in range(20)} == {"1 0"}
