"""ASGI 3 over an `Exchange`: the scope, `receive` and `send` of one HTTP request.

Written to the specification's words (asgi.readthedocs.io, HTTP & WebSocket message
format). It starts no task and cancels none: an application that wants to know that
its client is gone calls `receive`, or gets the exception out of `send`.

The one fact: a message out of turn is an error in the application's own frame,
raised by `send`, so that its traceback points at the line to mend.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from prefork.errors import ClientDisconnected, GatewayError
from prefork.gateway.exchange import Exchange
from prefork.protocol.events import Headers

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApplication = Callable[[Scope, Receive, Send], Awaitable[None]]

ASGI_VERSION = "3.0"

# 2.4 asks that `send` raises an OSError once the client is gone, which ours does, and 2.5 adds only a
# key to `websocket.disconnect`. 2.3 is announced all the same, as by uvicorn: reading 2.4, Starlette
# streams without listening for `http.disconnect`, so a stream that has nothing to send, such as
# server-sent events, would wait for ever for a client that has left.
HTTP_SPEC_VERSION = "2.3"

START = "http.response.start"
BODY = "http.response.body"
TRAILERS = "http.response.trailers"


class AsgiGateway:
    """Calls an ASGI 3 application once per exchange."""

    def __init__(self, app: ASGIApplication, *, state: dict[str, Any] | None, root_path: str = "") -> None:
        """*state* is the namespace the lifespan filled (None: not offered); each request gets a shallow copy."""
        self._app = app
        self._state = state
        self._root_path = root_path
        self._raw_root_path = quote(root_path).encode("ascii")  # as it stands on the wire

    async def __call__(self, exchange: Exchange) -> None:
        """Run *exchange* to its end.

        What the application raises comes out as it is. Raises GatewayError if it
        returned without completing its response, and ClientDisconnected if it gave
        up because its client is gone: then there is nothing to report.
        """
        conversation = Conversation(exchange)
        called = self._app(self.scope(exchange), conversation.receive, conversation.send)
        if not hasattr(called, "__await__"):
            raise GatewayError(
                f"the application returned {_kind(called)} when called with scope, receive and send; "
                f"an ASGI application returns an awaitable: is it one? --interface says how it is called"
            )
        try:
            await called
        except Exception as exc:
            if _stems_from_disconnect(exc):
                raise ClientDisconnected("the application stopped because the client went away") from exc
            raise
        conversation.check_complete()

    def scope(self, exchange: Exchange) -> Scope:
        """The connection scope. Lists and dictionaries are this request's own: middleware may change them."""
        request = exchange.request
        path = self._whole_path(request.path)
        scope: Scope = {
            "type": "http",
            "asgi": {"version": ASGI_VERSION, "spec_version": HTTP_SPEC_VERSION},
            "http_version": request.version,
            "method": request.method.upper(),
            "scheme": exchange.scheme,
            "path": decode_path(path),
            "raw_path": path,
            "query_string": request.query,
            "root_path": self._root_path,
            "headers": list(request.headers),
            "client": exchange.client,
            "server": exchange.server,
            "extensions": {},
        }
        if self._state is not None:
            scope["state"] = self._state.copy()
        return scope

    def _whole_path(self, path: bytes) -> bytes:
        """*path* with root_path in front, as the specification has it (PATH_INFO is `path` less `root_path`).

        A proxy may have taken it off, or left it there.
        """
        root = self._raw_root_path
        if not root or path == root or path.startswith(root + b"/"):
            return path
        return root + path


def decode_path(path: bytes) -> str:
    """Percent-escapes decoded, then UTF-8; what is not UTF-8 becomes U+FFFD, since the scope has room for text only."""
    if b"%" in path:
        path = unquote_to_bytes(path)
    return path.decode("utf-8", "replace")


