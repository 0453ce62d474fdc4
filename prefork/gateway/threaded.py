"""One exchange of a WSGI application in a thread: a `Job` for `Threads`.

The body is there before a thread is asked, so that no slow client holds one. The
ordinary answer, one piece or a known length, goes back to the loop as a whole; one
that streams makes a `Bridge` and goes through it, in bounded memory.

The one fact: the loop runs `post`, `receive`, `end` and `accompany`, the thread `work`,
`start` and `send`, and only the bridge may be made by either.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing
from typing import IO

from prefork.gateway.answer import Answer, WSGIApplication
from prefork.gateway.bridge import Bridge, file_of
from prefork.gateway.environ import Environ
from prefork.gateway.exchange import Exchange
from prefork.gateway.file import Part
from prefork.gateway.threads import Threads, carriable
from prefork.protocol.response import FieldLines

# Guards the making of a call's bridge: by its thread, when the application streams, or by the
# loop, when the worker leaves. Both are rare, so one lock for all calls.
OPENING = threading.Lock()


class ThreadedCall:
    """One exchange in a thread, a `Job`. Its response goes back whole, or over a bridge that is made when it streams."""

    __slots__ = (
        "_app",
        "_body",
        "_bridge",
        "_ended",
        "_error",
        "_exchange",
        "_head",
        "_is_streaming",
        "_make_environ",
        "_threads",
        "_whole",
    )

    def __init__(
        self,
        app: WSGIApplication,
        make_environ: Callable[[Exchange], Environ],
        exchange: Exchange,
        threads: Threads,
    ) -> None:
        self._app = app
        self._make_environ = make_environ
        self._exchange = exchange
        self._threads = threads
        self._body: IO[bytes] | None = None
        self._head: tuple[int, FieldLines] | None = None
        self._whole: bytes | None = None
        self._is_streaming = False
        self._error: BaseException | None = None
        self._bridge: Bridge | None = None
        self._ended: asyncio.Future[None] | None = None  # for the task that carries the bridge

    # ---- the loop ----

    def post(self, body: bytes) -> None:
        """Have it run, with its whole *body*."""
        self._body = io.BytesIO(body)
        self._threads.post(self)

    async def receive(self) -> None:
        """Read the body into memory, have the call run, and stay with it to its end."""
        pieces: deque[bytes] = deque()
        while data := await self._exchange.read():
            pieces.append(data)
        self._body = file_of(pieces)
        self._ended = self._threads.loop.create_future()
        self._threads.post(self)
        await self._open_bridge().carry(self._ended)

    def end(self) -> None:
        self._respond()
        if self._bridge is not None:
            self._tell_carrier()
        elif self._error is not None:
            self._exchange.go_on(failure(carriable(self._error)))

    def accompany(self) -> None:
        self._open_bridge()
        self._carry()

    def _respond(self) -> None:
        """Send the response, if it is whole and was not sent."""
        body, self._whole = self._whole, None
        if body is None or self._head is None or self._exchange.responded:
            return
        try:
            self._exchange.start(*self._head)
            self._exchange.send(body, False)
        except Exception as exc:  # noqa: BLE001 - told by `end`
            self._error = exc

    def _carry(self) -> None:
        if self._ended is None:
            assert self._bridge is not None
            self._ended = self._threads.loop.create_future()
            self._exchange.go_on(self._bridge.carry(self._ended))

    def _tell_carrier(self) -> None:
        self._carry()  # if the thread was faster than its own word that there is a bridge
        assert self._ended is not None
        if self._ended.done():  # cancelled
            return
        if self._error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(carriable(self._error))

    # ---- the thread ----

    def work(self) -> None:
        if self._bridge is not None and self._bridge.is_stopped:
            return  # withdrawn before it was begun
        try:
            self._call()
        except BaseException as exc:  # noqa: BLE001 - told by `end`
            self._error = exc

    def start(self, status: int, headers: FieldLines) -> None:
        self._head = (status, headers)

    def send_at_once(self) -> None:
        """As `Bridge.send_at_once`."""

    def send(self, data: bytes | Part, more: bool) -> None:
        if self._is_streaming or more or isinstance(data, Part):
            self._stream(data, more)
        else:
            self._whole = data
            # Closing the iterable may take the application longer than all that was before.
            self._threads.tell(self._respond)

    def _call(self) -> None:
        environ = self._make_environ(self._exchange)
        environ["wsgi.input"] = self._body
        answer = Answer(self)
        iterable = self._app(environ, answer.start_response)
        self._whole = answer.whole(iterable)
        if self._whole is not None:
            return
        with closing(answer.pieces(iterable)) as pieces:
            for data, more in pieces:
                self.send(data, more)

    def _stream(self, data: bytes | Part, more: bool) -> None:
        bridge = self._open_bridge()
        if not self._is_streaming:
            self._is_streaming = True
            assert self._head is not None
            bridge.start(*self._head)
            self._threads.tell(self._carry)
        bridge.send(data, more)

    # ---- both ----

    def _open_bridge(self) -> Bridge:
        with OPENING:
            if self._bridge is None:
                self._bridge = Bridge(self._exchange, self._threads.loop)
            return self._bridge


async def failure(error: BaseException) -> None:
    """For `Exchange.go_on`: all that is left of the exchange is that it failed."""
    raise error
