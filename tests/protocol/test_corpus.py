"""The wire files of tests/corpus, through both cycles: each is read whole, cut at every byte, and byte by byte.

The first line of a file says which rule it shows (and the status of a refusal);
all the rest is the wire, byte for byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefork.protocol.limits import Limits
from tests.harness import readings
from tests.harness.readings import Reader, against_h11, said

CORPUS = Path(__file__).parents[1] / "corpus"

# Small, so that a file which breaks a limit can still be read by people.
LIMITS = Limits(head_size=1000, field_count=20, target_size=256, body_size=1000, extension_size=256, trailer_size=256)


def files(kind: str) -> list[Any]:
    return [pytest.param(path, id=path.stem) for path in sorted((CORPUS / kind).glob("*.http"))]


def load(path: Path) -> tuple[str, bytes]:
    first, wire = path.read_bytes().split(b"\n", 1)
    assert first.startswith(b"# rule: "), f"{path.name} does not say which rule it shows"
    return first.removeprefix(b"# rule: ").decode(), wire


def cuts(wire: bytes) -> list[list[bytes]]:
    """Whole, in two at every byte, and byte by byte."""
    halves = [[wire[:at], wire[at:]] for at in range(1, len(wire))]
    return [[wire], *halves, [wire[at : at + 1] for at in range(len(wire))]]


@pytest.fixture(scope="module")
def reader() -> Reader:
    return readings.warm()


@pytest.mark.parametrize("full", [False, True], ids=["chosen", "full"])
@pytest.mark.parametrize("path", files("accept"))
def test_accepted_file_reads_the_same_however_it_is_cut(path: Path, full: bool, reader: Reader) -> None:
    """Where a packet ends is chance; what a request says must not be."""
    _, wire = load(path)
    expected = reader.read([wire], LIMITS, full=full)

    assert expected.messages
    assert all(message.is_complete for message in expected.messages)
    assert expected.end in (("closed", True), ("last",))
    for pieces in cuts(wire):
        assert said(reader.read(pieces, LIMITS, full=full)) == said(expected)


@pytest.mark.parametrize("path", files("accept"))
def test_accepted_file_means_to_h11_what_it_means_to_us(path: Path, reader: Reader) -> None:
    """Whatever passes the strict parser, a second parser must read alike."""
    _, wire = load(path)

    assert against_h11(wire, reader.read([wire], LIMITS)) is None


@pytest.mark.parametrize("full", [False, True], ids=["chosen", "full"])
@pytest.mark.parametrize("path", files("refuse"))
def test_refused_file_is_refused_with_its_status_however_it_is_cut(path: Path, full: bool, reader: Reader) -> None:
    """A refusal that depends on packet boundaries, or on who reads, can be stepped around."""
    rule, wire = load(path)
    status = int(rule[:3])

    for pieces in cuts(wire):
        reading = reader.read(pieces, LIMITS, full=full)
        assert reading.end[:2] == ("refused", status), rule
        assert reading.refusal.startswith(b"HTTP/1.1 %d " % status)
        assert b"\r\nconnection: close\r\n" in reading.refusal


@pytest.mark.parametrize("path", [*files("accept"), *files("refuse")])
def test_both_cycles_say_the_same(path: Path, reader: Reader) -> None:
    """Which of them serves a request is our own affair."""
    _, wire = load(path)

    for pieces in cuts(wire):
        for early in (False, True):
            chosen, full = (reader.read(pieces, LIMITS, full=full, early=early) for full in (False, True))
            assert chosen == full


@pytest.mark.parametrize("path", files("refuse"))
def test_refusal_is_a_sentence(path: Path, reader: Reader) -> None:
    """It goes into the log and to the client: one line, lower case or a name first, no full stop, not endless."""
    _, wire = load(path)
    reason = reader.read([wire], LIMITS).end[2]

    assert reason.isprintable()
    assert not reason.endswith(".")
    assert 10 < len(reason) < 300
