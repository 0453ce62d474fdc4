"""Feed generated and mutated requests to both cycles and to h11, or to a live server, for as long as one likes.

    python -m loadtest.fuzz --minutes 10                  # in this process: who disagrees with whom?
    python -m loadtest.fuzz --wire --inputs 1000000       # over sockets: does any worker die, does anything hang?
    python -m loadtest.fuzz --replay fuzz-findings.jsonl  # what is left of earlier findings

In this process each input goes, in pieces, through the chosen cycle, through h11's
cycle, in one piece, and through plain h11; now and then a batch of near-equal inputs
goes through a parser that has seen nothing before. Over sockets each input has a
connection of its own, which has to be answered or closed in time, while another
client asks for something ordinary and has to get it. Every input follows from
`--seed` and its number; what failed is kept in a file. Exits 1 if anything did.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import select
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random, SystemRandom

from prefork.protocol.limits import Limits
from tests.harness import readings, wires
from tests.harness.client import get
from tests.harness.server import Server

# Near-equal inputs for one fresh parser. Importing it anew costs as much as some fifty of them.
BATCH = 400
BATCH_EVERY = 5000  # inputs

# Limits that inputs of some hundred bytes can break.
SMALL = Limits(head_size=400, field_count=6, target_size=20, body_size=20, extension_size=20, trailer_size=60)

IN_FLIGHT = 64  # connections at a time
PROBE_EVERY = 2000  # inputs
PATIENCE = 15.0  # seconds until a connection counts as hanging; the server's own deadlines are a second each
SLOW_PROBE = 5.0  # seconds

# Clients on many addresses: a closed connection keeps its pair of ports for a minute.
SOURCES = [f"127.0.{net}.{host}" for net in range(1, 5) for host in range(1, 11)]

STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n")


async def app(request):  # type: ignore[no-untyped-def]
    """What the live server serves: it reads all, and answers with how much."""
    return f"{len(await request.body())} bytes\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="at most (default 5)")
    parser.add_argument("--inputs", type=int, help="at most")
    parser.add_argument("--seed", type=int, help="(default: drawn, and printed)")
    parser.add_argument("--wire", action="store_true", help="against a live server with two workers")
    parser.add_argument("--workers", type=int, default=2, help="of that server (default 2)")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings.jsonl"), help="inputs that failed go here")
    parser.add_argument("--replay", type=Path, help="only read again what is in this file")
    arguments = parser.parse_args()
    if arguments.replay:
        sys.exit(replay(arguments.replay))
    seed = arguments.seed if arguments.seed is not None else SystemRandom().randrange(2**32)
    print(f"seed {seed}, CPython {sys.version.split()[0]}, pid {os.getpid()}", flush=True)
    findings = Findings(arguments.findings)
    numbers = bounded(arguments.minutes * 60, arguments.inputs)
    if arguments.wire:
        Wire(seed, arguments.workers, findings).run(numbers)
    else:
        in_process(seed, numbers, findings)
    print(f"{findings.count} findings" + (f", kept in {findings.path}" if findings.count else ""))
    sys.exit(1 if findings.count else 0)


def bounded(seconds: float, inputs: int | None) -> Iterator[int]:
    """0, 1, 2 ... until the time or the number is used up."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end and (inputs is None or number < inputs):
        yield number
        number += 1


def drawn(seed: int, number: int) -> tuple[Random, bytes]:
    """Input *number* of this *seed*, and what draws the rest of its fate."""
    random = Random(f"{seed}:{number}")
    return random, wires.wire(random)


