"""HTTP/1.1 on real sockets: what a client may ask for, and what it gets.

One server for each event loop; every test here uses connections of its own.
"""

from __future__ import annotations

import json
import select
import socket
import time

import pytest

from tests.harness.client import DEADLINE, Client, get
from tests.harness.server import Server

# Bytes that no socket buffer holds, so that whoever does not read is noticed.
LARGE = 20_000_000

# Some 50 ms. In each of them a worker that is not held back would go on.
ROUND_TRIPS = 200


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def server(request):
    with Server("tests.apps.bodies:app", workers=1, loop=request.param) as server:
        server.wait_ready(1)
        yield server


def test_connection_is_kept_alive(client):
    """Two requests and their answers on one connection."""
    assert client.get("/").text == "hello"
    answer = client.get("/")
    assert answer.text == "hello"
    assert "connection" not in answer.headers
    assert answer.headers["server"] == "prefork"
    assert "date" in answer.headers


def test_ten_thousand_tiny_requests_on_one_connection(client):
    """Nothing is left behind by a request that the next ones would suffer from."""
    for _ in range(100):
        client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n" * 100)
        assert [client.read().text for _ in range(100)] == ["hello"] * 100


def test_thousand_pipelined_requests_are_answered_in_order(client):
    """All in one write: none is lost, none overtakes, and no stack overflows."""
    requests = [
        b"POST /length HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n%b" % (n, b"x" * n) for n in range(1000)
    ]
    client.send(b"".join(requests))
    assert [client.read().text for _ in requests] == [str(n) for n in range(1000)]


def test_bytes_may_come_one_by_one(client):
    """Also a head and a chunked body."""
    for byte in b"POST /echo HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n":
        client.send(bytes([byte]))
    assert client.read().body == b"abc"


def test_chunked_both_ways(client):
    """Each piece comes back before the next is sent: nothing waits for the end."""
    client.send(b"POST /echo HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n")
    client.send(b"5\r\nfirst\r\n")
    assert b"transfer-encoding: chunked" in client.read_until(b"\r\n\r\n")
    assert client.read_exactly(10) == b"5\r\nfirst\r\n"
    client.send(b"6;why=not\r\nsecond\r\n")
    assert client.read_exactly(11) == b"6\r\nsecond\r\n"
    client.send(b"0\r\nTrailer-Field: ignored\r\n\r\n")
    assert client.read_exactly(5) == b"0\r\n\r\n"
    assert client.get("/").text == "hello"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("HEAD", "/", 200), ("GET", "/empty", 204), ("GET", "/not-modified", 304)]
)
def test_response_without_a_body_has_none(client, method, path, status):
    """The next answer would not be understood otherwise."""
    answer = client.request(method, path)
    assert answer.status == status
    assert "transfer-encoding" not in answer.headers
    assert client.get("/").text == "hello"


def test_head_says_what_get_would_have(client):
    assert client.request("HEAD", "/").headers["content-length"] == "5"


def test_http_1_0_is_closed_after_the_answer(client):
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    answer = client.read()
    assert (answer.text, answer.headers["connection"]) == ("hello", "close")
    assert client.is_closed_by_peer()


def test_http_1_0_is_kept_alive_if_it_asks(client):
    client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert client.read().headers["connection"] == "keep-alive"
    assert client.get("/").text == "hello"


