"""What is served: the same few bytes in three languages, and the pid of whoever serves.

Nothing here imports prefork, so that every server can load it.
"""

from __future__ import annotations

import os

HELLO = b"Hello, world!\n"
TYPE = "text/plain; charset=utf-8"


async def handler(request):
    """Native."""
    return HELLO.decode()


def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", TYPE), ("Content-Length", str(len(HELLO)))])
    return [HELLO]


async def asgi(scope, receive, send):
    await _answer(scope, send, HELLO)


async def pid(scope, receive, send):
    """ASGI; a connection's answers tell who holds it."""
    await _answer(scope, send, str(os.getpid()).encode())


async def _answer(scope, send, body):
    if scope["type"] != "http":  # what servers try in order to find out whether there is a lifespan
        raise NotImplementedError(scope["type"])
    headers = [(b"content-type", TYPE.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
