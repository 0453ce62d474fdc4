"""Each interface gets the gateway that speaks it, and each gateway what it needs."""

from __future__ import annotations

import asyncio

from prefork.gateway.load import load_application
from prefork.gateway.make import make_gateway
from tests.harness.loop import go


def serve(app, exchange, *, interface="auto", run_in_thread=None, worker=None):
    """Run *exchange* through the gateway that *app* gets."""
    gateway = make_gateway(
        load_application(app, interface), run_in_thread=run_in_thread, worker=worker, state={"db": 1}, root_path="/api"
    )
    go(gateway(exchange))


def test_asgi_application_is_called_with_state_and_root_path(exchange_for, wire):
    """Both are in its scope."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": f"{scope['state']} {scope['root_path']}".encode()})

    serve(app, exchange_for())
    assert wire.body == b"{'db': 1} /api"


def test_wsgi_application_is_called_with_the_root_path(exchange_for, wire):
    """SCRIPT_NAME is WSGI's word for it."""

    def app(environ, start_response):
        start_response("200 OK", [])
        return [environ["SCRIPT_NAME"].encode()]

    serve(app, exchange_for())
    assert wire.body == b"/api"


def test_native_handler_is_called_with_a_request_that_knows_its_worker(exchange_for, wire):
    """`request.worker` is what the worker passed."""

    async def handler(request):
        return f"{request.worker}"

    serve(handler, exchange_for(), worker="worker 3")
    assert wire.body == b"worker 3"


def test_blocking_applications_run_where_the_worker_says(exchange_for, wire):
    """WSGI and plain functions; how many threads there are is not a gateway's business."""
    ran = []

    async def run_in_thread(call):
        ran.append(call)
        return await asyncio.to_thread(call)

    def app(environ, start_response):
        start_response("200 OK", [])
        return [b"wsgi"]

    serve(app, exchange_for(), run_in_thread=run_in_thread)
    serve(lambda request: "native", exchange_for(), run_in_thread=run_in_thread)

    assert ran
    assert wire.body == b"wsginative"