class Findings:
    """What failed, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0

    def add(self, wire: bytes, pieces: list[bytes], why: str) -> None:
        self.count += 1
        print(f"finding {self.count}: {why[:600]}\n  {wire!r}", flush=True)
        entry = {"wire": wire.hex(), "pieces": [piece.hex() for piece in pieces], "why": why}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


# ---- in this process ----


def in_process(seed: int, numbers: Iterator[int], findings: Findings) -> None:
    reader = readings.warm()
    ends: Counter[str] = Counter()
    began = told = time.monotonic()
    number = 0
    for number in numbers:
        random, wire = drawn(seed, number)
        pieces = wires.cut(random, wire)
        limits = SMALL if random.random() < 0.2 else None
        why = _difference(reader, random, wire, pieces, limits)
        if why is not None:
            findings.add(wire, pieces, why)
        if number % 20 == 0:
            end = reader.read(pieces, limits).end
            ends[" ".join(map(str, end[:2]))] += 1
        if number % BATCH_EVERY == 0:
            _compare_memories(reader, random, findings)
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(f"{number + 1} inputs, {(number + 1) / (told - began):.0f} a second", flush=True)
    seconds = time.monotonic() - began
    print(
        f"{number + 1} inputs in {seconds:.0f} s, {(number + 1) / seconds:.0f} a second, each read four to five times"
    )
    print("ends of every twentieth:", ", ".join(f"{end} {count}" for end, count in ends.most_common()))


def _difference(
    reader: readings.Reader, random: Random, wire: bytes, pieces: list[bytes], limits: Limits | None
) -> str | None:
    try:
        return readings.difference(
            reader, wire, pieces, limits, script=random.randrange(5), early=random.random() < 0.3
        )
    except Exception as exc:  # noqa: BLE001  # whatever it is, it is a finding
        return f"raised {exc!r}"


def _compare_memories(reader: readings.Reader, random: Random, findings: Findings) -> None:
    """A parser that has read millions of lines, and one that has read none, must agree about each."""
    near = [wire for _ in range(10) for wire in wires.neighbours(random, wires.request(random), BATCH // 10)]
    warm = {wire: reader.read([wire]) for wire in near}
    random.shuffle(near)
    fresh = readings.fresh()
    for wire in near:
        if fresh.read([wire]) != warm[wire]:
            findings.add(wire, [wire], "a parser that has seen more reads it differently")


def replay(path: Path) -> int:
    reader, left = readings.warm(), 0
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        wire, pieces = bytes.fromhex(entry["wire"]), [bytes.fromhex(piece) for piece in entry["pieces"]]
        why = readings.difference(reader, wire, pieces)
        left += why is not None
        print(f"{why or 'agreed'}: {wire!r}")
    return 1 if left else 0


# ---- over sockets ----


class Attempt:
    """One input on a connection of its own."""

    __slots__ = ("answer", "deadline", "pieces", "sends_eof", "sock", "wire")

    def __init__(self, address: tuple[str, int], random: Random, wire: bytes, source: str) -> None:
        self.wire = wire
        self.pieces = wires.cut(random, wire)[:20]
        self.sends_eof = random.random() < 0.98  # the others wait for the server's deadlines
        self.answer = b""
        self.deadline = time.monotonic() + PATIENCE
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
        self.sock.bind((source, 0))
        self.sock.connect(address)  # on the loopback interface this is done when it returns
        self.sock.setblocking(False)
        if random.random() < 0.02:  # and these leave without a word
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.deadline = 0.0

    def send(self) -> bool:
        """The next piece; True when there is none left."""
        if self.pieces:
            with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                self.sock.send(self.pieces.pop(0))
        if not self.pieces and self.sends_eof and self.deadline:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
        return not self.pieces

    def receive(self) -> bool:
        """True once the server has closed."""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            self.answer += b"(reset)"
            return True
        self.answer += data
        return not data


class Wire:
    """Attempts against a live server, and probes in between."""

    def __init__(self, seed: int, workers: int, findings: Findings) -> None:
        self._seed = seed
        self._workers = workers
        self._findings = findings
        self._statuses: Counter[str] = Counter()
        self._probes: list[float] = []
        self._poll = select.epoll()
        self._open: dict[int, Attempt] = {}
        self._sending: list[Attempt] = []

    def run(self, numbers: Iterator[int]) -> None:
        settings = {
            "head_timeout": 1,
            "body_timeout": 1,
            "keep_alive_timeout": 1,
            "write_timeout": 5,
            "limit_head": 4096,
        }
        with Server("loadtest.fuzz:app", workers=self._workers, log_level="warning", **settings) as server:
            self._serve(server, numbers)

    def _serve(self, server: Server, numbers: Iterator[int]) -> None:
        port = _wait_until_listening(server)
        pids = _children(server.pid)
        began = told = time.monotonic()
        count = 0
        for number in numbers:
            random, wire = drawn(self._seed, number)
            self._start(Attempt(("127.0.0.1", port), random, wire, SOURCES[number % len(SOURCES)]))
            self._advance(limit=IN_FLIGHT)
            count += 1
            if count % PROBE_EVERY == 0:
                self._probe(port)
                if _children(server.pid) != pids:
                    self._findings.add(wire, [wire], f"workers were {pids} and are {_children(server.pid)}")
                    pids = _children(server.pid)
            if time.monotonic() - told > 30:
                told = time.monotonic()
                print(f"{count} inputs, {count / (told - began):.0f} a second", flush=True)
        self._advance(limit=0)
        seconds = time.monotonic() - began
        self._probe(port)
        if _children(server.pid) != pids:
            self._findings.add(b"", [], f"workers were {pids} and are {_children(server.pid)}")
        self._report(count, seconds, server, pids)

    def _start(self, attempt: Attempt) -> None:
        self._open[attempt.sock.fileno()] = attempt
        if not attempt.send():
            self._sending.append(attempt)
        elif not attempt.deadline:
            self._end(attempt)
            return
        self._poll.register(attempt.sock.fileno(), select.EPOLLIN)

    def _advance(self, limit: int) -> None:
        """Go on with all that is open until no more than *limit* are."""
        while True:
            waiting, self._sending = self._sending, []
            for attempt in waiting:
                if attempt.sock.fileno() < 0:
                    continue
                if not attempt.send():
                    self._sending.append(attempt)
                elif not attempt.deadline:
                    self._poll.unregister(attempt.sock.fileno())
                    self._end(attempt)
            for descriptor, _ in self._poll.poll(0 if self._sending or len(self._open) <= limit else 0.05):
                attempt = self._open[descriptor]
                if attempt.receive():
                    self._poll.unregister(descriptor)
                    self._end(attempt)
            self._find_hanging()
            if len(self._open) <= max(limit, 0):
                return

    def _find_hanging(self) -> None:
        oldest = next(iter(self._open.values()), None)
        if oldest is None or time.monotonic() < oldest.deadline or not oldest.deadline:
            return
        self._findings.add(oldest.wire, [oldest.wire], f"neither answered nor closed within {PATIENCE:g} s")
        self._poll.unregister(oldest.sock.fileno())
        self._end(oldest)

    def _end(self, attempt: Attempt) -> None:
        del self._open[attempt.sock.fileno()]
        attempt.sock.close()
        self._judge(attempt)

    def _judge(self, attempt: Attempt) -> None:
        answer = attempt.answer
        if not attempt.deadline:
            self._statuses["left without a word"] += 1
            return
        if answer.endswith(b"(reset)"):
            answer = answer.removesuffix(b"(reset)")
            self._statuses[f"reset {'behind' if answer else 'without'} an answer"] += 1
            if not answer:
                return
        if not answer:
            self._statuses["closed without an answer"] += 1
            return
        if not answer.startswith(b"HTTP/1.1 "):
            self._findings.add(attempt.wire, [attempt.wire], f"answered with {answer[:100]!r}")
        for status in STATUS.findall(answer):
            self._statuses[status.decode()] += 1
            if status == b"500":
                self._findings.add(attempt.wire, [attempt.wire], "answered with 500")

    def _probe(self, port: int) -> None:
        began = time.monotonic()
        try:
            status = get(port).status
        except (OSError, EOFError) as exc:
            self._findings.add(b"", [], f"an ordinary request was not answered: {exc!r}")
            return
        seconds = time.monotonic() - began
        self._probes.append(seconds)
        if status != 200 or seconds > SLOW_PROBE:
            self._findings.add(b"", [], f"an ordinary request was answered with {status} after {seconds:.1f} s")

    def _report(self, count: int, seconds: float, server: Server, pids: set[int]) -> None:
        print(f"{count} inputs in {seconds:.0f} s, {count / seconds:.0f} a second")
        print("answers:", ", ".join(f"{status} {number}" for status, number in sorted(self._statuses.items())))
        slowest, typical = max(self._probes) * 1000, sorted(self._probes)[len(self._probes) // 2] * 1000
        print(f"{len(self._probes)} ordinary requests in between: median {typical:.1f} ms, slowest {slowest:.0f} ms")
        print(f"the workers {sorted(pids)} served throughout; log: {len(server.log.splitlines())} lines")
        for line in server.log.splitlines()[:20]:
            print(f"  {line}")


def _wait_until_listening(server: Server) -> int:
    """The port; the log is kept too quiet to tell when a worker listens."""
    end = time.monotonic() + 30
    port = 0
    while time.monotonic() < end:
        port = port or _listening_port(server.pid)
        if port:
            with suppress(OSError, EOFError):
                get(port)
                return port
        time.sleep(0.05)
    raise SystemExit(f"the server does not listen\n{server.log}")


def _listening_port(pid: int) -> int:
    """The first TCP port on which process *pid* listens, from /proc; 0 for none."""
    inodes = set()
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                inodes.add(os.readlink(entry.path).removeprefix("socket:[").removesuffix("]"))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            return int(fields[1].partition(":")[2], 16)
    return 0


def _children(pid: int) -> set[int]:
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ESRCH):
            return set()
        raise


if __name__ == "__main__":
    main()
