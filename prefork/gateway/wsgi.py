"""WSGI (PEP 3333) over an `Exchange`: where the application runs, and when.

Without threads, the application is called in the event loop itself, one request at a
time, after its body has been read. With threads, each request runs in one of them, as
a `ThreadedCall`; where the body has still to come, it is read through a `Bridge`.

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
from prefork.gateway.answer import Answer, FileWrapper, Piece, Pieces, WSGIApplication
from prefork.gateway.bridge import Bridge, RunInThread, open_body, outside_the_loop, spooled_body
from prefork.gateway.environ import Environ, EnvironMaker
from prefork.gateway.exchange import Exchange
from prefork.gateway.file import Part, send_part
from prefork.gateway.threaded import ThreadedCall, failure
from prefork.gateway.threads import Threads

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
        self._begun: list[Exchange] = []  # in this turn of the loop, to be called in its thread
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

        None too if it is seen to later, by a callback or a thread. What the application
        raises then, or `start` and `send`, is told to `Exchange.go_on`.
        """
        if self._run_in_thread is None and not exchange.request.expect_continue:
            self._begin_inline(exchange)
            return None
        if self._run_in_thread is None:
            return self._wait_inline(exchange)
        threads = self._threads
        if threads is None or threads.is_draining or exchange.request.expect_continue:
            return self._run_bridged(exchange)
        threads.post(ThreadedCall(self._app, self._make_environ, exchange, threads, self._run_bridged))
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

    def _begin_inline(self, exchange: Exchange) -> None:
        """After this turn of the loop has read all that is there, bodies too.

        To read many requests and then to call for all of them takes a tenth less time than
        by turns, perhaps because the processor's caches need not hold both codes at once.
        """
        if not self._begun:
            asyncio.get_running_loop().call_soon(self._call_begun)
        self._begun.append(exchange)

    def _call_begun(self) -> None:
        begun, self._begun = self._begun, []
        for exchange in begun:
            rest: Coroutine[Any, Any, None] | None
            try:
                body = None if self._turn.is_taken else exchange.take_whole()
                rest = self._wait_inline(exchange) if body is None else self._call_inline(exchange, io.BytesIO(body))
            except BaseException as exc:  # noqa: BLE001 - the door is on the other side of `go_on`
                rest = failure(exc)
            if rest is not None:
                exchange.go_on(rest)

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
        loop = asyncio.get_running_loop()
        asyncio._set_running_loop(None)  # as in `outside_the_loop`, without its closure
        try:
            iterable = context.run(self._app, environ, answer.start_response)
        except EXITS as exc:
            raise ApplicationExited(exc) from exc
        finally:
            asyncio._set_running_loop(loop)
        whole = answer.whole(iterable)
        if whole is not None:
            exchange.send(whole, False)
            return None
        return self._send_inline(exchange, Steps(answer.pieces(iterable), context))

    def _send_inline(self, exchange: Exchange, steps: Steps) -> Coroutine[Any, Any, None] | None:
        self._turn.is_taken = True
        is_over = True
        try:
            data, more = steps.next()
            if not more and not isinstance(data, Part):
                exchange.send(data, False)
                return None
            is_over = False
            return self._stream_inline(exchange, data, steps)
        finally:
            if is_over:
                self._close_inline(steps)

    async def _stream_inline(self, exchange: Exchange, data: bytes | Part, steps: Steps) -> None:
        more = True
        try:
            while more and not isinstance(data, Part):
                await exchange.write(data, True)
                await asyncio.sleep(0)  # the piece leaves in the next turn; a fast client never makes `write` wait
                data, more = steps.next()
            if isinstance(data, Part):
                await send_part(exchange, data, False)
            else:
                exchange.send(data, False)
        finally:
            self._close_inline(steps)

    def _close_inline(self, steps: Steps) -> None:
        try:
            steps.close()
        finally:
            self._turn.release()


class Steps:
    """The pieces of an answer, made in the loop's thread one by one, as if no loop were running there."""

    def __init__(self, pieces: Pieces, context: Context) -> None:
        self._pieces = pieces
        self._context = context

    def next(self) -> Piece:
        return self._run(lambda: next(self._pieces))

    def close(self) -> None:
        self._run(self._pieces.close)

    def _run(self, call: Callable[[], T]) -> T:
        try:
            return outside_the_loop(lambda: self._context.run(call))
        except EXITS as exc:
            raise ApplicationExited(exc) from exc


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
