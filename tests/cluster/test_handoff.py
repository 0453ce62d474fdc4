"""--sharing handoff, with real clients: equal shares, and a connection outlives the worker it was meant for."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import time
from collections import Counter
from contextlib import ExitStack, suppress

import pytest

from prefork.cluster.picks import MOST_UNACKNOWLEDGED
from tests.harness.client import DEADLINE, Client
from tests.harness.server import Server, stat, stopped, suspend

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


# ---- picks ----


def test_round_robin_is_exactly_even(leave):
    """Whatever the connections do, and though half of them end at once."""
    with Server(PLAIN, workers=3, sharing="handoff", pick="round_robin") as server:
        server.wait_ready(3)
        counts = Counter()
        for number in range(60):
            client = ask(leave, server.port)
            counts[worker_of(client)] += 1
            if number % 2:
                client.close()

        assert counts == {1: 20, 2: 20, 3: 20}


def get_from(address, *headers, first=b"", source="127.0.0.1"):
    """The worker that answers one connection with one request."""
    if isinstance(address, int):
        sock = socket.create_connection(("127.0.0.1", address), DEADLINE, (source, 0))
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(DEADLINE)
        sock.connect(address)
    with sock:
        request = "\r\n".join(["GET /worker HTTP/1.1", "Host: test", *headers, "Connection: close", "", ""])
        sock.sendall(first + request.encode())
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    return int(answer.partition(b"\r\n\r\n")[2].split()[0])


KEYS = range(1, 17)


def ports(server):
    return [int(match[1]) for match in re.finditer(r"listening on https?://\S+?:(\d+)$", server.log, re.MULTILINE)]


@pytest.mark.parametrize("by", ["ip", "header", "cookie"])
def test_the_same_client_goes_to_the_same_worker(by):
    """Over many connections, and whichever listener they come by."""

    def worker_for(port, key, serial):
        match by:
            case "ip":
                return get_from(port, source=f"127.0.1.{key}")
            case "header":
                return get_from(port, f"x-session:  {key} ", source=f"127.0.1.{key + serial}")
            case "cookie":
                return get_from(port, f"Cookie: theme=dark; sid={key}", source=f"127.0.1.{key + serial}")

    pick = {"ip": "sticky:ip", "header": "sticky:header:X-Session", "cookie": "sticky:cookie:sid"}[by]
    with Server(PLAIN, workers=4, sharing="handoff", pick=pick, bind=["127.0.0.1:0", "127.0.0.1:0"]) as server:
        server.wait_ready(4)
        found = {key: set() for key in KEYS}
        for serial in range(4):
            for key in KEYS:
                for port in ports(server):
                    found[key].add(worker_for(port, key, serial))

        assert [len(workers) for workers in found.values()] == [1] * len(KEYS)
        assert len(set.union(*found.values())) > 1


def test_a_replacement_gets_the_clients_of_the_dead(leave):
    """The same slot, the same clients; those of the others never moved."""
    with Server(PLAIN, workers=3, sharing="handoff", pick="sticky:header:X-Session") as server:
        server.wait_ready(3)
        before = {key: get_from(server.port, f"X-Session: {key}") for key in KEYS}
        dead = before[1]
        os.kill(server.worker(dead), signal.SIGKILL)
        server.wait_for("worker 4 .* is listening")

        assert {key: get_from(server.port, f"X-Session: {key}") for key in KEYS} == {
            key: 4 if worker == dead else worker for key, worker in before.items()
        }


def test_without_the_cookie_the_address_decides():
    """The first request of a session has none yet; many from one address are one client."""
    with Server(PLAIN, workers=4, sharing="handoff", pick="sticky:cookie:sid") as server:
        server.wait_ready(4)
        by_address = {
            get_from(server.port, *lines) for lines in ([], ["Cookie: other=1"], ["sid: 1"]) for _ in range(4)
        }

        assert len(by_address) == 1


def test_a_head_that_comes_slowly_is_waited_for(leave):
    """Byte by byte: the worker is the one that it would have been at once, and others are served meanwhile."""
    with Server(PLAIN, workers=4, sharing="handoff", pick="sticky:header:X-Session", head_timeout=60) as server:
        server.wait_ready(4)
        key = next(key for key in KEYS if get_from(server.port, f"X-Session: {key}") != get_from(server.port))
        client = leave.enter_context(Client(server.port))
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in f"GET /worker HTTP/1.1\r\nHost: t\r\nX-Session: {key}\r\n\r\n".encode():
            client.send(bytes([byte]))
            get_from(server.port, "X-Session: another")

        assert worker_of(client) == get_from(server.port, f"X-Session: {key}")


def test_a_client_that_says_nothing_is_not_waited_for_for_ever(leave):
    """It goes to a worker, whose deadline for heads ends it; and half a head, which stays readable, makes nobody spin."""
    with Server(PLAIN, workers=2, sharing="handoff", pick="sticky:header:X-Session", head_timeout=1) as server:
        server.wait_ready(2)
        silent = [leave.enter_context(Client(server.port)) for _ in range(10)]
        begun = [leave.enter_context(Client(server.port)) for _ in range(10)]
        for client in begun:
            client.send(b"GET /worker HTTP/1.1\r\nHo")
        before = processor_time(server.pid)

        assert [client.is_closed_by_peer() for client in silent] == [True] * 10
        assert [client.read().status for client in begun] == [408] * 10
        assert processor_time(server.pid) - before < 0.5


def processor_time(pid):
    """Seconds."""
    fields = stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_long_head_is_looked_at_as_far_as_it_goes():
    """What stands in the first 16 KiB counts, what comes behind does not; either is served."""
    filling = [f"X-Fill-{number}: {'x' * 1000}" for number in range(20)]
    with Server(PLAIN, workers=4, sharing="handoff", pick="sticky:header:X-Session") as server:
        server.wait_ready(4)
        key = next(key for key in KEYS if get_from(server.port, f"X-Session: {key}") != get_from(server.port))
        early, late = [f"X-Session: {key}", *filling], [*filling, f"X-Session: {key}"]

        assert get_from(server.port, *early) == get_from(server.port, f"X-Session: {key}")
        assert get_from(server.port, *late) == get_from(server.port)


def test_by_address_on_a_unix_socket_the_load_decides(leave, tmp_path):
    """All its clients would be one otherwise, with one worker for all of them."""
    path = str(tmp_path / "s.sock")
    with Server(PLAIN, workers=2, sharing="handoff", pick="sticky:ip", bind=f"unix:{path}") as server:
        server.wait_ready(2)
        clients = [ask(leave, path) for _ in range(8)]

        assert Counter(map(worker_of, clients)) == {1: 4, 2: 4}


def test_by_header_on_a_unix_socket_the_header_decides(tmp_path):
    """A proxy in front sends what it wants to be sticky."""
    path = str(tmp_path / "s.sock")
    with Server(PLAIN, workers=4, sharing="handoff", pick="sticky:header:x-session", bind=f"unix:{path}") as server:
        server.wait_ready(4)
        found = {key: {get_from(path, f"X-Session: {key}") for _ in range(4)} for key in KEYS}

        assert [len(workers) for workers in found.values()] == [1] * len(KEYS)
        assert len(set.union(*found.values())) > 1


def test_a_function_of_the_users_picks():
    """By what the connection is, or by what the request says."""
    with Server(PLAIN, workers=2, sharing="handoff", pick="tests.apps.picks:by_port") as server:
        server.wait_ready(2)
        for _ in range(20):
            with Client(server.port) as client:
                port = client.socket.getsockname()[1]
                client.send(b"GET /worker HTTP/1.1\r\nHost: t\r\n\r\n")
                # In the order in which they listened.
                assert worker_of(client) == order(server)[-1 if port % 2 else 0]
    with Server(PLAIN, workers=2, sharing="handoff", pick="tests.apps.picks:by_query") as server:
        server.wait_ready(2)
        for _ in range(5):
            with Client(server.port) as client:
                assert int(client.get("/worker?last").text.split()[0]) == order(server)[-1]
            with Client(server.port) as client:
                assert int(client.get("/worker").text.split()[0]) == order(server)[0]


def order(server):
    """Ids of the workers as they began to listen."""
    return [int(match[1]) for match in re.finditer(r"worker (\d+) .* is listening", server.log)]


def test_a_pick_that_fails_costs_nobody_anything(leave):
    """The log says it once, and the load decides."""
    with Server(PLAIN, workers=2, sharing="handoff", pick="tests.apps.picks:broken") as server:
        server.wait_ready(2)
        clients = [ask(leave, server.port) for _ in range(8)]

        assert Counter(map(worker_of, clients)) == {1: 4, 2: 4}
        assert server.log.count("RuntimeError: no idea") == 1
        assert server.log.count("error pick tests.apps.picks:broken raised") == 1


# ---- what may go wrong on the way ----


def test_full_workers_leave_clients_to_the_backlog(leave):
    """Both stand still: the master takes as many as it may offer, no more, and the rest when they go on."""
    with Server(PLAIN, workers=2, sharing="handoff") as server:
        server.wait_ready(2)
        for number in (1, 2):
            suspend(server.worker(number))
        rest = sockets_of(server.pid)
        clients = [ask(leave, server.port) for _ in range(2 * MOST_UNACKNOWLEDGED + 30)]
        end = time.monotonic() + DEADLINE
        while sockets_of(server.pid) < rest + 2 * MOST_UNACKNOWLEDGED:
            assert time.monotonic() < end
            os.sched_yield()
        for count in (1, 2):  # turns of the master
            server.signal(signal.SIGUSR1)
            server.wait_for("reopening the logs", count)
        before = processor_time(server.pid)
        assert sockets_of(server.pid) == rest + 2 * MOST_UNACKNOWLEDGED
        for number in (1, 2):
            os.kill(server.worker(number), signal.SIGCONT)

        assert set(map(worker_of, clients)) == {1, 2}
        assert processor_time(server.pid) - before < 0.5


def sockets_of(pid):
    """How many descriptors of sockets the process has."""
    count = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            count += os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    return count


@pytest.mark.parametrize("pick", ["round_robin", "least_busy", "sticky:header:X-Session"])
def test_no_client_loses_when_workers_are_killed_with_connections_on_their_way(leave, pick):
    """One after the other stands still, is given some, and is killed: others answer them all."""
    with Server(PLAIN, workers=3, sharing="handoff", pick=pick) as server:
        server.wait_ready(3)
        for victim in (1, 2, 4):
            suspend(server.worker(victim))
            clients = []
            for key in range(24):
                client = leave.enter_context(Client(server.port))
                client.send(f"GET /worker HTTP/1.1\r\nHost: t\r\nX-Session: {key}\r\n\r\n".encode())
                clients.append(client)
            answered = first_answered(clients, 8)
            os.kill(server.worker(victim), signal.SIGKILL)

            assert victim not in set(map(worker_of, clients))
            assert len(answered) < len(clients)
            server.wait_for(r"is listening, ", 3 + (1, 2, 4).index(victim) + 1)
            for client in clients:
                client.close()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_worker_out_of_descriptors_is_spared_and_others_serve(leave, loop):
    """What could not reach it reaches another; it keeps what it has, and lives."""
    few = {"FEW_FILES": "40"}
    with Server("tests.apps.few_for_one:app", workers=2, sharing="handoff", loop=loop, environ=few) as server:
        server.wait_ready(2)
        clients = [ask(leave, server.port) for _ in range(120)]
        shares = Counter(client.read().text for client in clients)

        assert shares["0"] < 40
        assert shares["1"] == 120 - shares["0"]
        assert "out of descriptors: it is given no connections for 1 s" in server.log
        assert " ended" not in server.log


def test_with_all_workers_out_of_descriptors_clients_wait(leave):
    """Nobody spins, nobody is turned away: who waits is served when others have gone."""
    few = {"FEW_FILES": "40"}
    with Server("tests.apps.few_files:app", workers=2, sharing="handoff", environ=few) as server:
        server.wait_ready(2)
        clients = [ask(leave, server.port, "/") for _ in range(100)]
        server.wait_for("out of descriptors: it is given no connections for 1 s", 2)
        before = processor_time(server.pid)
        server.wait_for("out of descriptors: it is given no connections for 1 s", 4)
        assert processor_time(server.pid) - before < 0.3, "it spins"
        for client in clients:
            assert client.read().text == "hello"
            client.close()
        assert " ended" not in server.log
