"""The head parser's values: what a Request says. What is refused is in tests/corpus."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefork.protocol.events import Request
from prefork.protocol.head import HeadRefused, parse_head
from prefork.protocol.limits import Limits

LIMITS = Limits()


def head(first: bytes = b"GET / HTTP/1.1", *fields: bytes) -> bytes:
    return b"\r\n".join([first, *fields, b"", b""])


def parse(first: bytes = b"GET / HTTP/1.1", *fields: bytes) -> Request:
    return parse_head(head(first, b"Host: a", *fields), LIMITS)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/", b"/", b""),
        (b"/a/b", b"/a/b", b""),
        (b"/a?b=c", b"/a", b"b=c"),
        (b"/a?", b"/a", b""),
        (b"/a?b?c", b"/a", b"b?c"),
        (b"/?", b"/", b""),
        (b"//b/c", b"//b/c", b""),
        (b"/a%2fb", b"/a%2fb", b""),
        (b"http://a", b"/", b""),
        (b"http://A/b?c", b"/b", b"c"),
        (b"https://a?c", b"/", b"c"),
        (b"http://a/http://b/", b"/http://b/", b""),
    ],
)
def test_target_is_split_and_kept(target: bytes, path: bytes, query: bytes) -> None:
    """Gateways want the halves; logs and `raw_path` want what was sent."""
    request = parse(b"GET %b HTTP/1.1" % target)

    assert (request.target, request.path, request.query) == (target, path, query)


def test_names_are_lower_cased_and_values_are_not() -> None:
    request = parse(b"GET / HTTP/1.1", b"X-Mixed-Case: \t Some Value\t")

    assert request.headers == [(b"host", b"a"), (b"x-mixed-case", b"Some Value")]


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [
        (b"1.1", None, True),
        (b"1.1", b"close", False),
        (b"1.1", b"Close", False),
        (b"1.1", b"foo , CLOSE", False),
        (b"1.1", b"closed", True),
        (b"1.1", b"keep-alive, close", False),
        (b"1.0", None, False),
        (b"1.0", b"Keep-Alive", True),
        (b"1.0", b"keep-alive, close", False),
    ],
)
def test_keep_alive_is_what_the_client_asked_for(version: bytes, connection: bytes | None, keep_alive: bool) -> None:
    """RFC 9112 section 9.3: close wins, and 1.0 has to ask."""
    fields = [] if connection is None else [b"Connection: " + connection]

    assert parse(b"GET / HTTP/%b" % version, *fields).keep_alive is keep_alive


def test_connection_options_are_gathered_from_all_lines() -> None:
    """A second line is the same list; reading only one of them would miss a close."""
    assert parse(b"GET / HTTP/1.1", b"Connection: foo", b"Connection: close").keep_alive is False


@pytest.mark.parametrize(
    ("first", "fields", "upgrade"),
    [
        (b"GET / HTTP/1.1", [b"Connection: Upgrade", b"Upgrade: websocket"], b"websocket"),
        (b"GET / HTTP/1.1", [b"Upgrade: websocket"], None),
        (b"GET / HTTP/1.1", [b"Connection: Upgrade"], None),
        (b"GET / HTTP/1.0", [b"Connection: Upgrade", b"Upgrade: websocket"], None),
    ],
)
def test_upgrade_counts_only_if_connection_names_it(first: bytes, fields: list[bytes], upgrade: bytes | None) -> None:
    """RFC 9110 section 7.8; and a server must ignore it in a 1.0 request."""
    assert parse(first, *fields).upgrade == upgrade


@pytest.mark.parametrize(
    ("first", "fields", "expected"),
    [
        (b"POST / HTTP/1.1", [b"Expect: 100-continue", b"Content-Length: 1"], True),
        (b"POST / HTTP/1.1", [b"Expect: 100-CONTINUE", b"Transfer-Encoding: chunked"], True),
        (b"POST / HTTP/1.1", [b"Expect: 100-continue", b"Content-Length: 0"], False),
        (b"POST / HTTP/1.1", [b"Expect: 100-continue"], False),
        (b"POST / HTTP/1.0", [b"Expect: 100-continue", b"Content-Length: 1"], False),
        (b"POST / HTTP/1.0", [b"Expect: miracles", b"Content-Length: 1"], False),
    ],
)
def test_continue_is_expected_only_with_a_body_to_come(first: bytes, fields: list[bytes], expected: bool) -> None:
    assert parse(first, *fields).expect_continue is expected


@pytest.mark.parametrize(
    ("fields", "length", "chunked", "has_body"),
    [
        ([], None, False, False),
        ([b"Content-Length: 0"], 0, False, False),
        ([b"Content-Length: 10"], 10, False, True),
        ([b"Content-Length: 9223372036854775807"], 2**63 - 1, False, True),
        ([b"Transfer-Encoding: chunked"], None, True, True),
    ],
)
def test_framing_is_read_once(fields: list[bytes], length: int | None, chunked: bool, has_body: bool) -> None:
    request = parse(b"POST / HTTP/1.1", *fields)

    assert (request.content_length, request.chunked, request.has_body) == (length, chunked, has_body)


def test_each_limit_is_the_last_value_that_passes() -> None:
    """A limit of n means that n pass and n + 1 do not."""
    whole = head(b"GET /aaaa HTTP/1.1", b"Host: a", b"X: y")
    exact = Limits(head_size=len(whole), field_count=2, target_size=5)
    parse_head(whole, exact)

    for limits in (
        Limits(head_size=len(whole) - 1, field_count=2, target_size=5),
        Limits(head_size=len(whole), field_count=1, target_size=5),
        Limits(head_size=len(whole), field_count=2, target_size=4),
    ):
        with pytest.raises(HeadRefused):
            parse_head(whole, limits)


def test_refusal_shows_no_value() -> None:
    """The value of a broken field may be a password, and reasons are logged."""
    with pytest.raises(HeadRefused) as caught:
        parse(b"GET / HTTP/1.1", b"Authorization: secret\x01")

    assert "secret" not in caught.value.reason
    assert "Authorization" in caught.value.reason


def cost_of_parsing(heads: list[bytes], limits: Limits) -> float:
    began = time.process_time()
    for candidate in heads:
        with suppress(HeadRefused):
            parse_head(candidate, limits)
    return time.process_time() - began


@pytest.mark.parametrize("filler", [b" ", b"\t", b"a ", b",", b":", b"%", b"/", b"http://", b"0", b"chunked,", b"-."])
@pytest.mark.parametrize("field", [b"X", b"Host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Expect"])
def test_parsing_costs_what_the_head_is_long(filler: bytes, field: bytes) -> None:
    """A pattern that backtracks turns one long line into minutes: sixteen times the bytes may not cost 150 times."""
    costs = []
    for size in (20_000, 320_000):
        line = b"%b: %b\x01" % (field, filler * (size // len(filler)))
        for first in (b"GET / HTTP/1.1", b"GET " + filler * (size // len(filler)) + b"\x01 HTTP/1.1"):
            limits = Limits(head_size=2**30, target_size=2**30)
            costs.append(min(cost_of_parsing([head(first, line), head(first, line[:-1])], limits) for _ in range(3)))

    assert max(costs[2:]) < 150 * max(*costs[:2], 0.0005)


@given(st.binary(max_size=200))
@example(b"")
@example(b"\r\n\r\n")
def test_any_bytes_are_a_request_or_a_refusal(data: bytes) -> None:
    """Nothing a peer sends may end in another exception: that would be a 500, or a dead worker."""
    with suppress(HeadRefused):
        parse_head(data + b"\r\n\r\n", LIMITS)


_NASTY = st.sampled_from([b"\r", b"\n", b"\0", b"\x7f", b" ", b"\t", b":", b",", b"\xff", b"#", b"+", b"_", b";", b""])


@given(st.data())
def test_mutated_head_is_a_request_or_a_refusal_and_never_shows_a_line_end(data: Any) -> None:
    """One strange byte anywhere: if it passes, no part of the request may carry it out."""
    whole = head(b"POST /a?b HTTP/1.1", b"Host: a", b"Content-Length: 5", b"X-A: b", b"Connection: close")
    at = data.draw(st.integers(0, len(whole) - 5))
    mutated = whole[:at] + data.draw(_NASTY) + whole[at + data.draw(st.integers(0, 1)) :]
    try:
        request = parse_head(mutated, LIMITS)
    except HeadRefused:
        return

    parts = [request.method.encode(), request.target, *(part for pair in request.headers for part in pair)]
    assert not any(byte in part for part in parts for byte in (b"\r", b"\n", b"\0", b"\x7f"))
