"""An ASGI application, bare: what it sees of its client, and answers in every shape."""

import asyncio
import json
from collections import defaultdict

seen: dict[str, asyncio.Event] = defaultdict(asyncio.Event)


async def app(scope, receive, send):
    assert scope["type"] == "http", "no lifespan here"
    path = scope["path"]
    if path == "/scope":
        facts = {key: scope[key] for key in ("scheme", "client", "server", "http_version", "method", "path")}
        return await answer(send, json.dumps(facts).encode())
    if path == "/tls":
        facts = scope["extensions"].get("tls")
        await answer(send, json.dumps(facts).encode())
        return facts and facts.clear()  # as middleware may
    if path == "/listen":  # tell of the client's leaving, answer nothing
        while (await receive())["type"] != "http.disconnect":
            pass
        seen["disconnect"].set()
        return None
    if path == "/seen":
        await seen["disconnect"].wait()
        return await answer(send, b"seen")
    if path == "/answer-after-disconnect":
        while (await receive())["type"] != "http.disconnect":
            pass
        return await answer(send, b"answered all the same")
    if path == "/echo":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        more = True
        while more:
            message = await receive()
            more = message["more_body"]
            await send({"type": "http.response.body", "body": message["body"], "more_body": more})
        return None
    if path == "/silent":
        return None
    if path == "/half":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        return None
    return await answer(send, b"hello")


async def answer(send, body):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})
