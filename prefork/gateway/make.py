"""From a loaded application to the gateway that runs its exchanges.

It decides nothing: the interface was found by `load`.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Protocol

from prefork.gateway.asgi import AsgiGateway
from prefork.gateway.asgi_websocket import AsgiWebSockets
from prefork.gateway.bridge import RunInThread
from prefork.gateway.exchange import Exchange
from prefork.gateway.handler import HandlerGateway
from prefork.gateway.load import Application, Interface, Takes
from prefork.gateway.websocket import NativeWebSockets, UpgradeRequired
from prefork.gateway.websocket_exchange import WebSocketGateway
from prefork.gateway.wsgi import WsgiGateway


class Gateway(Protocol):
    """Runs exchanges, each to its end."""

    def begin(self, exchange: Exchange) -> Coroutine[object, object, None] | None:
        """Begin to run *exchange*; the coroutine is the rest of it, None if there is none.

        What the application raises comes out of either, except what would end the event loop.
        """


def make_gateway(
    application: Application,
    *,
    run_in_thread: RunInThread | None,
    worker: object,
    state: dict[str, Any] | None,
    root_path: str,
) -> Gateway:
    """The gateway for *application*.

    *run_in_thread* carries WSGI and plain functions (None: inline in the loop);
    *worker* is what native handlers find at `request.worker`; *state* the namespace
    of the ASGI lifespan; *root_path* where the application is mounted, "" or "/prefix".
    """
    match application.interface:
        case Interface.ASGI:
            return AsgiGateway(application.target, state=state, root_path=root_path)
        case Interface.WSGI:
            return WsgiGateway(application.target, run_in_thread=run_in_thread, root_path=root_path)
        case Interface.NATIVE if application.takes is Takes.WEBSOCKETS:
            return UpgradeRequired()
        case Interface.NATIVE:
            return HandlerGateway(application.target, run_in_thread=run_in_thread, worker=worker)


def make_websocket_gateway(
    application: Application, *, worker: object, state: dict[str, Any] | None, root_path: str
) -> WebSocketGateway | None:
    """What runs WebSockets for *application*; None if it takes none. The arguments are those of `make_gateway`."""
    target = application.target
    if application.interface is Interface.ASGI:
        return AsgiWebSockets(target, state=state, root_path=root_path)
    if application.interface is Interface.NATIVE and application.takes is not Takes.REQUESTS:
        return NativeWebSockets(getattr(target, "websocket", target), worker=worker)
    return None
