"""WSGI (PEP 3333) over an `Exchange`: the environ, `start_response` and the iterable.

With threads, each request runs in one of them, behind a `Bridge`: the body streams in
and the response out, both in bounded memory. Without, the application is called in
the event loop itself, one request at a time, after its body has been read.

The reason phrase of a status line is not passed on (RFC 9112, section 4: clients
should ignore it); the number is. A response that is longer than its Content-Length is
cut there, as the PEP has it; a shorter one cuts the connection.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from functools import lru_cache
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

from prefork.errors import GatewayError
from prefork.gateway.bridge import Bridge, RunInThread, open_body, outside_the_loop, spooled_body
from prefork.gateway.exchange import Exchange
from prefork.protocol.events import Headers

Environ = dict[str, Any]
ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]
WSGIApplication = Callable[[Environ, Callable[..., Callable[[bytes], None]]], Iterable[bytes]]

# Bytes that `wsgi.file_wrapper` reads at a time unless told: what a transport holds.
FILE_BLOCK = 64 * 1024

DEFAULT_PORTS = {"http": "80", "https": "443"}


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
        self._root_path = root_path
        self._one_at_a_time = asyncio.Lock()
        self._constants: Environ = {
            "SERVER_SOFTWARE": "prefork",
            "wsgi.version": (1, 0),
            "wsgi.multithread": run_in_thread is not None,
            "wsgi.multiprocess": multiprocess,
            "wsgi.run_once": False,
            "wsgi.file_wrapper": FileWrapper,
            "wsgi.input_terminated": True,  # reading to the end is safe, with a length or without
        }

    async def __call__(self, exchange: Exchange) -> None:
        """Run *exchange* to its end.

        What the application raises comes out as it is, GatewayError if it broke the
        PEP, ClientDisconnected if it stopped because the client is gone.
        """
        environ = {**self._constants, **make_environ(exchange, self._root_path)}
        if self._run_in_thread is None:
            await self._run_inline(exchange, environ)
        else:
            await self._run_bridged(exchange, environ, self._run_in_thread)

    async def _run_bridged(self, exchange: Exchange, environ: Environ, run_in_thread: RunInThread) -> None:
        bridge = Bridge(exchange)
        environ["wsgi.input"] = open_body(bridge, exchange)
        if exchange.request.has_body and not exchange.request.expect_continue:
            bridge.read_ahead()

        def call() -> None:
            with closing(Answer(bridge).pieces(self._app, environ)) as pieces:
                for data, more in pieces:
                    bridge.send(data, more)

        await bridge.run(call, run_in_thread)

    async def _run_inline(self, exchange: Exchange, environ: Environ) -> None:
        async with spooled_body(exchange) as body:
            environ["wsgi.input"] = body
            # A body is read before the turn is taken, so a slow upload holds up nobody. A slow
            # download does: an application that runs in one thread may count on no second call
            # starting while its iterable is under way.
            async with self._one_at_a_time:
                pieces = Answer(exchange).pieces(self._app, environ)
                try:
                    while piece := outside_the_loop(lambda: next(pieces, None)):
                        data, more = piece
                        if more:
                            await exchange.write(data, more)
                            await asyncio.sleep(0)  # a fast client never makes `write` wait
                        else:
                            exchange.send(data, more)
                finally:
                    outside_the_loop(pieces.close)


class Sink(Protocol):
    """Where an answer goes: a `Bridge`, or the `Exchange` itself."""

    def start(self, status: int, headers: Headers) -> None: ...
    def send(self, data: bytes, more: bool) -> None: ...


class Answer:
    """What the application has said: `start_response`, `write`, the pieces of its iterable."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._head: tuple[int, Headers] | None = None
        self._has_sent_head = False
        self._left: int | None = None  # bytes still to come of the announced length, if there is one

    def pieces(self, app: WSGIApplication, environ: Environ) -> Generator[tuple[bytes, bool], None, None]:
        """Call *app* and yield (piece, more) until nothing is left; its iterable is closed with the generator."""
        iterable = app(environ, self.start_response)
        try:
            # The one case where the length is known before the first byte leaves (the PEP, "Handling
            # the Content-Length Header").
            is_whole = isinstance(iterable, list | tuple) and len(iterable) == 1
            is_complete = False
            for piece in _iterate(iterable):
                if not isinstance(piece, bytes):
                    raise GatewayError(f"the WSGI application yielded {_kind(piece)}, bytes were expected")
                if not piece:
                    continue
                self._begin()
                data = self._within_length(piece)
                if data:
                    is_complete = is_whole or self._left == 0
                    yield data, not is_complete
                if len(data) < len(piece):
                    break
            if not is_complete:
                self._begin()
                yield b"", False
        finally:
            close = getattr(iterable, "close", None)
            if close is not None:
                close()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None, /
    ) -> Callable[[bytes], None]:
        """The PEP's `start_response`: may replace what it said before only with *exc_info*, and only unsent."""
        if exc_info is not None:
            try:
                if self._has_sent_head:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # the PEP: "avoid dangling circular ref"
        elif self._head is not None:
            raise GatewayError(f"start_response was called again with {status!r}, and without exc_info")
        self._head = (_status(status), _headers(headers))
        return self.write

    def write(self, data: bytes, /) -> None:
        """The PEP's `write`, for applications that push."""
        if not isinstance(data, bytes):
            raise GatewayError(f"write() was given {_kind(data)}, bytes were expected")
        if not data:
            return
        self._begin()
        if self._within_length(data) != data:
            raise GatewayError(f"write() was given {len(data)} bytes, more than Content-Length announced")
        self._sink.send(data, True)

    def _begin(self) -> None:
        """The head leaves with the first byte, not before: until then an error may still replace it."""
        if self._has_sent_head:
            return
        if self._head is None:
            raise GatewayError("the WSGI application answered without calling start_response")
        self._sink.start(*self._head)
        self._left = _content_length(self._head[1])
        self._has_sent_head = True

    def _within_length(self, data: bytes) -> bytes:
        """As much of *data* as Content-Length has room for."""
        if self._left is None:
            return data
        data = data[: self._left]
        self._left -= len(data)
        return data


