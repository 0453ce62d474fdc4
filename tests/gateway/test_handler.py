"""Native handlers: what they may return, what a request offers, and where they run."""

from __future__ import annotations

import asyncio
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.errors import ClientDisconnected, GatewayError, MalformedBody
from prefork.gateway.handler import HandlerGateway
from prefork.gateway.message import Headers, Query, Request, Response, as_response
from tests.harness.loop import go, in_threads


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture(params=["threads", "inline"])
def run(request, pool):
    """Run one exchange through a handler, with threads at hand and without."""
    run_in_thread = in_threads(pool) if request.param == "threads" else None

    def runner(handler, exchange, worker=None):
        go(HandlerGateway(handler, run_in_thread=run_in_thread, worker=worker)(exchange))

    return runner


def returning(result):
    async def handler(request):
        return result

    return handler


# ---- what a handler returns ----


@pytest.mark.parametrize(
    ("result", "status", "content_type", "body"),
    [
        ("é", 200, [b"text/plain; charset=utf-8"], "é".encode()),
        ("", 200, [b"text/plain; charset=utf-8"], b""),
        (b"ab", 200, [b"application/octet-stream"], b"ab"),
        ({"a": [1, None, "é"]}, 200, [b"application/json"], '{"a":[1,null,"é"]}'.encode()),
        ([], 200, [b"application/json"], b"[]"),
        (None, 204, [], b""),
        (Response(), 200, [], b""),
        (Response("a", 404), 404, [b"text/plain; charset=utf-8"], b"a"),
        (Response(bytearray(b"a")), 200, [b"application/octet-stream"], b"a"),
        (Response("<a>", content_type="text/html"), 200, [b"text/html"], b"<a>"),
        (Response("a,b", headers={"Content-Type": "text/csv"}), 200, [b"text/csv"], b"a,b"),
        (Response.json({"a": 1}, HTTPStatus.CREATED), 201, [b"application/json"], b'{"a":1}'),
    ],
)
def test_result_becomes_one_write(run, exchange_for, wire, result, status, content_type, body):
    """The short answers are the common ones; each is a head and a body at once."""
    run(returning(result), exchange_for())

    [(_, sent_status, _, sent_body, more)] = wire.calls
    assert (sent_status, wire.header(b"content-type"), sent_body, more) == (status, content_type, body, False)


@pytest.mark.parametrize(("result", "name"), [(5, "int"), ((b"a", 200), "tuple"), (object(), "object")])
def test_result_of_another_type_is_named(run, exchange_for, wire, result, name):
    """The sentence says what came and what may come."""
    with pytest.raises(GatewayError, match=f"returned {name}, allowed are Response, str, bytes, dict, list and None"):
        run(returning(result), exchange_for())
    assert wire.calls == []


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Response(status=99), "is 99, an int from 200 to 999"),
        (lambda: Response(status="200"), "is '200', an int"),
        (lambda: Response(status=True), "is True, an int"),
        (lambda: Response({"a": 1}), "is dict; Response.json sends it"),
        (lambda: Response(5), "is int, bytes, str or an iterable"),
        (lambda: Response(headers={"a": 5}), "a header is str: int: 'a': 5; both must be str"),
        (lambda: Response(headers={"a": "€"}), "has characters beyond latin-1"),
    ],
)
def test_impossible_response_is_refused_where_it_is_made(make, sentence):
    """The traceback then points at the handler's line."""
    with pytest.raises(GatewayError, match=sentence):
        make()


def test_value_that_json_cannot_say_is_refused():
    """`NaN` is no JSON: browsers refuse the whole document."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_response({"a": float("nan")})


async def async_pieces():
    for piece in (b"a", b"", b"b"):
        yield piece


@pytest.mark.parametrize("make", [lambda: [b"a", b"", b"b"], lambda: iter([b"a", b"b"]), async_pieces])
def test_iterable_body_is_sent_piece_by_piece(run, exchange_for, wire, make):
    """Each leaves when it is there; the end is sent by itself."""
    run(returning(Response(make())), exchange_for())

    assert wire.calls == [
        ("head", 200, [(b"content-type", b"application/octet-stream")], b"a", True),
        ("body", b"b", True),
        ("body", b"", False),
    ]


def test_head_of_an_iterable_leaves_its_length_open(run, exchange_for, wire):
    """Nobody knows the length without making the body, and a wrong one is worse than none."""

    def never():
        raise AssertionError("the body of a HEAD response was made")
        yield

    run(returning(Response(never())), exchange_for("HEAD"))

    assert [(call[-2], call[-1]) for call in wire.calls] == [(b"", True), (b"", False)]


def test_piece_that_is_not_bytes_is_named(run, exchange_for):
    """Templates yield str."""
    with pytest.raises(GatewayError, match="yielded str, bytes were expected"):
        run(returning(Response(iter(["a"]))), exchange_for())


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_body_that_fails_leaves_the_response_open(run, exchange_for, wire, kind):
    """The worker then cuts the connection: half a body must not pass for a whole one."""

    def plain():
        yield b"half"
        raise LookupError

    async def asynchronous():
        yield b"half"
        raise LookupError

    with pytest.raises(LookupError):
        run(returning(Response(plain() if kind == "plain" else asynchronous())), exchange_for())
    assert (wire.body, wire.complete) == (b"half", False)


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_client_that_leaves_closes_the_body(exchange_for, wire, pool, kind):
    """A generator's `finally` gives its resources back."""
    closed = []

    def plain():
        try:
            while True:
                yield b"x"
        finally:
            closed.append("plain")

    async def asynchronous():
        try:
            while True:
                yield b"x"
        finally:
            closed.append("async")

    async def scenario():
        wire.writable = False
        handler = returning(Response(plain() if kind == "plain" else asynchronous()))
        task = asyncio.create_task(HandlerGateway(handler, run_in_thread=in_threads(pool))(exchange_for()))
        await wire.is_draining.wait()
        wire.leave()
        with pytest.raises(ClientDisconnected):
            await task

    go(scenario())

    assert closed == [kind]


