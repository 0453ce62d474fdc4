"""What a native handler is given and gives: `Request`, `Response`, `Headers`.

Nothing here sends: a `Response` is a value, and `HandlerGateway` makes bytes of it.

Header names and values are `str` here and bytes (latin-1) on the wire; names are in
lower case in both, and found whatever the case they are asked in.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, MutableMapping
from typing import IO, Any, cast
from urllib.parse import parse_qsl, unquote

from prefork.errors import GatewayError, MalformedBody, ResponseError
from prefork.gateway.exchange import Exchange
from prefork.gateway.file import File, guess_content_type
from prefork.protocol.events import Headers as RawHeaders
from prefork.protocol.memory import Memory
from prefork.protocol.response import Field, FieldLines, field_lines

Body = bytes | str | Iterable[bytes] | AsyncIterable[bytes]
HeaderItems = Mapping[str, str] | Iterable[tuple[str, str]]

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
BINARY = "application/octet-stream"


class Headers(MutableMapping[str, str]):
    """Header fields in order. `[name]` is the first of that name; `get_all` gives each of a repeated one."""

    __slots__ = ("raw",)

    def __init__(self, items: HeaderItems | None = None) -> None:
        self.raw: RawHeaders = []
        if items is None:
            return
        if isinstance(items, Headers):
            self.raw.extend(items.raw)
        else:
            pairs = items.items() if isinstance(items, dict | Mapping) else items
            self.raw.extend([_field(name, value) for name, value in pairs])

    @classmethod
    def of(cls, raw: RawHeaders) -> Headers:
        """A view of *raw*, whose names are in lower case."""
        headers = cls()
        headers.raw = raw
        return headers

    def __getitem__(self, name: str) -> str:
        key = _key(name)
        for candidate, value in self.raw:
            if candidate == key:
                return value.decode("latin-1")
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        key = _key(name) if isinstance(name, str) else None
        return any(candidate == key for candidate, _ in self.raw)

    def get_all(self, name: str) -> list[str]:
        """Every value of *name*, in order; empty if there is none."""
        key = _key(name)
        return [value.decode("latin-1") for candidate, value in self.raw if candidate == key]

    def add(self, name: str, value: str) -> None:
        """One more field, beside those of the same name: a second Set-Cookie."""
        self.raw.append(_field(name, value))

    def __setitem__(self, name: str, value: str) -> None:
        """The only field of its name."""
        field = _field(name, value)
        self.raw = [kept for kept in self.raw if kept[0] != field[0]]
        self.raw.append(field)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        key = _key(name)
        self.raw = [kept for kept in self.raw if kept[0] != key]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name.decode("latin-1") for name, _ in self.raw))

    def __len__(self) -> int:
        return len({name for name, _ in self.raw})

    def __repr__(self) -> str:
        return f"Headers({[(name.decode('latin-1'), value.decode('latin-1')) for name, value in self.raw]!r})"


class Query(Mapping[str, str]):
    """The parameters of a query string. `[name]` is the first of that name; `get_all` gives each."""

    __slots__ = ("items_in_order",)

    def __init__(self, query_string: bytes) -> None:
        self.items_in_order = parse_qsl(query_string.decode("latin-1"), keep_blank_values=True)

    def __getitem__(self, name: str) -> str:
        for candidate, value in self.items_in_order:
            if candidate == name:
                return value
        raise KeyError(name)

    def get_all(self, name: str) -> list[str]:
        """Every value of *name*, in order; empty if there is none."""
        return [value for candidate, value in self.items_in_order if candidate == name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.items_in_order))

    def __len__(self) -> int:
        return len(dict(self.items_in_order))

    def __repr__(self) -> str:
        return f"Query({self.items_in_order!r})"


class Request:
    """One request, as a native handler sees it.

    An async handler awaits `body`, `json` or `stream`. A plain one, which runs in a
    thread and cannot await, has the same body as `content`, `load_json` and `file`;
    these block that thread until the bytes have come. *worker* is the cluster's
    worker this runs in. *client* and *server* are (host, port), *client* None on a
    Unix socket. *raw_path* and *query_string* are bytes as sent, still escaped.
    """

    _headers: Headers | None = None
    _query: Query | None = None
    _content: bytes | None = None
    _is_streamed = False
    _file: IO[bytes] | None = None
    _is_over = False  # a plain handler has returned

    def __init__(self, exchange: Exchange, worker: Any = None) -> None:
        self._exchange = exchange
        self.worker = worker

    @property
    def method(self) -> str:
        return self._exchange.request.method

    @property
    def raw_path(self) -> bytes:
        return self._exchange.request.path

    @property
    def query_string(self) -> bytes:
        return self._exchange.request.query

    @property
    def http_version(self) -> str:
        return self._exchange.request.version

    @property
    def scheme(self) -> str:
        return self._exchange.scheme

    @property
    def client(self) -> tuple[str, int] | None:
        return self._exchange.client

    @property
    def server(self) -> tuple[str, int | None] | None:
        return self._exchange.server

    @property
    def path(self) -> str:
        """Decoded: escapes, then UTF-8; what is not UTF-8 becomes U+FFFD."""
        return unquote(self.raw_path.decode("latin-1"))

    @property
    def headers(self) -> Headers:
        if self._headers is None:
            self._headers = Headers.of(self._exchange.request.headers.copy())
        return self._headers

    @property
    def query(self) -> Query:
        if self._query is None:
            self._query = Query(self.query_string)
        return self._query

    # ---- the body, for async handlers ----

    async def body(self) -> bytes:
        """The whole body. Raises ClientDisconnected if the client went away in the middle."""
        if self._content is None and self._file is None:
            whole = None if self._is_streamed else self._exchange.take_whole()
            self._content = b"".join([piece async for piece in self.stream()]) if whole is None else whole
        return self.content

    async def json(self) -> Any:
        """The body as JSON. Raises MalformedBody, which becomes a 400 unless it is caught."""
        await self.body()
        return self.load_json()

    async def stream(self) -> AsyncIterator[bytes]:
        """The body in pieces as they arrive; the sender is held back while the handler is slow."""
        if self._content is not None or self._file is not None:
            yield self.content
            return
        if self._is_streamed:
            raise GatewayError("the body of the request was streamed already, and is not kept")
        self._is_streamed = True
        while piece := await self._exchange.read():
            yield piece

    # ---- the body, for plain handlers ----

    @property
    def content(self) -> bytes:
        """The whole body. In an async handler only after `await request.body()`."""
        if self._content is None:
            self._content = self.file.read()
        return self._content

    def load_json(self) -> Any:
        """`content` as JSON. Raises MalformedBody, which becomes a 400 unless it is caught."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError) as exc:  # RecursionError: a body of nothing but "["
            raise MalformedBody(f"the body of the request is not JSON: {exc}") from exc

    @property
    def file(self) -> IO[bytes]:
        """The body as a binary file, for what is too large for `content`. Plain handlers only."""
        if self._file is None and self._is_over:
            raise GatewayError("the handler has returned, and the body's file went with it: read the body before")
        if self._file is None:
            raise GatewayError("an async handler reads the body with 'await request.body()' or 'request.stream()'")
        return self._file

    def lend_file(self, file: IO[bytes] | None) -> None:
        """The gateway's: *file* blocks, so it is there while a plain handler runs, and None after that."""
        self._file = file
        self._is_over = file is None

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path}>"


