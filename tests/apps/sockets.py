"""WebSockets in every shape: a native handler that takes requests too, an ASGI application, and Starlette's."""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict

from prefork import Request, Response, WebSocket, WebSocketDisconnected

# How the WebSockets ended, by path and query.
ended: dict[str, asyncio.Queue[str]] = defaultdict(asyncio.Queue)
received = 0


async def handler(incoming: Request | WebSocket):
    if isinstance(incoming, Request):
        return await answer(incoming)
    try:
        await PATHS[incoming.path](incoming)
    finally:
        query = incoming.query_string.decode()
        ended[incoming.path + (query and f"?{query}")].put_nowait(f"{incoming.close_code} {incoming.close_reason}")
    return None


async def answer(request: Request):
    if request.path == "/ended":
        return await ended[request.query_string.decode().partition("=")[2]].get()
    if request.path == "/go":
        go.set()
    if request.path == "/received":
        return str(received)
    return "hello"


async def echo(socket: WebSocket):
    await socket.accept()
    async for message in socket:
        await socket.send(message)


async def facts(socket: WebSocket):
    await socket.accept(subprotocol="b", headers={"x-own": "yes"})
    await socket.send_json(
        {
            "path": socket.path,
            "query": dict(socket.query),
            "agent": socket.headers["x-agent"],
            "client": socket.client,
            "scheme": socket.scheme,
            "subprotocols": socket.subprotocols,
            "subprotocol": socket.subprotocol,
            "worker": socket.worker.id,
        }
    )
    await socket.receive()


async def closes(socket: WebSocket):
    await socket.accept()
    await socket.close(4000, "enough")


async def fails(socket: WebSocket):
    await socket.accept()
    raise RuntimeError("on purpose")


async def denies(socket: WebSocket):
    await socket.deny(Response("who are you?", status=401, headers={"www-authenticate": "Basic"}))


async def ignores(socket: WebSocket):
    pass


async def closes_at_once(socket: WebSocket):
    await socket.close()


async def waits_unaccepted(socket: WebSocket):
    try:
        await socket._exchange.receive()
    except WebSocketDisconnected:
        pass


async def wants_text(socket: WebSocket):
    await socket.accept()
    while True:
        await socket.send(await socket.receive_text())


async def wants_json(socket: WebSocket):
    await socket.accept()
    while True:
        await socket.send_json(await socket.receive_json())


async def slow(socket: WebSocket):
    """Takes a message when it is told to, by GET /go."""
    global received
    await socket.accept()
    await socket.send("ready")
    await go.wait()
    async for _ in socket:
        received += 1
    return


async def floods(socket: WebSocket):
    """Sends until it has to wait, and tells how much that was."""
    await socket.accept()
    sent = 0
    try:
        while True:
            await asyncio.wait_for(socket.send(bytes(100_000)), 2)
            sent += 1
    except TimeoutError:
        ended["flood"].put_nowait(f"{sent} sent")
        await socket.send("never")


async def streams(socket: WebSocket):
    """Sends without an end and without a receive."""
    await socket.accept()
    size = int(socket.query["size"])
    while True:
        await socket.send(b"x" * size)  # a new one each time: what holds it holds memory


async def sends_late(socket: WebSocket):
    """Sends once more when the client has closed its side, while the transport still holds what the client does not take."""
    await socket.accept()
    transport = socket._exchange._wire._transport
    while transport.get_write_buffer_size() < 100_000:
        await socket.send(bytes(50_000))
        await asyncio.sleep(0)
    ended["full"].put_nowait("now")
    while not transport.is_closing():  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0)
    try:
        await socket.send("late")
    except OSError as error:
        ended["late"].put_nowait(str(error))
    else:
        ended["late"].put_nowait("sent")


go = asyncio.Event()

PATHS = {
    "/echo": echo,
    "/facts": facts,
    "/closes": closes,
    "/fails": fails,
    "/denies": denies,
    "/ignores": ignores,
    "/closes-at-once": closes_at_once,
    "/waits-unaccepted": waits_unaccepted,
    "/text": wants_text,
    "/json": wants_json,
    "/slow": slow,
    "/floods": floods,
    "/streams": streams,
    "/late": sends_late,
}


async def only(socket: WebSocket):
    await echo(socket)


class Both:
    """A method for each."""

    async def __call__(self, request):
        return "over HTTP"

    async def websocket(self, socket):
        await echo(socket)


both = Both()


async def asgi(scope, receive, send):
    """Echo; /deny answers with a response in two pieces, /reject closes before it accepts, /order breaks the order.

    /tls begins with what the scope says of TLS, /scheme with its scheme; /streams sends without an end.
    """
    if scope["type"] == "http":
        path = scope["query_string"].decode().partition("=")[2]
        text = await ended[path].get() if scope["path"] == "/ended" else "hello"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})
    if scope["type"] != "websocket":
        return
    assert (await receive()) == {"type": "websocket.connect"}
    if scope["path"] == "/deny":
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "websocket.http.response.start", "status": 418, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": b"tea", "more_body": True})
        await send({"type": "websocket.http.response.body", "body": b"pot"})
        return
    if scope["path"] == "/reject":
        await send({"type": "websocket.close"})
        return
    if scope["path"] == "/order":
        await send({"type": "websocket.send", "text": "too early"})
    await send({"type": "websocket.accept", "subprotocol": None, "headers": [(b"X-Own", b"yes")]})
    if scope["path"] == "/tls":
        await send({"type": "websocket.send", "text": json.dumps(scope["extensions"].get("tls"))})
    if scope["path"] == "/scheme":
        await send({"type": "websocket.send", "text": scope["scheme"]})
    if scope["path"] == "/streams":
        payload = os.urandom(65536)
        try:
            while True:
                await send({"type": "websocket.send", "bytes": payload})
        except OSError as error:
            ended["/streams"].put_nowait(str(error))
            raise
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", **{key: message[key] for key in ("text", "bytes") if key in message}})
    assert message["type"] == "websocket.disconnect"


def starlette():
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocketDisconnect

    async def endpoint(websocket):
        await websocket.accept(subprotocol=next(iter(websocket.scope["subprotocols"]), None))
        try:
            while True:
                await websocket.send_text((await websocket.receive_text()).upper())
        except WebSocketDisconnect as left:
            ended["/ws"].put_nowait(f"{left.code} {left.reason}")

    async def denied(websocket):
        await websocket.send_denial_response(PlainTextResponse("no", status_code=409))

    async def last(request):
        return PlainTextResponse(await ended["/ws"].get())

    return Starlette(routes=[WebSocketRoute("/ws", endpoint), WebSocketRoute("/denied", denied), Route("/ended", last)])
