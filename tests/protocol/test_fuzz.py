"""Generated and mutated wires, read by both cycles, by h11, and by parsers that remember different things.

The scripts loadtest/fuzz.py and loadtest/fuzz_head.py do the same for as long as one likes.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness import readings, wires
from tests.harness.readings import Reader, against_h11, difference, said

randoms = st.randoms(use_true_random=False)
scripts = st.integers(0, 4)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return readings.warm()


@settings(max_examples=300)
@given(randoms, scripts, st.booleans())
def test_both_cycles_and_h11_agree(reader: Reader, random: Random, script: int, early: bool) -> None:
    """Same events, same bytes of answers; and what we accept, h11 accepts with the same meaning."""
    wire = wires.wire(random)

    assert difference(reader, wire, wires.cut(random, wire), script=script, early=early) is None


@settings(max_examples=100)
@given(randoms, scripts)
def test_cuts_do_not_matter_at_any_byte(reader: Reader, random: Random, script: int) -> None:
    wire = wires.wire(random)[:400]
    whole = said(reader.read([wire], script=script))

    for at in range(1, len(wire)):
        assert said(reader.read([wire[:at], wire[at:]], script=script)) == whole
    assert said(reader.read([wire[at : at + 1] for at in range(len(wire))], script=script)) == whole


@settings(max_examples=60)
@given(randoms)
def test_pipelined_requests_are_read_as_if_each_came_alone(reader: Reader, random: Random) -> None:
    """Nothing of one cycle reaches into the next."""
    singles = [wires.request(random) for _ in range(random.randrange(2, 9))]
    alone = []
    for single in singles:
        reading = reader.read([single])
        alone += reading.complete
        if reading.end != ("closed", True):
            break
    together = reader.read(wires.cut(random, b"".join(singles)))

    assert together.complete[: len(alone)] == alone


@settings(max_examples=60)
@given(randoms)
def test_what_was_read_before_changes_nothing(reader: Reader, random: Random) -> None:
    """Lines and blocks are remembered: near-equal ones, in any order, must not be taken for one another."""
    near = wires.neighbours(random, wires.request(random), 40)
    others = list(near)
    random.shuffle(others)
    other = readings.fresh()

    warm = {wire: reader.read([wire]) for wire in near}
    fresh = {wire: other.read([wire]) for wire in others}

    assert warm == fresh


@settings(max_examples=30)
@given(randoms)
def test_each_near_copy_is_read_as_h11_reads_it(reader: Reader, random: Random) -> None:
    near = wires.neighbours(random, wires.request(random), 40)

    for wire in [*near, *reversed(near)]:
        assert against_h11(wire, reader.read([wire])) is None


def test_a_flood_of_lines_pushes_out_what_is_remembered_and_no_more(reader: Reader) -> None:
    """After more different lines than any cache holds, the first ones mean what they meant."""
    head = b"GET /%d HTTP/1.1\r\nHost: h%d\r\nX-%d: %d\r\nContent-Length: 1\r\n\r\n%d"
    first = [head % (n, n, n, n, n % 10) for n in range(50)]
    before = [reader.read([wire]) for wire in first]

    for n in range(50, 20_000):
        reader.read([head % (n, n, n, n, n % 10)])

    assert [reader.read([wire]) for wire in first] == before


@given(st.binary(max_size=300))
def test_noise_is_refused_or_awaited(reader: Reader, noise: bytes) -> None:
    assert difference(reader, noise, [noise]) is None
