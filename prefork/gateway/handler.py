"""Native handlers over an `Exchange`: `async def handler(request) -> Response`, or a plain `def`.

An async handler runs in the loop. A plain one runs in a thread, as do the reads of a
file and the steps of a plain iterable, so that what blocks there blocks one request.
Without threads (`run_in_thread` None) all of it runs in the loop.

The response is sent after the handler has returned, never by it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from prefork.errors import EXITS, ApplicationExited, GatewayError, MalformedBody
from prefork.gateway.bridge import Bridge, RunInThread, open_body, outside_the_loop, spooled_body
from prefork.gateway.exchange import Exchange
from prefork.gateway.file import SMALL, File, OpenFile, open_file, select
from prefork.gateway.message import TEXT, Headers, Request, Response, as_response

T = TypeVar("T")

Handler = Callable[[Request], Any]

END: Final = object()  # the end of an iterable: StopIteration cannot cross a future


class HandlerGateway:
    """Calls a native handler once per exchange."""

    def __init__(self, handler: Handler, *, run_in_thread: RunInThread | None, worker: Any = None) -> None:
        """*worker* is what `request.worker` will be."""
        self._handler = handler
        self._is_async = is_async(handler)
        self._run_in_thread = run_in_thread
        self._worker = worker

    async def begin(self, exchange: Exchange) -> None:
        """Run *exchange* to its end.

        What the handler raises comes out as it is, but for MalformedBody: the client
        is to blame for that, and gets a 400. GatewayError if the handler returned
        what is no response, ClientDisconnected if the client is gone.
        """
        request = Request(exchange, self._worker)
        try:
            result = await (self._handler(request) if self._is_async else self._call(exchange, request))
        except MalformedBody as exc:
            result = Response(str(exc), status=400)
        except EXITS as exc:
            raise ApplicationExited(exc) from exc
        response = result if type(result) is Response else as_response(result)
        body = response.body
        if isinstance(body, bytes):
            exchange.start(response.status, response.fields)
            exchange.send(body, False)
        elif isinstance(body, File):
            await self._send_file(exchange, request, response, body.path)
        else:
            await self._send_pieces(exchange, response, body)

    __call__ = begin

    async def _call(self, exchange: Exchange, request: Request) -> Any:
        if self._run_in_thread is None:
            async with spooled_body(exchange) as file:
                request.lend_file(file)
                result = await _resolved(outside_the_loop(lambda: self._handler(request)))
                request.lend_file(None)
                return result
        bridge = Bridge(exchange)
        request.lend_file(open_body(bridge, exchange))
        result = await bridge.run(lambda: self._handler(request), self._run_in_thread)
        request.lend_file(None)
        return await _resolved(result)

    # ---- pieces ----

    async def _send_pieces(
        self, exchange: Exchange, response: Response, body: Iterable[bytes] | AsyncIterable[bytes]
    ) -> None:
        exchange.start(response.status, response.fields)
        if exchange.request.method == "HEAD":
            # Two sends say that the length is not known, one would say that it is nought.
            exchange.send(b"", True)
        elif isinstance(body, list | tuple):
            for piece in body:
                if _send(exchange, piece):
                    await exchange.drain()
        elif isinstance(body, AsyncIterable):
            await _send_async(exchange, body)
        else:
            await self._send_plain(exchange, body)
        exchange.send(b"", False)

    async def _send_plain(self, exchange: Exchange, body: Iterable[bytes]) -> None:
        iterator = iter(body)
        try:
            while (piece := await self._off_loop(partial(next, iterator, END))) is not END:
                if _send(exchange, piece):
                    await exchange.drain()
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                await self._off_loop(close)

    async def _off_loop(self, call: Callable[[], T]) -> T:
        if self._run_in_thread is None:
            return outside_the_loop(call)
        return await self._run_in_thread(call)

    # ---- files ----

    async def _send_file(self, exchange: Exchange, request: Request, response: Response, path: str) -> None:
        begun = await self._off_loop(partial(_begin_file, request, response, path))
        if begun is None:
            exchange.start(404, [(b"content-type", TEXT.encode())])
            exchange.send(b"Not Found", False)
            return
        with begun.opened.file:
            exchange.start(begun.status, begun.headers.raw)
            if begun.length <= SMALL:
                # A file that has shrunk meanwhile has too few bytes here, and the protocol says so.
                exchange.send(begun.piece, False)
            else:
                await exchange.send_file(begun.opened.file.fileno(), begun.start, begun.length, False)


def is_async(handler: object) -> bool:
    """True for an `async def`, wrapped by functools.partial or not, and for an object whose `__call__` is one."""
    if inspect.iscoroutinefunction(handler):
        return True
    return callable(handler) and inspect.iscoroutinefunction(type(handler).__call__)


async def _resolved(result: Any) -> Any:
    """A plain function may return what an async one would: a decorator that is no coroutine function itself."""
    return await result if isinstance(result, Awaitable) else result


async def _send_async(exchange: Exchange, body: AsyncIterable[bytes]) -> None:
    iterator = aiter(body)
    try:
        async for piece in iterator:
            if _send(exchange, piece):
                await exchange.drain()
    finally:
        aclose = getattr(iterator, "aclose", None)
        if aclose is not None:
            await aclose()


def _send(exchange: Exchange, piece: object) -> bool:
    """True if the client is behind. Raises GatewayError for what is no piece."""
    if not isinstance(piece, bytes):
        raise GatewayError(f"the body of the response yielded {type(piece).__name__}, bytes were expected")
    return bool(piece) and exchange.send(piece, True)


@dataclass(frozen=True, slots=True)
class FileBegun:
    """All that a small file needs, got in one trip to a thread: *piece* is all of its *length* bytes."""

    opened: OpenFile
    status: int
    headers: Headers
    start: int
    length: int
    piece: bytes


def _begin_file(request: Request, response: Response, path: str) -> FileBegun | None:
    """Open the file and decide what of it to send; None if it does not exist."""
    opened = open_file(path)
    if opened is None:
        return None
    # Section 13.2.1: conditions hold for what would be a 200, not for a page that explains a 404.
    conditions = request.headers if response.status == 200 else Headers()
    selection = select(request.method, conditions, response.headers, opened.size, opened.mtime_ns)
    headers = Headers(response.headers)  # a copy: the handler may return the same response again
    for name, value in selection.headers:
        headers[name] = value
    if selection.status in (304, 412, 416):  # no content, so no type of it
        headers.pop("content-type", None)
    length = 0 if request.method == "HEAD" else selection.length
    status = response.status if selection.status == 200 else selection.status
    piece = os.pread(opened.file.fileno(), length, selection.start) if length <= SMALL else b""
    return FileBegun(opened, status, headers, selection.start, length, piece)
