"""ASGI 3 over an `Exchange`: the scope, `receive` and `send` of one HTTP request.

Written to the specification's words (asgi.readthedocs.io, HTTP & WebSocket message
format). It starts no task and cancels none: an application that wants to know that
its client is gone calls `receive`, or gets the exception out of `send`.

The one fact: a message out of turn is an error in the application's own frame,
raised by `send`, so that its traceback points at the line to mend.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from prefork.errors import EXITS, ApplicationExited, ClientDisconnected, GatewayError, ResponseError
from prefork.gateway.exchange import Exchange
from prefork.gateway.file import send_descriptor, send_path
from prefork.protocol.memory import Memory
from prefork.protocol.response import Field

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
EARLY_HINT = "http.response.early_hint"
DEBUG = "http.response.debug"
PATHSEND = "http.response.pathsend"
ZEROCOPY = "http.response.zerocopysend"

# What `send` takes beside the two messages of the specification. Nobody writes to the inner ones.
EXTENSIONS: dict[str, dict[str, Any]] = {TRAILERS: {}, EARLY_HINT: {}, DEBUG: {}, PATHSEND: {}, ZEROCOPY: {}}


class AsgiGateway:
    """Calls an ASGI 3 application once per exchange."""

    def __init__(self, app: ASGIApplication, *, state: dict[str, Any] | None, root_path: str = "") -> None:
        """*state* is the namespace the lifespan filled (None: not offered); each request gets a shallow copy."""
        self._app = app
        self._state = state
        self._root_path = root_path
        self._raw_root_path = quote(root_path).encode("ascii")  # as it stands on the wire
        self._paths: Memory[bytes, str] = Memory()  # decoded

    async def begin(self, exchange: Exchange) -> None:
        """Run *exchange* to its end.

        What the application raises comes out as it is. Raises GatewayError if it
        returned without completing its response, and ClientDisconnected if it gave
        up because its client is gone: then there is nothing to report.
        """
        conversation = Conversation(exchange)
        called = self._app(self.scope(exchange), conversation.receive, conversation.send)
        try:
            await called
        except Exception as exc:
            if _stems_from_disconnect(exc):
                raise ClientDisconnected("the application stopped because the client went away") from exc
            if not hasattr(called, "__await__"):
                raise GatewayError(
                    f"the application returned {_kind(called)} when called with scope, receive and send; "
                    f"an ASGI application returns an awaitable: is it one? --interface says how it is called"
                ) from None
            raise
        except EXITS as exc:
            raise ApplicationExited(exc) from exc
        if not exchange.responded:
            conversation.check_complete()

    __call__ = begin

    def scope(self, exchange: Exchange) -> Scope:
        """The connection scope. Lists and dictionaries are this request's own: middleware may change them."""
        request = exchange.request
        path = request.path
        if self._raw_root_path:
            path = self._whole_path(path)
        method = request.method
        scope: Scope = {
            "type": "http",
            "asgi": {"version": ASGI_VERSION, "spec_version": HTTP_SPEC_VERSION},
            "http_version": request.version,
            "method": method if method.isupper() else method.upper(),
            "scheme": exchange.scheme,
            "path": self._paths.get(path) or self._paths.remember(path, decode_path(path), len(path)),
            "raw_path": path,
            "query_string": request.query,
            "root_path": self._root_path,
            "headers": request.headers.copy(),
            "client": exchange.client,
            "server": exchange.server,
            "extensions": EXTENSIONS.copy(),
        }
        if self._state is not None:
            scope["state"] = self._state.copy()
        if exchange.tls is not None:
            scope["extensions"]["tls"] = exchange.tls.copy()
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

    _client_left = False  # `send` has said so, whatever the application made of it
    _request_told = False  # the application has had the last `http.request`
    _trailers = False  # announced, so they are the end of the response

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def receive(self) -> Message:
        """The next piece of the request; after the last one `http.disconnect`, when there is something to tell."""
        exchange = self._exchange
        if not self._request_told and not exchange.responded:
            last = exchange.take_last()
            if last is not None:
                self._request_told = True
                return {"type": "http.request", "body": last, "more_body": False}
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
        if kind == BODY and exchange.status and not exchange.responded:
            body = message.get("body", b"")
            if type(body) is not bytes:
                body = _as_bytes(body)
            try:
                # Trailers, where they were announced, are the end.
                if exchange.send(body, message.get("more_body", False) or self._trailers):
                    await exchange.drain()
            except ClientDisconnected:
                self._client_left = True
                raise
        elif kind == START and not exchange.status:
            self._start(message)
        elif kind in (PATHSEND, ZEROCOPY) and exchange.status and not exchange.responded:
            await self._send_file(kind, message)
        else:
            self._send_other(kind, message)

    def check_complete(self) -> None:
        """Raise GatewayError if the application returned too early, ClientDisconnected if that was its client's doing."""
        exchange = self._exchange
        if exchange.responded:
            return
        if exchange.is_disconnected or self._client_left:
            raise ClientDisconnected("the application returned early because the client went away")
        if not exchange.has_started:
            raise GatewayError(f"the application returned without a response: {START!r} was never sent")
        last = f"{TRAILERS!r} with 'more_trailers'" if self._trailers else f"{BODY!r} with 'more_body'"
        raise GatewayError(f"the application returned before its response was complete: {last} false was never sent")

    def _start(self, message: Message) -> None:
        status = message.get("status")
        if type(status) is not int and (not isinstance(status, int) or isinstance(status, bool)):
            raise GatewayError(f"'status' of {START!r} is {_kind(status)}, an int was expected")
        headers = message.get("headers", ())
        if type(headers) is not list and isinstance(headers, Iterable):
            headers = tuple(headers)  # it may be one that can be read once only
        try:
            self._exchange.start(status, headers)
        except (ResponseError, TypeError):
            # Looked at one by one: an odd shape is mended, and for what cannot be mended there are words.
            self._exchange.start(int(status), _fields(headers, START))
        if message.get("trailers", False):
            self._trailers = True
            self._trailer_fields: list[Field] = []

    def _send_other(self, kind: object, message: Message) -> None:
        """What is rare, and what is out of turn."""
        exchange = self._exchange
        if kind == EARLY_HINT and not exchange.status:
            exchange.inform(103, [(b"link", link) for link in _links(message)])
        elif kind == TRAILERS and self._trailers and not exchange.responded:
            self._more_trailers(message)
        elif exchange.responded:
            raise GatewayError(f"ASGI message {kind!r} was sent after the response was complete")
        elif kind != DEBUG:  # what it carries is for tests of templates
            expected = BODY if exchange.status else START
            raise GatewayError(f"expected ASGI message {expected!r}, got {kind!r}")

    async def _send_file(self, kind: object, message: Message) -> None:
        try:
            if kind == PATHSEND:
                await send_path(self._exchange, _path(message))
            else:
                more = bool(message.get("more_body", False)) or self._trailers
                file, offset, count = _range(message)
                await send_descriptor(self._exchange, file, offset, count, more)
        except ClientDisconnected:
            self._client_left = True
            raise

    def _more_trailers(self, message: Message) -> None:
        self._trailer_fields += _fields(message.get("headers", ()), TRAILERS)
        if not message.get("more_trailers", False):
            self._exchange.send_trailers(self._trailer_fields)


