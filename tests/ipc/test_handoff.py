"""The bodies of handoffs: what one side says the other understands, and nothing else."""

from __future__ import annotations

import pytest

from prefork.errors import FrameError
from prefork.ipc.handoff import Verdict, decode_answer, decode_offers, encode_answer, encode_offers


@pytest.mark.parametrize("numbers", [(), (1,), (1, 2**64 - 1, 7)])
def test_offers_and_answers_come_back(numbers):
    """Numbers are never used again, so there are many."""
    assert decode_offers(encode_offers(65535, numbers)) == (65535, numbers)
    for verdict in Verdict:
        assert decode_answer(encode_answer(verdict, numbers)) == (verdict, numbers)


@pytest.mark.parametrize("body", [b"", b"\0", b"\0\0\0", encode_offers(1, [1])[:-1]])
def test_what_is_no_list_of_offers_is_refused(body):
    """A cut one would name other connections."""
    with pytest.raises(FrameError, match="bytes are no list of connections"):
        decode_offers(body)


@pytest.mark.parametrize("body", [b"", b"\1\0", encode_answer(Verdict.ACCEPTED, [1])[:-1]])
def test_what_is_no_answer_is_refused(body):
    """The same."""
    with pytest.raises(FrameError, match="bytes are no list of connections"):
        decode_answer(body)


def test_a_verdict_that_nobody_knows_is_refused():
    """It would have to be guessed what became of the connections."""
    with pytest.raises(FrameError, match="the answer to a handoff is 3, known are 0 to 2"):
        decode_answer(b"\3")
