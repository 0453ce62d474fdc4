"""The wire files of tests/corpus: each is read whole, and cut at every byte.

The first line of a file says which rule it shows (and the status of a refusal);
all the rest is the wire, byte for byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefork.protocol.events import Closed
from prefork.protocol.limits import Limits

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


@pytest.mark.parametrize("path", files("accept"))
def test_accepted_file_reads_the_same_however_it_is_cut(path: Path, read: Any) -> None:
    """Where a packet ends is chance; what a request says must not be."""
    _, wire = load(path)
    expected = read([wire], LIMITS)

    assert expected.messages
    assert all(message.is_complete for message in expected.messages)
    assert expected.end == Closed(clean=True) or expected.end is None
    for pieces in cuts(wire):
        assert read(pieces, LIMITS).messages == expected.messages


@pytest.mark.parametrize("path", files("accept"))
def test_accepted_file_means_to_h11_what_it_means_to_us(path: Path, read: Any, h11_read: Any) -> None:
    """Whatever passes the strict parser, a second parser must read alike."""
    _, wire = load(path)
    # h11 does not skip the empty lines that RFC 9112 section 2.2 wants skipped.
    wire = wire.lstrip(b"\r\n").replace(b"ab\r\nGET", b"abGET")

    assert read([wire], LIMITS).messages == h11_read(wire)


@pytest.mark.parametrize("path", files("refuse"))
def test_refused_file_is_refused_with_its_status_however_it_is_cut(path: Path, read: Any) -> None:
    """A refusal that depends on packet boundaries can be stepped around."""
    rule, wire = load(path)
    status = int(rule[:3])

    for pieces in cuts(wire):
        assert read(pieces, LIMITS).status == status, rule


@pytest.mark.parametrize("path", files("refuse"))
def test_refusal_is_a_sentence(path: Path, read: Any) -> None:
    """It goes into the log and to the client: one line, lower case or a name first, no full stop, not endless."""
    _, wire = load(path)
    reason = read([wire], LIMITS).end.reason

    assert reason.isprintable()
    assert not reason.endswith(".")
    assert 10 < len(reason) < 300
