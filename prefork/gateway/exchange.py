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
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any, Protocol

from prefork.errors import ClientDisconnected, GatewayError
from prefork.protocol.events import Request
from prefork.protocol.response import Field, FieldLines, field_lines

# Pieces the application has not read yet, in bytes: at the high-water mark the wire stops
# reading from the socket, at the low one it goes on. Both as asyncio's own for writing
# (low is a quarter of high), so that a steady upload does not pause and resume at each piece.
BODY_HIGH_WATER = 64 * 1024
BODY_LOW_WATER = BODY_HIGH_WATER // 4


class Wire(Protocol):
    """What a connection offers to the exchange it carries. Only the event loop's thread calls it."""

    def send_continue(self) -> None:
        """Answer `Expect: 100-continue`, if it was asked for and is not answered yet."""

    def send_interim(self, status: int, headers: Iterable[Field]) -> None:
        """An interim response before the final one. Raises ResponseError for what HTTP forbids."""

    def send_head(self, status: int, headers: FieldLines, body: bytes, more: bool) -> None:
        """Head and first piece in one write. Raises ResponseError for what HTTP forbids."""

    def send_body(self, data: bytes, more: bool) -> None:
        """The next piece. Raises ResponseError for more or fewer bytes than announced."""

    async def send_file(self, file: int, offset: int, count: int) -> None:
        """The next piece, *count* bytes of the descriptor *file* from *offset*; returns when they are with the system.

        Raises ResponseError as `send_body` and if the file is too short, OSError if it cannot be
        read, ClientDisconnected. Whatever it raises once it has begun, the connection is cut.
        """

    def send_trailers(self, trailers: FieldLines) -> None:
        """The end of the response, with *trailers* where the client takes them."""

    def send_at_once(self) -> None:
        """From now on, until the response is complete, each piece is with the kernel before `send_body` returns.

        As far as the kernel takes it, and TLS lets us; what is left over makes the wire not writable.
        """

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

    def go_on(self, exchange: Exchange, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run *coroutine*, the rest of what runs *exchange*, in a task; what it raises is treated alike."""

    def conclude(self, exchange: Exchange, error: BaseException | None) -> None:
        """What ran *exchange* has returned, or raised *error*: the door for applications."""

    def abort(self) -> None:
        """Cut the connection, so that a truncated body cannot pass for a whole one."""


class Exchange:
    """A request, the body still to come, and the response being made."""

    # What most exchanges never change stands here: to store it in each would cost a third of making one.
    status = 0  # 0: the application has not started its response
    responded = False  # the whole response is with the transport
    _head: FieldLines | None = None  # started, but not sent yet
    _has_sent_head = False
    _body: deque[bytes] | None = None  # pieces that came and were not read
    _buffered = 0  # bytes of them
    _paused = False
    _gone = False
    tls: dict[str, Any] | None = None  # what ASGI's extension of that name says
    _waiter: asyncio.Future[None] | None = None

    def __init__(
        self,
        request: Request,
        wire: Wire,
        client: tuple[str, int] | None,
        server: tuple[str, int | None] | None,
        scheme: str,
    ) -> None:
        self.request = request
        self.client = client
        self.server = server
        self.scheme = scheme
        self.wire = wire
        self._received_all = not request.has_body

    # ---- the wire feeds ----

    def feed(self, data: bytes) -> None:
        """A piece of the body arrived. After the response nobody reads it: it is dropped."""
        if self.responded:
            return
        if self._body is None:
            self._body = deque()
        self._body.append(data)
        self._buffered += len(data)
        if self._buffered >= BODY_HIGH_WATER and not self._paused:
            self._paused = True
            self.wire.pause_body()
        self._wake()

    def feed_whole(self, data: bytes) -> None:
        """The body arrived with its head. Before anybody could read."""
        self._body = deque((data,))
        self._buffered = len(data)
        self._received_all = True

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
            self.wire.send_continue()
            await self._wait()
        if not self._body:
            return b""
        data = self._body.popleft()
        self._buffered -= len(data)
        if self._buffered <= BODY_LOW_WATER:
            self._resume()
        return data

    def take_last(self) -> bytes | None:
        """The last piece of the body, if it is there, b"" after it; None if there is more to wait for, or to read before."""
        if not self._received_all:
            return None
        if not self._body:
            return b""
        return self.take_whole() if len(self._body) == 1 else None

    def take_whole(self) -> bytes | None:
        """What is left of the body, if all of it has arrived; None if not."""
        if not self._received_all:
            return None
        pieces, self._body = self._body, None
        if pieces is None:
            return b""
        self._buffered = 0
        self._resume()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def disconnected(self) -> None:
        """Wait until the client is gone or the response complete (ASGI's `http.disconnect`)."""
        while not self._gone and not self.responded:
            await self._wait()

    # ---- the gateway answers ----

    def inform(self, status: int, headers: Iterable[Field]) -> None:
        """Send an interim response (103 with its links, RFC 8297). Raises as `start` and `send`."""
        if self.status:
            raise GatewayError(f"interim status {status} comes too late: the response has started with {self.status}")
        self.wire.send_interim(status, headers)

    def start(self, status: int, headers: Iterable[Field]) -> None:
        """Begin the response; it leaves with the first piece of body. Only an unsent one may be replaced.

        Raises ResponseError for what is no field.
        """
        if self._has_sent_head:
            raise GatewayError(f"the response has already started with status {self.status}")
        self._head = field_lines(headers)
        self.status = status

    @property
    def has_started(self) -> bool:
        return self.status != 0

    @property
    def has_sent_head(self) -> bool:
        """The head is with the transport, so nothing about it can be changed."""
        return self._has_sent_head

    def send(self, data: bytes, more: bool) -> bool:
        """Send a piece of body, the head before it; *more* false completes the response.

        True if the client is slower than the application: `drain` before the next
        piece, of which there is none after the last. Raises ClientDisconnected if the
        client is gone, GatewayError out of turn and ResponseError for what HTTP forbids.
        """
        if self.responded or self._head is None:
            raise GatewayError(self._out_of_turn())
        # Whether the client can still read is the wire's to say: one that closed its sending half can.
        if self._has_sent_head:
            self.wire.send_body(data, more)
        else:
            # A head that HTTP forbids leaves nothing on the wire, so it stays unsent and `fail` can still answer 500.
            self.wire.send_head(self.status, self._head, data, more)
            self._has_sent_head = True
        if more:
            return not self.wire.is_writable()
        self.responded = True
        if self._paused or self._waiter is not None:
            self._release()
        return False

    def send_at_once(self) -> None:
        """From now on each piece is with the kernel before `send` returns, as far as it takes it (PEP 3333, "Buffering")."""
        self.wire.send_at_once()

    async def drain(self) -> None:
        """Wait until the client has taken enough. Raises ClientDisconnected when it is gone."""
        await self.wire.drain()

    def send_trailers(self, trailers: Iterable[Field]) -> None:
        """Complete the response with fields behind its body, where the client takes them. Raises as `send`."""
        lines = field_lines(trailers)
        if not self._has_sent_head:
            self.send(b"", True)
        if self.responded or self._head is None:
            raise GatewayError(self._out_of_turn())
        self.wire.send_trailers(lines)
        self.responded = True
        self._release()

    async def write(self, data: bytes, more: bool) -> None:
        """`send`, then wait while the client is slower than the application."""
        if self.send(data, more):
            await self.wire.drain()

    async def send_file(self, file: int, offset: int, count: int, more: bool) -> None:
        """`write` for *count* bytes of the descriptor *file* from *offset*, past the interpreter where the system can.

        Raises ResponseError too if the file is too short, and OSError if it cannot be read.
        """
        if self.responded or self._head is None:
            raise GatewayError(self._out_of_turn())
        if not self._has_sent_head:
            if not more and self._head.length is None:
                self._head = field_lines((*self._head, (b"content-length", b"%d" % count)))
            self.send(b"", True)
        head, self._head = self._head, None  # nothing else may be sent meanwhile
        try:
            await self.wire.send_file(file, offset, count)
        finally:
            self._head = head
        if not more:
            self.send(b"", False)

    def fail(self) -> None:
        """The application failed: 500 if nothing was sent, otherwise cut the connection. Never raises."""
        if self.responded:
            return
        if self.has_sent_head:
            self.wire.abort()
            return
        self.start(500, [(b"content-type", b"text/plain; charset=utf-8")])
        with suppress(ClientDisconnected):  # nobody is left to be told
            self.send(b"Internal Server Error", False)

    def go_on(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """For a gateway that began without a task: run *coroutine*, the rest, in one."""
        self.wire.go_on(self, coroutine)

    # ---- inside ----

    def _release(self) -> None:
        """The response is complete."""
        self._paused = False  # the wire may be in its next exchange, whose pause is not ours to end
        self._wake()

    def _out_of_turn(self) -> str:
        when = "after the response was complete" if self.responded else "before the response was started"
        return (
            f"a piece of body was sent {when if self.responded or not self.status else 'while a file was being sent'}"
        )

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self.wire.resume_body()

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
