"""A native application that tests start: who answered, slow answers, bodies both ways."""

import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncIterator

from prefork import Request, Response, cluster


async def app(request: Request) -> object:
    match request.path:
        case "/worker":
            return f"{request.worker.id} {os.getpid()}"
        case "/slow":
            await asyncio.sleep(float(request.query["seconds"]))
            return "slow"
        case "/announced":
            print("announced", flush=True)
            await asyncio.sleep(float(request.query["seconds"]))
            return "announced"
        case "/block":
            print("blocking the loop", flush=True)
            time.sleep(float(request.query["seconds"]))  # noqa: ASYNC251 - the loop shall stand still
            return "blocked"
        case "/stuck":
            print("stuck in C", flush=True)
            return re.match("(a+)+$", "a" * 64 + "b")  # would take centuries, with the interpreter's lock held
        case "/echo":
            return await request.body()
        case "/length":
            size = 0
            async for piece in request.stream():
                size += len(piece)
            return str(size)
        case "/big":
            return Response(zeros(int(request.query["size"])), content_type="application/octet-stream")
        case "/fail":
            raise RuntimeError("this handler always fails")
        case "/leave":
            cluster.worker.disconnect()
            return "leaving"
        case "/exit":
            os._exit(int(request.query["code"]))
        case "/sysexit":
            sys.exit(7)
        case _:
            return "hello"


async def zeros(size: int) -> AsyncIterator[bytes]:
    piece = bytes(65536)
    for start in range(0, size, len(piece)):
        yield piece[: size - start]
