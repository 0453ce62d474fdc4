"""ASGI's `websocket` scope over a `WebSocketExchange`.

Each message of the application is checked for its form here, with an error that names
the message and the key. Whether it comes in turn is the exchange's to say, but for a
denial in parts, which only ASGI has.

The one fact: once the client is gone, `receive` says `websocket.disconnect`, as often
as it is asked, and `send` raises WebSocketDisconnected, which is an OSError.
"""

from __future__ import annotations

from typing import Any

from prefork.errors import GatewayError, WebSocketDisconnected
from prefork.gateway.asgi import ASGIApplication, AsgiGateway, Message, Scope
from prefork.gateway.websocket_exchange import NORMAL, State, WebSocketExchange
from prefork.protocol.events import Headers

# 2.5 added the reason of a disconnect.
WEBSOCKET_SPEC_VERSION = "2.5"

ACCEPT = "websocket.accept"
SEND = "websocket.send"
CLOSE = "websocket.close"
DENIAL_START = "websocket.http.response.start"
DENIAL_BODY = "websocket.http.response.body"


class AsgiWebSockets:
    """Calls an ASGI application once per WebSocket."""

    def __init__(self, app: ASGIApplication, *, state: dict[str, Any] | None, root_path: str = "") -> None:
        self._app = app
        self._http = AsgiGateway(app, state=state, root_path=root_path)

    async def __call__(self, exchange: WebSocketExchange) -> None:
        """Run *exchange* to its end. What the application raises comes out as it is."""
        conversation = WebSocketConversation(exchange)
        await self._app(self.scope(exchange), conversation.receive, conversation.send)
        exchange.finish()

    def scope(self, exchange: WebSocketExchange) -> Scope:
        """As for HTTP, but for what a WebSocket has not and what only it has."""
        scope = self._http.scope(exchange.exchange)
        del scope["method"]
        scope["type"] = "websocket"
        scope["asgi"] = {**scope["asgi"], "spec_version": WEBSOCKET_SPEC_VERSION}
        scope["scheme"] = "wss" if exchange.exchange.scheme == "https" else "ws"
        scope["subprotocols"] = list(exchange.handshake.subprotocols)
        tls = {name: value for name, value in scope.get("extensions", {}).items() if name == "tls"}
        scope["extensions"] = {**tls, "websocket.http.response": {}}
        return scope


class WebSocketConversation:
    """The two callables of one WebSocket."""

    __slots__ = ("_exchange", "_is_told")

    def __init__(self, exchange: WebSocketExchange) -> None:
        self._exchange = exchange
        self._is_told = False  # of `websocket.connect`

    async def receive(self) -> Message:
        """`websocket.connect`, then messages, then `websocket.disconnect`, and that again if asked again."""
        if not self._is_told:
            self._is_told = True
            return {"type": "websocket.connect"}
        try:
            message = await self._exchange.receive()
        except WebSocketDisconnected as exc:
            return {"type": "websocket.disconnect", "code": exc.code, "reason": exc.reason}
        if type(message) is str:
            return {"type": "websocket.receive", "text": message}
        return {"type": "websocket.receive", "bytes": message}

    async def send(self, message: Message) -> None:
        """Accept, deny, send or close.

        Raises GatewayError for a message that is malformed or out of turn, and
        WebSocketDisconnected, an OSError, once the client is gone.
        """
        kind = message.get("type")
        exchange = self._exchange
        if kind == SEND:
            await exchange.send(_data(message))
        elif kind == CLOSE:
            code, reason = message.get("code"), message.get("reason")
            exchange.close(NORMAL if code is None else code, _text(reason or "", CLOSE, "reason"))
        elif kind == ACCEPT:
            exchange.accept(_subprotocol(message.get("subprotocol")), _headers(message, ACCEPT))
        elif kind == DENIAL_START:
            self._start_denial(message)
        elif kind == DENIAL_BODY:
            await self._send_denial(message)
        else:
            raise GatewayError(f"ASGI message {kind!r} has no place in a WebSocket")

    def _start_denial(self, message: Message) -> None:
        exchange = self._exchange
        if exchange.state is not State.CONNECTING:
            raise GatewayError(f"the WebSocket cannot be denied: it is {exchange.state.value}")
        status = message.get("status")
        if not isinstance(status, int) or isinstance(status, bool):
            raise GatewayError(f"'status' of {DENIAL_START!r} is {_kind(status)}, an int was expected")
        exchange.exchange.start(int(status), _headers(message, DENIAL_START))
        exchange.state = State.DENYING

    async def _send_denial(self, message: Message) -> None:
        exchange = self._exchange
        if exchange.state is not State.DENYING:
            raise GatewayError(f"{DENIAL_BODY!r} has no place here: the WebSocket is {exchange.state.value}")
        body, more = message.get("body", b""), bool(message.get("more_body", False))
        if not isinstance(body, bytes | bytearray | memoryview):
            raise GatewayError(f"'body' of {DENIAL_BODY!r} is {_kind(body)}, bytes were expected")
        await exchange.exchange.write(bytes(body), more)
        if not more:
            exchange.state = State.OVER


def _data(message: Message) -> str | bytes:
    """Exactly one of `text` and `bytes` is there and not None."""
    text, data = message.get("text"), message.get("bytes")
    if type(text) is str and data is None:
        return text
    if type(data) is bytes and text is None:
        return data
    if isinstance(text, str) and data is None:
        return str(text)
    if isinstance(data, bytearray | memoryview | bytes) and text is None:
        return bytes(data)
    raise GatewayError(
        f"{SEND!r} has 'text' of {_kind(text)} and 'bytes' of {_kind(data)}; one of them must be there, str or bytes"
    )


def _text(value: object, kind: str, key: str) -> str:
    if not isinstance(value, str):
        raise GatewayError(f"{key!r} of {kind!r} is {_kind(value)}, str was expected")
    return value


def _subprotocol(value: object) -> str | None:
    return None if value is None else _text(value, ACCEPT, "subprotocol")


def _headers(message: Message, kind: str) -> Headers:
    headers = []
    for field in message.get("headers") or ():
        try:
            name, value = field
        except (TypeError, ValueError):
            raise GatewayError(f"a header of {kind!r} is {field!r}, [name, value] was expected") from None
        if not isinstance(name, bytes) or not isinstance(value, bytes):
            raise GatewayError(f"a header of {kind!r} is {name!r}: {value!r}; both must be bytes")
        headers.append((name.lower(), value))
    return headers


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