class Response:
    """An answer: a status, headers and a body.

    *body* is bytes, str (sent as UTF-8) or an iterable of bytes, async or not, which
    is sent piece by piece as the client takes it. *content_type* defaults to
    text/plain for str and application/octet-stream for the rest, nothing for an empty
    body. Raises GatewayError for a status, header or body that cannot be one.
    """

    __slots__ = ("_fields", "body", "status")

    def __init__(
        self,
        body: Body = b"",
        status: int = 200,
        headers: HeaderItems | None = None,
        content_type: str | None = None,
    ) -> None:
        self.status = status if type(status) is int and 200 <= status <= 999 else _status(status)
        default_type = TEXT if isinstance(body, str) else BINARY if body else None
        self.body: bytes | File | Iterable[bytes] | AsyncIterable[bytes] = body if type(body) is bytes else _body(body)
        self._fields: FieldLines | Headers
        if headers is None or type(headers) is dict:
            self._fields = _recall(tuple(headers.items()) if headers else (), content_type, default_type)
        else:
            self._fields = _headers(headers, content_type, default_type)

    @property
    def headers(self) -> Headers:
        if type(self._fields) is FieldLines:
            self._fields = Headers.of(list(self._fields))
        return cast(Headers, self._fields)

    @property
    def fields(self) -> Iterable[Field]:
        """The headers as they are sent."""
        return self._fields if type(self._fields) is FieldLines else cast(Headers, self._fields).raw

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: HeaderItems | None = None) -> Response:
        """*value* as JSON, compact. Raises TypeError or ValueError for what JSON has no form for, NaN included."""
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return cls(text.encode(), status, headers, JSON)

    @classmethod
    def file(
        cls,
        path: str | os.PathLike[str],
        headers: HeaderItems | None = None,
        content_type: str | None = None,
    ) -> Response:
        """The file at *path*, read while it is sent, off the event loop.

        Answers ranges (206, 416) and conditions (304) by ETag and Last-Modified;
        404 if there is no regular file of that name. Keep *path* inside the directory
        you mean: nothing else does. The content type is guessed from the name.
        """
        response = cls(b"", 200, headers)
        response.body = File(os.fspath(path))
        if content_type is not None or "content-type" not in response.headers:
            response.headers["content-type"] = content_type or guess_content_type(response.body.path)
        return response

    def __repr__(self) -> str:
        return f"<Response {self.status}>"


