"""One HTTP/1.1 connection of a worker: between a transport, `protocol.Connection` and a gateway.

Bytes go down into the protocol, its events come up; requests become exchanges,
each run by the gateway in a task of its own. Memory per connection is bounded in
both directions: while a response is unfinished, or not taken, the next pipelined
request stays in the buffer; an application that reads slowly stops the socket, and a
client that reads slowly stops the application.

Errors leave by one door, `_run` for applications and `_refuse` for peers. What is
waited for, and how long, is decided in one place, `_rearm`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import cast

from prefork.errors import ClientDisconnected
from prefork.gateway.exchange import Exchange
from prefork.protocol.connection import Connection
from prefork.protocol.events import NEED_DATA, PAUSED, Closed, Data, EndOfMessage, Headers, Refusal, Request
from prefork.worker.deadlines import IDLE, LINGER, LINGER_WHILE_SENDING, NEVER, Awaited
from prefork.worker.service import Service, endpoint, local_endpoint

log = logging.getLogger("prefork")

# Bytes of pipelined requests to hold while a response is being made. Reading goes on up to
# here, because only a read notices that the client has left.
PIPELINE_LIMIT = 64 * 1024

# A body that the application did not read is read to its end and thrown away if that takes no
# more than this many bytes: cheaper than a new connection. Beyond it the connection is closed.
DISCARD_LIMIT = 256 * 1024


class HTTPConnection(asyncio.Protocol):
    """Made by the server for each accepted connection; lives as long as its transport."""

    def __init__(self, service: Service) -> None:
        self.deadline = NEVER  # on the loop's clock; see `Sweep`
        self._awaited = Awaited.APPLICATION
        self._service = service
        self._http = Connection(service.limits, server=service.server_header)
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # until connection_made
        self._client: tuple[str, int] | None = None
        self._server: tuple[str, int | None] | None = None
        self._scheme = "http"
        self._exchange: Exchange | None = None  # the one whose response is unfinished
        self._started_at = 0.0  # when its head was complete
        self._sent = 0  # bytes of its response's body
        self._discarded = 0  # bytes of body that nobody wanted
        self._is_advancing = False
        self._is_reading = True
        self._is_body_paused = False  # the application is behind
        self._is_lingering = False  # all is said; reading only until the peer closes
        self._linger_end = 0.0
        self._has_eof = False
        self._has_served = False
        self._is_lost = False
        self._drained: asyncio.Future[None] | None = None  # set while the client is behind
        self._unwritten = 0  # the transport's buffer when the write deadline was last set

    # ---- the transport's callbacks ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        get = transport.get_extra_info
        self._client = endpoint(get("peername"))
        self._server = local_endpoint(get("sockname"))
        self._scheme = "http" if get("sslcontext") is None else "https"
        self._service.connections.add(self)
        self._service.slot.opened += 1
        self._rearm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._rearm()
        self._service.leave(self)
        self._service.slot.closed += 1
        self._release_writers()
        if self._exchange is not None:
            # 499 is nginx's number for a client that left before its answer.
            self._log_access(self._exchange.request, self._exchange.status or 499)
            self._leave_exchange().disconnect()

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            if self._awaited is Awaited.CLOSE and not self._service.is_draining:
                self.deadline = min(self._service.loop.time() + LINGER, self._linger_end)
            return
        self._http.receive_data(data)
        self._advance()

    def eof_received(self) -> bool:
        """The peer has sent its last byte. It may still read, so what it asked for is answered."""
        self._has_eof = True
        if self._is_lingering:
            return False
        self._http.receive_data(b"")
        self._advance()
        # TLS transports close by themselves; for the others True keeps the writing side open.
        return self._scheme == "http" and (self._exchange is not None or self._is_behind)

    def pause_writing(self) -> None:
        self._drained = self._service.loop.create_future()
        self._rearm()

    def resume_writing(self) -> None:
        self._release_writers()
        self._rearm()
        self._advance()

    # ---- reading ----

    @property
    def _is_behind(self) -> bool:
        """The client does not take the answers it has: no further request is begun."""
        return self._drained is not None and self._exchange is None and not self._http.response_complete

    def _advance(self) -> None:
        """Take events until there is none. Not re-entrant: a response may complete inside."""
        if self._is_advancing:
            return
        self._is_advancing = True
        try:
            while not (self._is_lost or self._is_lingering or self._is_behind):
                event = self._http.next_event()
                if event is NEED_DATA or event is PAUSED:
                    break
                self._handle(event)
        finally:
            self._is_advancing = False
        if self._has_eof and self._exchange is not None:
            # Most likely the client is gone altogether; the application is told, and may finish all the same.
            self._exchange.disconnect()
        self._regulate_reading()
        self._rearm()

    def _handle(self, event: object) -> None:
        match event:
            case Request():
                self._begin(event)
            case Data():
                self._take_body(event.data)
            case EndOfMessage():
                if self._exchange is not None:
                    self._exchange.feed_end()
                else:
                    self._next_cycle()
            case Refusal():
                self._refuse(event)
            case Closed():
                if self._exchange is None:
                    self._transport.close()

    def _begin(self, request: Request) -> None:
        service = self._service
        exchange = Exchange(request, self, client=self._client, server=self._server, scheme=self._scheme)
        self._exchange = exchange
        self._has_served = True
        self._awaited, self.deadline = Awaited.APPLICATION, NEVER
        self._started_at = service.loop.time()
        self._sent = self._discarded = 0
        service.slot.in_flight += 1
        service.run(self._run(exchange))

    def _take_body(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.feed(data)
            self._rearm(progress=Awaited.BODY)
            return
        self._discarded += len(data)
        if self._discarded > DISCARD_LIMIT:
            self._linger()

    def _regulate_reading(self) -> None:
        if self._is_lost or self._has_eof or self._transport.is_closing():
            return
        is_full = self._http.buffered > PIPELINE_LIMIT and (self._exchange is not None or self._is_behind)
        wanted = self._is_lingering or not (self._is_body_paused or is_full)
        if wanted == self._is_reading:
            return
        self._is_reading = wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    # ---- the door for applications ----

    async def _run(self, exchange: Exchange) -> None:
        """Run the application on *exchange*; whatever it raises ends here."""
        try:
            await self._service.gateway(exchange)
        except asyncio.CancelledError:
            # The worker's drain is over, or the application cancelled itself.
            log.warning("%s was cancelled", _describe(exchange))
            exchange.fail()
            raise
        except ClientDisconnected:
            log.debug("%s was left by its client", _describe(exchange))
        except BaseException:  # sys.exit() in a handler must not take the worker with it
            log.exception("%s failed", _describe(exchange))
            exchange.fail()
        if self._exchange is exchange and not exchange.responded:
            self.abort()  # the application gave up because its client left; nothing will complete this

    # ---- the wire that exchanges write to ----

    def send_continue(self) -> None:
        data = self._http.send_continue()
        if data:
            self._transport.write(data)
            self._rearm()

    def send_head(self, status: int, headers: Headers, body: bytes, more: bool) -> None:
        self._check_present()
        if self._service.is_draining:
            self._http.close_after()
        data = self._http.send_head(status, headers, body, more, date=self._service.date())
        self._sent += len(body)
        self._transport.write(data)
        if not more:
            self._complete()

    def send_body(self, data: bytes, more: bool) -> None:
        self._check_present()
        framed = self._http.send_body(data, more)
        self._sent += len(data)
        if framed:
            self._transport.write(framed)
        if not more:
            self._complete()

    def is_writable(self) -> bool:
        return self._drained is None

    async def drain(self) -> None:
        if self._drained is not None:
            await asyncio.shield(self._drained)
        self._check_present()

    def pause_body(self) -> None:
        self._is_body_paused = True
        self._regulate_reading()
        self._rearm()

    def resume_body(self) -> None:
        self._is_body_paused = False
        self._regulate_reading()
        self._rearm()

    def abort(self) -> None:
        self._transport.abort()

    def _check_present(self) -> None:
        if self._is_lost or self._is_lingering or self._transport.is_closing():
            raise ClientDisconnected("the client went away before its response was complete")

    # ---- the end of an exchange ----

    def _complete(self) -> None:
        """The whole response is with the transport."""
        assert self._exchange is not None
        self._log_access(self._exchange.request, self._exchange.status)
        self._leave_exchange()
        if self._http.request_complete:
            self._next_cycle()
        elif self._has_eof or not self._http.keep_alive or self._http.wants_continue:
            self._linger()
        else:  # the rest of the body is discarded
            self._regulate_reading()
            self._rearm()

    def _leave_exchange(self) -> Exchange:
        assert self._exchange is not None
        exchange, self._exchange = self._exchange, None
        self._is_body_paused = False
        self._service.slot.in_flight -= 1
        self._service.slot.requests += 1
        return exchange

    def _next_cycle(self) -> None:
        if not self._http.keep_alive or self._service.is_draining:
            self._close()
            return
        self._http.start_next_cycle()
        self._advance()

    def _close(self) -> None:
        """Everything that was asked is answered: close, without destroying the answer."""
        if self._http.buffered:
            self._linger()
        else:
            self._transport.close()
            self._rearm()

    def _linger(self) -> None:
        """Say that we are done, and read on for a moment before closing."""
        if self._has_eof:
            self._transport.close()
        else:
            self._is_lingering = True
            self._linger_end = self._service.loop.time() + LINGER_WHILE_SENDING
            if self._transport.can_write_eof():  # TLS cannot; its answers carry their length
                self._transport.write_eof()
            self._regulate_reading()
        self._rearm()

    def _refuse(self, refusal: Refusal) -> None:
        """The peer broke HTTP: its status, then close."""
        log.info("refused a request of %s with %d: %s", self._describe_client(), refusal.status, refusal.reason)
        exchange = self._exchange
        if exchange is not None and exchange.has_sent_head:
            self.abort()
            return
        if self._http.response_complete:  # what is broken is a body that nobody wanted
            self._linger()
            return
        answer = self._http.refuse(refusal, date=self._service.date())
        self._sent = len(answer.partition(b"\r\n\r\n")[2])
        self._transport.write(answer)
        self._log_access(None if exchange is None else exchange.request, refusal.status)
        if exchange is None:
            self._service.slot.requests += 1
        else:
            self._leave_exchange().disconnect()
        self._linger()

    # ---- draining ----

    def drain_connection(self) -> None:
        """Finish the exchange in hand, or the head that has begun, and close."""
        if self._exchange is not None:
            self._http.close_after()
        elif self._awaited in IDLE or self._is_behind:
            self._close()

    # ---- deadlines ----

    def _rearm(self, progress: Awaited | None = None) -> None:
        """Decide what is waited for now. While that stays the same it keeps its deadline, unless it made *progress*."""
        awaited = self._look()
        if awaited is not self._awaited or awaited is progress:
            self._awaited = awaited
            self._unwritten = self._transport.get_write_buffer_size() if awaited is Awaited.WRITING else 0
            self.deadline = self._service.loop.time() + self._service.patience(awaited)

    def _look(self) -> Awaited:
        if self._is_lost:
            return Awaited.APPLICATION
        if self._drained is not None or self._transport.is_closing():
            return Awaited.WRITING
        if self._is_lingering:
            return Awaited.WRITING if self._transport.get_write_buffer_size() else Awaited.CLOSE
        if self._exchange is not None:
            is_due = not (self._http.request_complete or self._is_body_paused or self._has_eof)
            # A body that was not asked for by 100 Continue may well not come.
            return Awaited.BODY if is_due and not self._http.wants_continue else Awaited.APPLICATION
        if self._http.response_complete:
            return Awaited.REST
        if self._http.has_partial_head:
            return Awaited.HEAD
        return Awaited.NEXT_REQUEST if self._has_served else Awaited.FIRST_REQUEST

    def on_deadline(self, now: float) -> None:
        match self._awaited:
            case Awaited.FIRST_REQUEST | Awaited.NEXT_REQUEST:
                self._close()
            case Awaited.HEAD:
                self._refuse(Refusal(408, "the request's head did not arrive in time"))
            case Awaited.BODY:
                self._refuse(Refusal(408, "the request's body did not arrive in time"))
            case Awaited.REST:
                self._linger()
            case Awaited.CLOSE:
                self.abort()
            case Awaited.WRITING:
                self._check_written()

    def _check_written(self) -> None:
        """A slow client is served as long as it takes something in each interval."""
        unwritten = self._transport.get_write_buffer_size()
        if unwritten and unwritten >= self._unwritten:
            log.info("aborted a response to %s: nothing was taken in time", self._describe_client())
            self.abort()
        else:
            self._rearm(progress=Awaited.WRITING)

    # ---- the rest ----

    def _release_writers(self) -> None:
        if self._drained is not None:
            drained, self._drained = self._drained, None
            if not drained.done():
                drained.set_result(None)

    def _log_access(self, request: Request | None, status: int) -> None:
        """*request* None: it was refused before its head was understood."""
        access_log = self._service.access_log
        if access_log is None:
            return
        method, target, version = (
            ("-", b"-", "-") if request is None else (request.method, request.target, request.version)
        )
        seconds = 0.0 if request is None else self._service.loop.time() - self._started_at
        access_log.log(self._client, method, target, version, status, self._sent, seconds, self._service.worker_id)

    def _describe_client(self) -> str:
        return "a client on a unix socket" if self._client is None else f"{self._client[0]} port {self._client[1]}"


def _describe(exchange: Exchange) -> str:
    request = exchange.request
    return f"request {request.method} {request.target.decode('latin-1')}"
