"""WSGI to PEP 3333, and above all the bridge between the application's thread and the loop."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from types import SimpleNamespace
from wsgiref.validate import validator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefork.errors import ApplicationExited, ClientDisconnected, GatewayError, ResponseError
from prefork.gateway.bridge import HIGH_WATER, SPOOL_SIZE
from prefork.gateway.threads import Threads
from prefork.gateway.wsgi import WsgiGateway
from prefork.protocol.events import Fields
from tests.harness.client import DEADLINE
from tests.harness.loop import go, in_threads

PIECE = b"x" * HIGH_WATER
MEGABYTE = 1024 * 1024


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.fixture(params=["threads", "inline", "begun in threads", "begun inline"])
def run(request, pool, wire):
    """Run one exchange through an application: in a task, or begun without one, as the worker does."""

    def runner(app, exchange, **options):
        match request.param:
            case "threads":
                go(WsgiGateway(app, run_in_thread=in_threads(pool), **options)(exchange))
            case "inline":
                go(WsgiGateway(app, run_in_thread=None, **options)(exchange))
            case "begun in threads":
                go(begin_in_threads(app, exchange, wire, **options))
            case "begun inline":
                go(begin(WsgiGateway(app, run_in_thread=None, **options), exchange, wire))

    return runner


async def begin(gateway, exchange, wire, threads=None):
    """What a connection does with *exchange*, until it is over. Raises what the application raised."""
    rest = gateway.begin(exchange)
    if rest is not None:
        await rest
    if threads is not None:
        await threads.wait(DEADLINE)
    wire.calls[:] = [call for call in wire.calls if call != ("go_on",)]
    while wire.tasks:
        await wire.tasks.pop()


async def begin_in_threads(app, exchange, wire, **options):
    threads = Threads(2, asyncio.get_running_loop())
    try:
        await begin(WsgiGateway(app, run_in_thread=threads, **options), exchange, wire, threads)
    finally:
        threads.close()


def test_an_application_may_run_a_loop_of_its_own(run, exchange_for, wire):
    """Flask's async views do, and Django refuses its database where a loop runs: also with --threads 0."""

    async def answer(text):
        await asyncio.sleep(0)
        return text

    class Answers(Pieces):
        def close(self):
            super().close()
            asyncio.run(answer(b""))

    answers = Answers(asyncio.run(answer(text)) for text in (b"own ", b"loop"))

    def app(environ, start_response):
        start_response(asyncio.run(answer("200 OK")), [])
        return answers

    run(app, exchange_for())

    assert (wire.body, wire.complete, len(answers.closed_in)) == (b"own loop", True, 1)


@pytest.mark.parametrize("count", [0, 1])
def test_context_variables_of_a_request_are_its_own_from_its_call_to_its_close(exchange_for, wire, count):
    """A request's id for the log lives in one, and the next request must not have it."""
    variable, seen = ContextVar("variable", default="none"), []

    class Seeing(Pieces):
        def close(self):
            seen.append(variable.get())

    def step(number):
        seen.append(variable.get())
        variable.set(number)
        return b"x"

    def app(environ, start_response):
        seen.append(variable.get())
        variable.set("called")
        start_response("200 OK", [])
        return Seeing(map(step, (1, 2)))

    async def scenario():
        threads = Threads(count, asyncio.get_running_loop()) if count else None
        gateway = WsgiGateway(app, run_in_thread=threads)
        for _ in range(2):
            await begin(gateway, exchange_for(), wire, threads)
        if threads is not None:
            threads.close()

    go(scenario())

    assert seen == ["none", "called", 1, 2] * 2


def environ_of(run, exchange, **options):
    seen = {}

    def app(environ, start_response):
        seen.update(environ)
        start_response("204 No Content", [])
        return []

    run(app, exchange, **options)
    return seen


def answering(*pieces, status="200 OK", headers=()):
    def app(environ, start_response):
        start_response(status, list(headers))
        return list(pieces)

    return app


class Pieces:
    """An iterable that remembers where and how often it was closed."""

    def __init__(self, pieces):
        self.pieces = iter(pieces)
        self.closed_in = []

    def __iter__(self):
        return self.pieces

    def close(self):
        self.closed_in.append(threading.get_ident())


# ---- the environ ----


def test_environ_has_every_variable_of_the_pep(run, exchange_for):
    """Frameworks index these without asking."""
    environ = environ_of(
        run, exchange_for("POST", "/a%20b/c?x=1&y=%20", headers=[(b"content-type", b"text/x")], body=b"abc")
    )

    expected = {
        "REQUEST_METHOD": "POST",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/a b/c",
        "QUERY_STRING": "x=1&y=%20",
        "RAW_URI": "/a%20b/c?x=1&y=%20",
        "REQUEST_URI": "/a%20b/c?x=1&y=%20",
        "CONTENT_TYPE": "text/x",
        "CONTENT_LENGTH": "3",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "192.0.2.7",
        "REMOTE_PORT": "40123",
        "HTTP_HOST": "example.org",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.errors": sys.stderr,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
    }
    assert {name: environ[name] for name in expected} == expected
    assert not {"HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH"} & environ.keys()


def test_environ_tells_whether_threads_run_the_application(exchange_for, wire, pool):
    """An application that is not thread-safe refuses to start when this is true."""
    in_thread, inline = [
        environ_of(lambda app, exchange, m=mode: go(WsgiGateway(app, run_in_thread=m)(exchange)), exchange_for())
        for mode in (in_threads(pool), None)
    ]

    assert (in_thread["wsgi.multithread"], inline["wsgi.multithread"]) == (True, False)


def test_path_is_the_decoded_bytes_in_latin_1(run, exchange_for):
    """The PEP's way to carry bytes in str: frameworks encode it back and decode UTF-8."""
    environ = environ_of(run, exchange_for("GET", "/%C3%A9%2F"))

    assert environ["PATH_INFO"] == "/Ã©/"