def test_plain_body_is_made_in_a_thread(exchange_for, wire, pool):
    """A generator that queries a database must not stop the loop."""
    ran_in = set()

    def pieces():
        ran_in.add(threading.get_ident())
        yield b"a"

    go(HandlerGateway(returning(Response(pieces())), run_in_thread=in_threads(pool))(exchange_for()))

    assert threading.get_ident() not in ran_in


# ---- where a handler runs ----


def test_async_handler_runs_in_the_loop_and_plain_in_a_thread(exchange_for, wire, pool):
    """Plain functions block; coroutines need their loop."""
    ran_in = []

    async def asynchronous(request):
        ran_in.append(threading.get_ident())

    def plain(request):
        ran_in.append(threading.get_ident())

    for handler in (asynchronous, plain):
        go(HandlerGateway(handler, run_in_thread=in_threads(pool))(exchange_for()))

    assert [ident == threading.get_ident() for ident in ran_in] == [True, False]


class CallableObject:
    async def __call__(self, request):
        return "async"


def passing_on(handler):
    def plain(request):
        return handler(request)

    return plain


async def echo(request, prefix=b""):
    return prefix + await request.body()


@pytest.mark.parametrize("handler", [echo, functools.partial(echo, prefix=b""), passing_on(echo)])
def test_async_handlers_are_known_in_every_wrapping(run, exchange_for, wire, handler):
    """The last is a plain function that returns a coroutine: it is awaited, and finds the body still there."""
    run(handler, exchange_for("POST", body=b"abc"))

    assert wire.body == b"abc"


def test_object_with_an_async_call_is_an_async_handler(run, exchange_for, wire):
    """Applications with state are often objects."""
    run(CallableObject(), exchange_for())

    assert wire.body == b"async"


def test_the_body_cannot_be_used_after_a_plain_handler_has_returned(exchange_for, wire, pool):
    """It is streamed while the handler runs; as a response it would never come, and the client would not learn why."""
    exchange = exchange_for("POST", content_length=3)

    with pytest.raises(GatewayError, match="used after the handler had returned"):
        go(HandlerGateway(lambda request: Response(request.file), run_in_thread=in_threads(pool))(exchange))


@pytest.mark.parametrize("error", [LookupError("theirs"), StopIteration("theirs")])
def test_exception_of_a_plain_handler_comes_out(run, exchange_for, error):
    """StopIteration too, which a future cannot carry: its request would wait for ever."""

    def handler(request):
        raise error

    with pytest.raises((LookupError, RuntimeError)):
        run(handler, exchange_for())


def test_cancelled_exchange_frees_a_plain_handler_that_reads(exchange_for, pool):
    """The worker joins its threads when it shuts down."""
    outcomes = []

    async def scenario():
        loop, about_to_read = asyncio.get_running_loop(), asyncio.Event()

        def handler(request):
            loop.call_soon_threadsafe(about_to_read.set)
            try:
                return request.content
            except OSError as exc:
                outcomes.append(exc)
                raise

        exchange = exchange_for("POST", content_length=5)
        task = asyncio.create_task(HandlerGateway(handler, run_in_thread=in_threads(pool))(exchange))
        await about_to_read.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    go(scenario())
    pool.shutdown()

    assert len(outcomes) == 1


# ---- the request ----


def asked(run, exchange, ask, worker=None):
    answers = []

    async def handler(request):
        answers.append(ask(request))

    run(handler, exchange, worker)
    return answers[0]


