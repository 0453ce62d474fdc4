"""The file that FILE names, sent in each of the ways that the interfaces have."""

from __future__ import annotations

import gzip
import io
import os

from prefork import Response

PATH = os.environ.get("FILE", __file__)


def size() -> bytes:
    return b"%d" % os.path.getsize(PATH)


async def native(request):
    return Response.file(PATH)


async def asgi(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    with open(PATH, "rb") as file:  # noqa: ASYNC230
        await ASGI[scope["path"]](send, file)


async def start(send, *headers):
    await send({"type": "http.response.start", "status": 200, "headers": list(headers)})


async def pathsend(send, file):
    await start(send, (b"content-length", size()))
    await send({"type": "http.response.pathsend", "path": PATH})


async def missing(send, file):
    await start(send)
    await send({"type": "http.response.pathsend", "path": PATH + ".missing"})


async def zerocopy(send, file):
    await start(send, (b"content-length", size()))
    await send({"type": "http.response.zerocopysend", "file": file})


async def chunked(send, file):
    """Two ranges between two pieces, of a length that nobody announced; the second from where the file is."""
    await start(send)
    await send({"type": "http.response.body", "body": b"<", "more_body": True})
    zerocopysend = {"type": "http.response.zerocopysend", "more_body": True}
    await send({**zerocopysend, "file": file.fileno(), "offset": 5, "count": 500_000})
    file.read(7)
    await send({**zerocopysend, "file": file, "count": 300_000})
    assert file.tell() == 300_007
    await send({"type": "http.response.body", "body": b">"})


async def short(send, file):
    """More is announced than the file has."""
    await start(send, (b"content-length", b"%d" % (int(size()) + 1)))
    await send({"type": "http.response.zerocopysend", "file": file, "count": int(size()) + 1})


async def pipe(send, file):
    """No regular file, so no sendfile: read to its end."""
    reader, writer = os.pipe()
    os.write(writer, b"from a pipe")
    os.close(writer)
    try:
        await start(send)
        await send({"type": "http.response.zerocopysend", "file": reader})
    finally:
        os.close(reader)


ASGI = {f"/{function.__name__}": function for function in (pathsend, missing, zerocopy, chunked, short, pipe)}


class Closing(io.FileIO):
    """A file that says when it is closed."""

    def close(self):
        if not self.closed:
            print("closed", flush=True)
        super().close()


def wsgi(environ, start_response):
    headers = []
    path = environ["PATH_INFO"]
    file = Closing(PATH)
    if path == "/counted":
        headers.append(("Content-Length", "400000"))
        file.seek(9)
    elif path == "/whole":
        headers.append(("Content-Length", size().decode()))
    elif path == "/rest":
        file.seek(11)
    start_response("200 OK", headers)
    return environ["wsgi.file_wrapper"](gzip.open(PATH + ".gz") if path == "/gzip" else file)
