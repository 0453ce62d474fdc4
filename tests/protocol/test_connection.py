"""One connection from both ends: ours answers, h11's client asks and judges what it hears."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import h11
import pytest

from prefork.errors import ResponseError
from prefork.protocol.connection import Connection
from prefork.protocol.events import (
    NEED_DATA,
    PAUSED,
    Closed,
    Data,
    EndOfMessage,
    Headers,
    Refusal,
    Request,
    Wait,
)
from prefork.protocol.limits import Limits
from prefork.protocol.response import field_lines

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
GET10 = b"GET / HTTP/1.0\r\n\r\n"
LAST_GET = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
EXPECTING = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"

DATE = b"date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"


def connect(data: bytes = b"", limits: Limits | None = None) -> Connection:
    connection = Connection(limits or Limits())
    if data:
        connection.receive_data(data)
    return connection


def events(connection: Connection) -> list[Any]:
    """All there are, the `Wait` that ends them included."""
    told: list[Any] = []
    while not told or not isinstance(told[-1], Wait):
        told.append(connection.next_event())
    return told


def kinds(connection: Connection) -> list[Any]:
    return [event if isinstance(event, Wait) else type(event) for event in events(connection)]


def send(connection: Connection, body: bytes = b"", status: int = 200, headers: Headers | None = None) -> bytes:
    return b"".join(connection.send_head(status, headers or [], body, False, date=DATE))


class Client:
    """An h11 client whose bytes go to *server*, and back."""

    def __init__(self, server: Connection) -> None:
        self.h11 = h11.Connection(h11.CLIENT)
        self.server = server

    def ask(self, method: str = "GET", body: bytes | None = None, chunked: bool = False, **fields: str) -> None:
        headers = [("host", "a"), *((name.replace("_", "-"), value) for name, value in fields.items())]
        if body is not None:
            headers.append(("transfer-encoding", "chunked") if chunked else ("content-length", str(len(body))))
        self.say(h11.Request(method=method, target="/", headers=headers))
        if body:
            self.say(h11.Data(data=body))
        self.say(h11.EndOfMessage())

    def say(self, event: Any) -> None:
        # Some events have no bytes, and no bytes would be the end of file.
        if data := self.h11.send(event):
            self.server.receive_data(data)

    def hear(self, data: bytes) -> tuple[Any, bytes]:
        """The response in *data* and its body; it has to be complete."""
        self.h11.receive_data(data)
        response, body = self.h11.next_event(), b""
        while isinstance(event := self.h11.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        return response, body


# The ways in which an application may give the same answer.
def at_once(connection: Connection) -> bytes:
    return b"".join(connection.send_head(200, [], b"hello", False, date=DATE))


def in_pieces(connection: Connection) -> bytes:
    head = b"".join(connection.send_head(200, [], b"", True, date=DATE))
    return (
        head
        + b"".join(connection.send_body(piece, True) for piece in (b"he", b"", b"llo"))
        + connection.send_body(b"", False)
    )


def with_length(connection: Connection) -> bytes:
    head = b"".join(connection.send_head(200, [(b"Content-Length", b"5")], b"he", True, date=DATE))
    return head + connection.send_body(b"llo", False)


ANSWERS = [at_once, in_pieces, with_length]


@pytest.mark.parametrize("reply", ANSWERS)
@pytest.mark.parametrize("chunked", [False, True])
def test_cycles_follow_one_another(reply: Callable[[Connection], bytes], chunked: bool) -> None:
    """Keep-alive with bodies both ways: every cycle begins where the last one ended."""
    server = connect()
    client = Client(server)
    for number in range(3):
        client.ask("POST", b"x" * number, chunked)
        request, *data, end, wait = events(server)
        assert isinstance(request, Request)
        assert b"".join(piece.data for piece in data) == b"x" * number
        assert (end, wait) == (EndOfMessage(), NEED_DATA)
        assert (server.request_complete, server.response_complete) == (True, False)

        response, body = client.hear(reply(server))
        assert (response.status_code, body) == (200, b"hello")
        assert server.response_complete
        assert server.keep_alive
        server.start_next_cycle()
        client.h11.start_next_cycle()
        assert server.is_idle


@pytest.mark.parametrize("reply", ANSWERS)
def test_head_is_answered_without_a_body(reply: Callable[[Connection], bytes]) -> None:
    """The client would take the body for the next response."""
    client = Client(connect())
    client.ask("HEAD")
    events(client.server)

    assert client.hear(reply(client.server))[1] == b""
    assert client.server.response_complete
    assert client.server.keep_alive


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_body_drop_it(status: int) -> None:
    client = Client(connect())
    client.ask()
    events(client.server)
    wire = b"".join(client.server.send_head(status, [], b"he", True, date=DATE)) + client.server.send_body(
        b"llo", False
    )

    assert client.hear(wire)[1] == b""
    assert client.server.keep_alive


def test_pipelined_requests_wait_for_their_turn() -> None:
    """Answers go out in the order of the requests, so the next one is not even parsed before."""
    connection = connect(GET + POST + b"hello" + GET)

    assert kinds(connection) == [Request, EndOfMessage, PAUSED]
    assert connection.buffered == len(POST + b"hello" + GET)
    assert not connection.is_idle
    send(connection)
    assert connection.next_event() is PAUSED
    connection.start_next_cycle()
    assert connection.has_partial_head
    assert kinds(connection) == [Request, Data, EndOfMessage, PAUSED]
    send(connection)
    connection.start_next_cycle()
    assert kinds(connection) == [Request, EndOfMessage, NEED_DATA]


def test_next_cycle_needs_both_ends_of_this_one() -> None:
    connection = connect(POST)
    with pytest.raises(ResponseError, match="request is head"):
        connection.start_next_cycle()
    events(connection)
    send(connection)
    with pytest.raises(ResponseError, match="request is body"):
        connection.start_next_cycle()
    connection.receive_data(b"hello")
    events(connection)
    connection.start_next_cycle()


def test_answer_may_be_complete_before_the_body() -> None:
    """The application did not want it; what still comes belongs to this request all the same."""
    connection = connect(POST + b"he")
    assert kinds(connection) == [Request, Data, NEED_DATA]
    send(connection)
    assert connection.response_complete
    assert not connection.request_complete
    assert connection.keep_alive
    connection.receive_data(b"llo" + GET)
    assert kinds(connection) == [Data, EndOfMessage, PAUSED]


def test_continue_is_sent_once_and_only_when_asked_for() -> None:
    connection = connect(EXPECTING)
    events(connection)
    assert connection.wants_continue
    assert connection.send_continue() == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert not connection.wants_continue
    assert connection.send_continue() == b""

    plain = connect(POST)
    events(plain)
    assert plain.send_continue() == b""


def test_h11_client_goes_on_after_continue() -> None:
    client = Client(connect())
    client.say(
        h11.Request(
            method="POST", target="/", headers=[("host", "a"), ("content-length", "2"), ("expect", "100-continue")]
        )
    )
    events(client.server)
    client.h11.receive_data(client.server.send_continue())
    assert isinstance(client.h11.next_event(), h11.InformationalResponse)
    client.say(h11.Data(data=b"ab"))
    client.say(h11.EndOfMessage())

    assert kinds(client.server) == [Data, EndOfMessage, NEED_DATA]
    assert client.hear(send(client.server, b"c"))[1] == b"c"
    assert client.server.keep_alive


@pytest.mark.parametrize("pull", [False, True])
def test_continue_is_pointless_once_the_body_arrives(pull: bool) -> None:
    """A client may stop waiting; a late 100 would only cost it a read."""
    connection = connect(EXPECTING)
    events(connection)
    connection.receive_data(b"h")
    if pull:
        events(connection)

    assert not connection.wants_continue
    assert connection.send_continue() == b""
    assert b"connection: close" not in send(connection)


def test_answer_in_place_of_continue_closes() -> None:
    """Whether the body still comes is the client's choice, so its bytes cannot be told from a next request."""
    connection = connect(EXPECTING)
    events(connection)

    assert b"\r\nconnection: close\r\n" in send(connection, status=401)
    assert connection.send_continue() == b""
    assert not connection.keep_alive


