"""The load that wrk does not make: downloads, and WebSocket messages echoed. One process, one epoll set.

    python -m loadtest.client websocket PORT --seconds 1 --connections 32 --size 125 --window 4
    python -m loadtest.client download PORT --seconds 1 --connections 4

The result is one line of JSON: what came back in how many seconds, the share of them in
which this process ran, and the 99th percentile of how long one took. It does as little as it can for each byte, so that the
server is what is measured: frames are masked once and sent again and again, and a
download's bytes are dropped in the kernel. Whether it was idle at times, its user sees
in the processor time that it took.

What a WebSocket server sends must be the frames that were asked for, in their order:
payloads differ within a cycle, every read is compared with where the cycle should be,
and whatever is not equal ends the run with an error. A download must be as long as
its Content-Length says, and for the first one that is counted to the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress

PATIENCE = 10.0  # seconds without a byte
READ = 1 << 20

# How many different payloads take turns. A cycle of 64 KB messages would not fit the processor's
# caches if it were longer.
CYCLE = 4


class Failed(Exception):
    """The server does not do what it is asked."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.client", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", choices=("websocket", "download"))
    parser.add_argument("port", type=int)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--size", type=int, default=125, help="of a WebSocket message, in bytes (default 125)")
    parser.add_argument("--window", type=int, default=1, help="messages on their way in each connection (default 1)")
    arguments = parser.parse_args()
    if not 1 <= arguments.connections <= 1024 or not 1 <= arguments.window <= 1024 or not 0 < arguments.size <= 1 << 20:
        parser.error("--connections and --window must be from 1 to 1024, --size from 1 to 1048576")
    try:
        result = websocket(arguments) if arguments.kind == "websocket" else download(arguments)
    except (Failed, OSError) as exc:
        print(f"port {arguments.port}: {exc}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


# ---- WebSocket ----


def websocket(arguments: argparse.Namespace) -> dict[str, float]:
    payloads = [os.urandom(arguments.size) for _ in range(CYCLE)]
    sent, expected = b"".join(map(masked, payloads)), b"".join(map(plain, payloads))
    echoes = [
        Echo(connected(arguments.port), sent * 2, expected * 2, arguments.window) for _ in range(arguments.connections)
    ]
    for echo in echoes:
        echo.shake_hands(arguments.port)
        echo.socket.setblocking(False)
    spent = drive(echoes, arguments.seconds)
    return summary(sum(echo.messages for echo in echoes), spent, [took for echo in echoes for took in echo.times])


class Echo:
    """One connection: *window* messages on their way, and the next sent as one comes back.

    *sent* and *expected* are the cycle twice over, as it leaves and as it returns, so
    that a read or a write may cross from one turn to the next.
    """

    def __init__(self, sock: socket.socket, sent: bytes, expected: bytes, window: int) -> None:
        self.socket = sock
        self.messages = 0
        self.times: list[float] = []
        self._sent, self._cycle_out, self._frame_out = memoryview(sent), len(sent) // 2, len(sent) // 2 // CYCLE
        self._expected, self._cycle_in, self._frame_in = expected, len(expected) // 2, len(expected) // 2 // CYCLE
        self._window = window
        self._received = 0  # bytes
        self._written = 0
        self._watched = (0.0, 0)  # when a message was sent, and which one: one at a time is timed

    def shake_hands(self, port: int) -> None:
        request = (
            f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self.socket.sendall(request.encode())
        head, rest = read_head(self.socket)
        if not head.startswith(b"HTTP/1.1 101 ") or b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" not in head or rest:
            raise Failed(f"no WebSocket: {head + rest!r}")

    def start(self) -> bool:
        return self.on_writable()

    def on_readable(self) -> bool:
        """Whether there is still something to write, for which the socket has no room."""
        try:
            data = self.socket.recv(min(READ, self._cycle_in))
        except BlockingIOError:
            return False
        if not data:
            raise Failed(f"the connection ended after {self.messages} messages")
        at = self._received % self._cycle_in
        if data != self._expected[at : at + len(data)]:
            raise Failed(f"byte {self._received} or one of the {len(data)} from there is not what was sent")
        self._received += len(data)
        self.messages = self._received // self._frame_in
        if self.messages > self._watched[1]:
            now = time.perf_counter()
            if self._watched[0]:
                self.times.append(now - self._watched[0])
            self._watched = now, self.messages + self._window - 1
        return self.on_writable()

    def on_writable(self) -> bool:
        allowed = (self.messages + self._window) * self._frame_out
        while self._written < allowed:
            at = self._written % self._cycle_out
            piece = self._sent[at : at + min(allowed - self._written, self._cycle_out)]
            try:
                self._written += self.socket.send(piece)
            except BlockingIOError:
                return True
        return False


def masked(payload: bytes) -> bytes:
    """A binary message as a client must send it."""
    mask = os.urandom(4)
    repeated = int.from_bytes((mask * (len(payload) // 4 + 1))[: len(payload)], "big")
    body = (int.from_bytes(payload, "big") ^ repeated).to_bytes(len(payload), "big")
    return frame_head(len(payload), 0x80) + mask + body


def plain(payload: bytes) -> bytes:
    """The same message as a server must send it, if it makes one frame of it."""
    return frame_head(len(payload), 0) + payload


def frame_head(length: int, mask: int) -> bytes:
    if length < 126:
        return struct.pack("!BB", 0x82, mask | length)
    if length < 1 << 16:
        return struct.pack("!BBH", 0x82, mask | 126, length)
    return struct.pack("!BBQ", 0x82, mask | 127, length)


# ---- downloads ----


def download(arguments: argparse.Namespace) -> dict[str, float]:
    Download(connected(arguments.port), arguments.port).once()
    downloads = [Download(connected(arguments.port), arguments.port) for _ in range(arguments.connections)]
    for each in downloads:
        each.socket.setblocking(False)
    spent = drive(downloads, arguments.seconds)
    return summary(sum(each.received for each in downloads), spent, [took for each in downloads for took in each.times])


class Download:
    """One connection that asks again as soon as it has the whole body; a new one, if the server closes it."""

    def __init__(self, sock: socket.socket, port: int) -> None:
        self.socket = sock
        self.received = 0  # bytes of bodies
        self.times: list[float] = []
        self._request = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
        self._sink = bytearray(READ)
        self._left = 0
        self._head = b""
        self._asked = 0.0
        self._port = port
        self._closes = False
        self.is_single = False

    def once(self) -> None:
        """One whole body, and not a byte more or less."""
        self.is_single = True
        self.start()
        with suppress(Closed):
            while not self.times:
                self.on_readable()
        self.socket.settimeout(0)
        with suppress(BlockingIOError):
            if more := self.socket.recv(100):
                raise Failed(f"more came than the Content-Length said: {more!r}")
        self.socket.close()

    def reconnect(self) -> None:
        self.socket.close()
        self.socket = connected(self._port)
        self.socket.setblocking(False)
        self.start()

    def start(self) -> bool:
        self.socket.sendall(self._request)
        self._asked = time.perf_counter()
        return False

    def on_readable(self) -> bool:
        try:
            if self._left:
                # TCP drops what is read so, instead of copying it (tcp(7)).
                count = self.socket.recv_into(self._sink, min(self._left, READ), socket.MSG_TRUNC)
                self._count(count)
            else:
                data = self.socket.recv(65536)
                count = len(data)
                self._read_head(data)
        except BlockingIOError:
            return False
        if not count:
            raise Failed(f"the connection ended {self._left} bytes before the end of an answer")
        return False

    def on_writable(self) -> bool:
        return False

    def _read_head(self, data: bytes) -> None:
        self._head += data
        head, end, body = self._head.partition(b"\r\n\r\n")
        if not end:
            return
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if not head.startswith(b"HTTP/1.1 200 ") or not length:
            raise Failed(f"not a 200 with a length: {head!r}")
        self._closes = re.search(rb"\r\nconnection: *close", head, re.IGNORECASE) is not None
        self._left = int(length[1])
        self._head = b""
        self._count(len(body))

    def _count(self, count: int) -> None:
        self.received += count
        self._left -= count
        if self._left:
            return
        self.times.append(time.perf_counter() - self._asked)
        if self._closes:
            raise Closed
        if not self.is_single:
            self.start()


class Closed(Exception):
    """The server closes after this answer, as it said."""


# ---- both ----


def drive(connections: list[Echo] | list[Download], duration: float) -> tuple[float, float]:
    """Serve what epoll says until *duration* seconds have passed; how many they were, and of processor time."""
    poll = select.epoll()
    by_descriptor = {}
    blocked: set[int] = set()
    start, used = time.perf_counter(), time.process_time()
    for connection in connections:
        descriptor = connection.socket.fileno()
        by_descriptor[descriptor] = connection
        if is_blocked := connection.start():
            blocked.add(descriptor)
        poll.register(descriptor, select.EPOLLIN | (select.EPOLLOUT if is_blocked else 0))
    while (now := time.perf_counter()) < start + duration:
        ready = poll.poll(PATIENCE, 256)
        if not ready:
            raise Failed(f"nothing came for {PATIENCE:g} s")
        for descriptor, events in ready:
            connection = by_descriptor[descriptor]
            act: Callable[[], bool] = connection.on_readable if events & ~select.EPOLLOUT else connection.on_writable
            try:
                is_blocked = act()
            except Closed:
                assert isinstance(connection, Download)
                del by_descriptor[descriptor]  # closing it takes it out of the set
                connection.reconnect()
                by_descriptor[connection.socket.fileno()] = connection
                poll.register(connection.socket.fileno(), select.EPOLLIN)
                continue
            if is_blocked != (descriptor in blocked):
                poll.modify(descriptor, select.EPOLLIN | (select.EPOLLOUT if is_blocked else 0))
                (blocked.add if is_blocked else blocked.discard)(descriptor)
    used = time.process_time() - used
    for connection in connections:
        connection.socket.close()
    return now - start, used


def connected(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    received = b""
    while b"\r\n\r\n" not in received:
        data = sock.recv(4096)
        if not data:
            raise Failed(f"the connection ended after {received!r}")
        received += data
    head, end, rest = received.partition(b"\r\n\r\n")
    return head + end, rest


def summary(count: int, spent: tuple[float, float], times: list[float]) -> dict[str, float]:
    seconds, used = spent
    ordered = sorted(times)
    return {
        "count": count,
        "seconds": seconds,
        "busy": used / seconds,
        "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] if ordered else 0.0,
    }


if __name__ == "__main__":
    sys.exit(main())
