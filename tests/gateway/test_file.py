"""`Response.file`: which bytes answer which request, and how they travel."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.errors import ClientDisconnected, ResponseError
from prefork.gateway.file import SMALL, Selection, guess_content_type, open_file, select
from prefork.gateway.handler import HandlerGateway
from prefork.gateway.message import Headers, Response
from tests.harness.loop import go, in_threads

MTIME = 1_000_000_000_500_000_000  # nanoseconds: half a second past the date below
MODIFIED = "Sun, 09 Sep 2001 01:46:40 GMT"
LATER = "Sun, 09 Sep 2001 01:46:41 GMT"
EARLIER = "Sun, 09 Sep 2001 01:46:39 GMT"
ETAG = f'"{MTIME:x}-a"'


def selection(method="GET", size=10, own=None, **request) -> Selection:
    headers = {name.replace("_", "-"): value for name, value in request.items()}
    return select(method, Headers(headers), Headers(own), size, MTIME)


# ---- which bytes ----


@pytest.mark.parametrize(
    ("value", "status", "start", "length"),
    [
        ("bytes=0-3", 206, 0, 4),
        ("bytes=5-", 206, 5, 5),
        ("bytes=-3", 206, 7, 3),
        ("bytes=9-9", 206, 9, 1),
        ("BYTES=2-100", 206, 2, 8),
        ("bytes= 1-2 ", 206, 1, 2),
        ("bytes=-100", 200, 0, 10),
        ("bytes=0-", 200, 0, 10),
        ("bytes=0-9", 200, 0, 10),
        ("bytes=10-", 416, 0, 0),
        ("bytes=10-20", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
        ("bytes=5-2", 200, 0, 10),
        ("bytes=0-1,4-5", 200, 0, 10),
        ("bytes=-", 200, 0, 10),
        ("bytes=a-b", 200, 0, 10),
        ("bytes=+1-2", 200, 0, 10),
        ("bytes=\u0661-\u0662", 200, 0, 10),
        ("lines=0-3", 200, 0, 10),
        ("bytes=" + "9" * 50 + "-", 200, 0, 10),
        ("", 200, 0, 10),
    ],
)
def test_range_selects_bytes(value, status, start, length):
    """RFC 9110, section 14: what cannot be read is ignored, what lies outside is 416, several are sent whole."""
    chosen = select("GET", {"range": value}, {}, 10, MTIME)

    assert (chosen.status, chosen.start, chosen.length) == (status, start, length)


def test_partial_response_says_which_part_it_is():
    """A client that resumes a download puts the parts together by this."""
    assert ("content-range", "bytes 2-4/10") in selection(range="bytes=2-4").headers


def test_unsatisfiable_range_is_told_the_size():
    """So the client can ask again, rightly."""
    assert ("content-range", "bytes */10") in selection(range="bytes=10-").headers


@pytest.mark.parametrize(("value", "status"), [("bytes=0-", 416), ("bytes=-5", 200), ("bytes=-0", 416)])
def test_empty_file_has_no_partial_answer(value, status):
    """206 cannot name a range of no bytes."""
    assert selection(size=0, range=value).status == status


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 60))
def test_range_is_what_a_slice_is(size, first, last):
    """The arithmetic is off by one in every second server."""
    content = bytes(range(size))
    chosen = selection(size=size, range=f"bytes={first}-{last}")
    sent = content[chosen.start : chosen.start + chosen.length]

    if last < first:
        assert sent == content
    elif first >= size:
        assert chosen.status == 416
    else:
        assert sent == content[first : last + 1]


@pytest.mark.parametrize("method", ["HEAD", "POST"])
def test_range_is_for_get_alone(method):
    """RFC 9110, section 14.2: "a server MUST ignore a Range header field received with" another method."""
    assert selection(method, range="bytes=0-3").status == 200


# ---- conditions ----


@pytest.mark.parametrize(
    ("request_headers", "status"),
    [
        ({"if_none_match": ETAG}, 304),
        ({"if_none_match": f"W/{ETAG}"}, 304),
        ({"if_none_match": f'"x", {ETAG}'}, 304),
        ({"if_none_match": "*"}, 304),
        ({"if_none_match": '"x"'}, 200),
        ({"if_none_match": '"x"', "if_modified_since": LATER}, 200),
        ({"if_modified_since": MODIFIED}, 304),
        ({"if_modified_since": LATER}, 304),
        ({"if_modified_since": EARLIER}, 200),
        ({"if_modified_since": "Sunday, 09-Sep-01 01:46:40 GMT"}, 304),
        ({"if_modified_since": "yesterday"}, 200),
        ({"if_modified_since": ""}, 200),
        ({"if_none_match": ETAG, "range": "bytes=0-3"}, 304),
        ({"range": "bytes=0-3", "if_range": ETAG}, 206),
        ({"range": "bytes=0-3", "if_range": f"W/{ETAG}"}, 200),
        ({"range": "bytes=0-3", "if_range": '"x"'}, 200),
        ({"range": "bytes=0-3", "if_range": MODIFIED}, 206),
        ({"range": "bytes=0-3", "if_range": EARLIER}, 200),
        ({"range": "bytes=10-", "if_range": '"x"'}, 200),
    ],
)
def test_conditions_decide_the_status(request_headers, status):
    """RFC 9110, section 13.2.2, in its order."""
    assert selection(**request_headers).status == status


def test_conditions_do_not_hold_for_other_methods():
    """A 304 to a POST would tell its client nothing."""
    assert selection("POST", if_none_match=ETAG).status == 200


def test_whole_file_carries_what_the_next_request_needs():
    """The validators and the size; the client sends them back."""
    assert selection().headers == [
        ("etag", ETAG),
        ("last-modified", MODIFIED),
        ("accept-ranges", "bytes"),
        ("content-length", "10"),
    ]


def test_application_may_name_its_own_validators():
    """A hash in the file's name is a better ETag than its time."""
    own = {"ETag": 'W/"v1"', "Last-Modified": EARLIER}

    assert selection(own=own, if_none_match='"v1"').status == 304
    assert selection(own=own, if_modified_since=EARLIER).status == 304
    assert selection(own=own, range="bytes=0-1", if_range='W/"v1"').status == 200