@pytest.mark.parametrize(
    ("root", "target", "script_name", "path_info"),
    [
        ("", "/a", "", "/a"),
        ("/api", "/api/a", "/api", "/a"),
        ("/api", "/api", "/api", ""),
        ("/api/", "/api/a", "/api", "/a"),
        ("/api", "/a", "/api", "/a"),
        ("/api", "/apiary", "/api", "/apiary"),
        ("/é", "/%C3%A9/a", "/Ã©", "/a"),
        ("", "*", "", ""),
    ],
)
def test_root_path_becomes_script_name_and_leaves_the_path(run, exchange_for, root, target, script_name, path_info):
    """A proxy may pass the prefix on or take it off: the application must see the same."""
    environ = environ_of(run, exchange_for("OPTIONS", target), root_path=root)

    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == (script_name, path_info)


def test_headers_with_an_underscore_are_dropped(run, exchange_for):
    """`x_user` would overwrite the `X-User` that a proxy in front vouches for."""
    environ = environ_of(run, exchange_for(headers=[(b"x-user", b"proxy"), (b"x_user", b"evil")]))

    assert environ["HTTP_X_USER"] == "proxy"


def test_repeated_headers_are_joined(run, exchange_for):
    """One key can hold one value; RFC 9110, section 5.3 gives the comma, RFC 9113 the cookie's semicolon."""
    environ = environ_of(
        run, exchange_for(headers=[(b"accept", b"a"), (b"cookie", b"x=1"), (b"accept", b"b"), (b"cookie", b"y=2")])
    )

    assert (environ["HTTP_ACCEPT"], environ["HTTP_COOKIE"]) == ("a,b", "x=1; y=2")


def test_header_values_are_latin_1(run, exchange_for):
    """Bytes on the wire come through whole."""
    assert environ_of(run, exchange_for(headers=[(b"x-name", b"\xe9\xff")]))["HTTP_X_NAME"] == "éÿ"


def test_client_of_a_unix_socket_has_an_empty_address(run, exchange_for):
    """CGI demands REMOTE_ADDR; there is none to give."""
    environ = environ_of(run, exchange_for(client=None))

    assert environ["REMOTE_ADDR"] == ""
    assert "REMOTE_PORT" not in environ


@pytest.mark.parametrize(
    ("server", "host", "scheme", "expected"),
    [
        (("::1", 8000), b"example.org", "http", ("::1", "8000")),
        (("/run/app.sock", None), b"example.org", "http", ("example.org", "80")),
        (None, b"example.org:8443", "https", ("example.org", "8443")),
        (None, b"[::1]", "https", ("[::1]", "443")),
        (None, b"[::1]:81", "http", ("[::1]", "81")),
        (None, b"", "http", ("localhost", "80")),
    ],
)
def test_server_name_and_port_are_never_empty(run, exchange_for, server, host, scheme, expected):
    """The PEP: they "can never be empty strings", so a Unix socket answers with the Host field."""
    environ = environ_of(run, exchange_for(headers=[(b"host", host)], server=server, scheme=scheme))

    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == expected


def test_chunked_request_has_no_content_length_and_a_terminated_input(run, exchange_for):
    """`wsgi.input_terminated` is what tells frameworks to read it all the same."""
    bodies = []

    def app(environ, start_response):
        assert "CONTENT_LENGTH" not in environ
        bodies.append(environ["wsgi.input"].read())
        return answering()(environ, start_response)

    run(app, exchange_for("POST", body=[b"ab", b"c"], chunked=True))

    assert bodies == [b"abc"]


def test_each_request_has_an_environ_of_its_own(exchange_for):
    """Middleware writes into it, and what it leaves there must not reach the next request."""
    seen = []

    def app(environ, start_response):
        seen.append(dict(environ))
        environ["HTTP_X_USER"] = environ["PATH_INFO"] = "left behind"
        return answering(b"")(environ, start_response)

    gateway = WsgiGateway(app, run_in_thread=None)
    fields = Fields([(b"host", b"example.org")])
    for target in ("/a?x=1", "/b", "/a?x=1"):
        exchange = exchange_for("GET", target)
        exchange.request.fields = fields
        go(gateway(exchange))

    assert [(each["PATH_INFO"], each["QUERY_STRING"]) for each in seen] == [("/a", "x=1"), ("/b", ""), ("/a", "x=1")]
    assert not any("HTTP_X_USER" in each for each in seen)


# ---- the response ----


def test_one_piece_is_one_write_with_its_end(run, exchange_for, wire):
    """So the protocol knows the length, and sends Content-Length instead of chunks."""
    run(answering(b"hello", status="201 Created", headers=[("X-A", "é")]), exchange_for())

    assert wire.calls == [("head", 201, [(b"x-a", b"\xe9")], b"hello", False)]


def test_empty_list_is_a_complete_response(run, exchange_for, wire):
    """The head must leave although no piece ever pushes it."""
    run(answering(), exchange_for())

    assert wire.calls == [("head", 200, [], b"", False)]


def test_announced_length_completes_the_response_with_its_last_byte(run, exchange_for, wire):
    """Django and Flask give the length: one write, although their iterable could go on."""

    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", "5")])
        return Pieces([b"", b"hello"])

    run(app, exchange_for())

    assert wire.calls == [("head", 200, [(b"content-length", b"5")], b"hello", False)]


def test_pieces_beyond_the_announced_length_are_cut(run, exchange_for, wire):
    """The PEP: "must not transmit more bytes than Content-Length", else the next response is misread."""
    pieces = Pieces([b"hel", b"lo!!", b"more"])

    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", "5")])
        return pieces

    run(app, exchange_for())

    assert (wire.body, wire.complete, len(pieces.closed_in)) == (b"hello", True, 1)


