"""Coverage-guided: libFuzzer looks for bytes that reach new branches of the head parser and of a connection.

    python -m loadtest.fuzz_head --minutes 5

Needs atheris (the extra `fuzz`). It begins with the wire files of tests/corpus, and
judges as loadtest/fuzz.py does: both cycles, any cut and h11 have to agree, and nothing
but a refusal may come out of the parser. It stops at the first finding, which libFuzzer
keeps in a file crash-*; give that file as an argument to see it again. What it has
found reachable can be kept from run to run with --corpus.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from random import Random

try:
    import atheris
except ImportError as exc:
    raise SystemExit("atheris is not installed: pip install 'prefork[fuzz]'") from exc

with atheris.instrument_imports(include=["prefork.protocol"]):
    from prefork.protocol import head, limits

from tests.harness import readings, wires

WIRES = Path(__file__).parents[1] / "tests" / "corpus"
LONGEST = 1024  # bytes; every rule can be broken in less

LIMITS = limits.Limits()
SMALL = limits.Limits(head_size=400, field_count=6, target_size=20, body_size=20, extension_size=20, trailer_size=60)

READER = readings.warm()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.fuzz_head", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="at most (default 5)")
    parser.add_argument("--corpus", type=Path, help="keep what reaches new branches in this directory")
    parser.add_argument("crash", nargs="*", help="only read these files again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        seeds = Path(directory)
        for path in sorted(WIRES.glob("*/*.http")):
            (seeds / f"{path.parent.name}-{path.stem}").write_bytes(b"\0" + path.read_bytes().partition(b"\n")[2])
        flags = [f"-max_total_time={round(arguments.minutes * 60)}", f"-max_len={LONGEST}", "-print_final_stats=1"]
        places = arguments.crash or [str(place) for place in (arguments.corpus, seeds) if place]
        atheris.Setup([sys.argv[0], *flags, *places], judge, custom_mutator=mutate)
        atheris.Fuzz()


def judge(data: bytes) -> None:
    """The first byte decides how the others are cut, limited and answered."""
    random, wire = Random(data[:1]), data[1:]
    bounds = SMALL if data[:1] >= b"\x80" else LIMITS
    end = wire.find(b"\r\n\r\n")
    if end >= 0:
        try:
            head.parse_head(wire[: end + 4], bounds)
        except head.HeadRefused:
            pass
    pieces = wires.cut(random, wire)
    why = readings.difference(READER, wire, pieces, bounds, script=random.randrange(5), early=random.random() < 0.3)
    if why is not None:
        raise AssertionError(why)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time by the grammar, which line ends and framing fields need; otherwise as libFuzzer likes."""
    random = Random(seed)
    if random.random() < 0.5:
        return bytes(atheris.Mutate(data, max_size))
    wire = data[1:]
    for _ in range(random.choice((1, 1, 2, 4))):
        wire = wires.mutated(random, wire) if wire and random.random() < 0.95 else wires.wire(random)
    return (bytes([random.randrange(256)]) + wire)[:max_size]


if __name__ == "__main__":
    main()