def test_file_that_changed_has_another_etag():
    """Two writes in one second differ in nanoseconds or in size."""
    etags = {select("GET", {}, {}, size, mtime).headers[0] for size in (1, 2) for mtime in (MTIME, MTIME + 1)}

    assert len(etags) == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.html", "text/html; charset=utf-8"),
        ("a.png", "image/png"),
        ("a.json", "application/json"),
        ("a.tar.gz", "application/gzip"),
        ("a.unheard-of", "application/octet-stream"),
        ("noname", "application/octet-stream"),
    ],
)
def test_content_type_follows_the_name(name, expected):
    """Browsers show or save by it; a declared encoding would make them unpack archives."""
    assert guess_content_type(name) == expected


# ---- on the wire ----


@pytest.fixture(params=["threads", "inline"])
def send(request, exchange_for):
    """Send a response for one request."""

    def sender(response, *arguments, **options):
        async def handler(_):
            return response

        exchange = exchange_for(*arguments, **options)
        with ThreadPoolExecutor(2) as pool:
            run_in_thread = in_threads(pool) if request.param == "threads" else None
            go(HandlerGateway(handler, run_in_thread=run_in_thread)(exchange))

    return sender


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789")
    os.utime(path, ns=(MTIME, MTIME))
    return path


def test_small_file_is_one_write(send, wire, small):
    """A favicon should cost what a short text costs."""
    send(Response.file(small, {"cache-control": "max-age=60"}))

    assert wire.calls == [
        (
            "head",
            200,
            [
                (b"cache-control", b"max-age=60"),
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"etag", ETAG.encode()),
                (b"last-modified", MODIFIED.encode()),
                (b"accept-ranges", b"bytes"),
                (b"content-length", b"10"),
            ],
            b"0123456789",
            False,
        )
    ]


def test_range_travels(send, wire, small):
    """From the request's header to the bytes."""
    send(Response.file(str(small)), headers=[(b"range", b"bytes=2-4")])

    assert (wire.status, wire.body, wire.header(b"content-length")) == (206, b"234", [b"3"])


def test_unchanged_file_is_not_sent(send, wire, small):
    """304 carries the validators, and no type of a body that is not there."""
    send(Response.file(small), headers=[(b"if-none-match", ETAG.encode())])

    assert (wire.status, wire.body, wire.complete) == (304, b"", True)
    assert (wire.header(b"etag"), wire.header(b"content-type")) == ([ETAG.encode()], [])