@pytest.mark.parametrize(
    ("asked", "reply", "field", "keep_alive"),
    [
        (GET, at_once, None, True),
        (LAST_GET, at_once, b"connection: close", False),
        (GET10, at_once, b"connection: close", False),
        (GET10, in_pieces, b"connection: close", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", at_once, b"connection: keep-alive", True),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", in_pieces, b"connection: close", False),
    ],
)
def test_connection_lives_as_long_as_both_sides_can_tell_where_the_body_ends(
    asked: bytes, reply: Callable[[Connection], bytes], field: bytes | None, keep_alive: bool
) -> None:
    connection = connect(asked)
    events(connection)
    lines = reply(connection).partition(b"\r\n\r\n")[0].split(b"\r\n")

    assert [line for line in lines if line.startswith(b"connection:")] == ([field] if field else [])
    assert connection.keep_alive is keep_alive
    assert connection.start_next_cycle() is keep_alive


def test_answer_of_unknown_length_to_an_old_client_is_not_chunked() -> None:
    connection = connect(GET10)
    events(connection)

    assert in_pieces(connection).endswith(b"\r\n\r\nhello")


def test_drain_before_the_head_says_close() -> None:
    connection = connect(GET)
    events(connection)
    connection.close_after()

    assert b"\r\nconnection: close\r\n" in send(connection)
    assert not connection.keep_alive