# What responses are made of repeats: their headers are looked at once.
_known: Memory[tuple[object, str | None, str | None], FieldLines] = Memory()


def _recall(items: tuple[tuple[str, str], ...], content_type: str | None, default_type: str | None) -> FieldLines:
    key = (items, content_type, default_type)
    try:
        known = _known.get(key)
    except TypeError:  # a value that is no text, for which there are words
        known = None
    if known is None:
        known = _lines(_headers(items, content_type, default_type))
        _known.remember(key, known, len(known.lines))
    return known


def _headers(items: HeaderItems, content_type: str | None, default_type: str | None) -> Headers:
    headers = Headers(items)
    if content_type is not None:
        headers["content-type"] = content_type
    elif default_type is not None and "content-type" not in headers:
        headers["content-type"] = default_type
    return headers


def _lines(headers: Headers) -> FieldLines:
    try:
        return field_lines(headers.raw)
    except ResponseError as exc:
        raise GatewayError(str(exc)) from exc


def as_response(result: object) -> Response:
    """What a handler returned, as a Response. Raises GatewayError for what it may not return."""
    if isinstance(result, Response):
        return result
    if result is None:
        return Response(status=204)
    if isinstance(result, str | bytes):
        return Response(result)
    if isinstance(result, dict | list):
        return Response.json(result)
    raise GatewayError(f"the handler returned {_kind(result)}, allowed are Response, str, bytes, dict, list and None")


def _status(status: object) -> int:
    if isinstance(status, int) and not isinstance(status, bool) and 200 <= status <= 999:
        return int(status)  # an http.HTTPStatus too
    raise GatewayError(f"the status of a response is {status!r}, an int from 200 to 999 was expected")


def _body(body: object) -> bytes | Iterable[bytes] | AsyncIterable[bytes]:
    if isinstance(body, bytes):
        return body
    if isinstance(body, str):
        return body.encode()
    if isinstance(body, bytearray | memoryview):
        return bytes(body)
    if isinstance(body, Mapping):
        raise GatewayError(f"the body of a response is {_kind(body)}; Response.json sends it as JSON")
    if isinstance(body, Iterable | AsyncIterable):
        return body
    raise GatewayError(
        f"the body of a response is {_kind(body)}, bytes, str or an iterable of bytes, async or not, were expected"
    )


_fields: Memory[tuple[str, str], tuple[bytes, bytes]] = Memory()  # encoded before


def _key(name: str) -> bytes:
    # The backslash stands in no header's name, so what latin-1 lacks is found nowhere.
    return name.lower().encode("latin-1", "backslashreplace")


def _field(name: object, value: object) -> tuple[bytes, bytes]:
    if not isinstance(name, str) or not isinstance(value, str):
        raise GatewayError(f"a header is {_kind(name)}: {_kind(value)}: {name!r}: {value!r}; both must be str")
    known = _fields.get((name, value))
    if known is not None:
        return known
    try:
        field = name.lower().encode("latin-1"), value.encode("latin-1")
    except UnicodeEncodeError:
        raise GatewayError(f"the header {name!r}: {value!r} has characters beyond latin-1") from None
    return _fields.remember((name, value), field, len(name) + len(value))


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
