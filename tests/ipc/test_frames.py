"""The codec alone: cut anywhere, descriptors claimed by the right frame, nonsense refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.errors import FrameError
from prefork.ipc.frames import HEADER_SIZE, MAX_FDS, MAX_SIZE, Decoder, Frame, Kind, encode

# Numbers are enough: nothing here opens or closes a descriptor.
frames = st.builds(
    Frame,
    st.sampled_from(Kind),
    st.binary(max_size=100),
    st.lists(st.integers(0, 1000), max_size=MAX_FDS).map(tuple),
    st.just(False),
)


def reads(sent: list[Frame], cuts: set[int]) -> list[tuple[bytes, tuple[int, ...]]]:
    """*sent* as recvmsg(2) might return it: cut at *cuts*, and after each byte that carries descriptors."""
    carriers = {}
    stream = b""
    for frame in sent:
        if frame.fds:
            carriers[len(stream)] = frame.fds
        stream += encode(frame)
    # A read never goes on into the next frame's descriptors, but may begin with plain bytes.
    ends = sorted({cut for cut in cuts if 0 < cut < len(stream)} | set(carriers) - {0} | {len(stream)})
    pieces, start = [], 0
    for end in ends:
        pieces.append((stream[start:end], carriers.get(start, ())))
        start = end
    return pieces


def decode(pieces: list[tuple[bytes, tuple[int, ...]]]) -> list[Frame]:
    decoder = Decoder()
    got = [frame for data, fds in pieces for frame in decoder.feed(data, fds)]
    assert decoder.leftovers() == []
    return got


def test_decoder_gives_each_descriptor_to_the_frame_that_claims_it():
    """Two frames may arrive in one read; only the second owns the descriptor."""
    plain = Frame(Kind.USER, b"a")
    owner = Frame(Kind.USER, b"b", fds=(7,))

    assert Decoder().feed(encode(plain) + encode(owner), [7]) == [plain, owner]


@given(st.lists(frames, max_size=5), st.sets(st.integers(0, 600)))
def test_frames_arrive_whole_wherever_reads_are_cut(sent: list[Frame], cuts: set[int]):
    """The kernel cuts a stream where it likes."""
    assert decode(reads(sent, cuts)) == sent


def test_frames_arrive_whole_cut_at_every_single_byte():
    """Each place between two bytes, one after another, and all at once."""
    sent = [Frame(Kind.HANDOFF, b"one", (3, 4)), Frame(Kind.ACK, b""), Frame(Kind.USER, b"two" * 9, (5,))]
    length = sum(len(encode(frame)) for frame in sent)

    for cut in range(length):
        assert decode(reads(sent, {cut})) == sent
    assert decode(reads(sent, set(range(length)))) == sent


def test_descriptors_may_arrive_with_the_end_of_an_earlier_frame():
    """Plain bytes before the frame that owns them may share its read."""
    plain, owner = Frame(Kind.USER, b"earlier"), Frame(Kind.USER, b"later", (9,))
    stream = encode(plain) + encode(owner)
    decoder = Decoder()

    for cut in range(1, len(encode(plain))):
        assert decoder.feed(stream[:cut]) == []
        assert decoder.feed(stream[cut : len(encode(plain)) + 1], [9]) == [plain]
        assert decoder.feed(stream[len(encode(plain)) + 1 :]) == [owner]


@given(st.binary(max_size=200), st.lists(st.integers(0, 1000), max_size=3))
def test_any_bytes_are_frames_or_a_frame_error_and_no_descriptor_is_lost(data: bytes, fds: list[int]):
    """Whatever a confused peer writes, each descriptor is in a frame or among the leftovers."""
    decoder = Decoder()
    owned: list[int] = []
    try:
        owned = [fd for frame in decoder.feed(data, fds) for fd in frame.fds]
    except FrameError:
        pass

    assert sorted(owned + decoder.leftovers()) == sorted(fds)


def header(size: int, kind: int, count: int) -> bytes:
    return size.to_bytes(4, "big") + bytes([kind, count])


@pytest.mark.parametrize(
    ("data", "fds", "why"),
    [
        (bytes(HEADER_SIZE), [], "frame is of kind 0, known are 1 to 7"),
        (header(0, 8, 0), [], "frame is of kind 8, known are 1 to 7"),
        (header(MAX_SIZE + 1, 1, 0), [], "frame claims 67108865 bytes, 67108864 are allowed"),
        (header(0, 1, MAX_FDS + 1), [], "frame claims 17 descriptors, 16 are allowed"),
        (header(0, 1, 2), [7], "frame claims 2 descriptors, 1 arrived"),
        (header(0, 1, 0), [7], "1 descriptors arrived that no frame claims"),
        (header(9, 1, 1), [7, 8], "1 descriptors arrived that no frame claims"),
        (b"", [7], "1 descriptors arrived that no frame claims"),
    ],
)
def test_broken_frame_is_refused_and_its_descriptors_are_left_over(data: bytes, fds: list[int], why: str):
    """Guessing on would give a connection to the wrong message."""
    decoder = Decoder()

    with pytest.raises(FrameError) as caught:
        decoder.feed(data, fds)

    assert str(caught.value) == why
    assert decoder.leftovers() == fds
    assert decoder.leftovers() == []


def test_good_frames_before_a_broken_one_leave_their_descriptors_too():
    """They were not returned, so nobody else would close them."""
    decoder = Decoder()

    with pytest.raises(FrameError):
        decoder.feed(
            encode(Frame(Kind.USER, b"", (1, 2))) + encode(Frame(Kind.USER, b"", (3,))) + bytes(9), [1, 2, 3, 4]
        )

    assert decoder.leftovers() == [1, 2, 3, 4]


def test_unfinished_frame_leaves_its_descriptors_over():
    """The sender died in the middle."""
    decoder = Decoder()
    decoder.feed(encode(Frame(Kind.HANDOFF, b"half", (7,)))[:-1], [7])

    assert decoder.leftovers() == [7]


def test_decoder_may_allow_less():
    """A channel to a stranger has a lower limit than one between our own processes."""
    with pytest.raises(FrameError, match="frame claims 11 bytes, 10 are allowed"):
        Decoder(max_size=10).feed(encode(Frame(Kind.USER, b"x" * 11)))


def test_frame_that_no_decoder_would_take_is_not_encoded():
    """The sender's mistake is the sender's error."""
    with pytest.raises(FrameError, match="a payload of 67108865 bytes is too large for a frame: 67108864 are allowed"):
        encode(Frame(Kind.USER, bytes(MAX_SIZE + 1)))
    with pytest.raises(FrameError, match="17 descriptors are too many for a frame: 16 are allowed"):
        encode(Frame(Kind.USER, b"", tuple(range(17))))


def test_frame_that_lost_its_descriptors_is_told_cut_at_every_byte():
    """Others around it keep theirs, also if their headers were cut by the end of the read."""
    sent = [
        Frame(Kind.USER, b"has", (1,)),
        Frame(Kind.USER, b"plain"),
        Frame(Kind.USER, b"lost", (2,)),
        Frame(Kind.HANDOFF, b"x", (3,)),
    ]
    stream = b"".join(map(encode, sent))
    begins = [sum(len(encode(f)) for f in sent[:i]) for i in range(5)]

    for first in range(1, begins[1] + 1):
        # A read ends with the chunk that carries descriptors, or within it.
        for end in range(begins[2] + 1, begins[3] + 1):
            decoder = Decoder()
            got = decoder.feed(stream[:first], [1])
            got += decoder.feed(stream[first:end], is_lost=True)
            got += decoder.feed(stream[end:], [3])

            assert got == [sent[0], sent[1], Frame(Kind.USER, b"lost", (), True), sent[3]]
            assert decoder.leftovers() == []


def test_lost_descriptors_that_no_frame_claims_are_refused():
    """And are not among what is left over."""
    decoder = Decoder()
    with pytest.raises(FrameError, match="1 descriptors arrived that no frame claims"):
        decoder.feed(encode(Frame(Kind.USER, b"")), is_lost=True)

    assert decoder.leftovers() == []


def test_large_payload_is_read_to_where_it_belongs():
    """The header's read ends in the middle of it, and so do others."""
    frame = Frame(Kind.USER, b"x" * 200_000, (7,))
    wire = encode(frame)
    decoder = Decoder()
    assert decoder.room() is None
    assert decoder.feed(wire[:1000], [7]) == []
    room = decoder.room()
    assert room is not None
    assert len(room) == len(wire) - 1000
    room[:50_000] = wire[1000:51_000]
    assert decoder.filled(50_000) == []
    assert decoder.feed(wire[51_000:] + encode(frame)[:3], [8]) == [frame]
    assert decoder.leftovers() == [8]