def test_http_1_0_stream_ends_with_the_connection(client):
    """No chunks for 1.0; what comes until the end is the body."""
    client.send(b"GET /flood?size=200000 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    answer = client.read()
    assert "transfer-encoding" not in answer.headers
    assert len(answer.body) >= 200_000


def test_connection_close_is_obeyed(client):
    answer = client.get("/", "Connection: close")
    assert answer.headers["connection"] == "close"
    assert client.is_closed_by_peer()


def test_application_may_close_the_connection(client):
    assert client.get("/close").headers["connection"] == "close"
    assert client.is_closed_by_peer()


# ---- 100-continue ----


def test_continue_is_sent_when_the_application_first_reads(server, client):
    """Not at the head: the application may refuse the body by what the head says."""
    client.send(b"POST /hold?event=expect HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    get(server.port, "/wait?event=expect-begun")
    assert not select.select([client.socket], [], [], 0)[0]
    get(server.port, "/set?event=expect")
    assert client.read().status == 100
    client.send(b"abc")
    assert client.read().text == "3"
    assert client.get("/").text == "hello"


def test_continue_is_not_sent_if_nobody_reads(client):
    """The answer comes at once, and the connection ends: who knows whether the body will come."""
    client.send(b"POST /unread HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    answer = client.read()
    assert (answer.status, answer.text, answer.headers["connection"]) == (200, "not read", "close")
    assert client.is_closed_by_peer()


def test_continue_is_not_sent_if_the_body_is_here_already(client):
    client.send(b"POST /length HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc")
    assert client.read().text == "3"
    assert client.get("/").text == "hello"


# ---- bodies nobody reads ----


def test_small_unread_body_keeps_the_connection(client):
    """Read to its end and thrown away: cheaper than a new connection."""
    assert client.request("POST", "/unread", body=b"x" * 100_000).text == "not read"
    assert client.get("/").text == "hello"


@pytest.mark.parametrize("framing", ["Content-Length: 20000000", "Transfer-Encoding: chunked"])
def test_large_unread_body_ends_the_connection_and_not_the_answer(client, framing):
    """The client sends all of it before it looks: no reset may destroy what it then reads."""
    client.send(f"POST /unread HTTP/1.1\r\nHost: test\r\n{framing}\r\n\r\n".encode())
    client.send((b"" if "Length" in framing else b"%x\r\n" % LARGE) + bytes(LARGE))
    assert client.read().text == "not read"
    assert client.read_to_end() == b""


# ---- applications that fail ----


def test_failure_before_the_head_is_a_500(server, client):
    """With its traceback in the log, and the connection as good as before."""
    answer = client.get("/fail")
    assert (answer.status, answer.text) == (500, "Internal Server Error")
    assert client.get("/").text == "hello"
    server.wait_for(r"error request GET /fail failed\n(.*\n)+?.*RuntimeError: this handler always fails")


def test_failure_after_the_head_is_seen_in_a_chunked_body(client):
    """The last chunk never comes: a truncated body cannot pass for a whole one."""
    with pytest.raises((EOFError, ConnectionResetError)):
        client.get("/fail-later")


def test_failure_after_the_head_is_seen_in_a_body_of_known_length(client):
    with pytest.raises((EOFError, ConnectionResetError)):
        client.get("/fail-short")


def test_sys_exit_in_a_handler_is_a_500_and_ends_nothing(server, client):
    """A bug of that handler; the worker has other requests."""
    assert client.get("/sysexit").status == 500
    assert client.get("/").text == "hello"
    assert "ended" not in server.log


def test_application_cannot_inject_a_header(client):
    answer = client.get("/inject")
    assert answer.status == 500
    assert "set-cookie" not in answer.headers


# ---- clients that leave, wholly or in part ----


def test_half_closed_client_gets_its_answers(server):
    """`printf 'GET ...' | nc` ends its sending half before it reads; pipelined requests count too."""
    with Client(server.port) as client:
        client.send(b"GET /wait?event=half HTTP/1.1\r\nHost: t\r\n\r\nGET /unread HTTP/1.1\r\nHost: t\r\n\r\n")
        client.socket.shutdown(socket.SHUT_WR)
        get(server.port, "/set?event=half")
        assert client.read().text == "waited"
        assert client.read().text == "not read"
        assert client.read_to_end() == b""


def test_reader_of_a_body_hears_that_its_client_left(server):
    with Client(server.port) as client:
        client.send(b"POST /leave?event=reader HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nhalf")
    assert get(server.port, "/wait?event=reader").text == "waited"


def test_sender_of_a_stream_hears_that_its_client_left(server):
    with Client(server.port) as client:
        client.send(b"GET /watch?event=sender HTTP/1.1\r\nHost: t\r\n\r\n")
        client.read_until(b"still here")
    assert get(server.port, "/wait?event=sender").text == "waited"


def test_client_that_leaves_in_a_head_harms_nobody(server):
    with Client(server.port) as client:
        client.send(b"GET / HT")
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read_to_end() == b""
    assert get(server.port).text == "hello"


# ---- back-pressure ----


def test_slow_client_stops_the_application(server, client):
    """It goes on only as the client takes: memory holds a few pieces, not the response."""
    client.send(b"GET /flood?size=100000000 HTTP/1.1\r\nHost: test\r\n\r\n")
    client.read_until(b"\r\n\r\n")
    stood_at = wait_until_still(server, "sent")
    assert stood_at < LARGE
    client.read_exactly(2 * LARGE)
    assert wait_until_still(server, "sent") > stood_at


def test_slow_application_stops_the_client(server, client):
    """What it does not read stays with the client: its socket takes no more."""
    client.send(b"POST /hold?event=slow HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % LARGE)
    get(server.port, "/wait?event=slow-begun")
    sent = send_until_full(client.socket, LARGE)
    assert sent < LARGE
    get(server.port, "/set?event=slow")
    client.socket.settimeout(DEADLINE)
    client.send(bytes(LARGE - sent))
    assert client.read().text == str(LARGE)


def test_client_that_pipelines_and_never_reads_is_not_served_on(server, client):
    """The next request is begun only when the last answer is nearly taken, else they would pile up."""
    before = json.loads(get(server.port, "/progress").body)["whole"]
    client.send(b"GET /whole?size=1000000 HTTP/1.1\r\nHost: test\r\n\r\n" * 100)
    assert wait_until_still(server, "whole") - before < 30
    for _ in range(100):
        assert len(client.read().body) == 1_000_000
    assert wait_until_still(server, "whole") - before == 100


def test_answer_is_not_held_back_for_the_one_before(client):
    """Nagle's algorithm would wait for the client's delayed acknowledgement, 40 ms each time."""
    start = time.monotonic()
    for _ in range(50):
        client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n" * 10)
        for _ in range(10):
            client.read()
    assert time.monotonic() - start < 50 * 0.04


def wait_until_still(server: Server, what: str) -> int:
    """How far the application came, once it does not come further in as many turns of the loop as there are round trips."""
    end = time.monotonic() + DEADLINE
    with Client(server.port) as other:
        seen: list[int] = []
        while len(seen) < ROUND_TRIPS or seen[-ROUND_TRIPS] != seen[-1]:
            assert time.monotonic() < end, "the application never stands still"
            seen.append(json.loads(other.get("/progress").body)[what])
        return seen[-1]


def send_until_full(connection: socket.socket, most: int, piece: bytes = bytes(65536)) -> int:
    """Send up to *most* bytes; how many went before the socket took none for half a second."""
    connection.setblocking(False)
    sent = 0
    while sent < most and select.select([], [connection], [], 0.5)[1]:
        sent += connection.send(piece[: most - sent])
    connection.setblocking(True)
    return sent


# ---- memory ----


def test_worker_stays_small_with_large_bodies(server):
    """500 MB each way, in bounded memory."""
    size = 500_000_000
    pid = server.worker(1)
    before = peak_memory(pid)
    with Client(server.port) as client:
        client.send(b"GET /flood?size=%d HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n" % size)
        received = 0
        while data := client.socket.recv(1 << 20):
            received += len(data)
    assert received > size
    with Client(server.port) as client:
        client.send(b"POST /digest HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % size)
        piece = bytes(1_000_000)
        for _ in range(size // len(piece)):
            client.send(piece)
        assert client.read().status == 200
    assert peak_memory(pid) - before < 20_000  # kB


def peak_memory(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1])
