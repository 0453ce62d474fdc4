"""The opening handshake, and an open WebSocket, without I/O: exhaustively where that is possible."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN, SERVER, Protocol

from prefork.errors import ResponseError
from prefork.protocol.head import parse_head
from prefork.protocol.limits import Limits
from prefork.protocol.session import NO_STATUS, Closed, Session, negotiate
from prefork.protocol.websocket import Handshake, HandshakeRefused, accept_key, asks_for_websocket, check, switching

ROOT = Path(__file__).resolve().parents[2]
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
MASK = b"\x37\xfa\x21\x3d"


def request(*lines, first="GET /chat HTTP/1.1", key=KEY, version="13"):
    head = [first, "Host: test", "Upgrade: websocket", "Connection: Upgrade"]
    head += [f"Sec-WebSocket-Key: {key}"] if key is not None else []
    head += [f"Sec-WebSocket-Version: {version}"] if version is not None else []
    return parse_head("\r\n".join([*head, *lines, "", ""]).encode("latin-1"), Limits())


def refusal(**changes):
    with pytest.raises(HandshakeRefused) as caught:
        check(request(**changes))
    return caught.value


# ---- the handshake ----


def test_accept_key_is_that_of_the_rfc():
    """Section 1.3 of RFC 6455 has this pair."""
    assert accept_key(KEY.encode()) == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@pytest.mark.parametrize(
    ("upgrade", "connection", "asks"),
    [
        ("websocket", "Upgrade", True),
        ("WebSocket", "keep-alive, upgrade", True),
        ("h2c, websocket", "upgrade", True),
        ("h2c", "upgrade", False),
        ("websockets", "upgrade", False),
        ("websocket", "keep-alive", False),
    ],
)
def test_upgrade_must_name_websocket_and_connection_must_name_upgrade(upgrade, connection, asks):
    head = f"GET / HTTP/1.1\r\nHost: t\r\nUpgrade: {upgrade}\r\nConnection: {connection}\r\n\r\n"
    assert asks_for_websocket(parse_head(head.encode(), Limits())) is asks


def test_offer_is_read():
    offer = check(request("Sec-WebSocket-Protocol: chat, v2.chat", "Sec-WebSocket-Protocol: x"))
    assert offer == Handshake(KEY.encode(), ("chat", "v2.chat", "x"), "")


@pytest.mark.parametrize("version", [None, "8", "13, 8", "013"])
def test_other_versions_are_told_which_one_is_spoken(version):
    """RFC 6455, section 4.4, and RFC 9110, section 15.5.22."""
    refused = refusal(version=version)
    assert refused.status == 426
    assert refused.headers == [(b"sec-websocket-version", b"13"), (b"upgrade", b"websocket")]


@pytest.mark.parametrize(
    "key",
    [
        None,
        "",
        "short",
        "dGhlIHNhbXBsZSBub25jZQ",
        "dGhlIHNhbXBsZSBub25jZR==",
        "AAAAAAAAAAAAAAAAAAAAAAAA",
        KEY + "AAAA",
        "*" * 22 + "==",
    ],
)
def test_key_is_sixteen_bytes_in_base64(key):
    assert refusal(key=key).status == 400


def test_key_may_not_be_there_twice():
    with pytest.raises(HandshakeRefused, match="2 times"):
        check(request(f"Sec-WebSocket-Key: {KEY}"))


@pytest.mark.parametrize("first", ["POST /chat HTTP/1.1", "get /chat HTTP/1.1"])
def test_only_get_opens(first):
    assert refusal(first=first).status == 400


def test_body_is_refused():
    """A proxy might take its bytes for the first frames."""
    with pytest.raises(HandshakeRefused, match="no body"):
        check(request("Content-Length: 3"))


def test_subprotocol_that_is_no_token_is_refused():
    with pytest.raises(HandshakeRefused, match="token"):
        check(request("Sec-WebSocket-Protocol: a b"))


def answer(offer=None, **changes):
    offer = offer or check(request("Sec-WebSocket-Protocol: chat"))
    arguments = {"subprotocol": None, "extensions": None, "headers": [], "date": b"date: now\r\n", "server": b""}
    return switching(offer, **{**arguments, **changes})


def test_answer_has_what_was_chosen():
    assert answer(subprotocol="chat", extensions="permessage-deflate", headers=[(b"set-cookie", b"a=1")]) == (
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
        b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nsec-websocket-protocol: chat\r\n"
        b"sec-websocket-extensions: permessage-deflate\r\nset-cookie: a=1\r\ndate: now\r\n\r\n"
    )


def test_content_length_does_not_get_into_a_101():
    """RFC 9110, section 8.6, forbids it."""
    assert b"content-length" not in answer(headers=[(b"content-length", b"0"), (b"transfer-encoding", b"chunked")])


@pytest.mark.parametrize(
    "changes",
    [
        {"subprotocol": "other"},
        {"subprotocol": "chat\r\nx: y"},
        {"headers": [(b"x", b"a\r\nb: c")]},
        {"headers": [(b"x y", b"a")]},
        {"headers": [("x", "a")]},
        {"headers": [(b"Sec-WebSocket-Protocol", b"chat")]},
        {"headers": [(b"upgrade", b"h2c")]},
    ],
)
def test_application_cannot_inject_or_contradict(changes):
    with pytest.raises(ResponseError):
        answer(**changes)


def test_prefork_is_imported_without_the_library():
    """It is an extra."""
    code = "import sys; sys.modules['websockets'] = None; import prefork; from prefork.protocol.websocket import load_sessions\n"
    code += "try: load_sessions()\nexcept prefork.PreforkError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "pip install 'prefork[websocket]'" in done.stdout


# ---- frames ----


def frame(opcode, payload=b"", *, fin=True, rsv1=False, rsv2=False, mask=True, length=None):
    """A client's frame. *length* forces a form of the length: 2 or 8 bytes."""
    first = (0x80 if fin else 0) | (0x40 if rsv1 else 0) | (0x20 if rsv2 else 0) | opcode
    size = len(payload)
    length = length or (0 if size < 126 else 2 if size < 65536 else 8)
    second = {0: size, 2: 126, 8: 127}[length]
    head = bytes((first, (0x80 if mask else 0) | second)) + (size.to_bytes(length, "big") if length else b"")
    if not mask:
        return head + payload
    return head + MASK + bytes(byte ^ MASK[at & 3] for at, byte in enumerate(payload))


