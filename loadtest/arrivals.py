"""Requests at given instants, on new connections or kept ones, and who answered how late. One process, one epoll set.

    python -m loadtest.arrivals burst PORT --connections 100 --block 10
    python -m loadtest.arrivals kept PORT --connections 64 --rate 490 --seconds 2 --seed 1
    python -m loadtest.arrivals mixed PORT --rate 490 --seconds 3 --seed 1

The load is open: a request is sent at its instant, whatever became of those before it,
and how long it took is counted from that instant, so a server that holds up the client
does not look better for it. A request's query says for how many milliseconds the server
is to block, its answer's body is the pid of whoever gave it.

The result is one line of JSON: requests by pid, the most first, and seconds that they took: the
median and the 99th percentile of all, and the latter of those that block shortly.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import selectors
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator

PATIENCE = 20.0  # seconds after the last instant

# What a mixed load blocks, in milliseconds, and how many of 100 requests are of the long sort.
SHORT, LONG = 5, 100
LONG_OF_100 = 5

# Before the first instant, so that it is not late already, in seconds.
HEAD_START = 0.02


class Arrival:
    """A request: when, and how long it blocks."""

    __slots__ = ("block", "due", "on", "took")

    def __init__(self, due: float, block: int, on: int | None = None) -> None:
        self.due = due
        self.block = block
        self.on = on  # the number of a kept connection; None: a new one
        self.took = 0.0

    def __lt__(self, other: Arrival) -> bool:
        return self.due < other.due


class Client:
    """One connection. Kept ones ask again; one that the server ends after an answer is opened again."""

    __slots__ = ("arrivals", "is_kept", "received", "socket")

    def __init__(self, is_kept: bool) -> None:
        self.is_kept = is_kept
        self.socket: socket.socket | None = None
        self.arrivals: deque[Arrival] = deque()  # the first is being asked, if there is any
        self.received = b""


class Load:
    def __init__(self, port: int) -> None:
        self.answers: Counter[bytes] = Counter()
        self.done: list[Arrival] = []
        self._port = port
        self._selector = selectors.DefaultSelector()

    def connect(self, client: Client) -> None:
        # The kernel answers this, and no worker has a part in it.
        client.socket = socket.create_connection(("127.0.0.1", self._port), PATIENCE)
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.socket.setblocking(False)
        client.received = b""
        self._selector.register(client.socket, selectors.EVENT_READ, client)

    def run(self, arrivals: list[Arrival], kept: list[Client]) -> None:
        heapq.heapify(arrivals)
        wanted = len(arrivals)
        give_up = max(arrival.due for arrival in arrivals) + PATIENCE
        while len(self.done) < wanted:
            now = time.monotonic()
            if now > give_up:
                raise SystemExit(f"{wanted - len(self.done)} of {wanted} requests are not answered")
            while arrivals and arrivals[0].due <= now:
                arrival = heapq.heappop(arrivals)
                client = Client(False) if arrival.on is None else kept[arrival.on]
                client.arrivals.append(arrival)
                if len(client.arrivals) == 1:
                    self._ask(client)
            wait = arrivals[0].due - time.monotonic() if arrivals else give_up - now
            for key, _ in self._selector.select(max(0.0, wait)):
                self._take(key.data)

    def _ask(self, client: Client) -> None:
        if client.socket is None:
            self.connect(client)
            assert client.socket is not None
        close = b"" if client.is_kept else b"Connection: close\r\n"
        client.socket.send(b"GET /?%d HTTP/1.1\r\nHost: load\r\n%b\r\n" % (client.arrivals[0].block, close))

    def _take(self, client: Client) -> None:
        assert client.socket is not None
        data = client.socket.recv(65536)
        client.received += data
        head, _, body = client.received.partition(b"\r\n\r\n")
        if not body:  # a pid is the whole body, and never comes in two packets
            if not data and client.arrivals:
                raise SystemExit(f"a connection ended after {client.received!r}")
            if not data:
                self._forget(client)
            return
        if not head.startswith(b"HTTP/1.1 200 "):
            raise SystemExit(f"not a good answer: {client.received!r}")
        client.received = b""
        self.answers[body.strip()] += 1
        arrival = client.arrivals.popleft()
        arrival.took = time.monotonic() - arrival.due
        self.done.append(arrival)
        if not client.is_kept or b"connection: close" in head.lower():
            self._forget(client)
        if client.arrivals:
            self._ask(client)

    def _forget(self, client: Client) -> None:
        assert client.socket is not None
        self._selector.unregister(client.socket)
        client.socket.close()
        client.socket = None

    def summary(self) -> dict[str, object]:
        answers = {pid.decode(): count for pid, count in self.answers.most_common()}
        took = [arrival.took for arrival in self.done]
        short = [arrival.took for arrival in self.done if arrival.block != LONG]
        return {"answers": answers, "p50": rank(took, 0.5), "p99": rank(took, 0.99), "short_p99": rank(short, 0.99)}


def rank(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def instants(rate: float, seconds: float, seed: int) -> Iterator[tuple[float, int]]:
    """Arrivals that do not know of each other, and how long each blocks."""
    chance = random.Random(seed)
    instant = 0.0
    while (instant := instant + chance.expovariate(rate)) < seconds:
        yield instant, LONG if chance.randrange(100) < LONG_OF_100 else SHORT


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.arrivals", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", choices=("burst", "kept", "mixed"))
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--block", type=int, default=10, help="of a burst's requests, in milliseconds (default 10)")
    parser.add_argument("--rate", type=float, default=490.0, help="requests a second (default 490)")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    load, kept = Load(arguments.port), []
    if arguments.kind == "kept":
        kept = [Client(True) for _ in range(arguments.connections)]
        for client in kept:  # all at once, and each asks for something at once
            load.connect(client)
        start = time.monotonic()
        load.run([Arrival(start, 0, number) for number in range(len(kept))], kept)
        load.answers.clear()
        load.done.clear()
    start = time.monotonic() + HEAD_START
    if arguments.kind == "burst":
        arrivals = [Arrival(start, arguments.block) for _ in range(arguments.connections)]
    else:
        arrivals = [
            Arrival(start + due, block, number % len(kept) if kept else None)
            for number, (due, block) in enumerate(instants(arguments.rate, arguments.seconds, arguments.seed))
        ]
    load.run(arrivals, kept)
    print(json.dumps(load.summary()))


if __name__ == "__main__":
    sys.exit(main())
