"""An ASGI application that tells the headers it was given, and then empties their list; /last says much, and close."""

import json

LARGE = 10_000_000  # bytes: more than sockets hold


async def app(scope, receive, send):
    assert scope["type"] == "http", "no lifespan here"
    if scope["path"] == "/last":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"x" * LARGE})
        return
    headers = scope["headers"]
    said = json.dumps([[name.decode(), value.decode()] for name, value in headers]).encode()
    if isinstance(headers, list):
        headers.clear()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-path", scope["path"].encode())]})
    await send({"type": "http.response.body", "body": said})