class FileWrapper:
    """`wsgi.file_wrapper`: a file as an iterable of blocks. Its `close` is the file's."""

    def __init__(self, filelike: Any, block_size: int = FILE_BLOCK) -> None:
        self.filelike = filelike
        self.block_size = block_size
        if hasattr(filelike, "close"):
            self.close = filelike.close

    def __iter__(self) -> FileWrapper:
        return self

    def __next__(self) -> bytes:
        data: bytes = self.filelike.read(self.block_size)
        if not data:
            raise StopIteration
        return data


# ---- the environ ----


def make_environ(exchange: Exchange, root_path: str) -> Environ:
    """What differs from request to request, `wsgi.input` excepted (PEP 3333, "environ Variables"; RFC 3875).

    Text is bytes decoded as latin-1, as the PEP demands. A header whose name has an
    underscore is left out: it would pass for the one with a hyphen that a proxy set.
    """
    request = exchange.request
    script_name, path_info = _split_path(request.path, root_path)
    target = request.target.decode("latin-1")
    environ: Environ = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": script_name,
        "PATH_INFO": path_info,
        "QUERY_STRING": request.query.decode("latin-1"),
        "RAW_URI": target,
        "REQUEST_URI": target,
        "SERVER_PROTOCOL": f"HTTP/{request.version}",
        "REMOTE_ADDR": "",  # nothing for a Unix socket's client, and CGI has no way to leave it out
        "wsgi.url_scheme": exchange.scheme,
        "wsgi.errors": sys.stderr,
    }
    for raw_name, value in request.headers:
        name = _variable(raw_name)
        if name is None:
            continue
        text = value.decode("latin-1")
        if name in environ:
            text = environ[name] + ("; " if name == "HTTP_COOKIE" else ",") + text
        environ[name] = text
    environ["SERVER_NAME"], environ["SERVER_PORT"] = _server(exchange, environ.get("HTTP_HOST", ""))
    if exchange.client is not None:
        environ["REMOTE_ADDR"], environ["REMOTE_PORT"] = exchange.client[0], str(exchange.client[1])
    return environ


def _split_path(raw_path: bytes, root_path: str) -> tuple[str, str]:
    """SCRIPT_NAME and PATH_INFO. A proxy in front may have left *root_path* in the path or taken it off."""
    path = unquote_to_bytes(raw_path).decode("latin-1")
    if not path.startswith("/"):  # OPTIONS *
        path = ""
    root = root_path.rstrip("/").encode().decode("latin-1")
    if path == root or path.startswith(root + "/"):
        path = path[len(root) :]
    return root, path


@lru_cache(maxsize=512)  # names repeat; those that do not push one another out
def _variable(name: bytes) -> str | None:
    if b"_" in name:
        return None
    variable = name.decode("latin-1").upper().replace("-", "_")
    return variable if variable in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + variable


def _server(exchange: Exchange, host: str) -> tuple[str, str]:
    """SERVER_NAME and SERVER_PORT, neither of which may be empty: on a Unix socket, what the client called us."""
    if exchange.server is not None and exchange.server[1] is not None:
        return exchange.server[0], str(exchange.server[1])
    name, colon, port = host.rpartition(":")
    if not colon or port.endswith("]"):  # no port: the last colon is one of an IPv6 address
        name, port = host, ""
    return name or "localhost", port or DEFAULT_PORTS.get(exchange.scheme, "80")


# ---- what the application said ----


def _iterate(iterable: Any) -> Iterable[Any]:
    if isinstance(iterable, bytes | str) or not hasattr(iterable, "__iter__"):
        raise GatewayError(f"the WSGI application returned {_kind(iterable)}, an iterable of bytes was expected")
    result: Iterable[Any] = iterable
    return result


def _status(status: object) -> int:
    if isinstance(status, str) and status[:3].isascii() and status[:3].isdigit() and status[3:4] in ("", " "):
        code = int(status[:3])
        if code >= 200:
            return code
    raise GatewayError(f"start_response was given the status {status!r}, one such as '200 OK' was expected")


def _headers(headers: object) -> Headers:
    if not isinstance(headers, list):
        raise GatewayError(
            f"start_response was given headers as {_kind(headers)}, a list of (name, value) was expected"
        )
    return [_field(field) for field in headers]


def _field(field: object) -> tuple[bytes, bytes]:
    if not isinstance(field, tuple) or len(field) != 2 or not all(isinstance(part, str) for part in field):
        raise GatewayError(f"start_response was given the header {field!r}, a tuple of two str was expected")
    name, value = field
    try:
        return name.lower().encode("latin-1"), value.encode("latin-1")
    except UnicodeEncodeError:
        raise GatewayError(f"the header {name!r}: {value!r} has characters beyond latin-1") from None


def _content_length(headers: Headers) -> int | None:
    """None too for what is no number: the protocol refuses it with a better sentence."""
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
