"""From a loaded application to the gateway that runs its exchanges.

It decides nothing: the interface was found by `load`.
"""

from __future__ import annotations

from typing import Any, Protocol

from prefork.gateway.asgi import AsgiGateway
from prefork.gateway.bridge import RunInThread
from prefork.gateway.exchange import Exchange
from prefork.gateway.handler import HandlerGateway
from prefork.gateway.load import Application, Interface
from prefork.gateway.wsgi import WsgiGateway


class Gateway(Protocol):
    """Runs one exchange to its end. What the application raises comes out of the call."""

    async def __call__(self, exchange: Exchange) -> None: ...


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
        case Interface.NATIVE:
            return HandlerGateway(application.target, run_in_thread=run_in_thread, worker=worker)
