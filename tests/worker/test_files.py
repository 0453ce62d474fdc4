"""Files as responses, from each interface to real clients: `Response.file`, pathsend, zerocopysend, file_wrapper."""

from __future__ import annotations

import gzip
import os
import socket
import struct
import time
from pathlib import Path

import pytest

from tests.harness.client import Client, get
from tests.harness.server import DEADLINE, Server, resident_memory

SIZE = 3_000_001


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "file.bin"
    path.write_bytes(b"".join(struct.pack("<I", number) for number in range(SIZE // 4)) + b"!")
    return path


@pytest.fixture(scope="module")
def content(path):
    return path.read_bytes()


def serving(app: str, path: Path, **settings: object) -> Server:
    return Server(f"tests.apps.files:{app}", environ={"FILE": str(path)}, workers=1, **settings)


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def native(request, path):
    with serving("native", path, loop=request.param) as server:
        server.wait_ready(1)
        yield server


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def asgi(request, path):
    with serving("asgi", path, loop=request.param) as server:
        server.wait_ready(1)
        yield server


@pytest.fixture(scope="module", params=[0, 2], ids=["in the loop", "in threads"])
def wsgi(request, path):
    with serving("wsgi", path, interface="wsgi", threads=request.param) as server:
        server.wait_ready(1)
        yield server


def test_native_file_and_what_follows_it_on_the_connection(native, content):
    """A range, the head alone, the whole, twice: the connection stays in step."""
    with Client(native.port) as client:
        assert client.get("/").body == content
        assert client.get("/", "Range: bytes=1000000-").body == content[1_000_000:]
        head = client.request("HEAD", "/")
        assert head.headers["content-length"] == str(SIZE)
        unchanged = client.get("/", f"If-None-Match: {head.headers['etag']}")
        assert (unchanged.status, unchanged.body) == (304, b"")
        assert client.get("/").body == content


def test_pipelined_requests_are_answered_in_order(native, content):
    """The second request comes while the first file is under way."""
    with Client(native.port) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n" * 3)
        assert [client.read().body == content for _ in range(3)] == [True] * 3


@pytest.mark.parametrize("way", ["pathsend", "zerocopy"])
def test_asgi_extension_sends_a_whole_file(asgi, content, way):
    """With its Content-Length; nothing of a body in answer to HEAD."""
    with Client(asgi.port) as client:
        assert client.get(f"/{way}").body == content
        assert client.request("HEAD", f"/{way}").headers["content-length"] == str(SIZE)
        assert client.get(f"/{way}").body == content


def test_ranges_of_files_stand_between_pieces_of_a_chunked_body(asgi, content):
    """zerocopysend may be mixed with ordinary bodies, and begins where the file stands."""
    with Client(asgi.port) as client:
        expected = b"<" + content[5:500_005] + content[7:300_007] + b">"
        assert client.get("/chunked").body == expected
        assert client.get("/chunked").body == expected


def test_descriptor_that_is_no_file_is_read_to_its_end(asgi):
    """zerocopysend of a pipe."""
    assert get(asgi.port, "/pipe").body == b"from a pipe"


def test_path_of_no_file_is_the_applications_error(asgi):
    """Nothing has left yet, so there is room for a 500."""
    assert get(asgi.port, "/missing").status == 500


def test_short_file_cuts_the_connection(asgi):
    """It must not pass for a whole one."""
    with Client(asgi.port) as client, pytest.raises((EOFError, ConnectionResetError)):
        client.get("/short")


@pytest.mark.parametrize(("way", "start", "stop"), [("/whole", 0, SIZE), ("/rest", 11, SIZE), ("/counted", 9, 400_009)])
def test_file_wrapper_sends_from_where_the_file_stands(wsgi, content, way, start, stop):
    """To its end, or as many bytes as Content-Length says; then the application's close is called."""
    closed = wsgi.log.count("closed")
    with Client(wsgi.port) as client:
        assert client.get(way).body == content[start:stop]
        assert client.get(way).body == content[start:stop]
    wsgi.wait_for("^closed$", closed + 2)


def test_file_wrapper_of_a_decompressing_reader_is_read(wsgi, path, content):
    """It has a descriptor too: that of the compressed file."""
    with gzip.open(f"{path}.gz", "wb", compresslevel=1) as file:
        file.write(content)
    assert get(wsgi.port, "/gzip").body == content


def test_client_that_leaves_in_the_middle_of_a_wrapped_file_has_it_closed(wsgi):
    """And no sooner than nobody reads it."""
    closed = wsgi.log.count("closed")
    with Client(wsgi.port) as client:
        client.send(b"GET /whole HTTP/1.1\r\nHost: test\r\n\r\n")
        client.read_exactly(100_000)
    wsgi.wait_for("^closed$", closed + 1)


def test_large_download_takes_no_memory(tmp_path):
    """Four clients, a third of a gigabyte each."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(300_000_000)
    with serving("native", path) as server:
        server.wait_ready(1)
        get(server.port, "/", "Range: bytes=0-100")
        before = resident_memory(server.worker(1))
        clients = [Client(server.port) for _ in range(4)]
        for client in clients:
            client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        for client in clients:
            client.read_until(b"\r\n\r\n")
        left = 300_000_000
        while left:
            size = min(left, 10_000_000)
            for client in clients:
                client.read_exactly(size)
            left -= size
        assert resident_memory(server.worker(1)) - before < 16_000_000
        for client in clients:
            client.close()


def test_client_that_takes_nothing_is_cut_off_and_a_slow_one_is_not(tmp_path):
    """The write deadline sees what the client has taken, not what the kernel holds for it."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(5_000_000_000)
    with serving("native", path, write_timeout=2) as server:
        server.wait_ready(1)
        with Client(server.port) as slow, Client(server.port) as stalled:
            for client in (slow, stalled):
                client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            port = stalled.socket.getsockname()[1]
            # A little at a time until the other one is gone, which takes two deadlines at the most.
            end = time.monotonic() + DEADLINE
            while f"port {port}: nothing was taken in time" not in server.log:
                assert time.monotonic() < end, "the stalled client is not cut off"
                slow.read_exactly(1000)
            assert server.log.count("nothing was taken in time") == 1


def test_vanishing_clients_leave_nothing_behind(native):
    """Descriptors of sockets and files, and the server's temper."""
    pid = native.worker(1)
    get(native.port, "/")
    before = len(os.listdir(f"/proc/{pid}/fd"))
    for _ in range(20):
        with Client(native.port) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            client.read_until(b"\r\n\r\n")
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end = time.monotonic() + DEADLINE
    while len(os.listdir(f"/proc/{pid}/fd")) > before and time.monotonic() < end:
        get(native.port, "/")
    assert len(os.listdir(f"/proc/{pid}/fd")) <= before
    assert "Traceback" not in native.log