def close(code, reason=""):
    return frame(8, code.to_bytes(2, "big") + reason.encode())


TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10


def events(session, *pieces):
    found = []
    for piece in pieces:
        session.receive_data(piece)
        while (event := session.next_event()) is not None:
            found.append(event)
    return found


def cut(data, every):
    return [data[at : at + every] for at in range(0, len(data), every)]


def whole(parts):
    return parts if isinstance(parts, bytes) else b"".join(parts)


CONVERSATIONS = {
    "text": (frame(TEXT, "schön".encode()), ["schön"]),
    "binary": (frame(BINARY, b"\x00\xff"), [b"\x00\xff"]),
    "empty": (frame(TEXT) + frame(BINARY), ["", b""]),
    "two byte length": (frame(BINARY, b"x" * 126), [b"x" * 126]),
    "eight byte length": (frame(BINARY, b"x" * 65536), [b"x" * 65536]),
    "several": (frame(TEXT, b"a") + frame(BINARY, b"b") + frame(TEXT, b"c"), ["a", b"b", "c"]),
    "ping before": (frame(PING, b"p") + frame(TEXT, b"a") + frame(PONG) + frame(TEXT, b"b"), ["a", "b"]),
    "fragments": (frame(TEXT, b"a", fin=False) + frame(0, b"b", fin=False) + frame(0, b"c"), ["abc"]),
    "fragments within a character": (frame(TEXT, b"\xc3", fin=False) + frame(0, b"\xb6"), ["ö"]),
    "ping between fragments": (
        frame(BINARY, b"a", fin=False) + frame(PING) + frame(0, b"b") + frame(TEXT, b"c"),
        [b"ab", "c"],
    ),
    "close": (frame(TEXT, b"a") + close(1000, "bye") + b"rubbish", ["a", Closed(1000, "bye")]),
    "close without a code": (frame(CLOSE), [Closed(NO_STATUS, "")]),
    "close between fragments": (frame(TEXT, b"a", fin=False) + close(1001), [Closed(1001, "")]),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("every", [1, 2, 3, 5, 7, 1000, 1 << 20])
def test_messages_are_the_same_wherever_the_bytes_are_cut(name, every):
    data, expected = CONVERSATIONS[name]
    if every < 1000 and len(data) > 1000:
        every *= 997
    assert events(Session(1 << 20), *cut(data, every)) == expected


def test_every_cut_of_a_conversation_in_two():
    data = b"".join(part for part, _ in list(CONVERSATIONS.values())[:3]) + CONVERSATIONS["ping between fragments"][0]
    expected = events(Session(1 << 20), data)
    for at in range(len(data)):
        assert events(Session(1 << 20), data[:at], data[at:]) == expected


def test_pings_are_answered_in_order():
    session = Session(1000)
    assert events(session, frame(PING, b"1") + frame(PING, b"2")) == []
    assert session.take_replies() == b"\x8a\x011\x8a\x012"
    assert session.take_replies() == b""


def test_close_is_answered_with_its_own_code():
    session = Session(1000)
    events(session, close(4001, "why"))
    assert session.take_replies() == b"\x88\x05\x0f\xa1why"


WRONG = {
    "no mask": (frame(TEXT, b"a", mask=False), 1002),
    "no mask and no payload": (frame(TEXT, mask=False), 1002),
    "no mask on a ping": (frame(PING, mask=False), 1002),
    "RSV1 without an extension": (frame(TEXT, b"a", rsv1=True), 1002),
    "RSV2": (frame(TEXT, b"a", rsv2=True), 1002),
    "RSV2 on a ping": (frame(PING, b"a", rsv2=True), 1002),
    "opcode 3": (frame(3, b"a"), 1002),
    "opcode 11": (frame(11, b"a"), 1002),
    "long ping": (frame(PING, b"a" * 126), 1002),
    "long close": (frame(CLOSE, b"\x03\xe8" + b"a" * 124), 1002),
    "fragmented ping": (frame(PING, b"a", fin=False), 1002),
    "continuation of nothing": (frame(0, b"a"), 1002),
    "text within a message": (frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), 1002),
    "length of two bytes that one would hold": (frame(BINARY, b"a" * 125, length=2), 1002),
    "length of eight bytes that two would hold": (frame(BINARY, b"a" * 65535, length=8), 1002),
    "close with one byte": (frame(CLOSE, b"\x03"), 1002),
    "close with 1005": (close(1005), 1002),
    "close with 1006": (close(1006), 1002),
    "close with 999": (close(999), 1002),
    "close with 5000": (close(5000), 1002),
    "close whose reason is not UTF-8": (frame(CLOSE, b"\x03\xe8\xff"), 1007),
    "text that is not UTF-8": (frame(TEXT, b"\xff"), 1007),
    "text with a surrogate": (frame(TEXT, b"\xed\xa0\x80"), 1007),
    "text that ends within a character": (frame(TEXT, b"\xc3"), 1007),
    "fragment that is not UTF-8": (frame(TEXT, b"\xff", fin=False), 1007),
    "last fragment within a character": (frame(TEXT, b"a", fin=False) + frame(0, b"\xc3"), 1007),
    "too large": (frame(BINARY, b"a" * 70001), 1009),
    "fragments that are too large together": (frame(BINARY, b"a" * 69999, fin=False) + frame(0, b"aa"), 1009),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("every", [1, 3, 1 << 20])
def test_what_is_wrong_is_told_with_its_code_and_nothing_is_read_after_it(name, every):
    data, code = WRONG[name]
    session = Session(70000)
    pieces = cut(data + frame(TEXT, b"later"), every if len(data) < 1000 else max(every, 999))
    [closed] = events(session, *pieces)
    assert (closed.code, closed.is_failure) == (code, True)
    reply = session.take_replies()
    assert reply[0] == 0x88
    assert reply[2:4] == code.to_bytes(2, "big")
    assert len(reply) == reply[1] + 2 <= 127
    assert events(session, frame(TEXT, b"more")) == []
    assert session.take_replies() == b""


def test_text_that_cannot_be_utf8_is_refused_before_its_end():
    """A client that sends megabytes of it is told at once."""
    data = frame(TEXT, b"\xff" + b"a" * 1000)
    [closed] = events(Session(1 << 20), data[:20])
    assert closed.code == 1007


def test_length_above_the_limit_is_refused_before_its_payload():
    [closed] = events(Session(1000), b"\x82\xff" + (1 << 62).to_bytes(8, "big") + MASK)
    assert closed.code == 1009


def test_frames_made_here_are_read_by_the_library():
    for size in (0, 1, 125, 126, 65535, 65536, 100_000):
        library = Protocol(SERVER.__class__.CLIENT, max_size=None)
        session = Session(1000)
        library.receive_data(whole(session.text("x" * size)) + whole(session.binary(b"y" * size)))
        text, binary = library.events_received()
        assert (text.opcode, bytes(text.data)) == (Opcode.TEXT, b"x" * size)
        assert (binary.opcode, bytes(binary.data)) == (Opcode.BINARY, b"y" * size)


def test_after_our_close_messages_are_dropped_until_the_peer_closes():
    session = Session(1000)
    assert session.close(1001, "") == b"\x88\x02\x03\xe9"
    assert session.close(1002, "again") == b""
    assert events(session, frame(TEXT, b"a") + frame(BINARY, b"b", fin=False) + frame(0) + frame(PING)) == []
    assert events(session, close(1001)) == [Closed(1001, "")]
    assert session.take_replies() == b""


def test_reason_is_cut_between_two_characters():
    made = Session(1000).close(1000, "é" * 100)
    assert made[4:].decode() == "é" * 61


# ---- compression ----


def deflated(payload, bits=12, final=False):
    compressor = zlib.compressobj(wbits=-bits)
    data = compressor.compress(payload)
    return (
        data + compressor.flush(zlib.Z_FINISH) + b"\x00" if final else (data + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
    )


def compressed_session(offer="permessage-deflate; client_max_window_bits", max_size=1 << 20):
    _, deflate = negotiate(offer)
    return Session(max_size, deflate)


@pytest.mark.parametrize(
    ("offer", "agreed"),
    [
        ("permessage-deflate", "permessage-deflate; server_max_window_bits=12"),
        (
            "permessage-deflate; client_max_window_bits",
            "permessage-deflate; server_max_window_bits=12; client_max_window_bits=12",
        ),
        (
            "permessage-deflate; client_max_window_bits=10",
            "permessage-deflate; server_max_window_bits=12; client_max_window_bits=10",
        ),
        ("permessage-deflate; server_max_window_bits=9", "permessage-deflate; server_max_window_bits=9"),
        (
            "permessage-deflate; server_no_context_takeover",
            "permessage-deflate; server_no_context_takeover; server_max_window_bits=12",
        ),
        (
            "permessage-deflate; server_max_window_bits=8, permessage-deflate",
            "permessage-deflate; server_max_window_bits=12",
        ),
        ("x-webkit-deflate-frame, permessage-deflate", "permessage-deflate; server_max_window_bits=12"),
    ],
)
def test_compression_is_agreed_on_within_our_window(offer, agreed):
    assert negotiate(offer)[0] == agreed


@pytest.mark.parametrize(
    "offer",
    ["", "bzip", "permessage-deflate; unknown", "permessage-deflate; server_max_window_bits=8", "permessage-deflate;;"],
)
def test_other_offers_are_declined(offer):
    assert negotiate(offer) is None


@pytest.mark.parametrize("every", [1, 4, 1 << 20])
def test_compressed_messages_are_inflated(every):
    compressor = zlib.compressobj(wbits=-12)
    packed = [
        (compressor.compress(text) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4] for text in (b"hello" * 9, b"hello" * 9)
    ]
    data = frame(TEXT, packed[0], rsv1=True) + frame(PING) + frame(TEXT, b"plain")
    data += frame(BINARY, packed[1][:3], rsv1=True, fin=False) + frame(0, packed[1][3:])
    assert events(compressed_session(), *cut(data, every)) == ["hello" * 9, "plain", b"hello" * 9]


def test_what_we_compress_can_be_inflated():
    session = compressed_session()
    inflater = zlib.decompressobj(wbits=-12)
    for text in ("hello" * 9, "", "hello" * 9, "x" * 100_000):
        made = whole(session.text(text))
        assert made[0] == 0xC1
        head = {126: 4, 127: 10}.get(made[1], 2)
        assert inflater.decompress(made[head:] + b"\x00\x00\xff\xff").decode() == text


@pytest.mark.parametrize("fragmented", [False, True])
def test_bomb_is_refused_without_being_inflated(fragmented):
    """10 MB of zeros come in 10 KB."""
    packed = deflated(bytes(10 << 20))
    data = (
        frame(BINARY, packed[:99], rsv1=True, fin=False) + frame(0, packed[99:])
        if fragmented
        else frame(BINARY, packed, rsv1=True)
    )
    [closed] = events(compressed_session(max_size=100_000), data)
    assert closed.code == 1009


def test_message_of_exactly_the_limit_passes():
    session = compressed_session(max_size=1000)
    assert events(session, frame(BINARY, deflated(bytes(1000)), rsv1=True)) == [bytes(1000)]


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("memory", [1, 5, 9])
@pytest.mark.parametrize("strategy", [zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED])
@pytest.mark.parametrize("size", [1, 100, 200_000])
@pytest.mark.parametrize("fragmented", [False, True])
def test_limit_is_that_of_the_inflated_message(level, memory, strategy, size, fragmented):
    """What cannot be compressed grows, by an eighth at worst."""

    def sent(message):
        compressor = zlib.compressobj(level, wbits=-15, memLevel=memory, strategy=strategy)
        packed = (compressor.compress(message) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
        assert size < 100 or len(packed) > len(message)
        if not fragmented:
            return frame(BINARY, packed, rsv1=True)
        half = len(packed) - 3
        return frame(BINARY, packed[:half], rsv1=True, fin=False) + frame(PING) + frame(0, packed[half:])

    message = os.urandom(size + 1)
    assert events(compressed_session("permessage-deflate", max_size=size), sent(message[1:])) == [message[1:]]
    [closed] = events(compressed_session("permessage-deflate", max_size=size), sent(message))
    assert (closed.code, closed.is_failure) == (1009, True)


def test_nothing_is_inflated_after_a_first_fragment_that_reached_the_limit():
    """zlib takes a limit of 0 for none."""
    compressor = zlib.compressobj(wbits=-15)
    first, bomb = (compressor.compress(bytes(n)) + compressor.flush(zlib.Z_SYNC_FLUSH) for n in (80_000, 9 << 20))
    data = frame(BINARY, first, rsv1=True, fin=False) + frame(0, bomb[:-4])
    session = compressed_session("permessage-deflate", max_size=80_000)
    tracemalloc.start()
    try:
        [closed] = events(session, data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert closed.code == 1009


@pytest.mark.parametrize("fragmented", [False, True])
def test_plain_message_among_compressed_ones_has_no_more_room(fragmented):
    def sent(size):
        if fragmented:
            return frame(BINARY, bytes(1000), fin=False) + frame(0, bytes(size - 1000))
        return frame(BINARY, bytes(size))

    assert events(compressed_session(max_size=2000), sent(2000)) == [bytes(2000)]
    [closed] = events(compressed_session(max_size=2000), sent(2001))
    assert closed.code == 1009


def test_rubbish_is_no_deflate():
    [closed] = events(compressed_session(), frame(BINARY, b"\xff\xff\xff", rsv1=True))
    assert closed.code == 1002


def test_stream_may_end_with_a_message_and_another_begin():
    """RFC 7692, section 7.2.3.4. The library alone would lose what follows, and keep it in memory."""
    session = compressed_session()
    once = frame(BINARY, deflated(b"one", final=True), rsv1=True)
    assert events(session, once + once + frame(BINARY, deflated(b"two"), rsv1=True)) == [b"one", b"one", b"two"]


def test_stream_may_not_end_within_a_message():
    """Each end would cost a new decoder, and a message could have millions."""
    packed = deflated(b"one", final=True)[:-1] + deflated(b"two")
    [closed] = events(compressed_session(), frame(BINARY, packed, rsv1=True))
    assert closed.code == 1002


def test_empty_compressed_message():
    assert events(compressed_session(), frame(TEXT, b"\x00", rsv1=True) + frame(TEXT, b"a")) == ["", "a"]


# ---- against the library alone ----

payloads = st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode), st.integers(120, 130).map(bytes))


@st.composite
def wire(draw):
    """Frames, most of them right, and then perhaps a mutation."""
    data = b"".join(
        frame(
            draw(st.sampled_from([TEXT, BINARY, BINARY, CONTINUATION, PING, PONG, CLOSE, 3])),
            draw(payloads),
            fin=draw(st.integers(0, 3)) > 0,
            rsv1=draw(st.integers(0, 19)) == 0,
            mask=draw(st.integers(0, 19)) > 0,
        )
        for _ in range(draw(st.integers(1, 6)))
    )
    if draw(st.booleans()):
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + bytes((draw(st.integers(0, 255)),)) + data[at + 1 :]
    return data


def by_the_library(data, max_size):
    """Messages, and the code of the close frame that is sent; None if there is none."""
    library = Protocol(SERVER, state=OPEN, max_size=max_size)
    library.receive_data(data)
    messages, parts, opcode = [], [], None
    for each in library.events_received():
        assert isinstance(each, Frame)
        if each.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            opcode = each.opcode if each.opcode is not Opcode.CONT else opcode
            parts.append(bytes(each.data))
            if each.fin:
                messages.append((opcode is Opcode.TEXT, b"".join(parts)))
                parts = []
    return messages, None if library.close_sent is None else library.close_sent.code


@settings(max_examples=400, deadline=None)
@given(wire(), st.integers(1, 50))
def test_whatever_is_accepted_the_library_accepts(data, every):
    """Where we refuse and it does not, the reason is one of three that it leaves to others."""
    theirs, their_code = by_the_library(data, 10_000)
    session = Session(10_000)
    found = events(session, *cut(data, every))
    reply = session.take_replies()
    closed = found.pop() if found and isinstance(found[-1], Closed) else None
    ours = [(isinstance(each, str), each.encode() if isinstance(each, str) else each) for each in found]
    assert ours == theirs[: len(ours)]
    if closed is None:
        assert (ours, their_code) == (theirs, None)
    elif closed.code != their_code:
        assert (
            closed.code == 1007  # it leaves UTF-8 to its caller
            or "shortest form" in closed.reason
            or "control frame" in closed.reason  # it reads on to the end of the payload, or says 1009
            or not closed.is_failure  # a close frame between fragments, which it refuses
        )
    assert closed is None or reply


def test_memory_of_an_idle_session_is_small():
    """Ten thousand of them are ordinary."""
    session = Session(1 << 20)
    events(session, frame(BINARY, os.urandom(1000)), frame(PING))
    session.take_replies()
    held = sum(sys.getsizeof(getattr(session, name)) for name in Session.__slots__)
    assert held < 600
    assert session._library is None