def _as_bytes(body: object) -> bytes:
    if isinstance(body, bytes | bytearray | memoryview):  # Starlette passes views through
        return bytes(body)
    raise GatewayError(f"'body' of {BODY!r} is {_kind(body)}, bytes were expected")


def _path(message: Message) -> str:
    path = message.get("path")
    if isinstance(path, str):
        return path
    raise GatewayError(f"'path' of {PATHSEND!r} is {_kind(path)}, a str was expected")


def _range(message: Message) -> tuple[Any, int | None, int | None]:
    file = message.get("file")
    if not isinstance(file, int) and not hasattr(file, "fileno"):
        raise GatewayError(f"'file' of {ZEROCOPY!r} is {_kind(file)}, a file with a descriptor was expected")
    for name in ("offset", "count"):
        value = message.get(name)
        if value is not None and (not isinstance(value, int) or value < 0):
            raise GatewayError(f"{name!r} of {ZEROCOPY!r} is {value!r}, a number of bytes was expected")
    return file, message.get("offset"), message.get("count")


def _links(message: Message) -> list[bytes]:
    links = message.get("links", ())
    if isinstance(links, Iterable) and not isinstance(links, bytes | str):
        links = list(links)
        if all(isinstance(link, bytes) for link in links):
            return links
    raise GatewayError(f"'links' of {EARLY_HINT!r} is {links!r}, an iterable of bytes was expected")


def _fields(headers: object, where: str) -> list[Field]:
    """*headers* in the one shape that is passed on, or the words for what is wrong with them."""
    if not isinstance(headers, Iterable):
        raise GatewayError(f"'headers' of {where!r} is {_kind(headers)}, an iterable of [name, value] was expected")
    return [_field(field, where) for field in headers]


def _field(field: Any, where: str) -> Field:
    try:
        name, value = field
    except (TypeError, ValueError):
        raise GatewayError(f"a header of {where!r} is {field!r}, [name, value] was expected") from None
    if not isinstance(name, bytes) or not isinstance(value, bytes):
        raise GatewayError(
            f"a header of {where!r} is [{_kind(name)}, {_kind(value)}]: {name!r}: {value!r}; both must be bytes"
        )
    return bytes(name), bytes(value)


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
