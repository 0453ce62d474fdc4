"""A native application of streams, failures and events that a second request can see or set off."""

import asyncio
import hashlib
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator

from prefork import Request, Response

progress = {"sent": 0, "read": 0, "whole": 0}  # bytes, bytes, answers
events: dict[str, asyncio.Event] = defaultdict(asyncio.Event)


async def app(request: Request) -> object:
    match request.path:
        case "/echo":
            return Response(request.stream())
        case "/digest":
            digest = hashlib.sha256()
            async for piece in request.stream():
                digest.update(piece)
            return digest.hexdigest()
        case "/length":
            return str(len(await request.body()))
        case "/unread":
            return "not read"
        case "/flood":
            return Response(flood(int(request.query["size"])))
        case "/whole":
            progress["whole"] += 1
            return bytes(int(request.query["size"]))
        case "/progress":
            return progress
        case "/set":
            events[request.query["event"]].set()
            return "set"
        case "/wait":
            await events[request.query["event"]].wait()
            return "waited"
        case "/hold":  # tell that it has begun, wait for leave, then read
            events[request.query["event"] + "-begun"].set()
            await events[request.query["event"]].wait()
            return str(len(await request.body()))
        case "/leave":  # read until the client is gone
            try:
                async for piece in request.stream():
                    progress["read"] += len(piece)
            finally:
                events[request.query["event"]].set()
            return "complete"
        case "/watch":  # send until the client is gone
            return Response(watch(request.query["event"]))
        case "/empty":
            return None
        case "/not-modified":
            return Response(b"no body may follow", status=304)
        case "/fail":
            raise RuntimeError("this handler always fails")
        case "/fail-later":
            return Response(fail_later())
        case "/fail-short":
            return Response(fail_later(), headers={"content-length": "10"})
        case "/block":
            print("this worker stands still", flush=True)
            time.sleep(60)  # noqa: ASYNC251 - the loop shall stand still
            return "too late"
        case "/sysexit":
            sys.exit(7)
        case "/close":
            return Response(b"last", headers={"connection": "close"})
        case "/inject":
            return Response(b"", headers={"x": "a\r\nset-cookie: b"})
        case _:
            return "hello"


async def flood(size: int) -> AsyncIterator[bytes]:
    progress["sent"] = 0
    piece = bytes(65536)
    while progress["sent"] < size:
        yield piece
        progress["sent"] += len(piece)


async def watch(event: str) -> AsyncIterator[bytes]:
    try:
        while True:
            yield b"still here\n"
            await asyncio.sleep(0.01)
    finally:
        events[event].set()


async def fail_later() -> AsyncIterator[bytes]:
    yield b"12345"
    raise RuntimeError("this body ends early")
