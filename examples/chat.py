"""A chat room over four workers: whatever one says, all hear, whichever worker they are connected to.

    pip install 'prefork[websocket]'
    prefork serve examples.chat:handler --workers 4

Open http://127.0.0.1:8000/ in as many windows as you like. Each client subscribes to the topic
"chat" in its worker, and what it says is published there for all of them. What one client says
arrives in the order in which it was said.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from prefork import Request, Response, WebSocket, WebSocketDisconnected, cluster

PAGE = """<!doctype html><title>chat</title><input autofocus placeholder="say something"><pre></pre><script>
const socket = new WebSocket(location.href.replace("http", "ws"))
const [input, output] = document.querySelectorAll("input, pre")
socket.onmessage = event => {
  const {worker, text} = JSON.parse(event.data)
  output.prepend(`(worker ${worker}) ${text}\\n`)
}
input.onchange = () => { socket.send(input.value); input.value = "" }
</script>"""


async def handler(incoming: Request | WebSocket):
    """The page, and the WebSocket that it opens."""
    if isinstance(incoming, WebSocket):
        return await converse(incoming)
    return Response(PAGE, content_type="text/html; charset=utf-8")


async def converse(socket: WebSocket):
    await socket.accept()
    with cluster.worker.subscribe("chat") as chat:
        telling = asyncio.create_task(tell(socket, chat))
        try:
            async for text in socket:
                if isinstance(text, str):
                    cluster.worker.broadcast("chat", {"worker": cluster.worker.id, "text": text})
        finally:
            telling.cancel()


async def tell(socket: WebSocket, chat):
    """A client that reads slowly makes `send` wait, and then misses the oldest messages: the others do not wait for it."""
    with suppress(WebSocketDisconnected):
        async for message in chat:
            await socket.send_json(message)
