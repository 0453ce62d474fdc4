"""A recording wire, and exchanges over it: what every gateway test stands on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import pytest

from prefork.errors import ClientDisconnected, ResponseError
from prefork.gateway.exchange import Exchange
from prefork.protocol.events import Headers, Request


class FakeWire:
    """A `Wire` that writes down every call, in order, and obeys the test.

    *calls* is the list of what happened: `("head", status, headers, body, more)`,
    `("body", data, more)`, `("continue",)`, `("pause",)`, `("resume",)`, `("abort",)`,
    `("drain",)`, `("at once",)`. Set *writable* to False to play a slow client; `take()` lets the
    drains that wait for it go on, `leave()` makes them raise as for a client that
    is gone. *refuse* is raised by the next send, as ResponseError would be.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.writable = True
        self.gone = False
        self.refuse: Exception | None = None
        self.head: tuple[int, Headers] | None = None
        self.pieces: list[bytes] = []
        self.complete = False
        self.tasks: list[asyncio.Task[None]] = []  # what `go_on` was given
        self.task_of: dict[Exchange, asyncio.Task[None]] = {}
        self.is_draining = asyncio.Event()  # set while somebody waits in drain
        self._taken = asyncio.Event()

    # ---- what the test looks at ----

    @property
    def body(self) -> bytes:
        """All pieces of body so far, the one that left with the head included."""
        return b"".join(self.pieces)

    @property
    def status(self) -> int | None:
        return self.head[0] if self.head else None

    def header(self, name: bytes) -> list[bytes]:
        """Every value of the response's *name*, in order."""
        return [value for key, value in (self.head[1] if self.head else []) if key.lower() == name]

    def count(self, name: str) -> int:
        """How often *name* was called."""
        return sum(1 for call in self.calls if call[0] == name)

    # ---- what the test makes happen ----

    def take(self) -> None:
        """The slow client took everything."""
        self.writable = True
        self._taken.set()

    def leave(self) -> None:
        """The client is gone: waiting drains raise, and so do later ones."""
        self.gone = True
        self._taken.set()

    # ---- Wire ----

    def send_continue(self) -> None:
        self.calls.append(("continue",))

    def send_head(self, status: int, headers: Headers, body: bytes, more: bool) -> None:
        self._check()
        self.calls.append(("head", status, list(headers), body, more))
        self.head = (status, list(headers))
        self._piece(body, more)

    def send_body(self, data: bytes, more: bool) -> None:
        self._check()
        self.calls.append(("body", data, more))
        self._piece(data, more)

    def send_interim(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._check()
        self.calls.append(("interim", status, list(headers)))

    async def send_file(self, file: int, offset: int, count: int) -> None:
        self._check()
        self.calls.append(("file", offset, count))
        await self.drain()
        data = os.pread(file, count, offset)
        self._piece(data, True)
        if len(data) < count:
            raise ResponseError("the file is too short")

    def send_trailers(self, trailers: Iterable[tuple[bytes, bytes]]) -> None:
        self._check()
        self.calls.append(("trailers", list(trailers)))
        self.complete = True

    def go_on(self, exchange: Exchange, coroutine: Coroutine[Any, Any, None]) -> None:
        self.calls.append(("go_on",))
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.append(task)
        self.task_of[exchange] = task

    def conclude(self, exchange: Exchange, error: BaseException | None) -> None:
        self.calls.append(("conclude", error))

    def send_at_once(self) -> None:
        self.calls.append(("at once",))

    def is_writable(self) -> bool:
        return self.writable

    async def drain(self) -> None:
        self.calls.append(("drain",))
        self._taken.clear()
        while not self.writable and not self.gone:
            self.is_draining.set()
            await self._taken.wait()
            self._taken.clear()
        self.is_draining.clear()
        if self.gone:
            raise ClientDisconnected("the client went away before its response was complete")

    def pause_body(self) -> None:
        self.calls.append(("pause",))

    def resume_body(self) -> None:
        self.calls.append(("resume",))

    def abort(self) -> None:
        self.calls.append(("abort",))

    # ---- inside ----

    def _check(self) -> None:
        if self.refuse is not None:
            error, self.refuse = self.refuse, None
            raise error
        if self.gone:
            raise ClientDisconnected("the client went away before its response was complete")

    def _piece(self, data: bytes, more: bool) -> None:
        if data:
            self.pieces.append(data)
        self.complete = not more


ExchangeFor = Callable[..., Exchange]


@pytest.fixture
def wire() -> FakeWire:
    """The wire under the exchanges of `exchange_for`."""
    return FakeWire()


@pytest.fixture
def exchange_for(wire: FakeWire) -> ExchangeFor:
    """Build an exchange on *wire*: `exchange_for("POST", "/a%20b?x=1", headers=[...], body=[b"ab", b"c"])`.

    *body* is the request's pieces, fed and ended at once; None with a
    *content_length* or *chunked* leaves feeding to the test. `host` is added unless given.
    """

    def build(
        method: str = "GET",
        target: str = "/",
        *,
        headers: Iterable[tuple[bytes, bytes]] = (),
        body: bytes | Iterable[bytes] | None = None,
        content_length: int | None = None,
        chunked: bool = False,
        version: str = "1.1",
        expect_continue: bool = False,
        client: tuple[str, int] | None = ("192.0.2.7", 40123),
        server: tuple[str, int | None] | None = ("127.0.0.1", 8000),
        scheme: str = "http",
    ) -> Exchange:
        pieces = [body] if isinstance(body, bytes) else list(body or ())
        if body is not None and not chunked and content_length is None:
            content_length = sum(map(len, pieces))
        fields: Headers = list(headers)
        names = {name for name, _ in fields}
        if b"host" not in names:
            fields.insert(0, (b"host", b"example.org"))
        if content_length is not None and b"content-length" not in names:
            fields.append((b"content-length", b"%d" % content_length))
        if chunked and b"transfer-encoding" not in names:
            fields.append((b"transfer-encoding", b"chunked"))
        path, _, query = target.partition("?")
        request = Request(
            method=method,
            target=target.encode(),
            path=path.encode(),
            query=query.encode(),
            version=version,
            headers=fields,
            content_length=content_length,
            chunked=chunked,
            expect_continue=expect_continue,
        )
        exchange = Exchange(request, wire, client, server, scheme)
        if body is not None:
            for piece in pieces:
                if piece:
                    exchange.feed(piece)
            exchange.feed_end()
        return exchange

    return build
