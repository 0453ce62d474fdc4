"""Applications of which several clients, or several requests of one, must not feel each other."""

import os
from contextvars import ContextVar

user: ContextVar[str] = ContextVar("user", default="nobody")


async def asgi(scope, receive, send):
    assert scope["type"] == "http", "no lifespan here"
    before = user.get()
    user.set(scope["path"])
    match scope["path"]:
        case "/upload":
            while (await receive())["more_body"]:
                pass
        case "/big":
            before = "x" * 20_000_000
        case "/endless":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": b"12345678", "more_body": True})
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": before.encode()})


def wsgi(environ, start_response):
    before = user.get()
    user.set(environ["PATH_INFO"])
    start_response("200 OK", [("X-Host", environ.get("HTTP_HOST", "none")), ("X-Thread", str(os.getpid()))])
    return [before.encode()]
