"""Heads and bodies of responses: framing chosen once, and nothing an application passes injects a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.errors import ResponseError
from prefork.protocol.response import BodyWriter, answer


@dataclass
class Answer:
    head: bytes
    writer: BodyWriter
    keep_alive: bool


def make(status: int = 200, headers: Any = (), **settings: Any) -> Answer:
    defaults: dict[str, Any] = {
        "whole": None,
        "method": "GET",
        "version": "1.1",
        "keep_alive": True,
        "date": b"",
        "server": b"",
    }
    head, writer, keep_alive = answer(status, headers, **(defaults | settings))
    return Answer(b"".join(head), writer, keep_alive)


@pytest.mark.parametrize("bad", [b"a\rb", b"a\nb", b"a\r\nSet-Cookie: b", b"a\0b", b"\x01", b"a\x7f", b"a\r\n b"])
@pytest.mark.parametrize("name", [b"x-a", b"connection", b"content-length", b"transfer-encoding", b"date", b"server"])
def test_value_with_a_line_end_is_an_error(name: bytes, bad: bytes) -> None:
    """An application that copies user input into a header must not hand the user a second header."""
    with pytest.raises(ResponseError):
        make(headers=[(name, bad)])


@pytest.mark.parametrize("bad", [b"", b"a b", b"a:", b"a\r\nb", b"a\n", b"a\0", b"\xc3\xa4", b" a", b"a\t", b"(a)"])
def test_name_that_is_not_a_token_is_an_error(bad: bytes) -> None:
    with pytest.raises(ResponseError, match="not a token"):
        make(headers=[(bad, b"b")])


@pytest.mark.parametrize("pair", [("a", b"b"), (b"a", "b"), (b"a", 1), (b"a", None), (bytearray(b"a"), b"b")])
def test_name_and_value_are_bytes(pair: Any) -> None:
    with pytest.raises(ResponseError, match="pair of bytes"):
        make(headers=[pair])


@given(st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=12)), max_size=4))
def test_head_has_as_many_lines_as_fields(headers: list[tuple[bytes, bytes]]) -> None:
    """Whatever bytes are passed: an error, or one line each."""
    try:
        head = make(204, headers).head
    except ResponseError:
        return

    # No field that is ours to write has a name as short as these.
    assert head.count(b"\n") == head.count(b"\r") == 2 + len(headers)
    assert head.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("status", [-1, 0, 99, 100, 101, 103, 199, 1000])
def test_status_is_final(status: int) -> None:
    """A client would wait for another answer after an interim one."""
    with pytest.raises(ResponseError, match="final"):
        make(status)


@pytest.mark.parametrize(
    ("status", "line"),
    [(200, b"HTTP/1.1 200 OK\r\n"), (404, b"HTTP/1.1 404 Not Found\r\n"), (299, b"HTTP/1.1 299 \r\n")],
)
def test_status_line_keeps_its_second_space(status: int, line: bytes) -> None:
    """RFC 9112 section 4: the space stays even where there is no reason."""
    assert make(status).head.startswith(line)


CHUNKED = b"transfer-encoding: chunked"
CLOSE = b"connection: close"
LENGTH = [(b"Content-Length", b"003")]


@pytest.mark.parametrize(
    ("status", "settings", "headers", "lines", "wire"),
    [
        (200, {}, [], [CHUNKED], b"3\r\nabc\r\n0\r\n\r\n"),
        (200, {"whole": 3}, [], [b"content-length: 3"], b"abc"),
        (200, {}, LENGTH, [b"content-length: 3"], b"abc"),
        (200, {"version": "1.0"}, [], [CLOSE], b"abc"),
        (200, {"version": "1.0", "whole": 3}, [], [b"content-length: 3", b"connection: keep-alive"], b"abc"),
        (200, {"version": "1.0", "keep_alive": False}, LENGTH, [b"content-length: 3", CLOSE], b"abc"),
        (204, {}, [], [], b""),
        (204, {"whole": 3}, LENGTH, [], b""),
        (304, {}, [], [], b""),
        (304, {"whole": 3}, [], [], b""),
        (304, {}, LENGTH, [b"content-length: 3"], b""),
        (200, {"method": "HEAD"}, [], [], b""),
        (200, {"method": "HEAD", "whole": 0}, [], [], b""),
        (200, {"method": "HEAD", "whole": 3}, [], [b"content-length: 3"], b""),
        (200, {"method": "HEAD", "whole": 0}, LENGTH, [b"content-length: 3"], b""),
        (200, {"method": "HEAD", "version": "1.0"}, [], [b"connection: keep-alive"], b""),
    ],
)
def test_framing_follows_status_method_and_version(
    status: int, settings: dict[str, Any], headers: Any, lines: list[bytes], wire: bytes
) -> None:
    """The table of RFC 9112 section 6.3, from the sender's side."""
    started = make(status, headers, **settings)

    assert started.head.split(b"\r\n")[1:-2] == lines
    assert started.writer.write(b"abc", False) == wire


@pytest.mark.parametrize(
    "headers",
    [
        [(b"Transfer-Encoding", b"chunked")],
        [(b"transfer-encoding", b"gzip, chunked")],
        [(b"Keep-Alive", b"timeout=5")],
        [(b"Connection", b"keep-alive, x-a")],
        [(b"Proxy-Connection", b"keep-alive")],
    ],
)
def test_fields_of_the_connection_are_not_copied(headers: Any) -> None:
    """They would contradict what is written here: two framings in one head are a split response."""
    assert make(headers=headers, whole=3).head == b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n"


def test_application_may_close() -> None:
    started = make(headers=[(b"Connection", b"foo, Close")], whole=0)

    assert started.keep_alive is False
    assert started.head.count(CLOSE) == 1


def test_date_and_server_are_added_where_the_application_gave_none() -> None:
    ours = make(204, date=b"date: now\r\n", server=b"server: us\r\n").head
    theirs = make(204, [(b"Date", b"then"), (b"Server", b"them")], date=b"date: now\r\n", server=b"server: us\r\n").head

    assert ours == b"HTTP/1.1 204 No Content\r\ndate: now\r\nserver: us\r\n\r\n"
    assert theirs == b"HTTP/1.1 204 No Content\r\ndate: then\r\nserver: them\r\n\r\n"


@pytest.mark.parametrize("value", [b"", b"-1", b"+1", b"1_0", b"0x1", b"1, 1", b"a", b"1" * 20])
def test_content_length_is_a_number(value: bytes) -> None:
    with pytest.raises(ResponseError, match="content-length"):
        make(headers=[(b"content-length", value)])


def test_content_length_is_given_once() -> None:
    with pytest.raises(ResponseError, match="two content-length"):
        make(headers=[(b"content-length", b"1"), (b"Content-Length", b"1")])


@pytest.mark.parametrize("pieces", [[b"ab"], [b"a", b"bcd"], [b"abcd"], [b"", b""]])
def test_body_has_the_announced_size(pieces: list[bytes]) -> None:
    """One byte more begins a response of its own in the client's eyes; one less hangs it."""
    writer = make(headers=[(b"content-length", b"3")]).writer

    with pytest.raises(ResponseError, match="content-length of 3"):
        for number, piece in enumerate(pieces, 1):
            writer.write(piece, number < len(pieces))


def test_empty_piece_does_not_end_a_chunked_body() -> None:
    """A chunk of size zero is the last one."""
    writer = make().writer

    assert writer.write(b"", True) == b""
    assert writer.write(b"a", True) == b"1\r\na\r\n"
    assert writer.write(b"", False) == b"0\r\n\r\n"
