"""WSGI (PEP 3333) over an `Exchange`: where the application runs, and when.

Without threads, the application is called in the event loop itself, one request at a
time, after its body has been read. With threads, each request runs in one of them:
after its body has been read too, as a `ThreadedCall`, if that is short; a body that is
long, of unknown length or waits for 100 Continue is read through a `Bridge` as it comes.

What the application says is not judged here: `Answer` does that, wherever it runs.

The one fact: in the loop's thread, an answer that takes more than one turn of the loop
holds up every other call, however slow its client. An application that runs in one
thread may count on no second call starting while its iterable is under way.
"""

from __future__ import annotations

import asyncio
import io
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import closing
from contextvars import Context, copy_context
from typing import IO, Any, TypeVar

from prefork.errors import EXITS, ApplicationExited
from prefork.gateway.answer import Answer, FileWrapper, Pieces, WSGIApplication
from prefork.gateway.bridge import SPOOL_SIZE, Bridge, RunInThread, open_body, spooled_body
from prefork.gateway.environ import Environ, EnvironMaker
from prefork.gateway.exchange import Exchange
from prefork.gateway.file import Part, send_part
from prefork.gateway.threaded import ThreadedCall
from prefork.gateway.threads import Threads
from prefork.protocol.events import Request

T = TypeVar("T")


class WsgiGateway:
    """Calls a WSGI application once per exchange."""

    def __init__(
        self,
        app: WSGIApplication,
        *,
        run_in_thread: RunInThread | None,
        multiprocess: bool = True,
        root_path: str = "",
    ) -> None:
        """*run_in_thread* None: in the loop's own thread. *root_path* becomes SCRIPT_NAME."""
        self._app = app
        self._run_in_thread = run_in_thread
        self._threads = run_in_thread if isinstance(run_in_thread, Threads) else None
        self._context = copy_context()  # no request's
        self._turn = Turn()
        constants: Environ = {
            "SERVER_SOFTWARE": "prefork",
            "wsgi.version": (1, 0),
            "wsgi.multithread": run_in_thread is not None,
            "wsgi.multiprocess": multiprocess,
            "wsgi.run_once": False,
            "wsgi.file_wrapper": FileWrapper,
            "wsgi.input_terminated": True,  # reading to the end is safe, with a length or without
        }
        self._make_environ = EnvironMaker(constants, root_path).make

    async def __call__(self, exchange: Exchange) -> None:
        """Run *exchange* to its end.

        What the application raises comes out as it is, GatewayError if it broke the
        PEP, ClientDisconnected if it stopped because the client is gone.
        """
        await (self._wait_inline(exchange) if self._run_in_thread is None else self._run_bridged(exchange))

    def begin(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        """As a call does, without a task where none is needed: None, or the rest to be awaited.

        Call it after all that is there was read. None, too, if a thread sees to it: what
        the application raises there is told to `Exchange.go_on`.
        """
        if self._run_in_thread is None:
            return self._begin_inline(exchange)
        threads = self._threads
        if threads is None or threads.is_draining:
            return self._run_bridged(exchange)
        body = exchange.take_whole()
        if body is None and _is_as_it_comes(exchange.request):
            return self._run_bridged(exchange)
        call = ThreadedCall(self._app, self._make_environ, exchange, threads)
        if body is None:
            return call.receive()
        call.post(body)
        return None

    # ---- in a thread, behind a bridge ----

    async def _run_bridged(self, exchange: Exchange) -> None:
        assert self._run_in_thread is not None
        bridge = Bridge(exchange)
        environ = self._make_environ(exchange)
        environ["wsgi.input"] = open_body(bridge, exchange)
        if exchange.request.has_body and not exchange.request.expect_continue:
            bridge.read_ahead()

        def call() -> None:
            answer = Answer(bridge)
            with closing(answer.pieces(self._app(environ, answer.start_response))) as pieces:
                for data, more in pieces:
                    bridge.send(data, more)

        await bridge.run(call, self._run_in_thread)

    # ---- in the loop ----

    def _begin_inline(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        body = None if self._turn.is_taken else exchange.take_whole()
        return self._wait_inline(exchange) if body is None else self._call_inline(exchange, io.BytesIO(body))

    async def _wait_inline(self, exchange: Exchange) -> None:
        """Read the body, wait for the turn, call.

        A body is read before the turn is taken, so a slow upload holds up nobody. A slow
        download does: an application that runs in one thread may count on no second call
        starting while its iterable is under way.
        """
        async with spooled_body(exchange) as body:
            await self._turn.wait()
            rest = self._call_inline(exchange, body)
            if rest is not None:
                await rest

    def _call_inline(self, exchange: Exchange, body: IO[bytes]) -> Coroutine[Any, Any, None] | None:
        """Call the application, whose turn it is, and send its answer, or return what sends the rest of it."""
        environ = self._make_environ(exchange)
        environ["wsgi.input"] = body
        answer = Answer(exchange)
        context = self._context.copy()
        iterable = _apart(context, self._app, environ, answer.start_response)
        whole = answer.whole(iterable)
        if whole is not None:
            exchange.send(whole, False)
            return None
        pieces = answer.pieces(iterable)
        is_over = True
        try:
            data, more = _apart(context, next, pieces)
            if not more and not isinstance(data, Part):
                exchange.send(data, False)
                return None
            is_over = False
            self._turn.is_taken = True
            return self._stream_inline(exchange, data, more, pieces, context)
        finally:
            if is_over:
                _apart(context, pieces.close)

    async def _stream_inline(
        self, exchange: Exchange, data: bytes | Part, more: bool, pieces: Pieces, context: Context
    ) -> None:
        try:
            if more:
                exchange.send_at_once()
            while more and not isinstance(data, Part):
                if exchange.send(data, True):
                    await exchange.drain()
                data, more = _apart(context, next, pieces)
            if isinstance(data, Part):
                await send_part(exchange, data, False)
            else:
                exchange.send(data, False)
        finally:
            try:
                _apart(context, pieces.close)
            finally:
                self._turn.release()


def _apart(context: Context, call: Callable[..., T], *args: Any) -> T:
    """`outside_the_loop`, in *context*: what the application does in the loop's thread."""
    loop = asyncio.get_running_loop()
    asyncio._set_running_loop(None)
    try:
        return context.run(call, *args)
    except EXITS as exc:
        raise ApplicationExited(exc) from exc
    finally:
        asyncio._set_running_loop(loop)


def _is_as_it_comes(request: Request) -> bool:
    """Whether the application is to have the body while it is still coming: to ask for it, or because of its size."""
    return request.expect_continue or request.content_length is None or request.content_length > SPOOL_SIZE


class Turn:
    """Whose turn it is in the loop's thread. It is taken only by an answer that takes more than one turn of the loop."""

    def __init__(self) -> None:
        self.is_taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Until it is free. Whoever awaits this goes on without awaiting before it has called or taken it."""
        while self.is_taken:
            mine = asyncio.get_running_loop().create_future()
            self._waiting.append(mine)
            await mine

    def release(self) -> None:
        self.is_taken = False
        waiting, self._waiting = self._waiting, deque()
        for each in waiting:
            if not each.done():
                each.set_result(None)
