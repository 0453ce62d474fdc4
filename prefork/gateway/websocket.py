"""WebSockets for native handlers: `async def handler(socket: WebSocket)`.

It decides what a handler may say and how it reads; order, queue and the closing are
the exchange's. Text is str, binary is bytes, and neither is ever made of the other.

The one fact: a handler that returns closes its WebSocket with 1000, one that raises
with 1011 (MalformedBody: 1007); nobody has to close in a `finally`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from prefork.errors import GatewayError, MalformedBody, WebSocketDisconnected
from prefork.gateway.asgi import decode_path
from prefork.gateway.exchange import Exchange
from prefork.gateway.message import HeaderItems, Headers, Query, Response
from prefork.gateway.websocket_exchange import FORBIDDEN, NORMAL, State, WebSocketExchange

UNSUPPORTED_DATA = 1003
INVALID_DATA = 1007

UPGRADE_REQUIRED = 426


class WebSocket:
    """A WebSocket, as a native handler sees it.

        async def handler(socket: WebSocket) -> None:
            await socket.accept()
            async for message in socket:
                await socket.send(message)

    Text is str, binary is bytes. `async for` ends when the WebSocket is closed, by
    whomever; every other verb raises WebSocketDisconnected then. A handler that
    returns closes it with 1000, one that raises with 1011.
    """

    __slots__ = ("_exchange", "_headers", "_query", "_request", "worker")

    def __init__(self, exchange: WebSocketExchange, worker: Any = None) -> None:
        self.worker = worker
        self._exchange = exchange
        self._request = exchange.exchange.request
        self._headers: Headers | None = None
        self._query: Query | None = None

    # ---- the request that asked for it ----

    @property
    def path(self) -> str:
        """Decoded: escapes, then UTF-8; what is not UTF-8 becomes U+FFFD."""
        return decode_path(self._request.path)

    @property
    def raw_path(self) -> bytes:
        return self._request.path

    @property
    def query_string(self) -> bytes:
        return self._request.query

    @property
    def query(self) -> Query:
        if self._query is None:
            self._query = Query(self._request.query)
        return self._query

    @property
    def headers(self) -> Headers:
        """Of the request. Check `origin` here: browsers let any page open a WebSocket to any host, with its cookies."""
        if self._headers is None:
            self._headers = Headers.of(list(self._request.headers))
        return self._headers

    @property
    def scheme(self) -> str:
        """ "ws" or "wss"."""
        return "wss" if self._exchange.exchange.scheme == "https" else "ws"

    @property
    def client(self) -> tuple[str, int] | None:
        """Host and port; None on a Unix socket."""
        return self._exchange.exchange.client

    @property
    def server(self) -> tuple[str, int | None] | None:
        return self._exchange.exchange.server

    @property
    def subprotocols(self) -> tuple[str, ...]:
        """What the client offers, in the order of its preference."""
        return self._exchange.handshake.subprotocols

    # ---- before it is open ----

    async def accept(self, subprotocol: str | None = None, headers: HeaderItems | None = None) -> None:
        """Open it, with one of `subprotocols` or none, and *headers* for the answer.

        Raises GatewayError if that is not possible, WebSocketDisconnected if the client is gone.
        """
        self._exchange.accept(subprotocol, Headers(headers).raw)

    async def deny(self, response: Response | None = None) -> None:
        """Answer with an HTTP response, whose body is bytes or str, instead of opening; None is a 403."""
        response = Response("Forbidden", status=FORBIDDEN) if response is None else response
        if not isinstance(response.body, bytes):
            raise GatewayError("the body of a response that denies a WebSocket must be bytes or str")
        self._exchange.deny(response.status, list(response.fields), response.body)

    # ---- while it is open ----

    @property
    def subprotocol(self) -> str | None:
        """The one that was accepted."""
        return self._exchange.subprotocol

    async def receive(self) -> str | bytes:
        """The next message; the client is held back while nobody receives."""
        if self._exchange.state is State.CONNECTING:
            raise GatewayError("nothing can be received before 'await socket.accept()'")
        return await self._exchange.receive()

    async def receive_text(self) -> str:
        """The next message, which must be text; otherwise the WebSocket is closed with 1003."""
        message = await self.receive()
        return message if isinstance(message, str) else self._unsupported("text")

    async def receive_bytes(self) -> bytes:
        """The next message, which must be binary; otherwise the WebSocket is closed with 1003."""
        message = await self.receive()
        return message if isinstance(message, bytes) else self._unsupported("binary")

    async def receive_json(self) -> Any:
        """The next message, text or binary, as JSON. Raises MalformedBody, which closes with 1007 unless it is caught."""
        message = await self.receive()
        try:
            return json.loads(message)
        except (ValueError, RecursionError) as exc:  # RecursionError: a message of nothing but "["
            raise MalformedBody(f"the message is not JSON: {exc}") from exc

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        try:
            while True:
                yield await self.receive()
        except WebSocketDisconnected:
            return

    async def send(self, data: str | bytes | bytearray | memoryview) -> None:
        """Send a message, str as text and bytes as binary, and wait while the client is slow."""
        if isinstance(data, bytearray | memoryview):
            data = bytes(data)
        if not isinstance(data, str | bytes):
            raise GatewayError(f"a message is {_kind(data)}, str or bytes were expected")
        await self._exchange.send(data)

    async def send_json(self, value: Any) -> None:
        """*value* as JSON, compact, in a text message. Raises TypeError or ValueError for what JSON has no form for."""
        await self.send(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Begin to close; *reason* is cut to 123 bytes. Without effect if it is closed; before `accept` it denies."""
        if self._exchange.state is not State.OVER and self._exchange.disconnected is None:
            self._exchange.close(code, reason)

    # ---- after it was closed ----

    @property
    def close_code(self) -> int | None:
        """None while it is open. 1005: closed without a code; 1006: the connection was lost."""
        disconnected = self._exchange.disconnected
        return None if disconnected is None else disconnected.code

    @property
    def close_reason(self) -> str | None:
        disconnected = self._exchange.disconnected
        return None if disconnected is None else disconnected.reason

    def _unsupported(self, expected: str) -> Any:
        reason = f"a {expected} message was expected"
        if self._exchange.disconnected is None:
            self._exchange.close(UNSUPPORTED_DATA, reason)
        raise WebSocketDisconnected(UNSUPPORTED_DATA, reason)

    def __repr__(self) -> str:
        return f"<WebSocket {self.path}>"


class NativeWebSockets:
    """Calls a native handler once per WebSocket."""

    def __init__(self, handler: Callable[[WebSocket], Awaitable[object]], *, worker: Any = None) -> None:
        self._handler = handler
        self._worker = worker

    async def __call__(self, exchange: WebSocketExchange) -> None:
        """Run *exchange* to its end. What the handler raises comes out as it is, but for MalformedBody."""
        try:
            await self._handler(WebSocket(exchange, self._worker))
        except MalformedBody as exc:
            if exchange.state is not State.OPEN:
                raise
            if exchange.disconnected is None:
                exchange.close(INVALID_DATA, str(exc))
        exchange.finish()


class UpgradeRequired:
    """The HTTP gateway of a handler that takes WebSockets only."""

    def begin(self, exchange: Exchange) -> None:
        """Say so. RFC 9110, section 15.5.22, wants the field."""
        headers = [(b"upgrade", b"websocket"), (b"content-type", b"text/plain; charset=utf-8")]
        exchange.start(UPGRADE_REQUIRED, headers)
        exchange.send(b"this is a WebSocket", False)


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
