"""Keep-alive connections under load, workers killed beneath them, and whose fault each failure is.

    with Load(server.port, connections=64, path="/worker") as load:
        kills = kill_one_after_another(server, PREFORK, count=10, every=0.35)
    verdict = judge(load.tally, kills)

Every connection always has one request on its way, so a connection that ends is a
failed request. The answers name the process that gave them: that is who holds the
connection, and a failure is excused only if that process was killed before it.

Before its first answer nobody knows who holds a connection. It may be queued in the
kernel, where no worker's death can reach it, because the master keeps the listening
socket open; or a worker may have accepted it in the last instant. So a first request
is excused, and counted apart, only if a worker was killed while it waited. A refused
or reset connect(2), a wrong answer and an answer that does not come are never excused.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from tests.harness.server import Server

# A worker "that comes": its pid in the group `pid`.
PREFORK = r"worker \d+ \(pid (?P<pid>\d+), generation \d+\) is listening"

# An answer takes milliseconds. One that takes longer than this is lost, in seconds.
PATIENCE = 10.0

# While nobody listens, try to connect again after this many seconds, and note this many failures at the most.
RETRY = 0.01
MOST_FAILURES = 10_000


class During(StrEnum):
    """How far a connection had come when it failed."""

    CONNECT = "connect"
    FIRST = "first request"  # nobody knows who held it
    LATER = "later request"
    SILENCE = "no answer"
    NONSENSE = "wrong answer"


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that was not answered, at an instant of the monotonic clock."""

    during: During
    asked: float  # when it was sent; for a first request, when the connection was opened
    failed: float
    held_by: int | None  # pid of whoever answered last on this connection
    why: str


@dataclass(slots=True)
class Tally:
    """What a load has seen."""

    answers: Counter[int] = field(default_factory=Counter)  # by pid
    failures: list[Failure] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.answers.total() + len(self.failures)


@dataclass(frozen=True, slots=True)
class Kill:
    """A worker that we killed, at an instant of the monotonic clock, and its replacement."""

    pid: int
    when: float
    took: float  # seconds until the replacement's line was read
    replacement: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """All failures, by whose fault they are."""

    in_flight: list[Failure]  # on a connection that a killed worker held
    first: list[Failure]  # on a new connection, a worker having been killed while it waited
    unexplained: list[Failure]  # ours: there must be none


def judge(tally: Tally, kills: Sequence[Kill]) -> Verdict:
    """Excuse what the *kills* explain."""
    killed = {kill.pid: kill.when for kill in kills}
    verdict = Verdict([], [], [])
    for failure in tally.failures:
        match failure.during:
            case During.LATER if killed.get(failure.held_by or 0, float("inf")) <= failure.failed:
                verdict.in_flight.append(failure)
            case During.FIRST if any(failure.asked <= when <= failure.failed for when in killed.values()):
                verdict.first.append(failure)
            case _:
                verdict.unexplained.append(failure)
    return verdict


def kill_one_after_another(
    server: Server, arrival: str, *, workers: int, count: int, every: float, seconds: float = float("inf")
) -> list[Kill]:
    """Kill the oldest worker with -9, wait for its replacement, and so on: *count* times, or until *seconds* are over.

    Two kills are at least *every* seconds apart. *arrival* is the log line of a worker that comes, with
    its pid in the group `pid`; *workers* of them are there already.
    """
    pids = deque(int(server.wait_for(arrival, number)["pid"]) for number in range(1, workers + 1))
    kills: list[Kill] = []
    end = time.monotonic() + seconds
    while len(kills) < count and time.monotonic() < end:
        victim = pids.popleft()
        when = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        replacement = int(server.wait_for(arrival, workers + len(kills) + 1)["pid"])
        took = time.monotonic() - when
        kills.append(Kill(victim, when, took, replacement))
        pids.append(replacement)
        time.sleep(max(0.0, every - took))
    return kills


