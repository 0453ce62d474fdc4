"""A chat room: whatever one says, all hear, in as many windows of a browser as you open.

    pip install 'prefork[websocket]'
    prefork serve examples.websocket:handler --workers 1

Each worker would have a room of its own; examples/chat.py has one for all workers.
"""

from __future__ import annotations

from prefork import Request, Response, WebSocket, WebSocketDisconnected

PAGE = """<!doctype html><input autofocus placeholder="say something"><pre></pre><script>
const socket = new WebSocket(location.href.replace("http", "ws"))
const [input, output] = document.querySelectorAll("input, pre")
socket.onmessage = event => output.prepend(event.data + "\\n")
input.onchange = () => { socket.send(input.value); input.value = "" }
</script>"""

room: set[WebSocket] = set()


async def handler(incoming: Request | WebSocket):
    """One path, spoken to in two ways."""
    if isinstance(incoming, WebSocket):
        return await converse(incoming)
    return Response(PAGE, content_type="text/html; charset=utf-8")


async def converse(socket: WebSocket):
    await socket.accept()
    room.add(socket)
    try:
        async for message in socket:
            for listener in list(room):
                await say(listener, message)
    finally:
        room.discard(socket)


async def say(socket: WebSocket, message: str | bytes):
    try:
        await socket.send(message)
    except WebSocketDisconnected:
        room.discard(socket)