def test_drain_after_the_head_lets_the_answer_end() -> None:
    """The head has promised keep-alive; closing after the answer is still within HTTP."""
    connection = connect(GET + GET)
    events(connection)
    connection.send_head(200, [], b"a", True, date=DATE)
    connection.close_after()

    assert connection.send_body(b"b", False) == b"1\r\nb\r\n0\r\n\r\n"
    assert not connection.keep_alive


def test_drain_while_idle_answers_the_request_that_was_under_way() -> None:
    connection = connect(GET[:10])
    connection.close_after()
    connection.receive_data(GET[10:])
    events(connection)

    assert b"\r\nconnection: close\r\n" in send(connection)


@pytest.mark.parametrize(
    ("sent", "clean"),
    [
        (b"", True),
        (b"\r\n", True),
        (b"\r", False),
        (GET[:10], False),
        (POST, False),
        (POST + b"hell", False),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", False),
        (GET, True),
        (POST + b"hello", True),
    ],
)
def test_end_of_file_is_clean_between_messages_only(sent: bytes, clean: bool) -> None:
    connection = connect(sent)
    events(connection)
    connection.receive_data(b"")

    assert events(connection) == [Closed(clean), NEED_DATA]
    assert events(connection) == [NEED_DATA], "told once"
    assert not connection.keep_alive


def test_half_closed_client_gets_all_its_answers() -> None:
    """`printf ... | nc` closes its side first; only the last answer says close."""
    connection = connect(GET + GET)
    connection.receive_data(b"")
    assert kinds(connection) == [Request, EndOfMessage, PAUSED]
    assert b"connection: close" not in send(connection)
    connection.start_next_cycle()
    assert kinds(connection) == [Request, EndOfMessage, Closed, NEED_DATA]
    assert connection.request_complete
    assert b"connection: close" in send(connection)


def test_refusal_is_answered_whole_and_ends_the_connection() -> None:
    connection = connect(b"GET / HTTP/1.1\r\n\r\n" + GET)
    refusal, wait = events(connection)
    assert isinstance(refusal, Refusal)
    assert wait is NEED_DATA

    peer = h11.Connection(h11.CLIENT)
    peer.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    peer.send(h11.EndOfMessage())
    peer.receive_data(connection.refuse(refusal, date=DATE))
    response, body = peer.next_event(), peer.next_event()
    assert response.status_code == 400
    assert dict(response.headers)[b"connection"] == b"close"
    assert dict(response.headers)[b"date"] == b"Thu, 01 Jan 1970 00:00:00 GMT"
    assert dict(response.headers)[b"content-type"] == b"text/plain; charset=us-ascii"
    assert body.data == b"HTTP/1.1 needs a Host field and there is none\n"
    assert connection.response_complete
    assert not connection.keep_alive


def test_nothing_is_read_after_a_refusal() -> None:
    """Where the next message begins cannot be known; a sender who goes on must not fill memory."""
    connection = connect(b"GET / HTTP/9.9\r\n\r\n")
    events(connection)
    connection.receive_data(GET * 1000)

    assert connection.buffered == 0
    assert events(connection) == [NEED_DATA]
    assert not connection.is_idle
    assert not connection.has_partial_head


def test_refusal_in_a_body_is_answered_if_nothing_was_sent() -> None:
    connection = connect(CHUNKED)
    events(connection)
    connection.receive_data(b"5 \r\nhello\r\n")
    refusal = events(connection)[0]

    assert connection.refuse(refusal, date=DATE).startswith(b"HTTP/1.1 400 ")
    assert connection.response_complete


@pytest.mark.parametrize("more", [True, False])
def test_refusal_after_the_head_says_nothing(more: bool) -> None:
    """A second status line inside a body would be read as body."""
    connection = connect(CHUNKED)
    events(connection)
    connection.send_head(200, [], b"a", more, date=DATE)
    connection.receive_data(b"xyz\r\n")
    refusal = events(connection)[0]

    assert connection.refuse(refusal, date=DATE) == b""
    assert not connection.keep_alive


def test_owner_may_refuse_by_itself() -> None:
    """A head that does not come in time is the owner's to judge: there is no clock here."""
    connection = connect(GET[:10])
    events(connection)

    assert connection.refuse(Refusal(408, "the head took too long"), date=DATE).startswith(b"HTTP/1.1 408 ")
    assert connection.buffered == 0


def test_bad_head_can_be_replaced() -> None:
    """The application's mistake becomes a 500, because nothing of it has left."""
    connection = connect(GET)
    events(connection)
    for headers, body in (([(b"x", b"a\r\nb: c")], b""), ([(b"content-length", b"3")], b"four")):
        with pytest.raises(ResponseError):
            connection.send_head(200, headers, body, False, date=DATE)

    assert send(connection, status=500).startswith(b"HTTP/1.1 500 ")
    assert connection.keep_alive