def test_generator_calls_start_response_with_its_first_piece(run, exchange_for, wire):
    """A generator function runs nothing when it is called."""

    def app(environ, start_response):
        start_response("200 OK", [])
        yield b""
        yield b"a"
        yield b"b"

    run(app, exchange_for())

    assert (wire.status, wire.body, wire.complete) == (200, b"ab", True)


def test_write_callable_sends_before_the_iterable(run, exchange_for, wire):
    """The PEP keeps `write` for applications that print."""

    def app(environ, start_response):
        write = start_response("200 OK", [])
        write(b"a")
        write(b"")
        write(b"b")
        return [b"c"]

    run(app, exchange_for())

    assert (wire.body, wire.complete) == (b"abc", True)


def test_write_beyond_the_announced_length_is_an_error(run, exchange_for):
    """The PEP: "raise an error if the application tries to write() past that point"."""

    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", "2")])(b"abc")
        return []

    with pytest.raises(GatewayError, match=r"write\(\) was given 3 bytes, more than Content-Length announced"):
        run(app, exchange_for())


def test_error_replaces_a_head_that_has_not_left(run, exchange_for, wire):
    """`exc_info` is how error middleware turns a 200 into a 500."""

    def app(environ, start_response):
        start_response("200 OK", [])
        try:
            raise ValueError
        except ValueError:
            start_response("500 Oops", [("X-A", "b")], sys.exc_info())
        return [b"sorry"]

    run(app, exchange_for())

    assert wire.calls == [("head", 500, [(b"x-a", b"b")], b"sorry", False)]


def test_error_after_the_head_has_left_is_raised_again(run, exchange_for, wire):
    """The application must stop: what it wants to say can no longer be said."""

    def app(environ, start_response):
        start_response("200 OK", [])(b"half")
        try:
            raise ValueError("too late")
        except ValueError:
            start_response("500 Oops", [], sys.exc_info())
        return [b"never"]

    with pytest.raises(ValueError, match="too late"):
        run(app, exchange_for())
    assert (wire.body, wire.complete) == (b"half", False)


@pytest.mark.parametrize(
    ("app", "sentence"),
    [
        (answering("text"), "the WSGI application yielded str, bytes were expected"),
        (answering(b"", status="fine"), "the status 'fine', one such as '200 OK' was expected"),
        (answering(b"", status="100 Continue"), "the status '100 Continue'"),
        (answering(b"", status=200), "the status 200,"),
        (answering(b"", headers=[("a", 1)]), r"the header \('a', 1\), a tuple of two str was expected"),
        (answering(b"", headers=[("a", "€")]), "has characters beyond latin-1"),
        (lambda environ, start_response: start_response("200 OK", ()), "headers as tuple, a list"),
        (lambda environ, start_response: [b"a"], "answered without calling start_response"),
        (lambda environ, start_response: [], "answered without calling start_response"),
        (lambda environ, start_response: None, "returned None, an iterable of bytes was expected"),
        (lambda environ, start_response: b"abc", "returned bytes, an iterable of bytes was expected"),
        (lambda environ, start_response: [start_response("200 OK", []), start_response("200 OK", [])], "called again"),
        (lambda environ, start_response: start_response("200 OK", [])("a"), r"write\(\) was given str"),
    ],
)
def test_breach_of_the_pep_is_named(run, exchange_for, wire, app, sentence):
    """The sentence is all that the author of the application sees in the log."""
    with pytest.raises(GatewayError, match=sentence):
        run(app, exchange_for())
    assert wire.calls == []


def test_exception_of_the_application_comes_out_as_it_is(run, exchange_for):
    """The worker logs it with the application's own traceback."""

    def app(environ, start_response):
        raise LookupError("theirs")

    with pytest.raises(LookupError, match="theirs") as caught:
        run(app, exchange_for())
    assert caught.traceback[-1].name == "app"


def test_stop_iteration_of_the_application_does_not_hang_its_request(run, exchange_for):
    """asyncio's futures refuse StopIteration: the awaiting side would never wake."""

    def app(environ, start_response):
        raise StopIteration

    with pytest.raises(RuntimeError):
        run(app, exchange_for())


def test_pieces_before_an_exception_have_left(run, exchange_for, wire):
    """They were given to the server, so the worker must cut the connection and not answer 500."""

    def app(environ, start_response):
        start_response("200 OK", [])
        yield b"half"
        raise LookupError

    exchange = exchange_for()
    with pytest.raises(LookupError):
        run(app, exchange)
    assert (exchange.has_sent_head, wire.body, wire.complete) == (True, b"half", False)


@pytest.mark.parametrize("pieces", [[], [b"a"], [b"a", b"b"], ["wrong"]])
def test_iterable_is_closed_once_and_where_it_ran(run, exchange_for, pieces):
    """Database sessions are tied to their thread; a second close would give one back twice."""
    iterable, ran_in = Pieces(pieces), []

    def app(environ, start_response):
        ran_in.append(threading.get_ident())
        start_response("200 OK", [])
        return iterable

    try:
        run(app, exchange_for())
    except GatewayError:
        assert pieces == ["wrong"]
    assert iterable.closed_in == ran_in


@pytest.mark.parametrize("headers", [[], [("Content-Length", "1")]], ids=["stream", "known length"])
def test_exception_in_close_comes_out(run, exchange_for, wire, headers):
    """The response is complete and stands; the log must tell all the same."""

    class Failing(Pieces):
        def close(self):
            raise LookupError("in close")

    def app(environ, start_response):
        start_response("200 OK", headers)
        return Failing([b"a"])

    with pytest.raises(LookupError, match="in close"):
        run(app, exchange_for())
    assert wire.complete


