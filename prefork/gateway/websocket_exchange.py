"""A WebSocket between an application, which awaits and sends, and a wire, which owns the transport.

It begins as an HTTP exchange: until the application accepts, it may answer with any
HTTP response instead. Messages wait in a queue that is bounded in number and bytes;
when it is full the wire stops reading. How an application speaks to it is the business
of `asgi_websocket` and `websocket`.

The one fact: what the application does out of turn is a GatewayError in its own
frame, and what the client did to it is a WebSocketDisconnected, which is an OSError.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Protocol

from prefork.errors import ClientDisconnected, GatewayError, ResponseError, WebSocketDisconnected
from prefork.gateway.exchange import Exchange
from prefork.protocol.events import Headers
from prefork.protocol.websocket import Handshake

# Messages that the application has not received yet. At the high-water mark, in messages or in bytes,
# the wire stops reading; at the low one it goes on.
QUEUE_HIGH_WATER = 64
QUEUE_LOW_WATER = QUEUE_HIGH_WATER // 4
QUEUE_HIGH_WATER_BYTES = 64 * 1024
QUEUE_LOW_WATER_BYTES = QUEUE_HIGH_WATER_BYTES // 4

# What may be sent without a wait before the loop gets a turn, in bytes, of which each message counts as some more.
# A client that takes everything at once never makes a `send` wait: nobody else would be served, nor its end be heard of.
TURN_BYTES = 128 * 1024
TURN_BYTES_PER_MESSAGE = 2 * 1024

NORMAL = 1000
LOST = 1006
INTERNAL_ERROR = 1011

FORBIDDEN = 403  # what the ASGI specification makes of a close before the accept


class WebSocketWire(Protocol):
    """What a connection offers to the WebSocket it carries. Only the event loop's thread calls it."""

    def open(self, exchange: WebSocketExchange, subprotocol: str | None, headers: Headers) -> None:
        """Send the 101 and take the connection over. Raises ResponseError, and ClientDisconnected."""

    def send(self, data: str | bytes) -> None:
        """Send one message. Does not wait. Raises WebSocketDisconnected once the transport is closing."""

    def is_writable(self) -> bool:
        """False above the transport's high-water mark: `await drain()` before the next message."""

    async def drain(self) -> None:
        """Wait until the client has taken enough, or is gone."""

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake; its end is the wire's to await."""

    def resume_messages(self) -> None:
        """The application caught up."""


class State(Enum):
    """Where a WebSocket is, as its application knows it."""

    CONNECTING = "asked for"
    OPEN = "accepted"
    DENYING = "denied, and the response is incomplete"
    OVER = "closed or denied by the application"


