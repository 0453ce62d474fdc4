"""One WebSocket of a worker: between a transport, `protocol.session` and an application.

It begins inside an `HTTPConnection`, which stays the transport's protocol until the
application accepts: a refusal and a denial are ordinary responses. With the 101 the
transport changes hands, and from then on this is a connection of the worker like
any other: the sweep knows its deadline, the drain closes it, and the write deadline
of HTTP holds for it too.

Both directions are bounded. An application that does not receive stops the socket;
a client that does not take stops the application, and is not read from either, since
what it sends may ask for more: a ping is answered.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from prefork.errors import ClientDisconnected, GatewayError, MissingExtra, WebSocketDisconnected
from prefork.gateway.exchange import Exchange
from prefork.gateway.websocket_exchange import INTERNAL_ERROR, LOST, State, WebSocketExchange, WebSocketGateway
from prefork.protocol import websocket as protocol
from prefork.protocol.events import Headers
from prefork.protocol.websocket import HandshakeRefused
from prefork.worker.deadlines import LINGER, NEVER

if TYPE_CHECKING:
    from prefork.protocol.session import Closed, Session
    from prefork.worker.connection import HTTPConnection
    from prefork.worker.service import Service

log = logging.getLogger("prefork")

GOING_AWAY = 1012  # "service restart": clients may come back at once, and will meet another worker

# For the client's part of the closing handshake, in seconds; half of what the websockets library waits.
CLOSE_TIMEOUT = 5.0

# Above this the application waits for the client. asyncio's own 64 KB is less than one message of 64 KB
# with its header, so that each of them would pause and resume.
WRITE_HIGH_WATER = 256 * 1024

SWITCHING = 101
NOT_IMPLEMENTED = 501


@dataclass(slots=True)
class WebSockets:
    """What all WebSockets of one worker share."""

    gateway: WebSocketGateway
    max_size: int  # of a message, in bytes
    compression: bool
    ping_interval: float  # seconds; `inf` for none
    ping_timeout: float
    server: bytes  # the line of that field
    is_explained: bool = False  # that the extra is missing


async def upgrade(http: HTTPConnection, exchange: Exchange, service: Service, settings: WebSockets) -> None:
    """Run the WebSocket that *exchange* of *http* asks for to its end. It takes the HTTP gateway's place.

    Until it is open, what the application raises comes out as it is.
    """
    try:
        handshake = protocol.check(exchange.request)
        sessions = protocol.load_sessions()
    except HandshakeRefused as refused:
        _answer(exchange, refused.status, refused.headers, str(refused))
        return
    except MissingExtra as missing:
        if not settings.is_explained:
            settings.is_explained = True
            log.warning("a WebSocket was asked for: %s", missing)
        _answer(exchange, NOT_IMPLEMENTED, [], "WebSockets are not served here")
        return
    wire = WebSocketConnection(http, service, settings, sessions)
    del http  # while this waits, nothing of HTTP is held
    websocket = WebSocketExchange(exchange, handshake, wire)
    try:
        await settings.gateway(websocket)
    except BaseException as error:
        if websocket.state is not State.OPEN and not exchange.responded:
            raise
        _end(websocket, error)
        if isinstance(error, asyncio.CancelledError):
            raise


def _answer(exchange: Exchange, status: int, headers: Headers, reason: str) -> None:
    exchange.start(status, [*headers, (b"content-type", b"text/plain; charset=us-ascii")])
    exchange.send(reason.encode("ascii", "backslashreplace") + b"\n", False)


def _end(websocket: WebSocketExchange, error: BaseException) -> None:
    """The application raised after it was open, or after it was over."""
    target = websocket.exchange.request.target.decode("latin-1")
    if isinstance(error, asyncio.CancelledError):
        log.warning("WebSocket %s was cancelled", target)
    elif isinstance(error, ClientDisconnected) or _stems_from_disconnect(error):
        log.debug("WebSocket %s was left by its client", target)
    else:
        log.error("WebSocket %s failed", target, exc_info=error)
    websocket.fail()


class WebSocketConnection(asyncio.Protocol):
    """The transport's protocol from the 101 on; before it only what the application may call."""

    __slots__ = (
        "__weakref__",
        "_drained",
        "_exchange",
        "_http",
        "_is_closing",
        "_is_heard",
        "_is_over",
        "_is_pinged",
        "_is_queue_full",
        "_is_reading",
        "_service",
        "_session",
        "_sessions",
        "_settings",
        "_transport",
        "_unwritten",
        "deadline",
    )

    def __init__(self, http: HTTPConnection, service: Service, settings: WebSockets, sessions: Any) -> None:
        self.deadline = NEVER  # on the loop's clock; see `Sweep`
        self._http: HTTPConnection | None = http  # until the 101
        self._service = service
        self._settings = settings
        self._sessions = sessions
        self._session: Session = cast("Session", None)  # from the 101 on, as the two below
        self._exchange: WebSocketExchange = cast(WebSocketExchange, None)
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._is_reading = True
        self._is_queue_full = False
        self._is_closing = False  # our close frame is sent
        self._is_over = False  # all is said: nothing is read but the end
        self._is_heard = True  # something came since the deadline was set
        self._is_pinged = False
        self._drained: asyncio.Future[None] | None = None  # set while the client is behind
        self._unwritten = 0  # the transport's buffer when the write deadline was last set

    # ---- the wire of the exchange ----

    def open(self, exchange: WebSocketExchange, subprotocol: str | None, headers: Headers) -> None:
        http, service, settings = self._http, self._service, self._settings
        assert http is not None
        agreed = self._sessions.negotiate(exchange.handshake.extensions) if settings.compression else None
        answer = protocol.switching(
            exchange.handshake,
            subprotocol=subprotocol,
            extensions=agreed and agreed[0],
            headers=headers,
            date=service.date,
            server=settings.server,
        )
        self._transport, unread = http.switch(answer)
        self._http = None
        exchange.exchange.status, exchange.exchange.responded = SWITCHING, True
        self._exchange = exchange
        self._session = self._sessions.Session(settings.max_size, agreed and agreed[1])
        service.connections.add(self)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        self._transport.set_protocol(self)
        self._await_client()
        if unread:
            self.data_received(unread)
        if service.is_draining:
            service.loop.call_soon(self.drain_connection)

    def send(self, data: str | bytes) -> None:
        session, transport = self._session, self._transport
        if transport.is_closing():  # it would take the message, and drop it; `connection_lost` may be long in coming
            self._exchange.feed_end(LOST, "")
            raise WebSocketDisconnected(LOST)
        try:
            frame = session.text(data) if type(data) is str else session.binary(cast(bytes, data))
        except UnicodeEncodeError as exc:
            raise GatewayError(f"a message cannot be sent as UTF-8: {exc.reason}") from exc
        if isinstance(frame, bytes):
            transport.write(frame)
        else:
            # Not `writelines`: since CPython 3.12 asyncio's never calls `pause_writing`.
            for part in frame:
                transport.write(part)

    def is_writable(self) -> bool:
        return self._drained is None

    async def drain(self) -> None:
        if self._drained is not None:
            await asyncio.shield(self._drained)

    def close(self, code: int, reason: str) -> None:
        frame = self._session.close(code, reason)
        if frame and not self._transport.is_closing():
            self._transport.write(frame)
        self._is_closing = True
        self._is_queue_full = False
        self._await_client()
        self._advance()

    def resume_messages(self) -> None:
        self._is_queue_full = False
        self._advance()

    # ---- the transport's callbacks ----

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True
        self.deadline = NEVER
        self._exchange.feed_end(LOST, "")
        self._release_writers()
        self._service.leave(self)
        self._service.count_closed()

    def data_received(self, data: bytes) -> None:
        self._is_heard = True
        self._session.receive_data(data)
        self._advance()

    def eof_received(self) -> None:
        """Without a close frame it is a loss; the transport closes by itself."""

    def pause_writing(self) -> None:
        self._drained = self._service.loop.create_future()
        self._regulate_reading()
        self._await_client()

    def resume_writing(self) -> None:
        self._release_writers()
        self._await_client()
        self._advance()

    # ---- reading ----

    def _advance(self) -> None:
        """Take messages until there is none, or enough of them."""
        session, feed = self._session, self._exchange.feed
        while not (self._is_queue_full or self._is_over):
            event = session.next_event()
            if event is None:
                break
            if isinstance(event, str | bytes):
                self._is_queue_full = not feed(event)
            else:
                self._is_over = True
                if self._exchange.has_messages:
                    # The application, which was woken for them, gets one turn to answer them before our close frame.
                    self._service.loop.call_soon(self._end, event)
                else:
                    self._end(event)
                return
        replies = session.take_replies()
        if replies:
            self._transport.write(replies)
        if self._is_reading is (self._is_queue_full or self._drained is not None):
            self._regulate_reading()

    def _regulate_reading(self) -> None:
        wanted = self._is_over or not (self._is_queue_full or self._drained is not None)
        if wanted == self._is_reading or self._transport.is_closing():
            return
        self._is_reading = wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    # ---- the end ----

    def _end(self, closed: Closed) -> None:
        """The client has closed, or broken the protocol; what it has to be told is with the session."""
        self._is_over = True
        transport = self._transport
        self._exchange.feed_end(closed.code, closed.reason)
        if transport.is_closing():
            return
        transport.write(self._session.take_replies())
        if closed.is_failure:
            log.info("a WebSocket of %s was closed with %d: %s", self._describe_client(), closed.code, closed.reason)
            # It may still be sending. Closed with unread bytes, the kernel's RST could overtake our close frame.
            if transport.can_write_eof():
                transport.write_eof()
        else:
            transport.close()
        self._regulate_reading()
        self._await_client()

    def drain_connection(self) -> None:
        """The worker leaves: so does this."""
        if not self._is_closing and not self._is_over:
            self.close(GOING_AWAY, "service restart")
            self._exchange.feed_end(GOING_AWAY, "service restart")

    def abort(self) -> None:
        self._transport.abort()

    # ---- deadlines ----

    def _await_client(self) -> None:
        """Decide how long to wait for its next sign of life."""
        now = self._service.loop.time()
        self._is_pinged = False
        if self._drained is not None:
            self._unwritten = self._transport.get_write_buffer_size()
            self.deadline = now + self._service.timeouts.write
        elif self._is_over:
            self.deadline = now + LINGER
        elif self._is_closing:
            self.deadline = now + CLOSE_TIMEOUT
        else:
            self._is_heard = False
            self.deadline = now + self._settings.ping_interval

    def on_deadline(self, now: float) -> None:
        if self._drained is not None:
            self._check_written()
        elif self._is_over or self._is_closing:
            self.abort()
        elif self._is_heard or not self._is_reading:  # held back by us, it may have been answering all the time
            self._await_client()
        elif self._is_pinged:
            self._give_up()
        else:
            self._is_pinged = True
            self.deadline = now + self._settings.ping_timeout
            self._transport.write(self._session.ping())

    def _check_written(self) -> None:
        """A slow client is served as long as it takes something in each interval."""
        unwritten = self._transport.get_write_buffer_size()
        if unwritten >= self._unwritten:
            log.info("aborted a WebSocket of %s: nothing was taken in time", self._describe_client())
            self.abort()
        else:
            self._await_client()

    def _give_up(self) -> None:
        log.info("aborted a WebSocket of %s: no answer to a ping", self._describe_client())
        self.close(INTERNAL_ERROR, "no answer to a ping")
        self._exchange.feed_end(LOST, "no answer to a ping")
        self.abort()

    # ---- the rest ----

    def _release_writers(self) -> None:
        if self._drained is not None:
            drained, self._drained = self._drained, None
            if not drained.done():
                drained.set_result(None)

    def _describe_client(self) -> str:
        client = self._exchange.exchange.client
        return "a client on a unix socket" if client is None else f"{client[0]} port {client[1]}"


def _stems_from_disconnect(error: BaseException) -> bool:
    """True for what a framework makes of our WebSocketDisconnected: a group of them, or an error raised from it."""
    if isinstance(error, BaseExceptionGroup):
        return all(_stems_from_disconnect(part) for part in error.exceptions)
    cause = error.__cause__ or (None if type(error).__module__ == "builtins" else error.__context__)
    return isinstance(error, WebSocketDisconnected) or (cause is not None and _stems_from_disconnect(cause))
