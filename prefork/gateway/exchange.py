"""One request and its response, as the gateways see it.

An `Exchange` stands between a gateway, which awaits and writes, and a *wire*, which
owns the transport. Body pieces are fed in by the wire and read out by the
application; when the application falls behind, the wire is told to stop reading,
so the memory of an upload is bounded whatever its size. The response head waits
for the first piece of body, so that an ordinary answer is one write.

The exchange decides nothing about bytes on the wire: framing, `Connection: close`
and HEAD are the protocol's business.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Protocol

from prefork.errors import ClientDisconnected, GatewayError
from prefork.protocol.events import Headers, Request

# Pieces the application has not read yet, in bytes: at the high-water mark the wire stops
# reading from the socket, at the low one it goes on. Both as asyncio's own for writing
# (low is a quarter of high), so that a steady upload does not pause and resume at each piece.
BODY_HIGH_WATER = 64 * 1024
BODY_LOW_WATER = BODY_HIGH_WATER // 4


class Wire(Protocol):
    """What a connection offers to the exchange it carries. Only the event loop's thread calls it."""

    def send_continue(self) -> None:
        """Answer `Expect: 100-continue`, if it was asked for and is not answered yet."""

    def send_head(self, status: int, headers: Headers, body: bytes, more: bool) -> None:
        """Head and first piece in one write. Raises ResponseError for what HTTP forbids."""

    def send_body(self, data: bytes, more: bool) -> None:
        """The next piece. Raises ResponseError for more or fewer bytes than announced."""

    def is_writable(self) -> bool:
        """False above the transport's high-water mark: `await drain()` before the next piece."""

    async def drain(self) -> None:
        """Wait until the client has taken enough. Raises ClientDisconnected when it is gone."""

    def pause_body(self) -> None:
        """The application is behind: read no more of the request's body.

        Holds until `resume_body`, or until the response is complete: from then on
        the application reads nothing, and what is left is the wire's to drain or cut.
        """

    def resume_body(self) -> None:
        """The application caught up, or the body is complete. Called once after each pause."""

    def abort(self) -> None:
        """Cut the connection, so that a truncated body cannot pass for a whole one."""


class Exchange:
    """A request, the body still to come, and the response being made."""

    __slots__ = (
        "_body",
        "_buffered",
        "_gone",
        "_head",
        "_paused",
        "_received_all",
        "_waiter",
        "_wire",
        "client",
        "request",
        "responded",
        "scheme",
        "server",
        "status",
    )

    def __init__(
        self,
        request: Request,
        wire: Wire,
        *,
        client: tuple[str, int] | None,
        server: tuple[str, int | None] | None,
        scheme: str,
    ) -> None:
        self.request = request
        self.client = client
        self.server = server
        self.scheme = scheme
        self.status = 0  # 0: the application has not started its response
        self.responded = False  # the whole response is with the transport
        self._wire = wire
        self._head: tuple[int, Headers] | None = None  # started, but not sent yet
        self._body: deque[bytes] = deque()
        self._buffered = 0
        self._paused = False
        self._received_all = not request.has_body
        self._gone = False
        self._waiter: asyncio.Future[None] | None = None

    # ---- the wire feeds ----

    def feed(self, data: bytes) -> None:
        """A piece of the body arrived. After the response nobody reads it: it is dropped."""
        if self.responded:
            return
        self._body.append(data)
        self._buffered += len(data)
        if self._buffered >= BODY_HIGH_WATER and not self._paused:
            self._paused = True
            self._wire.pause_body()
        self._wake()

    def feed_end(self) -> None:
        """The body is complete, so nothing more can pile up; the wire may watch for the client's leaving again."""
        self._received_all = True
        self._resume()
        self._wake()

    def disconnect(self) -> None:
        """The client sends nothing more, most likely it is gone: readers get ClientDisconnected, waiters wake."""
        self._gone = True
        self._wake()

    # ---- the gateway reads ----

    @property
    def is_disconnected(self) -> bool:
        return self._gone

    @property
    def has_unread_body(self) -> bool:
        """False once the body is complete and its last piece was handed out."""
        return bool(self._body) or not self._received_all

    async def read(self) -> bytes:
        """The next piece of the body, b"" at its end.

        A call that has to wait answers `Expect: 100-continue` first. Pieces that
        arrived are handed out whatever happened since. Raises ClientDisconnected if
        the client went away before the body was complete, or if the response was
        completed meanwhile, because then the rest of the body is never fed.
        """
        while not self._body and not self._received_all:
            if self._gone:
                raise ClientDisconnected("the client went away before its request was complete")
            if self.responded:
                raise ClientDisconnected("the exchange is over: its response was complete before its request")
            self._wire.send_continue()
            await self._wait()
        if not self._body:
            return b""
        data = self._body.popleft()
        self._buffered -= len(data)
        if self._buffered <= BODY_LOW_WATER:
            self._resume()
        return data

    async def disconnected(self) -> None:
        """Wait until the client is gone or the response complete (ASGI's `http.disconnect`)."""
        while not self._gone and not self.responded:
            await self._wait()

    # ---- the gateway answers ----

    def start(self, status: int, headers: Headers) -> None:
        """Begin the response; it leaves with the first piece of body. Only an unsent one may be replaced."""
        if self.has_sent_head:
            raise GatewayError(f"the response has already started with status {self.status}")
        self.status = status
        self._head = (status, headers)

    @property
    def has_started(self) -> bool:
        return self.status != 0

    @property
    def has_sent_head(self) -> bool:
        """The head is with the transport, so nothing about it can be changed."""
        return self.status != 0 and self._head is None

    def send(self, data: bytes, more: bool) -> None:
        """Send a piece of body, the head before it; *more* false completes the response.

        Raises ClientDisconnected if the client is gone, GatewayError out of turn and
        ResponseError for what HTTP forbids. Does not wait: see `write`.
        """
        if self.status == 0:
            raise GatewayError("a piece of body was sent before the response was started")
        if self.responded:
            raise GatewayError("a piece of body was sent after the response was complete")
        # Whether the client can still read is the wire's to say: one that closed its sending half can.
        if self._head is not None:
            # A head that HTTP forbids leaves nothing on the wire, so it stays unsent and `fail` can still answer 500.
            self._wire.send_head(*self._head, data, more)
            self._head = None
        else:
            self._wire.send_body(data, more)
        if not more:
            self.responded = True
            self._paused = False  # the wire may be in its next exchange, whose pause is not ours to end
            self._wake()

    async def write(self, data: bytes, more: bool) -> None:
        """`send`, then wait while the client is slower than the application."""
        self.send(data, more)
        if not self._wire.is_writable():
            await self._wire.drain()

    def fail(self) -> None:
        """The application failed: 500 if nothing was sent, otherwise cut the connection. Never raises."""
        if self.responded:
            return
        if self.has_sent_head:
            self._wire.abort()
            return
        self.start(500, [(b"content-type", b"text/plain; charset=utf-8")])
        with suppress(ClientDisconnected):  # nobody is left to be told
            self.send(b"Internal Server Error", False)

    # ---- inside ----

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self._wire.resume_body()

    async def _wait(self) -> None:
        """Until something changes. Several readers may wait at once (ASGI allows it)."""
        if self._waiter is None:
            self._waiter = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._waiter)

    def _wake(self) -> None:
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            if not waiter.done():
                waiter.set_result(None)
