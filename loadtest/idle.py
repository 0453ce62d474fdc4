"""What do 10,000 idle connections and 1,000 that send a byte a second cost one worker, and when does it drop them?

The same connections are held by a bare uvloop protocol that writes a constant, so that
what prefork adds to a connection can be told from what uvloop takes for it. Deadlines
are shortened for the run; a healthy client measures its latency before and meanwhile.
With --explain, a smaller run under tracemalloc says what the memory is made of.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import re
import resource
import select
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.client import Client
from tests.harness.server import Server

REQUEST = b"GET / HTTP/1.1\r\nHost: idle\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

# Seconds; as short as the run allows: the connections must still be there while we measure.
KEEP_ALIVE = 24
HEAD = 14

BATCH = 100  # connections opened at a time, fewer than any backlog
SAMPLES = 3000  # requests of the healthy client
SETTLE = 2.0  # seconds for what was opened to be accepted, and garbage to be collected
GIVE_UP = 60.0  # seconds after which whoever is still connected has outlived every deadline

# A pair of addresses has 28,000 ports, some of which still wait.
SOURCES = [f"127.0.0.{host}" for host in range(2, 12)]


async def app(request):  # type: ignore[no-untyped-def]
    """What is served; /memory tells what the worker holds."""
    return held() if request.path == "/memory" else "ok"


def held() -> dict[str, dict[str, list[int]]]:
    """Bytes and numbers of what is allocated, by line and by type."""
    gc.collect()
    lines = {
        f"{Path(stat.traceback[0].filename).as_posix()[-48:]}:{stat.traceback[0].lineno}": [stat.size, stat.count]
        for stat in (tracemalloc.take_snapshot().statistics("lineno") if tracemalloc.is_tracing() else [])
    }
    types: dict[str, list[int]] = {}
    for thing in gc.get_objects():
        entry = types.setdefault(f"{type(thing).__module__}.{type(thing).__qualname__}", [0, 0])
        entry[0] += sys.getsizeof(thing)
        entry[1] += 1
    return {"lines": lines, "types": types}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.idle", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--slow", type=int, default=1_000)
    parser.add_argument(
        "--explain", action="store_true", help="what the memory is made of, with 2,000 idle connections"
    )
    parser.add_argument("--part", choices=["bare", "hold", "drip"], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    needed = arguments.idle + arguments.slow + 100
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < needed:
        raise SystemExit(f"{needed} descriptors are needed, {hard} are allowed: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if arguments.part == "bare":
        _serve_bare(arguments.port)
    elif arguments.part == "hold":
        _hold(arguments.port, arguments.idle)
    elif arguments.part == "drip":
        _drip(arguments.port, arguments.slow)
    elif arguments.explain:
        explain(2000)
    else:
        compare(arguments.idle, arguments.slow)


# ---- the comparison ----


def compare(idle: int, slow: int) -> None:
    print(f"CPython {sys.version.split()[0]}, {idle} idle connections, {slow} that send a byte a second, one worker")
    with _bare() as (pid, port):
        bare = measure("a bare uvloop protocol", pid, port, idle, slow, drops=False)
    settings = {"keep_alive_timeout": KEEP_ALIVE, "head_timeout": HEAD, "threads": 1}
    with Server("loadtest.idle:app", workers=1, **settings) as server:
        pid = server.worker(1)
        with _read_log(server):
            ours = measure("prefork", pid, server.port, idle, slow, drops=True)
        if not Path(f"/proc/{pid}").exists():
            raise SystemExit(f"the worker died\n{server.log[-3000:]}")
    for kind in ("idle", "slow"):
        extra = {name: ours[kind][name] - bare[kind][name] for name in ("Rss", "Pss")}
        print(f"beyond uvloop's own, for each {kind} connection: {extra['Pss']:.2f} KB PSS, {extra['Rss']:.2f} KB RSS")


@contextmanager
def _read_log(server: Server) -> Iterator[None]:
    """Each refusal is a line, and a full pipe would stop the worker."""
    ended = threading.Event()

    def read() -> None:
        while not ended.wait(0.2):
            _ = server.log

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def measure(name: str, pid: int, port: int, idle: int, slow: int, *, drops: bool) -> dict[str, dict[str, float]]:
    """KB for each connection of either kind."""
    _latency(port)  # caches are filled, and lazily imported modules imported
    alone = _latency(port)
    start = memory(pid)
    with _part("hold", port, idle, slow) as holder:
        _expect(holder, "held")
        time.sleep(SETTLE)
        middle = memory(pid)
        with _part("drip", port, idle, slow) as dripper:
            _expect(dripper, "held")
            time.sleep(SETTLE)
            end = memory(pid)
            meanwhile = _latency(port)
            print(f"\n{name}")
            each = {"idle": _each(start, middle, idle), "slow": _each(middle, end, slow)}
            for kind, values in each.items():
                print(f"  for each {kind} connection: {values['Pss']:.2f} KB PSS, {values['Rss']:.2f} KB RSS")
            print(
                f"  the process: {start['Pss'] / 1024:.1f} MB PSS before, {end['Pss'] / 1024:.1f} MB with all of them"
            )
            for when, (median, p99) in (("alone", alone), ("meanwhile", meanwhile)):
                print(f"  a healthy client {when}: median {median * 1e6:.0f} us, p99 {p99 * 1e6:.0f} us")
            if drops:
                print("  slow:", _expect(dripper, "closed"))
                print("  idle:", _expect(holder, "closed"))
                time.sleep(SETTLE)
                print(f"  the process: {memory(pid)['Pss'] / 1024:.1f} MB PSS after they were dropped")
    return each


def memory(pid: int) -> dict[str, int]:
    """KB, by kind."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _each(before: dict[str, int], after: dict[str, int], count: int) -> dict[str, float]:
    return {name: (after[name] - before[name]) / count for name in ("Rss", "Pss")}