class Conversation:
    """The two callables of one request, and how far it has come."""

    __slots__ = ("_client_left", "_exchange", "_request_told", "_trailers")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._client_left = False  # `send` has said so, whatever the application made of it
        self._request_told = False  # the application has had the last `http.request`
        self._trailers = False  # announced, so their message is no error

    async def receive(self) -> Message:
        """The next piece of the request; after the last one `http.disconnect`, when there is something to tell."""
        exchange = self._exchange
        if not self._request_told and not exchange.responded:
            try:
                body = await exchange.read()
            except ClientDisconnected:
                return {"type": "http.disconnect"}
            # Two receives may have waited for the same last piece: the second one goes on to the disconnect.
            if not self._request_told:
                more = exchange.has_unread_body
                self._request_told = not more
                return {"type": "http.request", "body": body, "more_body": more}
        await exchange.disconnected()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Start the response, or send a piece of it and wait while the client is slow.

        Raises GatewayError for a message that is malformed or out of turn and
        ClientDisconnected, an OSError, once the client is gone; for the start of a
        response, which waits for its first piece, that piece does.
        """
        kind = message.get("type")
        exchange = self._exchange
        if exchange.responded:
            self._after_the_end(kind)
        elif not exchange.has_started:
            _expect(START, kind)
            self._start(message)
        else:
            _expect(BODY, kind)
            try:
                await exchange.write(_body(message), bool(message.get("more_body", False)))
            except ClientDisconnected:
                self._client_left = True
                raise

    def check_complete(self) -> None:
        """Raise GatewayError if the application returned too early, ClientDisconnected if that was its client's doing."""
        exchange = self._exchange
        if exchange.responded:
            return
        if exchange.is_disconnected or self._client_left:
            raise ClientDisconnected("the application returned early because the client went away")
        if not exchange.has_started:
            raise GatewayError(f"the application returned without a response: {START!r} was never sent")
        raise GatewayError(
            f"the application returned before its response was complete: {BODY!r} with 'more_body' false was never sent"
        )

    def _start(self, message: Message) -> None:
        exchange = self._exchange
        status = message.get("status")
        if not isinstance(status, int) or isinstance(status, bool):
            raise GatewayError(f"'status' of {START!r} is {_kind(status)}, an int was expected")
        headers = _headers(message.get("headers", ()))
        self._trailers = bool(message.get("trailers", False))
        exchange.start(int(status), headers)

    def _after_the_end(self, kind: object) -> None:
        # Trailers are no extension we offer. RFC 9110, section 6.5.1, lets a sender drop them,
        # so an application that announced some all the same gets its response through.
        if not (self._trailers and kind == TRAILERS):
            raise GatewayError(f"ASGI message {kind!r} was sent after the response was complete")


def _expect(expected: str, kind: object) -> None:
    if kind != expected:
        raise GatewayError(f"expected ASGI message {expected!r}, got {kind!r}")


def _body(message: Message) -> bytes:
    body = message.get("body", b"")
    if isinstance(body, bytes):
        return body
    if isinstance(body, bytearray | memoryview):  # Starlette passes views through
        return bytes(body)
    raise GatewayError(f"'body' of {BODY!r} is {_kind(body)}, bytes were expected")


def _headers(headers: object) -> Headers:
    if not isinstance(headers, Iterable):
        raise GatewayError(f"'headers' of {START!r} is {_kind(headers)}, an iterable of [name, value] was expected")
    return list(_fields(headers))


def _fields(headers: Iterable[Any]) -> Iterator[tuple[bytes, bytes]]:
    for field in headers:
        try:
            name, value = field
        except (TypeError, ValueError):
            raise GatewayError(f"a header of {START!r} is {field!r}, [name, value] was expected") from None
        if not isinstance(name, bytes) or not isinstance(value, bytes):
            raise GatewayError(
                f"a header of {START!r} is [{_kind(name)}, {_kind(value)}]: {name!r}: {value!r}; both must be bytes"
            )
        # "Header names must be lowercased": the application's duty, and cheap to do for those that forget.
        yield name.lower(), value


def _stems_from_disconnect(exc: BaseException) -> bool:
    """True if *exc* is our ClientDisconnected, or what a framework makes of it.

    The specification lets an application re-raise it. Task groups wrap it, and
    Starlette raises an error of its own class while handling it. A built-in
    exception raised there is taken for a mistake in the application's cleaning up.
    """
    if isinstance(exc, ClientDisconnected):
        return True
    if isinstance(exc, BaseExceptionGroup):
        return all(_stems_from_disconnect(part) for part in exc.exceptions)
    if exc.__cause__ is not None:
        return _stems_from_disconnect(exc.__cause__)
    if exc.__context__ is None or type(exc).__module__ == "builtins":
        return False
    return _stems_from_disconnect(exc.__context__)


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