def test_response_that_breaks_http_is_raised_and_closes_the_iterable(run, exchange_for, wire):
    """The protocol refuses in the loop; the thread must not go on for nobody."""
    iterable = Pieces([b"a"] * 1000)
    wire.refuse = ResponseError("header value with a line feed")

    def app(environ, start_response):
        start_response("200 OK", [])
        return iterable

    with pytest.raises(ResponseError):
        run(app, exchange_for())
    assert len(iterable.closed_in) == 1


def test_file_wrapper_sends_the_file_and_closes_it(run, exchange_for, wire):
    """Frameworks hand over files this way."""
    file = io.BytesIO(b"0123456789")

    def app(environ, start_response):
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](file, 3)

    run(app, exchange_for())

    assert (wire.body, wire.complete, file.closed) == (b"0123456789", True, True)


def test_file_wrapper_takes_what_has_no_close(run, exchange_for, wire):
    """The PEP asks of a file-like object only `read`."""

    pieces = iter([b"ab", b""])
    readable = SimpleNamespace(read=lambda size: next(pieces))

    def app(environ, start_response):
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](readable)

    run(app, exchange_for())

    assert wire.body == b"ab"


# ---- wsgiref.validate ----


def validated(kind):
    @validator
    def app(environ, start_response):
        headers = [("Content-Type", "text/plain")]
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if kind == "write":
            start_response("200 OK", headers)(body)
            return [b"!"]
        start_response("200 OK", headers)
        if kind == "file":
            return environ["wsgi.file_wrapper"](io.BytesIO(body + b"!"), 2)
        return [body, b"!"]

    return app


@pytest.mark.parametrize("kind", ["list", "write", "file"])
@pytest.mark.parametrize(
    "request_as",
    [
        {"method": "GET", "target": "/"},
        {"method": "HEAD", "target": "/a%20b?c=d"},
        {"method": "POST", "target": "/a", "body": b"abc", "headers": [(b"content-type", b"text/plain")]},
        {
            "method": "POST",
            "target": "/",
            "body": b"abc",
            "client": None,
            "server": ("/run/s", None),
            "scheme": "https",
        },
    ],
)
def test_reference_validator_is_content(run, exchange_for, wire, kind, request_as):
    """wsgiref's own reading of the PEP, on both sides of the call."""
    request_as = dict(request_as)
    run(validated(kind), exchange_for(request_as.pop("method"), request_as.pop("target"), **request_as))

    assert wire.body == request_as.get("body", b"") + b"!"


# ---- wsgi.input ----


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=40).map(lambda b: b.replace(b"\x01", b"\n")), max_size=6),
    steps=st.lists(st.tuples(st.sampled_from(["read", "readline"]), st.integers(0, 30)), max_size=8),
    last=st.sampled_from(["read", "readlines", "iter"]),
)
def test_input_reads_as_a_file_does(run, exchange_for, pieces, steps, last):
    """However the network cut it, the application sees what a BytesIO of the whole would give."""
    results = {}

    def play(file):
        done = [getattr(file, name)(size) for name, size in steps]
        return [
            *done,
            {"read": file.read, "readlines": file.readlines, "iter": lambda: list(file)}[last](),
            file.read(1),
        ]

    def app(environ, start_response):
        results["input"] = play(environ["wsgi.input"])
        return answering()(environ, start_response)

    run(app, exchange_for("POST", body=pieces, chunked=True))

    assert results["input"] == play(io.BytesIO(b"".join(pieces)))


def test_input_waits_for_bytes_that_are_still_to_come(exchange_for, pool):
    """A thread that blocks in read must not hold up the loop that feeds it."""
    steps, lines = [], []

    async def scenario():
        exchange = exchange_for("POST", content_length=4)
        first_line = asyncio.Event()
        loop = asyncio.get_running_loop()

        def app(environ, start_response):
            lines.append(environ["wsgi.input"].readline())
            loop.call_soon_threadsafe(first_line.set)
            lines.append(environ["wsgi.input"].readline())
            return answering()(environ, start_response)

        task = asyncio.create_task(WsgiGateway(app, run_in_thread=in_threads(pool))(exchange))
        exchange.feed(b"a\n")
        await first_line.wait()
        steps.append("fed")
        exchange.feed(b"b\n")
        exchange.feed_end()
        await task

    go(scenario())

    assert (lines, steps) == ([b"a\n", b"b\n"], ["fed"])


@pytest.mark.parametrize(("reads", "expected"), [(True, 1), (False, 0)])
def test_continue_is_sent_only_when_the_application_reads(exchange_for, wire, pool, reads, expected):
    """`Expect: 100-continue` lets an application refuse an upload before it is sent."""

    async def scenario():
        exchange = exchange_for("POST", content_length=2, expect_continue=True)

        def feed():
            exchange.feed(b"ab")
            exchange.feed_end()

        def send_continue():
            wire.calls.append(("continue",))
            asyncio.get_running_loop().call_soon(feed)

        wire.send_continue = send_continue

        def app(environ, start_response):
            if reads:
                assert environ["wsgi.input"].read() == b"ab"
            return answering(b"ok")(environ, start_response)

        await WsgiGateway(app, run_in_thread=in_threads(pool))(exchange)

    go(scenario())

    assert wire.count("continue") == expected


def test_application_may_answer_without_reading_the_body(exchange_for, wire, pool):
    """Half an upload is under way; the response must not wait for the other half."""

    async def scenario():
        exchange = exchange_for("POST", content_length=100)
        exchange.feed(b"part")
        await WsgiGateway(answering(b"no"), run_in_thread=in_threads(pool))(exchange)

    go(scenario())

    assert (wire.body, wire.complete) == (b"no", True)


def test_inline_body_above_the_spool_size_goes_through_a_file(exchange_for, wire):
    """Read before the call, so it must not live in memory however large."""
    sizes = []

    def app(environ, start_response):
        file = environ["wsgi.input"]
        sizes.append((file.name is not None, sum(len(line) for line in file)))
        return answering()(environ, start_response)

    body = [b"x" * 999 + b"\n"] * 2000
    go(WsgiGateway(app, run_in_thread=None)(exchange_for("POST", body=body)))

    assert sizes == [(True, 2_000_000)]


