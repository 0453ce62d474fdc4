"""An ASGI application by hand, with a lifespan. FastAPI, Starlette, Django and the like are served the same way.

prefork serve examples.asgi:app
"""

import time


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(scope["state"], receive, send)
        return
    age = time.monotonic() - scope["state"]["started"]
    body = f"this worker has served for {age:.1f} s\n".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})


async def lifespan(state, receive, send):
    """Runs once per worker: open what requests share, and close it after the last of them."""
    await receive()  # lifespan.startup
    state["started"] = time.monotonic()
    await send({"type": "lifespan.startup.complete"})
    await receive()  # lifespan.shutdown
    await send({"type": "lifespan.shutdown.complete"})