class WebSocketExchange:
    """A WebSocket: the request that asked for it, the messages that came, and how it ended."""

    __slots__ = (
        "_held",
        "_is_full",
        "_messages",
        "_turn",
        "_waiters",
        "_wire",
        "disconnected",
        "exchange",
        "handshake",
        "state",
        "subprotocol",
    )

    def __init__(self, exchange: Exchange, handshake: Handshake, wire: WebSocketWire) -> None:
        self.exchange = exchange
        self.handshake = handshake
        self.state = State.CONNECTING
        self.subprotocol: str | None = None
        self.disconnected: WebSocketDisconnected | None = None  # set once nothing more will come
        self._wire = wire
        self._messages: deque[str | bytes] = deque()
        self._held = 0  # their size
        self._is_full = False
        self._turn = TURN_BYTES  # what is left of it
        self._waiters: deque[asyncio.Future[None]] = deque()

    # ---- the wire feeds ----

    def feed(self, message: str | bytes) -> bool:
        """A message arrived. False: feed no more until `resume_messages`."""
        messages = self._messages
        messages.append(message)
        self._held += len(message)
        if self._waiters:
            self._wake()
        if self._held < QUEUE_HIGH_WATER_BYTES and len(messages) < QUEUE_HIGH_WATER:
            return True
        self._is_full = True
        return False

    def feed_end(self, code: int, reason: str) -> None:
        """Nothing more will come: the WebSocket is closed, or lost."""
        if self.disconnected is None:
            self.disconnected = WebSocketDisconnected(code, reason)
            while self._waiters:
                self._wake()

    @property
    def has_messages(self) -> bool:
        """The application has some to receive."""
        return bool(self._messages)

    # ---- the gateway converses ----

    def accept(self, subprotocol: str | None, headers: Headers) -> None:
        """Open the WebSocket. Raises GatewayError out of turn, and WebSocketDisconnected."""
        self._expect(State.CONNECTING, "accepted")
        try:
            self._wire.open(self, subprotocol, headers)
        except ResponseError as exc:
            raise GatewayError(f"the WebSocket cannot be accepted: {exc}") from exc
        except ClientDisconnected as exc:
            self.feed_end(LOST, "")
            raise WebSocketDisconnected(LOST) from exc
        self.state = State.OPEN
        self.subprotocol = subprotocol

    async def receive(self) -> str | bytes:
        """The next message. Raises WebSocketDisconnected after the last one."""
        messages = self._messages
        while not messages:
            if self.disconnected is not None:
                raise self._disconnection()
            if self.state is not State.OPEN:
                await self.exchange.disconnected()
                self.feed_end(LOST, "")
            else:
                await self._wait()
        message = messages.popleft()
        self._held -= len(message)
        if self._is_full and self._held <= QUEUE_LOW_WATER_BYTES and len(messages) <= QUEUE_LOW_WATER:
            self._is_full = False
            self._wire.resume_messages()
        return message

    async def send(self, data: str | bytes) -> None:
        """Send a message, and wait while the client is slower than the application.

        It goes out before any wait, so that the messages of several tasks keep their order.
        """
        if self.state is not State.OPEN:
            self._expect(State.OPEN, "sent to")
        if self.disconnected is not None:
            raise self._disconnection()
        wire = self._wire
        wire.send(data)
        self._turn -= len(data) + TURN_BYTES_PER_MESSAGE
        if self._turn > 0 and wire.is_writable():
            return
        self._turn = TURN_BYTES
        if wire.is_writable():
            await asyncio.sleep(0)
        else:
            await wire.drain()
        if self.disconnected is not None:
            raise self._disconnection()

    def close(self, code: int, reason: str) -> None:
        """Begin to close with *code*; unread messages are dropped. Before the accept it denies with 403."""
        if not is_closing_code(code):
            raise GatewayError(
                f"a WebSocket cannot be closed with {code!r}, allowed are 1000 to 1003, 1007 to 1014 and 3000 to 4999"
            )
        if self.state is State.CONNECTING:
            self.deny(FORBIDDEN, [(b"content-type", b"text/plain; charset=utf-8")], b"Forbidden")
            return
        self._expect(State.OPEN, "closed")
        if self.disconnected is not None:
            raise self._disconnection()
        self.state = State.OVER
        self._messages.clear()
        self._wire.close(code, reason)
        self.feed_end(code, reason)

    def deny(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer with a whole HTTP response instead of opening."""
        self._expect(State.CONNECTING, "denied")
        self.exchange.start(status, headers)
        self.state = State.OVER
        self.exchange.send(body, False)

    def finish(self) -> None:
        """The application has returned: close what it left open. Raises GatewayError if it neither accepted nor denied."""
        if self.state is State.OPEN and self.disconnected is None:
            self.close(NORMAL, "")
        elif self.state in (State.CONNECTING, State.DENYING) and not self.exchange.is_disconnected:
            raise GatewayError("the application returned without accepting or denying the WebSocket")

    def fail(self) -> None:
        """The application failed: 1011, or before the accept a 500. Never raises."""
        if self.state is not State.OPEN:
            self.exchange.fail()
        elif self.disconnected is None:
            self.close(INTERNAL_ERROR, "internal error")

    # ---- inside ----

    def _expect(self, state: State, done: str) -> None:
        if self.state is not state:
            raise GatewayError(f"the WebSocket cannot be {done}: it is {self.state.value}")

    def _disconnection(self) -> WebSocketDisconnected:
        assert self.disconnected is not None
        return WebSocketDisconnected(self.disconnected.code, self.disconnected.reason)

    async def _wait(self) -> None:
        """Until something came. Each receiver has a future of its own, so that cancelling one loses nothing."""
        self._turn = TURN_BYTES
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # woken and cancelled: the message is for the next one
                self._wake()
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            raise

    def _wake(self) -> None:
        waiters = self._waiters
        while waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


def is_closing_code(code: object) -> bool:
    """True for what a close frame may carry (RFC 6455, section 7.4, and the registry of IANA)."""
    if not isinstance(code, int) or isinstance(code, bool):
        return False
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


WebSocketGateway = Callable[[WebSocketExchange], Awaitable[None]]