def _latency(port: int) -> tuple[float, float]:
    """Median and 99th percentile in seconds, of requests that follow one another."""
    seconds = []
    with socket.create_connection(("127.0.0.1", port), 20) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(SAMPLES):
            began = time.perf_counter()
            sock.sendall(REQUEST)
            if not sock.recv(4096).startswith(b"HTTP/1.1 200"):
                raise SystemExit("the healthy client was not answered")
            seconds.append(time.perf_counter() - began)
    seconds.sort()
    return seconds[len(seconds) // 2], seconds[len(seconds) * 99 // 100]


# ---- what the memory is made of ----


def explain(count: int) -> None:
    environ = {"PYTHONTRACEMALLOC": "1"}
    with Server("loadtest.idle:app", workers=1, keep_alive_timeout=0, environ=environ) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.get("/memory")
            before = client.get("/memory").text
            with _part("hold", server.port, count, 0) as holder:
                _expect(holder, "held")
                after = client.get("/memory").text
    for kind, limit in (("lines", 20), ("types", 20)):
        old, new = json.loads(before)[kind], json.loads(after)[kind]
        rows = [
            ((size - old.get(name, [0, 0])[0]) / count, (number - old.get(name, [0, 0])[1]) / count, name)
            for name, (size, number) in new.items()
        ]
        rows = [row for row in rows if row[0] >= 4]
        print(f"by {kind}, for each of {count} idle connections: {sum(row[0] for row in rows):.0f} bytes")
        for size, number, name in sorted(rows, reverse=True)[:limit]:
            print(f"  {size:7.0f} bytes in {number:5.2f}  {name}")


# ---- the other processes ----


@contextmanager
def _part(part: str, port: int, idle: int, slow: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "loadtest.idle", "--part", part, "--port", str(port)]
    command += ["--idle", str(idle), "--slow", str(slow)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _expect(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line.startswith(word):
        raise SystemExit(f"expected {word!r}, heard {line!r}")
    return line


@contextmanager
def _bare() -> Iterator[tuple[int, int]]:
    with _part("bare", 0, 0, 0) as process:
        port = int(_expect(process, "port").split()[1])
        yield process.pid, port


def _serve_bare(port: int) -> None:
    class Constant(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            if data.endswith(b"\r\n\r\n"):
                self.transport.write(ANSWER)  # type: ignore[attr-defined]

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Constant, "127.0.0.1", port, backlog=2048)
        print("port", server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


def _open(port: int, count: int, first: bytes) -> dict[int, socket.socket]:
    """*count* connections that have sent *first*, the whole of it answered if it is a request."""
    opened: dict[int, socket.socket] = {}
    while len(opened) < count:
        batch = []
        for number in range(min(BATCH, count - len(opened))):
            sock = socket.socket()
            sock.settimeout(20)
            sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
            sock.bind((SOURCES[(len(opened) + number) % len(SOURCES)], 0))
            sock.connect(("127.0.0.1", port))
            sock.sendall(first)
            batch.append(sock)
        for sock in batch:
            if first == REQUEST and not sock.recv(4096):
                raise SystemExit("a connection was closed before its answer")
            opened[sock.fileno()] = sock
    return opened


def _hold(port: int, count: int) -> None:
    """Ask once on each connection, and wait until all are closed."""
    began = time.monotonic()
    opened = _open(port, count, REQUEST)
    took = time.monotonic() - began
    print("held", flush=True)
    ages, _ = _watch(opened, time.monotonic())
    if ages:
        print(
            f"closed {len(ages)} of {count}, {ages[0]:.1f} to {ages[-1]:.1f} s after the last (opening took {took:.1f} s)"
        )
    sys.stdout.flush()
    time.sleep(GIVE_UP)


def _drip(port: int, count: int) -> None:
    """A byte of a head a second on each connection, spread over the second."""
    opened = _open(port, count, REQUEST[:1])
    print("held", flush=True)
    ages, answers = _watch(opened, time.monotonic(), drip=True)
    said = ", ".join(f"{answer.decode()} {number}" for answer, number in answers.items())
    if ages:
        print(f"closed {len(ages)} of {count}, {ages[0]:.1f} to {ages[-1]:.1f} s after the first byte; heard: {said}")
    sys.stdout.flush()
    time.sleep(GIVE_UP)


def _watch(opened: dict[int, socket.socket], began: float, *, drip: bool = False) -> tuple[list[float], Counter[bytes]]:
    """Ages in seconds at which connections were closed, and what they heard."""
    poll = select.epoll()
    for descriptor in opened:
        poll.register(descriptor, select.EPOLLIN)
    ages: list[float] = []
    answers: Counter[bytes] = Counter()
    head = REQUEST[:-2] + b"X-Drip: " + b"x" * 1000
    turn = 0
    while opened and time.monotonic() - began < GIVE_UP:
        for descriptor, _ in poll.poll(0.02):
            sock = opened[descriptor]
            try:
                data = sock.recv(4096)
            except ConnectionResetError:
                data = b""
            if data:
                answers[data[:12]] += 1
                continue
            ages.append(time.monotonic() - began)
            poll.unregister(descriptor)
            opened.pop(descriptor).close()
        if drip:
            turn = _send_next(opened, head, turn, time.monotonic() - began)
    return ages, answers


def _send_next(opened: dict[int, socket.socket], head: bytes, turn: int, age: float) -> int:
    """In each of fifty turns a second, a fiftieth of the connections send their next byte."""
    while turn < age * 50:
        for descriptor, sock in list(opened.items()):
            if descriptor % 50 == turn % 50:
                at = 1 + turn // 50
                try:
                    sock.sendall(head[at : at + 1])
                except OSError:
                    pass  # it was dropped, and poll will say so
        turn += 1
    return turn


if __name__ == "__main__":
    main()
