"""What is served to WebSockets: every message comes back, in two languages.

Nothing here imports prefork at run time, so that every server can load it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefork import WebSocket


async def native(socket: WebSocket):
    await socket.accept()
    async for message in socket:
        await socket.send(message)


async def asgi(scope, receive, send):
    if scope["type"] != "websocket":
        raise NotImplementedError(scope["type"])
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": message.get("bytes"), "text": message.get("text")})