# ---- nobody blocks for ever ----


def start(app, exchange, pool):
    return asyncio.create_task(WsgiGateway(app, run_in_thread=in_threads(pool))(exchange))


class Endless(Pieces):
    """Pieces without end: only the server can stop it."""

    def __init__(self):
        super().__init__(iter(lambda: PIECE, None))


def endless_app(iterable):
    def app(environ, start_response):
        start_response("200 OK", [])
        return iterable

    return app


def test_client_that_leaves_stops_a_thread_that_is_writing(exchange_for, wire, pool):
    """The thread blocks because the client was slow; the pool has four of them and no more."""
    iterable = Endless()

    async def scenario():
        wire.writable = False
        exchange = exchange_for()
        task = start(endless_app(iterable), exchange, pool)
        await wire.is_draining.wait()
        wire.leave()
        exchange.disconnect()
        with pytest.raises(ClientDisconnected):
            await task

    go(scenario())

    assert len(iterable.closed_in) == 1


def reading_app(loop, about_to_read, outcomes):
    def app(environ, start_response):
        loop.call_soon_threadsafe(about_to_read.set)
        try:
            environ["wsgi.input"].read()
        except OSError as exc:
            outcomes.append(exc)
            raise
        return answering()(environ, start_response)

    return app


def test_client_that_leaves_stops_a_thread_that_is_reading(exchange_for, wire, pool):
    """The application gets an OSError, which frameworks know; the worker gets ClientDisconnected, and is silent."""
    outcomes = []

    async def scenario():
        exchange = exchange_for("POST", content_length=10)
        about_to_read = asyncio.Event()
        task = start(reading_app(asyncio.get_running_loop(), about_to_read, outcomes), exchange, pool)
        await about_to_read.wait()
        exchange.feed(b"abc")
        exchange.disconnect()
        with pytest.raises(ClientDisconnected):
            await task

    go(scenario())

    assert len(outcomes) == 1


def test_what_an_application_makes_of_a_lost_client_is_no_error_of_its_own(exchange_for, wire, pool):
    """Django raises UnreadablePostError, others RuntimeError: a traceback for each lost upload would bury the rest."""

    async def scenario():
        exchange = exchange_for("POST", content_length=10)

        def app(environ, start_response):
            try:
                environ["wsgi.input"].read()
            except OSError as exc:
                raise RuntimeError("unreadable") from exc

        task = start(app, exchange, pool)
        exchange.disconnect()
        with pytest.raises(ClientDisconnected) as caught:
            await task
        assert isinstance(caught.value.__cause__, RuntimeError)

    go(scenario())


@pytest.mark.parametrize("direction", ["reading", "writing"])
def test_cancelled_exchange_frees_its_thread(exchange_for, wire, direction):
    """A worker that shuts down joins its threads: one that blocks would make it miss its deadline."""
    outcomes, iterable = [], Endless()

    async def scenario(pool):
        wire.writable = False
        exchange = exchange_for("POST", content_length=10)
        about_to_read = asyncio.Event()
        if direction == "reading":
            task = start(reading_app(asyncio.get_running_loop(), about_to_read, outcomes), exchange, pool)
            await about_to_read.wait()
        else:
            task = start(endless_app(iterable), exchange, pool)
            await wire.is_draining.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with ThreadPoolExecutor(1) as pool:
        go(scenario(pool))

    assert len(outcomes) + len(iterable.closed_in) == 1


def test_loop_that_ends_frees_the_thread(exchange_for, wire):
    """`asyncio.run` cancels what is left and closes the loop; the thread finds nobody to call."""
    iterable = Endless()

    async def scenario(pool):
        wire.writable = False
        task = start(endless_app(iterable), exchange_for(), pool)
        await wire.is_draining.wait()
        return task

    with ThreadPoolExecutor(1) as pool:
        go(scenario(pool))

    assert len(iterable.closed_in) == 1


def test_thread_that_outlives_its_loop_ends_with_an_error_of_its_own(exchange_for, wire):
    """It computed while the loop was closed; its next piece must neither block nor crash the interpreter."""
    go_on, iterable = threading.Event(), Pieces([])

    def app(environ, start_response):
        start_response("200 OK", [])
        go_on.wait(DEADLINE)
        return iterable

    async def scenario(pool):
        start(app, exchange_for(), pool)
        await asyncio.sleep(0)

    with ThreadPoolExecutor(1) as pool:
        go(scenario(pool))
        go_on.set()

    assert len(iterable.closed_in) == 1


def test_call_that_no_thread_has_begun_is_withdrawn_with_its_exchange(exchange_for):
    """A cancelled request that still waits in the pool's queue must not run afterwards."""
    called, release = [], threading.Event()

    async def scenario(pool):
        pool.submit(release.wait, DEADLINE)
        task = start(lambda environ, start_response: called.append(1), exchange_for(), pool)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with ThreadPoolExecutor(1) as pool:
        go(scenario(pool))
        release.set()

    assert called == []


# ---- begun without a task ----


def begun(app, exchanges, wire, *, then=lambda threads: None):
    """Begin *exchanges* in one turn of the loop, in two threads, and wait until all are over."""

    async def scenario():
        threads = Threads(2, asyncio.get_running_loop())
        gateway = WsgiGateway(app, run_in_thread=threads)
        for exchange in exchanges:
            assert gateway.begin(exchange) is None
        then(threads)
        await threads.wait(DEADLINE)
        results = await asyncio.gather(*wire.tasks, return_exceptions=True)
        threads.close()
        return results

    return go(scenario())


