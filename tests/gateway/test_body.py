"""The body as a file: what a file of the whole would say, without the whole."""

from __future__ import annotations

import io
import tracemalloc
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.gateway.body import BodyFile

KB = 1024


def file_over(pieces):
    left = deque(pieces)
    return BodyFile(lambda: left.popleft() if left else b"")


def read_into(file, size):
    """What `readinto` says, and has put there."""
    buffer = bytearray(size or 0)
    count = file.readinto(buffer)
    return count, bytes(buffer[:count])


def lines_until(file, count):
    """The lines of an iteration that is left after *count*."""
    lines = []
    for line in file:
        lines.append(line)
        if len(lines) >= count:
            break
    return lines


STEPS = {
    "read": lambda file, size: file.read(size),
    "readline": lambda file, size: file.readline(size),
    "readlines": lambda file, size: file.readlines(size),
    "readinto": lambda file, size: read_into(file, max(size or 0, 0)),
    "lines": lambda file, size: lines_until(file, max(size or 0, 1)),
    "next": lambda file, size: next(file, b"end"),
}
SIZES = st.one_of(st.none(), st.integers(-1, 60))


@given(
    pieces=st.lists(st.lists(st.sampled_from([b"a", b"bc", b"\n"]), min_size=1, max_size=30).map(b"".join), max_size=6),
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), SIZES), max_size=12),
)
def test_every_way_to_read_says_what_a_file_says(pieces, steps):
    """However the pieces are cut, and in any order of calls; to the end and behind it."""

    def play(file):
        return [STEPS[name](file, size) for name, size in steps] + [file.read(), file.read(), file.readline(), [*file]]

    assert play(file_over(pieces)) == play(io.BufferedReader(io.BytesIO(b"".join(pieces))))


def test_reading_within_an_iteration_skips_nothing():
    """The iteration goes on behind what was read, though that is in another piece."""
    file = file_over([b"1\n2", b"\n3\n4\n5\n", b"6\n7"])

    assert [(line, file.read(4)) for line in file] == [(b"1\n", b"2\n3\n"), (b"4\n", b"5\n6\n"), (b"7", b"")]


@given(pieces=st.lists(st.binary(min_size=1, max_size=9), max_size=5), sizes=st.lists(st.integers(-1, 5), max_size=20))
def test_read1_asks_for_one_piece_at_the_most(pieces, sizes):
    """`io.TextIOWrapper` reads by it, and shall not wait for more than one line needs."""
    asked = []
    left = deque(pieces)
    file = BodyFile(lambda: asked.append(1) or (left.popleft() if left else b""))

    for size in sizes:
        before = len(asked)
        data = file.read1(size)
        assert len(asked) - before <= 1
        assert size < 0 or len(data) <= size
        assert data or size == 0 or not left


def test_text_wrapper_reads_it():
    """How `csv` and `json.load` are given an upload."""
    text = io.TextIOWrapper(file_over([b"caf\xc3", b"\xa9\nb", b"ar\n"]), encoding="utf-8")

    assert list(text) == ["café\n", "bar\n"]


@pytest.mark.parametrize("use", [lambda f: f.read(1), lambda f: f.read(0), lambda f: f.readline(), list, next])
def test_closed_file_is_not_read(use):
    """A reader that goes on after closing has a bug, which must not look like the end of the body."""
    file = file_over([b"abc"])
    file.read(1)
    file.close()

    with pytest.raises(ValueError, match="closed file"):
        use(file)


def test_it_says_what_it_can_do():
    """Frameworks ask before they rewind."""
    file = file_over([])

    assert (file.readable(), file.seekable(), file.writable()) == (True, False, False)


def test_pieces_are_not_joined():
    """Read block by block, a megabyte needs no more memory than it has, and a block."""
    left = deque(bytes(256 * KB - 100) for _ in range(4))
    file = BodyFile(lambda: left.popleft() if left else b"")

    tracemalloc.start()
    try:
        while file.read(64 * KB):
            assert tracemalloc.get_traced_memory()[1] < 200 * KB
    finally:
        tracemalloc.stop()