def test_request_offers_what_was_asked(run, exchange_for):
    """The names of the public page, each with its type."""
    exchange = exchange_for("PUT", "/a%20%C3%A9?b=c", scheme="https", version="1.0")
    worker = object()
    answer = asked(
        run,
        exchange,
        lambda r: (
            r.method,
            r.path,
            r.raw_path,
            r.query_string,
            r.http_version,
            r.scheme,
            r.client,
            r.server,
            r.worker,
        ),
        worker,
    )

    expected = (
        "PUT",
        "/a é",
        b"/a%20%C3%A9",
        b"b=c",
        "1.0",
        "https",
        ("192.0.2.7", 40123),
        ("127.0.0.1", 8000),
        worker,
    )
    assert answer == expected


def test_path_that_is_not_utf_8_is_still_text(run, exchange_for):
    """Any client can send it; it must not be a 500."""
    assert asked(run, exchange_for("GET", "/%ff"), lambda r: r.path) == "/\ufffd"


def test_request_headers_are_found_in_any_case(run, exchange_for):
    """HTTP's names have no case."""
    exchange = exchange_for(headers=[(b"x-a", b"\xe9"), (b"x-a", b"2")])

    assert asked(run, exchange, lambda r: (r.headers["Host"], r.headers["X-A"], r.headers.get_all("x-A"))) == (
        "example.org",
        "é",
        ["é", "2"],
    )


def test_request_query_decodes_and_keeps_repeats(run, exchange_for):
    """The first value by name, all of them by get_all."""
    query = asked(run, exchange_for("GET", "/?a=1&b=%C3%A9+x&a=2&empty="), lambda r: r.query)

    assert (query["a"], query.get_all("a"), query["b"], query["empty"], query.get("no")) == (
        "1",
        ["1", "2"],
        "é x",
        "",
        None,
    )
    assert dict(query) == {"a": "1", "b": "é x", "empty": ""}


def test_async_handler_reads_the_body_in_every_way(run, exchange_for, wire):
    """Whole, as JSON, in pieces; what was kept can be asked for again."""
    seen = []

    async def handler(request):
        seen.append(await request.json())
        seen.append(await request.body())
        seen.append([piece async for piece in request.stream()])
        seen.append(request.content)

    run(handler, exchange_for("POST", body=[b'{"a"', b":1}"]))

    assert seen == [{"a": 1}, b'{"a":1}', [b'{"a":1}'], b'{"a":1}']


def test_stream_gives_the_pieces_as_they_came(run, exchange_for):
    """Nothing is gathered that the handler did not ask for."""
    seen = []

    async def handler(request):
        seen.extend([piece async for piece in request.stream()])

    run(handler, exchange_for("POST", body=[b"a", b"b"]))

    assert seen == [b"a", b"b"]


def test_streamed_body_is_not_there_a_second_time(run, exchange_for):
    """An empty body in its place would be a silent loss."""

    async def handler(request):
        async for _ in request.stream():
            pass
        await request.body()

    with pytest.raises(GatewayError, match="streamed already"):
        run(handler, exchange_for("POST", body=b"abc"))


@pytest.mark.parametrize("name", ["content", "file"])
def test_async_handler_that_would_block_is_told_what_to_await(run, exchange_for, name):
    """A blocking read in the loop would stop every other request."""

    async def handler(request):
        return getattr(request, name)

    with pytest.raises(GatewayError, match=r"await request\.body\(\)"):
        run(handler, exchange_for("POST", body=b"abc"))


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda r: r.content, b'{"a":\n1}'),
        (lambda r: r.content + r.content, b'{"a":\n1}' * 2),
        (lambda r: r.load_json(), {"a": 1}),
        (lambda r: list(r.file), [b'{"a":\n', b"1}"]),
    ],
)
def test_plain_handler_reads_the_body_without_await(run, exchange_for, read, expected):
    """The same body, as a value or a file, streamed to the thread."""
    seen = []

    def handler(request):
        seen.append(read(request))

    run(handler, exchange_for("POST", body=[b'{"a"', b":\n1}"]))

    assert seen == [expected]


