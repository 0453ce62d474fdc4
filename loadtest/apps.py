"""What is served: the same work in the languages of the servers, and the pid of whoever serves.

`asgi_echo`, `wsgi_echo` and `rsgi_echo` do what `native.echo` does, and so on; each does
what its interface needs for it and nothing more. Nothing here imports prefork, so that
every server can load it: the native handlers have a module of their own.
"""

from __future__ import annotations

import os
import time

HELLO = b"Hello, world!\n"
TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
BINARY = "application/octet-stream"

# The large response, and the pieces of the download: what applications read from a file at a time.
LARGE = b"0123456789abcdef" * 4096  # 64 KiB
PIECES = 1600
DOWNLOAD = PIECES * len(LARGE)  # 100 MiB

# What a stream of log lines or of a language model's words is made of.
CHUNK = b"data: a few words at a time\n\n"
CHUNKS = 1000

# The file to send, which the race has written.
FILE = os.environ.get("RACE_FILE", "")


# ---- ASGI ----


async def asgi_hello(scope, receive, send):
    await _answer(scope, send, HELLO, TEXT)


async def asgi_echo(scope, receive, send):
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await _answer(scope, send, body, JSON)


async def asgi_large(scope, receive, send):
    await _answer(scope, send, LARGE, BINARY)


async def asgi_upload(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    size = 0
    more = True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await _answer(scope, send, str(size).encode(), TEXT)


async def asgi_download(scope, receive, send):
    await _start(scope, send, _headers(BINARY, DOWNLOAD))
    for _ in range(PIECES):
        await send({"type": "http.response.body", "body": LARGE, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def asgi_file(scope, receive, send):
    """As frameworks do it: the server sends the file if it can, else the application reads it."""
    await _start(scope, send, _headers(BINARY, os.path.getsize(FILE)))  # noqa: ASYNC240
    if "http.response.pathsend" in scope.get("extensions", ()):
        await send({"type": "http.response.pathsend", "path": FILE})
        return
    with open(FILE, "rb") as file:  # noqa: ASYNC230 - a thread for each piece would only slow it down
        while piece := file.read(len(LARGE)):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def asgi_chunks(scope, receive, send):
    await _start(scope, send, [(b"content-type", TEXT.encode())])
    for _ in range(CHUNKS):
        await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def asgi_websocket(scope, receive, send):
    if scope["type"] == "http":  # how the race asks whether the server is there
        await _answer(scope, send, HELLO, TEXT)
        return
    if scope["type"] != "websocket":
        raise NotImplementedError(scope["type"])
    await receive()
    await send({"type": "websocket.accept"})
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return
        if (data := message.get("bytes")) is not None:
            await send({"type": "websocket.send", "bytes": data})
        else:  # the race sends none, autobahn.py does
            await send({"type": "websocket.send", "text": message["text"]})


async def pid(scope, receive, send):
    """ASGI; a connection's answers tell who holds it."""
    await _answer(scope, send, str(os.getpid()).encode(), TEXT)


async def work(scope, receive, send):
    """ASGI; blocks for as many milliseconds as the query says, and tells who it was."""
    if scope["type"] == "http" and (milliseconds := int(scope["query_string"] or 0)):
        time.sleep(milliseconds / 1000)  # noqa: ASYNC251 - what is measured is who waits for it
    await pid(scope, receive, send)


async def _answer(scope, send, body, content_type):
    await _start(scope, send, _headers(content_type, len(body)))
    await send({"type": "http.response.body", "body": body})


async def _start(scope, send, headers):
    if scope["type"] != "http":  # what servers try in order to find out whether there is a lifespan
        raise NotImplementedError(scope["type"])
    await send({"type": "http.response.start", "status": 200, "headers": headers})


def _headers(content_type, length):
    return [(b"content-type", content_type.encode()), (b"content-length", str(length).encode())]


# ---- WSGI ----


def wsgi_hello(environ, start_response):
    return _respond(start_response, HELLO, TEXT)


def wsgi_echo(environ, start_response):
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    return _respond(start_response, body, JSON)


def wsgi_large(environ, start_response):
    return _respond(start_response, LARGE, BINARY)


def wsgi_upload(environ, start_response):
    left = size = int(environ.get("CONTENT_LENGTH") or 0)
    while left and (piece := environ["wsgi.input"].read(min(left, len(LARGE)))):
        left -= len(piece)
    return _respond(start_response, str(size - left).encode(), TEXT)


def wsgi_download(environ, start_response):
    start_response("200 OK", [("Content-Type", BINARY), ("Content-Length", str(DOWNLOAD))])
    return (LARGE for _ in range(PIECES))


def wsgi_file(environ, start_response):
    start_response("200 OK", [("Content-Type", BINARY), ("Content-Length", str(os.path.getsize(FILE)))])
    file = open(FILE, "rb")  # noqa: SIM115 - the server closes what it is given
    if wrapper := environ.get("wsgi.file_wrapper"):
        return wrapper(file, len(LARGE))
    return iter(lambda: file.read(len(LARGE)), b"")


def wsgi_chunks(environ, start_response):
    start_response("200 OK", [("Content-Type", TEXT)])
    return (CHUNK for _ in range(CHUNKS))


def _respond(start_response, body, content_type):
    start_response("200 OK", [("Content-Type", content_type), ("Content-Length", str(len(body)))])
    return [body]


# ---- RSGI (Granian's own) ----


async def rsgi_hello(scope, proto):
    proto.response_bytes(200, [("content-type", TEXT)], HELLO)


async def rsgi_echo(scope, proto):
    proto.response_bytes(200, [("content-type", JSON)], await proto())


async def rsgi_large(scope, proto):
    proto.response_bytes(200, [("content-type", BINARY)], LARGE)


async def rsgi_upload(scope, proto):
    size = 0
    async for piece in proto:
        size += len(piece)
    proto.response_bytes(200, [("content-type", TEXT)], str(size).encode())


async def rsgi_download(scope, proto):
    transport = proto.response_stream(200, [("content-type", BINARY), ("content-length", str(DOWNLOAD))])
    for _ in range(PIECES):
        await transport.send_bytes(LARGE)


async def rsgi_file(scope, proto):
    length = str(os.path.getsize(FILE))  # noqa: ASYNC240
    proto.response_file(200, [("content-type", BINARY), ("content-length", length)], FILE)


async def rsgi_chunks(scope, proto):
    transport = proto.response_stream(200, [("content-type", TEXT)])
    for _ in range(CHUNKS):
        await transport.send_bytes(CHUNK)


async def rsgi_websocket(scope, proto):
    if scope.proto != "ws":
        proto.response_bytes(200, [("content-type", TEXT)], HELLO)
        return
    transport = await proto.accept()
    while True:
        message = await transport.receive()
        if message.kind == 0:  # closed
            return
        await transport.send_bytes(message.data)
