"""What is served, as prefork's own handlers: see `apps` for the other interfaces."""

from __future__ import annotations

from loadtest.apps import BINARY, CHUNK, CHUNKS, DOWNLOAD, FILE, HELLO, JSON, LARGE, PIECES, TEXT
from prefork import Request, Response, WebSocket


async def hello(request: Request) -> str:
    return HELLO.decode()


async def echo(request: Request) -> Response:
    return Response(await request.body(), content_type=JSON)


async def large(request: Request) -> bytes:
    return LARGE


async def upload(request: Request) -> str:
    size = 0
    async for piece in request.stream():
        size += len(piece)
    return str(size)


async def download(request: Request) -> Response:
    async def pieces():
        for _ in range(PIECES):
            yield LARGE

    return Response(pieces(), headers={"content-length": str(DOWNLOAD)}, content_type=BINARY)


async def file(request: Request) -> Response:
    return Response.file(FILE, content_type=BINARY)


async def chunks(request: Request) -> Response:
    async def pieces():
        for _ in range(CHUNKS):
            yield CHUNK

    return Response(pieces(), content_type=TEXT)


async def websocket(socket: WebSocket) -> None:
    await socket.accept()
    async for message in socket:
        await socket.send(message)