def test_ordinary_answer_of_a_thread_takes_no_task(exchange_for, wire):
    """A task costs as much as the whole way to the thread and back."""
    begun(answering(b"hello"), [exchange_for()], wire)

    assert wire.calls == [("head", 200, [], b"hello", False)]


def test_ordinary_answer_in_the_loop_takes_no_task(exchange_for, wire):
    """Nor does an error: whoever begins is the door for applications."""

    def app(environ, start_response):
        if environ["PATH_INFO"] == "/fails":
            raise LookupError("theirs")
        return answering(b"hello")(environ, start_response)

    async def scenario():
        gateway = WsgiGateway(app, run_in_thread=None)
        with pytest.raises(LookupError, match="theirs"):
            gateway.begin(exchange_for("GET", "/fails"))
        assert gateway.begin(exchange_for()) is None

    go(scenario())

    assert wire.calls == [("head", 200, [], b"hello", False)]


@pytest.mark.parametrize("count", [0, 2])
def test_body_that_comes_with_its_head_needs_no_task(exchange_for, wire, count):
    """A small form arrives in one segment, or in one turn of the loop."""
    bodies = []

    def app(environ, start_response):
        bodies.append(environ["wsgi.input"].read())
        return answering(b"thanks")(environ, start_response)

    async def scenario():
        threads = Threads(count, asyncio.get_running_loop()) if count else None
        exchange = exchange_for("POST", body=[b"ab", b"cd"])
        assert WsgiGateway(app, run_in_thread=threads).begin(exchange) is None
        if threads is not None:
            await threads.wait(DEADLINE)
            threads.close()

    go(scenario())

    assert (bodies, wire.body, wire.count("go_on")) == ([b"abcd"], b"thanks", 0)


def begun_before_its_body(app, exchange, wire, feed):
    """The outcome of what `begin` returns for *exchange* in the only thread; *feed* is called when it waits."""

    async def scenario():
        threads = Threads(1, asyncio.get_running_loop())
        gateway = WsgiGateway(app, run_in_thread=threads)
        rest = asyncio.create_task(gateway.begin(exchange))
        try:
            await asyncio.sleep(0)  # it is begun
            await feed(gateway, threads, rest)
            return (await asyncio.gather(rest, return_exceptions=True))[0]
        finally:
            threads.close()

    return go(scenario())


