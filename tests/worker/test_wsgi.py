"""A WSGI application behind the whole server, in threads and in the loop itself."""

from __future__ import annotations

import pytest

from tests.harness.client import Client
from tests.harness.server import Server


@pytest.fixture(scope="module", params=[4, 0], ids=["threads", "inline"])
def server(request):
    with Server("tests.apps.wsgi:app", workers=1, threads="0" if request.param == 0 else request.param) as server:
        server.wait_ready(1)
        server.threads = request.param
        yield server


def test_requests_follow_one_another(client):
    for _ in range(3):
        assert client.get("/").text == "hello"


def test_thousand_pipelined_requests_are_answered_in_order(client):
    """Answers that complete at once must not build a tower of calls."""
    client.send(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n" * 1000)
    assert [client.read().text for _ in range(1000)] == ["hello"] * 1000


def test_body_of_known_length_is_read(client):
    body = b"0123456789" * 300_000
    assert client.request("POST", "/echo", body=body).body == body


def test_chunked_body_is_read(client):
    client.send(
        b"POST /lines HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n4\r\na\nb\n\r\n2\r\nc\n\r\n0\r\n\r\n"
    )
    assert client.read().text == "3"


def test_continue_is_sent_when_the_application_reads(client):
    client.send(b"POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    assert client.read().status == 100
    client.send(b"abc")
    assert client.read().text == "abc"


def test_generator_is_sent_whole(client):
    assert client.get("/pieces").text == "".join(f"{number}\n" for number in range(1000))
    assert client.get("/").text == "hello"


def test_failure_is_a_500(client):
    assert client.get("/fail").status == 500
    assert client.get("/").text == "hello"


def test_failure_after_the_head_cuts_the_body(client):
    with pytest.raises((EOFError, ConnectionResetError)):
        client.get("/fail-later")


def test_sys_exit_is_a_500_and_ends_nothing(server, client):
    assert client.get("/sysexit").status == 500
    assert client.get("/").text == "hello"
    assert "ended" not in server.log


def test_threads_serve_two_at_once(server, client):
    if not server.threads:
        pytest.skip("one at a time, in the loop")
    with Client(server.port) as other:
        for each in (client, other):
            each.send(b"GET /meet HTTP/1.1\r\nHost: t\r\n\r\n")
        assert [each.read().text for each in (client, other)] == ["met", "met"]
