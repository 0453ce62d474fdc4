"""Body readers: what belongs to a body, what it says, and that its size costs no more than its size."""

from __future__ import annotations

import time

import pytest

from prefork.protocol.fast import ChooseCycle, choose_cycle
from prefork.protocol.full import BodyReader, always_full
from prefork.protocol.head import Refused, parse_head
from prefork.protocol.limits import Limits

LIMITS = Limits()
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


CYCLES = pytest.mark.parametrize("choose", [choose_cycle, always_full])


def reader(head: bytes, limits: Limits = LIMITS, choose: ChooseCycle = choose_cycle) -> BodyReader:
    return choose(parse_head(head, limits), head, limits)


def with_length(length: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length


@CYCLES
@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", with_length(0)])
def test_request_without_body_is_complete_with_its_head(head: bytes, choose: ChooseCycle) -> None:
    """What follows is the next request."""
    assert reader(head, choose=choose).is_complete


@CYCLES
@pytest.mark.parametrize(
    ("head", "wire", "said"),
    [
        (with_length(5), b"hello", b"hello"),
        (CHUNKED, b"2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n", b"hello"),
        (CHUNKED, b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n", b"hello"),
    ],
)
def test_what_follows_a_body_is_left(head: bytes, wire: bytes, said: bytes, choose: ChooseCycle) -> None:
    """It is the next request; a byte too many taken here is a request lost or smuggled."""
    for at in range(1, len(wire) + 1):
        body = reader(head, choose=choose)
        first, end = body.read(b"..." + wire[:at], 3)
        assert end == 3 + at
        assert body.is_complete is (at == len(wire))

        data = wire[at:] + b"GET / HTTP/1.1"
        second, end = (b"", 0) if body.is_complete else body.read(data, 0)
        assert body.is_complete
        assert first + second == said
        assert data[end:] == b"GET / HTTP/1.1"


def test_piece_of_known_length_is_not_copied() -> None:
    """An upload of a gigabyte is a gigabyte to receive, not two to copy."""
    body = reader(with_length(2000))
    piece = b"x" * 1000

    assert body.read(piece, 0)[0] is piece


def test_trailers_are_told_apart_from_the_head() -> None:
    body = reader(CHUNKED)
    body.read(b"0\r\nX-Sum: \t1 \r\nx-sum: 2\r\n\r\n", 0)

    assert body.trailers == [(b"x-sum", b"1"), (b"x-sum", b"2")]


def test_chunks_of_one_read_come_as_one_piece() -> None:
    """A client that sends chunks of one byte must not cost an event for each."""
    assert reader(CHUNKED).read(b"1\r\nx\r\n" * 1000, 0)[0] == b"x" * 1000


def test_limit_of_a_chunked_body_counts_announced_bytes() -> None:
    """It is refused before it is received: 16 EiB announced need no 16 EiB to be too much."""
    limits = Limits(body_size=10)
    assert reader(CHUNKED, limits).read(b"5\r\nhello\r\n5\r\nhello\r\n0\r\n\r\n", 0)[0] == b"hellohello"

    with pytest.raises(Refused) as caught:
        reader(CHUNKED, limits).read(b"ffffffffffffffff\r\n", 0)
    assert caught.value.status == 413


def test_line_without_end_is_refused_before_it_fills_memory() -> None:
    for start, status in ((b"5;", 400), (b"0\r\nX-A: ", 431), (b"1\r\nx", 400)):
        body = reader(CHUNKED)
        body.read(start, 0)
        with pytest.raises(Refused) as caught:
            for _ in range(100):
                body.read(b"a" * 1000, 0)
        assert caught.value.status == status


@pytest.mark.parametrize("piece", [b"1\r\nx\r\n", b"4000\r\n" + b"x" * 0x4000 + b"\r\n"], ids=["tiny", "ordinary"])
def test_chunked_body_costs_what_it_is_long(piece: bytes) -> None:
    """Eight times the bytes in one buffer may not cost sixty times the work."""
    costs = []
    for size in (100_000, 800_000):
        body, data = reader(CHUNKED), piece * (size // len(piece))
        began = time.process_time()
        body.read(data, 0)
        costs.append(time.process_time() - began)

    assert costs[1] < 60 * max(costs[0], 0.0005)