def test_bad_body_ends_the_connection() -> None:
    connection = connect(GET)
    events(connection)
    connection.send_head(200, [(b"content-length", b"3")], b"a", True, date=DATE)
    with pytest.raises(ResponseError):
        connection.send_body(b"", False)

    assert not connection.response_complete
    assert not connection.keep_alive


def test_answers_out_of_turn_are_errors() -> None:
    connection = connect()
    with pytest.raises(ResponseError, match="answers no request"):
        send(connection)
    with pytest.raises(ResponseError, match="no place"):
        connection.send_body(b"a", True)
    connection.receive_data(GET)
    events(connection)
    with pytest.raises(ResponseError, match="no place"):
        connection.send_body(b"a", True)
    send(connection)
    with pytest.raises(ResponseError, match="answers no request"):
        send(connection)
    with pytest.raises(ResponseError, match="no place"):
        connection.send_body(b"a", True)


def test_idle_and_partial_head_tell_which_deadline_runs() -> None:
    connection = connect()
    assert (connection.is_idle, connection.has_partial_head) == (True, False)
    connection.receive_data(GET[:-1])
    events(connection)
    assert (connection.is_idle, connection.has_partial_head) == (False, True)
    connection.receive_data(GET[-1:])
    events(connection)
    assert (connection.is_idle, connection.has_partial_head) == (False, False)


def test_head_that_comes_byte_by_byte_is_not_scanned_again() -> None:
    """Slow clients are legion: sixteen times the head may not cost a hundred times the work."""
    costs = []
    for size in (4_000, 64_000):
        head = GET[:-2] + b"X-A: " + b"a" * size + b"\r\n\r\n"
        connection = connect(limits=Limits(head_size=100_000))
        began = time.process_time()
        for at in range(len(head)):
            connection.receive_data(head[at : at + 1])
            event = connection.next_event()
        costs.append(time.process_time() - began)
        assert isinstance(event, Request)

    assert costs[1] < 100 * costs[0]


@pytest.mark.parametrize("chunked", [False, True])
def test_large_body_streams_in_bounded_memory(chunked: bool) -> None:
    """Nothing is kept that was told."""
    piece = b"x" * 65536
    count = 512
    connection = connect(CHUNKED if chunked else POST.replace(b" 5", b" %d" % (len(piece) * count)))
    connection.next_event()
    received = 0
    for _ in range(count):
        connection.receive_data(b"10000\r\n" + piece + b"\r\n" if chunked else piece)
        received += sum(len(event.data) for event in events(connection) if isinstance(event, Data))
        assert connection.buffered == 0
    if chunked:
        connection.receive_data(b"0\r\n\r\n")
        events(connection)

    assert received == len(piece) * count
    assert connection.request_complete


@pytest.mark.parametrize("status", [200, 404, 599, 204, 304])
@pytest.mark.parametrize("body", [b"", b"hello", b"x" * 20_000])
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"content-type", b"text/plain")],
        [(b"content-length", b"5")],
        [(b"connection", b"close")],
        [(b"date", b"never")],
        [(b"server", b"other")],
        [(b"upgrade", b"h2c")],
    ],
    ids=lambda headers: headers[0][0].decode() if headers else "none",
)
@pytest.mark.parametrize("request_", [GET, POST + b"abcde", LAST_GET, GET10, GET.replace(b"GET", b"HEAD"), GET + GET])
def test_short_way_out_says_the_same_or_nothing(request_: bytes, headers: Headers, body: bytes, status: int) -> None:
    def begun() -> Connection:
        connection = Connection(Limits())
        assert connection.receive_request(request_) is not None
        return connection

    short, long = begun(), begun()
    said = short.send_whole(status, field_lines(headers), body, date=DATE)
    is_plain = request_ in (GET, POST + b"abcde") and status not in (204, 304) and len(body) < 20_000
    is_plain &= (
        not headers or headers[0][0] == b"content-type" or (headers[0][0] == b"content-length" and len(body) == 5)
    )
    assert bool(said) == is_plain
    if not said:  # nothing was begun
        short, long = long, short
        said = b"".join(short.send_head(status, field_lines(headers), b"", True, date=DATE))
        assert said
        return
    assert said == b"".join(long.send_head(status, headers, body, False, date=DATE))
    assert long.start_next_cycle()
    assert short.is_idle == long.is_idle is True
    assert short.receive_request(GET) == long.receive_request(GET) is not None


def test_short_way_out_is_closed_by_what_arrives_meanwhile() -> None:
    for event in (lambda c: c.receive_data(GET), lambda c: c.receive_data(b""), lambda c: c.close_after()):
        connection = Connection(Limits())
        assert connection.receive_request(GET) is not None
        event(connection)
        assert connection.send_whole(200, field_lines([]), b"hello", date=DATE) == b""
