"""Generated requests: what the strict parser lets through, h11 reads alike, however it is cut."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import h11
from hypothesis import given
from hypothesis import strategies as st

from prefork.protocol.events import Closed, Refusal
from prefork.protocol.limits import Limits

LIMITS = Limits()

TOKEN_CHARACTERS = string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~"
VISIBLE = "".join(map(chr, range(0x21, 0x7F)))

tokens = st.text(TOKEN_CHARACTERS, min_size=1, max_size=12).map(str.encode)
values = st.binary(max_size=20).map(lambda raw: bytes(b for b in raw if b >= 0x20 and b != 0x7F).strip())
spaces = st.sampled_from([b"", b" ", b"\t", b" \t "])
paths = st.text(VISIBLE.replace("#", ""), max_size=20).map(lambda text: b"/" + text.encode())
hosts = st.sampled_from([b"a", b"example.com:8080", b"[::1]", b"127.0.0.1", b"my_service"])

DECISIVE = {
    "host", "content-length", "transfer-encoding", "expect", "connection", "upgrade", "content_length",
    "transfer_encoding", "keep-alive", "te", "trailer",
}  # fmt: skip
plain_fields = st.tuples(tokens.filter(lambda name: name.decode().lower() not in DECISIVE), spaces, values, spaces)
field_lists = st.lists(plain_fields.map(lambda f: b"%b:%b%b%b" % f), max_size=5)


@dataclass
class Body:
    fields: list[bytes]
    wire: bytes


@st.composite
def known_bodies(draw: Any) -> Body:
    body = draw(st.binary(max_size=40))
    zeros = draw(st.sampled_from([b"", b"0", b"00"]))
    return Body([b"Content-Length: %b%d" % (zeros, len(body))], body)


@st.composite
def chunked_bodies(draw: Any) -> Body:
    wire = b""
    extensions = st.sampled_from([b"", b";a", b"; a=b", b';a="\\"b ;"', b";a;b=c"])
    for chunk in draw(st.lists(st.binary(min_size=1, max_size=20), max_size=4)):
        size = draw(st.sampled_from([b"%x", b"%X", b"0%x"])) % len(chunk)
        wire += size + draw(extensions) + b"\r\n" + chunk + b"\r\n"
    trailers = b"".join(line + b"\r\n" for line in draw(field_lists))
    last = draw(st.sampled_from([b"0", b"000"])) + draw(extensions) + b"\r\n"
    return Body(
        [b"Transfer-Encoding: " + draw(st.sampled_from([b"chunked", b"CHUNKED"]))], wire + last + trailers + b"\r\n"
    )


bodies = st.one_of(st.just(Body([], b"")), known_bodies(), chunked_bodies())


@st.composite
def requests(draw: Any) -> bytes:
    body = draw(bodies)
    method = draw(tokens.filter(lambda name: name != b"CONNECT"))
    fields = draw(st.permutations([b"Host: " + draw(hosts), *body.fields, *draw(field_lists)]))
    return b"\r\n".join([b"%b %b HTTP/1.1" % (method, draw(paths)), *fields, b"", b""]) + body.wire


wires = st.lists(requests(), min_size=1, max_size=3).map(b"".join)


@given(wires)
def test_valid_requests_are_read_as_h11_reads_them(read: Any, h11_read: Any, wire: bytes) -> None:
    """The parser in front of h11 may refuse more; it may not read differently."""
    ours = read([wire], LIMITS)

    assert ours.end == Closed(clean=True)
    assert ours.messages == h11_read(wire)


@given(wires)
def test_valid_requests_read_the_same_cut_at_every_byte(read: Any, wire: bytes) -> None:
    whole = read([wire], LIMITS)

    assert read([wire[at : at + 1] for at in range(len(wire))], LIMITS) == whole
    for at in range(1, len(wire)):
        assert read([wire[:at], wire[at:]], LIMITS) == whole


@given(requests(), st.data())
def test_cut_off_request_is_never_complete(read: Any, wire: bytes, data: Any) -> None:
    """A client that dies in the middle of a body must not look like one that finished."""
    at = data.draw(st.integers(1, len(wire) - 1))
    reading = read([wire[:at]], LIMITS)

    assert reading.end == Closed(clean=False)
    assert not any(message.is_complete for message in reading.messages)


NASTY = [b"\r", b"\n", b"\r\n", b"\0", b"\x0b", b"\x7f", b" ", b"\t", b":", b",", b"\xff", b"#", b"0", b"5", b";", b""]


@given(requests(), st.data())
def test_mutated_request_is_refused_or_read_as_h11_reads_it(read: Any, h11_read: Any, wire: bytes, data: Any) -> None:
    """Whatever a mutation makes of a request: no exception but a refusal, and no second reading of what passes."""
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(wire) - 1))
        wire = wire[:at] + data.draw(st.sampled_from(NASTY)) + wire[at + data.draw(st.integers(0, 2)) :]
    ours = read([wire], LIMITS)
    complete = [message for message in ours.messages if message.is_complete]
    if not complete or wire.startswith(b"\r\n"):
        return

    # What we refuse or miss further on, h11 may read; the requests before that must be the same.
    theirs: list[Any] = []
    end = len(wire)
    while len(theirs) < len(complete):
        try:
            theirs = h11_read(wire[:end])
        except h11.RemoteProtocolError:
            pass
        end -= 1
        assert end >= 0, "h11 refuses what we have read"
    assert theirs[: len(complete)] == complete


@given(st.binary(max_size=200))
def test_noise_ends_in_a_refusal_or_an_end(read: Any, noise: bytes) -> None:
    reading = read([noise], LIMITS)

    assert isinstance(reading.end, (Refusal, Closed))