def test_head_is_told_the_size_without_the_bytes(send, wire, small):
    """Clients ask so before they download."""
    send(Response.file(small), "HEAD")

    assert (wire.header(b"content-length"), wire.body, wire.complete) == ([b"10"], b"", True)


@pytest.mark.parametrize("name", ["missing", ".", "a.txt/b", "null\0", "fifo"])
def test_what_is_no_file_is_not_found(send, wire, small, name):
    """Paths come from clients: no name may hang the worker or be a 500."""
    os.mkfifo(small.parent / "fifo")
    send(Response.file(f"{small.parent}/{name}"))

    assert (wire.status, wire.body) == (404, b"Not Found")


def test_same_response_may_be_returned_again(send, wire, small):
    """A module may keep its logo; the second time must not answer with the first one's ETag."""
    response = Response.file(small)
    send(response)
    small.write_bytes(b"new")
    send(response)

    assert wire.body == b"0123456789new"
    assert wire.header(b"content-length") == [b"3"]


def test_error_page_from_a_file_ignores_conditions(send, wire, small):
    """RFC 9110, section 13.2.1: conditions hold where the answer would be a success."""
    response = Response.file(small)
    response.status = 404
    send(response, headers=[(b"if-none-match", b"*"), (b"range", b"bytes=0-1")])

    assert (wire.status, wire.body) == (404, b"0123456789")


@pytest.mark.parametrize(("size", "calls"), [(SMALL, ["head"]), (SMALL + 1, ["head", "file", "drain", "body"])])
def test_small_file_leaves_with_its_head_and_a_large_one_by_sendfile(send, wire, tmp_path, size, calls):
    """One write for the many icons, no memory for the film."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    send(Response.file(path))

    assert [call[0] for call in wire.calls] == calls
    assert wire.body == path.read_bytes()
    assert wire.complete


def test_large_range_is_named_to_sendfile(send, wire, tmp_path):
    """From its first byte, and no more than it has."""
    content = os.urandom(3 * SMALL + 7)
    path = tmp_path / "large"
    path.write_bytes(content)
    send(Response.file(path), headers=[(b"range", b"bytes=5-150000")])

    assert wire.body == content[5:150001]
    assert ("file", 5, 149996) in wire.calls


def test_large_file_is_never_in_memory(send, wire, tmp_path):
    """A download costs nothing, whatever its size."""
    path, size = tmp_path / "large", 200 * 1024 * 1024
    with path.open("wb") as file:
        file.truncate(size)
    sizes = []

    async def send_file(file, offset, count):
        sizes.append(count)

    wire.send_file = send_file
    tracemalloc.start()
    try:
        send(Response.file(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert sizes == [size]
    assert peak < 1024 * 1024


def test_file_that_shrinks_is_not_padded(exchange_for, wire, tmp_path):
    """Fewer bytes than announced: the wire says so, and the connection is cut."""
    path = tmp_path / "log"
    path.write_bytes(b"x" * (2 * SMALL))
    original = wire.send_head

    def truncating(status, headers, body, more):
        original(status, headers, body, more)
        os.truncate(path, SMALL)

    async def handler(_):
        return Response.file(path)

    wire.send_head = truncating
    with pytest.raises(ResponseError):
        go(HandlerGateway(handler, run_in_thread=None)(exchange_for()))

    assert wire.header(b"content-length") == [b"%d" % (2 * SMALL)]
    assert not wire.complete


def test_client_that_leaves_closes_the_file(exchange_for, wire, tmp_path, monkeypatch):
    """A descriptor for each aborted download would end the worker by the thousandth."""
    path = tmp_path / "large"
    path.write_bytes(b"x" * (4 * SMALL))
    opened = []
    monkeypatch.setattr("prefork.gateway.handler.open_file", lambda p: opened.append(open_file(p)) or opened[-1])

    async def handler(_):
        return Response.file(path)

    async def scenario():
        wire.writable = False
        task = asyncio.create_task(HandlerGateway(handler, run_in_thread=None)(exchange_for()))
        await wire.is_draining.wait()
        wire.leave()
        with pytest.raises(ClientDisconnected):
            await task

    go(scenario())

    assert [each.file.closed for each in opened] == [True]