class Load:
    """*connections* clients in a thread, each asking again as soon as it has its answer.

    The body of an answer is expected to end with the pid of the process that gave it.
    """

    def __init__(self, port: int, *, connections: int, path: str) -> None:
        self.tally = Tally()
        self._port = port
        self._request = f"GET {path} HTTP/1.1\r\nHost: load\r\n\r\n".encode()
        self._wanted = connections
        self._clients: set[_Client] = set()
        self._selector = selectors.DefaultSelector()
        self._may_connect_at = 0.0
        self._is_stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; requests on their way are forgotten. Raises what went wrong in the thread."""
        self._is_stopping.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._is_stopping.is_set() and len(self.tally.failures) < MOST_FAILURES:
                self._connect_missing()
                for key, _ in self._selector.select(RETRY):
                    self._take(key.data)
                self._end_silent()
        except BaseException as error:  # raised in the caller's thread by __exit__
            self._error = error
        finally:
            for client in self._clients:
                client.socket.close()
            self._selector.close()

    def _connect_missing(self) -> None:
        while len(self._clients) < self._wanted and time.monotonic() >= self._may_connect_at:
            opened = time.monotonic()
            try:
                # The kernel answers this, and no worker has a part in it.
                sock = socket.create_connection(("127.0.0.1", self._port), PATIENCE)
            except OSError as error:
                self._note(During.CONNECT, opened, None, repr(error))
                self._may_connect_at = time.monotonic() + RETRY
                return
            sock.setblocking(False)
            client = _Client(sock, opened)
            self._clients.add(client)
            self._selector.register(sock, selectors.EVENT_READ, client)
            self._ask(client)

    def _ask(self, client: _Client) -> None:
        try:
            client.socket.send(self._request)  # it is small and the socket is empty: whole or not at all
        except OSError as error:
            self._fail(client, repr(error))

    def _take(self, client: _Client) -> None:
        try:
            data = client.socket.recv(65536)
        except OSError as error:
            self._fail(client, repr(error))
            return
        if not data:
            self._fail(client, f"the connection ended after {client.received!r}")
            return
        client.received += data
        head, found, body = client.received.partition(b"\r\n\r\n")
        if not found or len(body) < _length(head):
            return
        pid = body.split()[-1:]
        if not head.startswith(b"HTTP/1.1 200 ") or not pid or not pid[0].isdigit():
            self._fail(client, repr(client.received), During.NONSENSE)
            return
        client.held_by = int(pid[0])
        self.tally.answers[client.held_by] += 1
        if b"connection: close" in head.lower():  # its worker retires: an answer, and an end that was announced
            self._forget(client)
        else:
            client.received = b""
            client.asked = time.monotonic()
            self._ask(client)

    def _end_silent(self) -> None:
        latest = time.monotonic() - PATIENCE
        for client in [client for client in self._clients if client.asked < latest]:
            self._fail(client, f"nothing within {PATIENCE:g} s after {client.received!r}", During.SILENCE)

    def _fail(self, client: _Client, why: str, during: During | None = None) -> None:
        during = during or (During.FIRST if client.held_by is None else During.LATER)
        self._note(during, client.asked, client.held_by, why)
        self._forget(client)

    def _note(self, during: During, asked: float, held_by: int | None, why: str) -> None:
        self.tally.failures.append(Failure(during, asked, time.monotonic(), held_by, why))

    def _forget(self, client: _Client) -> None:
        self._clients.discard(client)
        self._selector.unregister(client.socket)
        client.socket.close()


class _Client:
    """One connection and the request that is on its way."""

    __slots__ = ("asked", "held_by", "received", "socket")

    def __init__(self, sock: socket.socket, opened: float) -> None:
        self.socket = sock
        self.asked = opened
        self.held_by: int | None = None
        self.received = b""


def _length(head: bytes) -> int:
    """What the head says of the body; all servers that we ask say it this way."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise ValueError(f"no content-length in {head!r}")