ANSWERS = {
    "whole": lambda body: [body],
    "known length": lambda body: Pieces([body]),
    "stream": lambda body: iter([body, b"!"]),
    "failure": lambda body: {}[body],
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_slow_upload_holds_no_thread(exchange_for, wire, kind):
    """Four slow clients would be the end of a worker with four threads."""
    order = []

    def app(environ, start_response):
        order.append(environ["PATH_INFO"])
        start_response("200 OK", [("Content-Length", "5")] if kind == "known length" else [])
        return ANSWERS[kind](environ["wsgi.input"].read()) if environ["PATH_INFO"] == "/slow" else [b"other"]

    async def feed(gateway, threads, rest):
        exchange.feed(b"ab\n")
        assert gateway.begin(exchange_for("GET", "/other")) is None
        await threads.wait(DEADLINE)
        exchange.feed(b"cd")
        exchange.feed_end()

    exchange = exchange_for("POST", "/slow", content_length=5)
    outcome = begun_before_its_body(app, exchange, wire, feed)

    assert order == ["/other", "/slow"]
    assert type(outcome) is (KeyError if kind == "failure" else type(None))
    assert wire.body == b"other" + {"failure": b"", "stream": b"ab\ncd!"}.get(kind, b"ab\ncd")


@pytest.mark.parametrize(
    "request_as",
    [{"chunked": True}, {"content_length": SPOOL_SIZE + 1}, {"content_length": 4, "expect_continue": True}],
    ids=["unknown length", "long", "to be asked for"],
)
def test_body_that_is_not_waited_for_is_read_as_it_comes(exchange_for, wire, request_as):
    """What streams for ever, what is too large for memory, and what the application may refuse."""
    lines, has_read = [], threading.Event()

    def app(environ, start_response):
        lines.append(environ["wsgi.input"].readline())
        has_read.set()
        lines.extend(environ["wsgi.input"])
        return answering(b"ok")(environ, start_response)

    async def feed(gateway, threads, rest):
        exchange.feed(b"a\n")
        assert await asyncio.to_thread(has_read.wait, DEADLINE)
        exchange.feed(b"b\n")
        exchange.feed_end()

    exchange = exchange_for("POST", **request_as)
    begun_before_its_body(app, exchange, wire, feed)

    assert (lines, wire.body) == ([b"a\n", b"b\n"], b"ok")


@pytest.mark.parametrize("way", ["leaves", "is cancelled"])
def test_call_whose_body_never_comes_is_not_made(exchange_for, wire, way):
    """The client left in the middle of its upload, or the worker's time is over."""
    called = []

    async def feed(gateway, threads, rest):
        exchange.feed(b"ab")
        exchange.disconnect() if way == "leaves" else rest.cancel()

    exchange = exchange_for("POST", content_length=5)
    outcome = begun_before_its_body(lambda *_: called.append(1), exchange, wire, feed)

    assert isinstance(outcome, ClientDisconnected if way == "leaves" else asyncio.CancelledError)
    assert called == []


def test_answer_of_a_thread_does_not_wait_for_the_close_of_its_iterable(exchange_for, wire):
    """Frameworks do in `close` what may take its time because the client has its answer."""
    answered = threading.Event()

    class Slow(Pieces):
        def close(self):
            assert answered.wait(DEADLINE)
            super().close()

    pieces = Slow([b"hello"])

    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", "5")])
        return pieces

    original = wire.send_head
    wire.send_head = lambda *head: (original(*head), answered.set())
    begun(app, [exchange_for()], wire)

    assert (wire.body, len(pieces.closed_in)) == (b"hello", 1)


def test_threads_take_requests_that_wait_behind_one_that_blocks(exchange_for, wire):
    """Handed over together, they must not be bound to one thread."""
    released = threading.Event()

    def app(environ, start_response):
        if environ["PATH_INFO"] == "/blocks":
            assert released.wait(DEADLINE)
        elif environ["PATH_INFO"] == "/releases":
            released.set()
        return answering(b"x")(environ, start_response)

    targets = ["/blocks", "/", "/", "/", "/releases"]
    results = begun(app, [exchange_for("GET", target) for target in targets], wire)

    assert (wire.body, results) == (b"xxxxx", [])


def test_failure_of_one_answer_keeps_back_no_other(exchange_for, wire):
    """They return to the loop together."""
    wire.refuse = ResponseError("not HTTP")
    results = begun(answering(b"x"), [exchange_for() for _ in range(5)], wire)

    assert wire.body == b"xxxx"
    assert [type(result) for result in results] == [ResponseError]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_exit_in_a_thread_ends_its_request_only(exchange_for, wire, error):
    """Out of a task it would end the event loop."""

    def app(environ, start_response):
        raise error

    (result,) = begun(app, [exchange_for()], wire)

    assert isinstance(result, ApplicationExited)
    assert isinstance(result.__cause__, error)


def test_leaving_worker_knows_what_its_threads_do_as_tasks(exchange_for, wire):
    """So it can wait for them, count them and cut them off; their answers are the same."""
    release = threading.Event()

    def app(environ, start_response):
        assert release.wait(DEADLINE)
        return answering(b"x")(environ, start_response)

    def leave(threads):
        threads.drain()
        assert wire.count("go_on") == 3
        release.set()

    results = begun(app, [exchange_for() for _ in range(3)], wire, then=leave)

    assert (wire.body, results) == (b"xxx", [None] * 3)


def test_call_that_is_cut_off_before_a_thread_has_begun_it_is_withdrawn(exchange_for, wire):
    """The worker's time is over, and the threads are busy with others."""
    release, called = threading.Event(), []

    def app(environ, start_response):
        called.append(environ["PATH_INFO"])
        assert release.wait(DEADLINE)
        return answering(b"x")(environ, start_response)

    exchanges = [exchange_for("GET", target) for target in ("/1", "/2", "/3")]

    async def scenario():
        threads = Threads(2, asyncio.get_running_loop())
        gateway = WsgiGateway(app, run_in_thread=threads)
        for exchange in exchanges:
            gateway.begin(exchange)
        threads.drain()
        await asyncio.sleep(0)  # the tasks are begun
        wire.task_of[exchanges[2]].cancel()
        await asyncio.wait([wire.task_of[exchanges[2]]])
        release.set()
        await threads.wait(DEADLINE)
        await asyncio.wait(wire.tasks)
        threads.close()

    go(scenario())

    assert sorted(called) == ["/1", "/2"]


def test_application_that_keeps_its_input_cannot_read_on(exchange_for, pool):
    """The bytes that follow belong to the next request."""
    kept = []

    def app(environ, start_response):
        kept.append(environ["wsgi.input"])
        return answering()(environ, start_response)

    async def scenario():
        await WsgiGateway(app, run_in_thread=in_threads(pool))(exchange_for("POST", content_length=5))

    go(scenario())

    with pytest.raises(ClientDisconnected):
        kept[0].read()


def test_application_may_read_while_its_output_waits(exchange_for, wire, pool):
    """The client sends all before it reads: a reader behind a blocked writer would be a deadlock."""
    received = []

    async def scenario():
        wire.writable = False
        exchange = exchange_for("POST", content_length=2)
        loop, has_read = asyncio.get_running_loop(), asyncio.Event()

        def app(environ, start_response):
            start_response("200 OK", [])
            yield b"early"
            received.append(environ["wsgi.input"].read())
            loop.call_soon_threadsafe(has_read.set)
            yield b"late"

        task = start(app, exchange, pool)
        await wire.is_draining.wait()
        exchange.feed(b"ab")
        exchange.feed_end()
        await has_read.wait()
        wire.take()
        await task

    go(scenario())

    assert (received, wire.body) == ([b"ab"], b"earlylate")


def test_inline_client_that_leaves_closes_the_iterable(exchange_for, wire):
    """Inline it is the loop itself that must give up."""
    iterable = Pieces([PIECE] * 1000)  # an end, lest a test that fails should never end

    async def scenario():
        wire.writable = False
        task = asyncio.create_task(WsgiGateway(endless_app(iterable), run_in_thread=None)(exchange_for()))
        await wire.is_draining.wait()
        wire.leave()
        with pytest.raises(ClientDisconnected):
            await task

    go(scenario())

    assert len(iterable.closed_in) == 1


def test_inline_requests_run_one_at_a_time(exchange_for, wire):
    """No second call while an iterable is under way: thread-local state would be shared between the two."""
    order = []

    def app(environ, start_response):
        start_response("200 OK", [])
        order.append("begin")
        for _ in range(3):
            yield b"a"
        order.append("end")

    async def scenario():
        gateway = WsgiGateway(app, run_in_thread=None)
        wire.is_writable, wire.drain = (lambda: False), lambda: asyncio.sleep(0)  # each piece takes a turn of the loop
        late = exchange_for("POST", content_length=1)
        begun = [gateway.begin(exchange) for exchange in (exchange_for(), exchange_for(), late)]
        late.feed(b"x")
        late.feed_end()
        await asyncio.gather(*begun, gateway(exchange_for()))

    go(scenario())

    assert order == ["begin", "end"] * 4


class Stepwise(Pieces):
    """Remembers what was with the wire when each piece was asked for, and at the end."""

    def __init__(self, pieces, wire):
        super().__init__(self.steps(pieces, wire))
        self.sent = []

    def steps(self, pieces, wire):
        for piece in pieces:
            self.sent.append(wire.body)
            yield piece
        self.sent.append(wire.body)


def test_inline_piece_is_sent_before_the_next_is_asked_for(exchange_for, wire):
    """The PEP, "Buffering and Streaming": the kernel has it, so that it leaves while the application works on."""
    iterable = Stepwise([b"a", b"b", b"c"], wire)

    go(WsgiGateway(endless_app(iterable), run_in_thread=None)(exchange_for()))

    assert iterable.sent == [b"", b"a", b"ab", b"abc"]
    assert wire.calls[:2] == [("at once",), ("head", 200, [], b"a", True)]


def test_inline_write_sends_before_it_returns(exchange_for, wire):
    """The PEP asks the same of `write`; threads need it not, because the loop sends meanwhile."""

    def app(environ, start_response):
        write = start_response("200 OK", [])
        write(b"a")
        assert wire.body == b"a"
        write(b"b")
        return [b"c"]

    go(WsgiGateway(app, run_in_thread=None)(exchange_for()))

    assert wire.calls == [
        ("at once",),
        ("head", 200, [], b"a", True),
        ("body", b"b", True),
        ("body", b"c", False),
    ]


def test_inline_whole_answer_may_wait_for_the_end_of_the_turn(exchange_for, wire):
    """It leaves with the others of this turn, and nothing of the application comes after it."""
    go(WsgiGateway(endless_app(Pieces([b"a"])), run_in_thread=None)(exchange_for()))
    streamed = wire.count("at once")
    go(WsgiGateway(answering(b"a"), run_in_thread=None)(exchange_for()))

    assert (streamed, wire.count("at once")) == (1, 1)


def test_inline_stream_gives_the_loop_a_turn_only_when_the_wire_says_so(exchange_for, wire):
    """A turn for each piece would cost more than the piece."""
    iterable = Stepwise([b"x"] * 100, wire)

    async def scenario():
        rest = WsgiGateway(endless_app(iterable), run_in_thread=None).begin(exchange_for())
        with pytest.raises(StopIteration):
            rest.send(None)

    go(scenario())

    assert (len(iterable.sent), wire.complete, wire.count("drain")) == (101, True, 0)


def test_inline_stream_asks_for_nothing_while_its_client_is_behind(exchange_for, wire):
    """Or an endless iterable would fill the memory."""
    iterable = Stepwise([b"a", b"b", b"c"], wire)

    async def scenario():
        wire.writable = False
        task = asyncio.create_task(WsgiGateway(endless_app(iterable), run_in_thread=None)(exchange_for()))
        await wire.is_draining.wait()
        assert iterable.sent == [b""]
        wire.take()
        await task

    go(scenario())

    assert (iterable.sent, wire.complete) == ([b"", b"a", b"ab", b"abc"], True)


# ---- memory ----


class Meter:
    """A client that takes everything and keeps nothing, slow at every fourth piece."""

    def __init__(self, wire):
        self.size = 0
        self.wire = wire
        wire.send_head = lambda status, headers, body, more: self.count(body)
        wire.send_body = lambda data, more: self.count(data)
        wire.send_file = self.send_file
        wire.drain = self.drain
        wire.is_writable = lambda: self.sends % 4 != 0
        self.sends = 0

    async def send_file(self, file, offset, count):
        self.size += count

    def count(self, data):
        self.sends += 1
        self.size += len(data)

    async def drain(self):
        await asyncio.sleep(0)


def peak_of(function):
    """The most memory that Python held while *function* ran, in bytes."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_download_of_500_megabytes_keeps_memory_flat(run, exchange_for, wire, tmp_path):
    """Back-pressure holds the thread, so a slow client costs a few pieces and not the file."""
    size = 500 * MEGABYTE
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(size)
    meter = Meter(wire)

    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", str(size))])
        return environ["wsgi.file_wrapper"](path.open("rb"))

    peak = peak_of(lambda: run(app, exchange_for()))

    assert meter.size == size
    assert peak < 2 * MEGABYTE


def test_upload_of_50_megabytes_keeps_memory_flat(exchange_for, wire, pool):
    """The wire is told to pause whenever the application is behind."""
    size = 50 * MEGABYTE
    sizes = []

    def app(environ, start_response):
        sizes.append(sum(len(data) for data in iter(lambda: environ["wsgi.input"].read(10_000), b"")))
        return answering(b"thanks")(environ, start_response)

    async def scenario():
        may_send = asyncio.Event()
        may_send.set()
        wire.pause_body, wire.resume_body = may_send.clear, may_send.set
        exchange = exchange_for("POST", content_length=size)
        task = start(app, exchange, pool)
        for _ in range(size // (16 * 1024)):
            await may_send.wait()
            exchange.feed(bytes(16 * 1024))
        exchange.feed_end()
        await task

    peak = peak_of(lambda: go(scenario()))

    assert sizes == [size]
    assert peak < 2 * MEGABYTE


def test_many_small_pieces_are_few_writes(exchange_for, wire, pool):
    """A wake of the loop for each of a template's thousand pieces would cost more than the template."""
    pieces = [b"%d," % number for number in range(2000)]
    wakes = []

    async def scenario():
        loop = asyncio.get_running_loop()
        go_on = threading.Event()

        def app(environ, start_response):
            start_response("200 OK", [])
            yield b"first,"
            go_on.wait(DEADLINE)
            yield from pieces

        wire.writable = False
        original = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda callback, *args, **kw: (
            wakes.append(callback),
            original(callback, *args, **kw),
        )
        task = start(app, exchange_for(), pool)
        await wire.is_draining.wait()
        go_on.set()
        while not task.done():
            wire.take()
            await asyncio.sleep(0)
        await task

    go(scenario())

    assert wire.body == b"first," + b"".join(pieces)
    assert len(wakes) < len(pieces) / 4
