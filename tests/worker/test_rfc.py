"""What RFC 9110 demands of a server as a whole, where no other test shows it. docs/http.md lists all of it."""

from __future__ import annotations

import json
import re
from email.utils import parsedate_to_datetime

import pytest

from tests.apps.meddler import LARGE
from tests.harness.client import Client, get
from tests.harness.server import Server


@pytest.fixture(scope="module")
def server():
    with Server("tests.apps.meddler:app", workers=1) as server:
        server.wait_ready(1)
        yield server


def test_https_target_on_a_plain_connection_is_misdirected(server):
    """RFC 9110 section 7.4: such a request is for a server that can prove who it is."""
    with Client(server.port) as client:
        client.send(b"GET https://t/ HTTP/1.1\r\nHost: t\r\n\r\n")
        assert client.read().status in (400, 421)


def test_answers_carry_the_date_in_its_one_form(server):
    """RFC 9110 sections 5.6.7 and 6.6.1."""
    date = get(server.port).headers["date"]

    assert re.fullmatch(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", date)
    assert parsedate_to_datetime(date)


def test_refusals_carry_the_date(server):
    with Client(server.port) as client:
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        assert parsedate_to_datetime(client.read().headers["date"])


def test_server_field_tells_no_version(server):
    """RFC 9110 section 10.2.4: fine detail helps only those who look for a hole."""
    assert get(server.port).headers["server"] == "prefork"


def test_what_an_application_does_to_its_headers_stays_with_its_request(server):
    """Equal requests may share what was parsed; the application empties its list each time."""
    with Client(server.port) as client:
        first, second = (json.loads(client.get("/", "X-Here: yes").text) for _ in range(2))

    assert ["x-here", "yes"] in first
    assert first == second


def test_options_of_the_whole_server_reaches_the_application(server):
    """RFC 9110 section 9.3.7: `*` is no path, and the application is told so."""
    with Client(server.port) as client:
        client.send(b"OPTIONS * HTTP/1.1\r\nHost: t\r\n\r\n")
        answer = client.read()

    assert (answer.status, answer.headers["x-path"]) == (200, "*")


def test_request_behind_the_last_answer_does_not_destroy_it(server):
    """RFC 9112 section 9.6: a socket closed with unread bytes in it resets the connection, and what was still on its way."""
    with Client(server.port) as client:
        client.send(b"GET /last HTTP/1.1\r\nHost: t\r\n\r\n")
        head = client.read_until(b"\r\n\r\n")
        client.send(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")

        assert b"connection: close" in head
        assert len(client.read_exactly(LARGE)) == LARGE
        assert client.read_to_end() == b""
