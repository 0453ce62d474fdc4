"""From what a round measured to what is told: medians, ratios, tables, bars. Nothing here does I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}

# A load client that is busy for more of the time than this may be what was measured.
BUSY = 0.95

# A server that has its core for less of the time than this shared it, or waited for something else.
STARVED = 0.85

# What the others are compared with where it runs, else the first of the field.
REFERENCE = "uvicorn httptools"


@dataclass(frozen=True, slots=True)
class Sample:
    """What one round says of one server: *rate* in the scenario's unit, *p99* in seconds.

    *busy* and *server* are the shares of the time in which the load's process and the
    server's ran. *note* is what the load complained of.
    """

    rate: float
    p99: float
    busy: float
    note: str = ""
    server: float = 1.0


@dataclass(frozen=True, slots=True)
class Bar:
    """*ours* is to make at least *factor* times what *theirs* makes in *scenario*."""

    scenario: str
    ours: str
    theirs: str
    factor: float


# Rounds of a scenario, in the order they were measured, by the name of the server.
Rounds = Mapping[str, Sequence[Sample]]

BARS = (
    Bar("hello", "prefork ASGI", "granian ASGI", 1.4),
    Bar("hello", "prefork ASGI", "uvicorn httptools", 2.2),
    Bar("hello", "prefork ASGI", "uvicorn h11", 10.0),
    Bar("hello", "prefork native", "granian RSGI", 1.3),
    Bar("hello", "prefork native", "nginx", 0.65),
    Bar("hello", "prefork WSGI", "granian WSGI", 1.2),
    Bar("hello", "prefork WSGI", "granian WSGI, 4 threads", 1.2),  # its better one on some interpreters
    Bar("hello", "prefork WSGI, 4 threads", "gunicorn gthread, 4 threads", 3.0),
    Bar("access-log", "prefork native, access log", "prefork native", 0.85),
    Bar("access-log", "prefork ASGI, access log", "prefork ASGI", 0.85),
)

# Where prefork is to be ahead of every peer that is called as it is.
AHEAD = ("post", "upload", "download", "file", "chunks", "websocket", "websocket-64k", "tls", "connect")


def parse_wrk(output: str, busy: float) -> Sample:
    """What wrk printed with --latency. Raises ValueError if it is not a result, or not one of 2xx answers."""
    if refused := re.search(r"Non-2xx or 3xx responses: \d+", output):
        raise ValueError(refused[0])
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    p99 = re.search(r"^\s+99%\s+([\d.]+)(us|ms|s|m)\s*$", output, re.MULTILINE)
    if not rate or not p99:
        raise ValueError(f"wrk printed no result: {output!r}")
    if not float(rate[1]):
        raise ValueError("no request was answered")
    errors = re.search(r"Socket errors: (.*)", output)
    note = ", ".join(part for part in errors[1].split(", ") if not part.endswith(" 0")) if errors else ""
    return Sample(float(rate[1]), float(p99[1]) * UNITS[p99[2]], busy, note)


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample]) -> float:
    """The median of each round's ratio: a round's measurements are neighbours in time."""
    return median(a.rate / b.rate for a, b in zip(ours, theirs, strict=True))


def reference_of(rounds: Rounds) -> str:
    return REFERENCE if REFERENCE in rounds else next(iter(rounds))


def rows(rounds: Rounds, unit: str) -> list[list[str]]:
    """A scenario's table, its head first, the fastest on top."""
    reference = reference_of(rounds)
    table = [["server", unit, "range", "ratio", "p99 ms", "server busy", "load busy"]]
    for name in sorted(rounds, key=lambda name: -median(sample.rate for sample in rounds[name])):
        samples = rounds[name]
        rates = [sample.rate for sample in samples]
        busy = median(sample.busy for sample in samples)
        server = median(sample.server for sample in samples)
        p99 = median(sample.p99 for sample in samples)
        table.append(
            [
                name,
                f"{median(rates):.0f}",
                f"{min(rates):.0f}-{max(rates):.0f}",
                f"{ratio(samples, rounds[reference]):.2f}",
                f"{p99 * 1000:.2f}" if p99 else "-",  # wrk times no answer that came with the one before it
                f"{server:.0%}{' ?' if server < STARVED else ''}",
                f"{busy:.0%}{' *' if busy > BUSY else ''}",
            ]
        )
    return table


def aligned(table: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of *table*, the first column to the left and the others to the right."""
    lines = [list(line) for line in table]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def bars(results: Mapping[str, Rounds], interfaces: Mapping[str, str]) -> Iterator[Bar]:
    """Every bar of those scenarios that were run, against those servers that took part.

    *interfaces* tells how each server calls the application.
    """
    for bar in BARS:
        rounds = results.get(bar.scenario, {})
        if bar.ours in rounds and bar.theirs in rounds:
            yield bar
    for scenario in AHEAD:
        rounds = results.get(scenario, {})
        for ours in (name for name in rounds if name.startswith("prefork ")):
            for theirs in rounds:
                if not theirs.startswith("prefork ") and interfaces.get(theirs) == interfaces.get(ours):
                    yield Bar(scenario, ours, theirs, 1.0)


def verdicts(results: Mapping[str, Rounds], interfaces: Mapping[str, str]) -> list[list[str]]:
    """The table of bars, its head first."""
    table = [["scenario: ours / theirs", "bar", "is", ""]]
    for bar in bars(results, interfaces):
        rounds = results[bar.scenario]
        is_ = ratio(rounds[bar.ours], rounds[bar.theirs])
        verdict = "reached" if is_ >= bar.factor else f"MISSED by {1 - is_ / bar.factor:.0%}"
        table.append([f"{bar.scenario}: {bar.ours} / {bar.theirs}", f"{bar.factor:.2f}", f"{is_:.2f}", verdict])
    return table