def test_request_without_a_body_has_an_empty_one(run, exchange_for):
    """Not an error, and not a wait."""
    seen = []
    run(lambda request: seen.append((request.content, request.file.read())), exchange_for())

    assert seen == [(b"", b"")]


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe\xff", b"[" * 100_000])
@pytest.mark.parametrize("kind", ["async", "plain"])
def test_malformed_json_is_the_clients_fault(run, exchange_for, wire, body, kind):
    """400 with a reason, not a 500 and a traceback that anyone can fill the log with."""

    async def asynchronous(request):
        return await request.json()

    def plain(request):
        return request.load_json()

    run(asynchronous if kind == "async" else plain, exchange_for("POST", body=body))

    assert wire.status == 400
    assert wire.body.startswith(b"the body of the request is not JSON: ")


def test_malformed_json_can_be_answered_by_the_handler(run, exchange_for, wire):
    """It is a ValueError, as json's own."""

    async def handler(request):
        try:
            return await request.json()
        except ValueError as exc:
            return Response.json({"error": type(exc).__name__}, 422)

    run(handler, exchange_for("POST", body=b"{"))

    assert (wire.status, wire.body) == (422, b'{"error":"MalformedBody"}')


def test_client_that_leaves_in_the_middle_of_its_body_is_told_apart(run, exchange_for):
    """Half a body is no body."""

    async def handler(request):
        await request.body()

    exchange = exchange_for("POST", content_length=5)
    exchange.feed(b"ab")
    exchange.disconnect()
    with pytest.raises(ClientDisconnected):
        run(handler, exchange)


# ---- headers and query as mappings ----


def test_headers_replace_add_and_remove():
    """A mapping for the common case, `add` for the second Set-Cookie."""
    headers = Headers({"A": "1"})
    headers["a"] = "2"
    headers.add("Set-Cookie", "x=1")
    headers.add("set-cookie", "y=2")
    headers["B"] = "3"
    del headers["b"]

    assert headers.raw == [(b"a", b"2"), (b"set-cookie", b"x=1"), (b"set-cookie", b"y=2")]
    assert (list(headers), len(headers), "SET-COOKIE" in headers) == (["a", "set-cookie"], 2, True)


def test_headers_copy_keeps_repeats():
    """`dict(headers)` would lose a cookie."""
    headers = Headers([("a", "1"), ("a", "2")])

    assert Headers(headers).raw == headers.raw
    assert Headers(headers).raw is not headers.raw


@pytest.mark.parametrize("act", [lambda h: h["x"], lambda h: h["€"], lambda h: h.__delitem__("x")])
def test_headers_raise_key_error_for_what_is_not_there(act):
    """As every mapping does."""
    with pytest.raises(KeyError):
        act(Headers({"?": "a"}))


@given(st.lists(st.tuples(st.sampled_from("abAB"), st.sampled_from("12")), max_size=6))
def test_headers_are_a_mapping_of_first_values(items):
    """The laws of a mapping, whatever repeats."""
    headers = Headers(items)
    first = {}
    for name, value in items:
        first.setdefault(name.lower(), value)

    assert dict(headers) == first
    assert len(headers) == len(first)


@given(st.binary(max_size=30))
def test_query_takes_any_bytes(query_string):
    """Any client can send them; they must not be a 500."""
    query = Query(query_string)

    assert {name: query.get_all(name)[0] for name in query} == dict(query)


def test_values_show_themselves(exchange_for):
    """In a debugger and in a failed assertion."""
    assert repr(Request(exchange_for("GET", "/a"))) == "<Request GET /a>"
    assert repr(Response(status=404)) == "<Response 404>"
    assert repr(Headers({"A": "b"})) == "Headers([('a', 'b')])"
    assert repr(Query(b"a=b")) == "Query([('a', 'b')])"


def test_malformed_body_is_a_value_error():
    """What `json.loads` raises is one, so handlers catch what they always caught."""
    assert issubclass(MalformedBody, ValueError)


@pytest.mark.parametrize("headers", [(["a", "b"],), [("a", "b")], (("a", "b"),), {"a": "b"}])
def test_headers_of_any_shape_are_the_same(headers):
    assert list(Response(b"", headers=headers).fields) == [(b"a", b"b")]


@pytest.mark.parametrize("headers", [{"a b": "c"}, {"a": "b\r\nc: d"}, {"a": ["b"]}, {"a": 1}, {1: "a"}])
def test_header_that_cannot_be_one_is_an_error_of_the_constructor(headers):
    with pytest.raises(GatewayError):
        Response(b"", headers=headers)


def test_responses_share_no_headers():
    """Equal ones are looked at once; to change one must not change the other."""
    first, second = Response("a", headers={"x": "y"}), Response("a", headers={"x": "y"})
    first.headers["x"] = "z"
    first.headers.add("set-cookie", "secret")

    assert list(second.fields) == [(b"x", b"y"), (b"content-type", b"text/plain; charset=utf-8")]
    assert list(Response("a", headers={"x": "y"}).fields) == list(second.fields)


def test_body_that_is_read_after_the_handler_has_returned_says_so(run, exchange_for):
    """With threads and without."""

    def handler(request):
        return Response(request.file.read(1) for _ in range(1))

    with pytest.raises(GatewayError, match="the handler has returned"):
        run(handler, exchange_for("POST", body=b"abc"))
    with pytest.raises(GatewayError, match="the handler has returned"):
        go(HandlerGateway(handler, run_in_thread=None)(exchange_for("POST", body=b"abc")))
