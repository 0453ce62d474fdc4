"""ASGI applications with a lifespan: one that refuses to start, one that tells its events, and worse ones."""

import sys
import time

from prefork import cluster


async def refuses(scope, receive, send):
    assert scope["type"] == "lifespan"
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "the cache is cold"})


async def tells(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            print(message["type"], flush=True)
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


async def exits(scope, receive, send):
    """A start-up that calls sys.exit, as command-line habits have it."""
    if scope["type"] == "lifespan":
        await receive()
        sys.exit("the configuration of this application is missing")


async def never_stops(scope, receive, send):
    """Its shutdown blocks the loop for good."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        time.sleep(3600)  # noqa: ASYNC251 - the loop shall stand still
    cluster.worker.disconnect()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"leaving"})
