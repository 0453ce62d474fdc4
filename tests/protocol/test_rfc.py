"""What RFC 9110 and RFC 9112 demand of answers, and no other test of this room shows. docs/http.md lists all of it."""

from __future__ import annotations

from typing import Any

import pytest

from prefork.protocol.connection import Connection
from prefork.protocol.events import EndOfMessage, Headers, Refusal, Request, Wait
from prefork.protocol.limits import Limits
from tests.harness import readings
from tests.harness.readings import DATE

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def ask(wire: bytes) -> tuple[Connection, Any]:
    """A connection that has read *wire*, and the last event it told."""
    connection = Connection(Limits())
    connection.receive_data(wire)
    last: Any = None
    while not isinstance(event := connection.next_event(), Wait):
        last = event
        if isinstance(event, EndOfMessage):
            break
    return connection, last


def answer(wire: bytes, status: int, headers: Headers, body: bytes = b"hello") -> tuple[dict[bytes, bytes], bytes]:
    """The fields and the content of an answer."""
    connection, _ = ask(wire)
    head, _, content = b"".join(connection.send_head(status, headers, body, False, date=DATE)).partition(b"\r\n\r\n")
    fields = [line.partition(b": ")[::2] for line in head.split(b"\r\n")[1:]]
    return {name.lower(): value for name, value in fields}, content


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"5")]])
def test_reset_content_has_no_content(headers: Headers) -> None:
    """RFC 9110 section 15.3.6. Unlike 204, a client reads its length, so it has to say that it is nothing."""
    fields, content = answer(GET, 205, headers)

    assert (fields.get(b"content-length"), content) == (b"0", b"")


def test_upgrade_is_named_in_connection() -> None:
    """RFC 9110 section 7.8: without the option, a proxy would pass on what was meant for itself."""
    for status in (200, 426):
        fields, _ = answer(GET, status, [(b"Upgrade", b"h2c"), (b"Connection", b"upgrade")])
        assert fields[b"connection"].lower() == b"upgrade"


@pytest.mark.parametrize("wire", [b"HEAD / HTTP/1.1\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n"])
def test_refusal_of_head_has_no_content(wire: bytes) -> None:
    """RFC 9110 section 9.3.2, also where the rest of the head cannot be understood."""
    connection, refusal = ask(wire)
    assert isinstance(refusal, Refusal)
    head, _, content = connection.refuse(refusal, date=DATE).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400 ")
    assert content == b""


def test_authority_of_an_absolute_target_reaches_the_application() -> None:
    """RFC 9112 section 3.2.2: it stands for the Host that a client of HTTP/1.0 need not send."""
    connection = Connection(Limits())
    connection.receive_data(b"GET http://a.example/b HTTP/1.0\r\n\r\n")
    request = connection.next_event()

    assert isinstance(request, Request)
    assert (b"host", b"a.example") in request.headers


def test_order_of_equal_names_is_kept() -> None:
    """RFC 9110 section 5.3: the order of lines of one name is part of what they say."""
    connection = Connection(Limits())
    connection.receive_data(b"GET / HTTP/1.1\r\nX: 1\r\nHost: a\r\nx: 2\r\nX: 1\r\n\r\n")
    request = connection.next_event()

    assert isinstance(request, Request)
    assert [value for name, value in request.headers if name == b"x"] == [b"1", b"2", b"1"]


def test_refusal_closes_and_says_when_and_why() -> None:
    """RFC 9110 sections 6.6.1 and 15.5: a Date, an explanation; RFC 9112 section 9.6: the close is announced."""
    connection, refusal = ask(b"GET / HTTP/1.1\r\n\r\n")
    said = connection.refuse(refusal, date=DATE)

    assert DATE in said
    assert b"\r\nconnection: close\r\n" in said
    assert b"content-type: text/plain" in said
    assert said.endswith(b"\n")
    assert not connection.keep_alive


def test_limits_are_not_remembered() -> None:
    """What one connection accepted, another one with smaller limits refuses, and the other way round."""
    reader = readings.warm()
    small = Limits(target_size=10, field_count=2, body_size=3)
    for wire in (
        b"GET /0123456789 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nA: a\r\nB: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nabcd",
    ):
        for _ in range(2):
            assert reader.read([wire]).end == ("closed", True)
            assert reader.read([wire], small).end[0] == "refused"


@pytest.mark.parametrize(("te", "sent"), [(b"", False), (b"TE: trailers\r\n", True), (b"TE: gzip\r\n", False)])
def test_trailers_go_only_to_clients_that_take_them(te: bytes, sent: bool) -> None:
    """RFC 9110 section 6.5.1: others may drop them, or take them for something else."""
    connection, _ = ask(b"GET / HTTP/1.1\r\nHost: a\r\n" + te + b"\r\n")
    connection.send_head(200, [], b"hello", True, date=DATE)
    end = connection.send_trailers([(b"x-sum", b"1")])

    assert end == (b"0\r\nx-sum: 1\r\n\r\n" if sent else b"0\r\n\r\n")
    assert connection.response_complete
