"""One HTTP/1.1 connection of a worker: between a transport, `protocol.Connection` and a gateway.

Bytes go down into the protocol, its events come up; requests become exchanges,
which the batch has run by the gateway. Memory per connection is bounded in
both directions: while a response is unfinished, or not taken, the next pipelined
request stays in the buffer; an application that reads slowly stops the socket, and a
client that reads slowly stops the application.

Errors leave by one door, `conclude` for applications and `_refuse` for peers. What is
waited for, and how long, is decided in one place, `_rearm`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from prefork.errors import ClientDisconnected
from prefork.gateway.exchange import Exchange
from prefork.net.accepted import Accepted
from prefork.net.forwarded import NOTHING
from prefork.net.tls import tls_extension
from prefork.protocol.connection import Connection
from prefork.protocol.events import NEED_DATA, PAUSED, Closed, Data, EndOfMessage, Refusal, Request
from prefork.protocol.response import Field, FieldLines
from prefork.protocol.websocket import asks_for_websocket
from prefork.scoreboard import BEGUN, REQUESTS
from prefork.worker.deadlines import IDLE, LINGER, LINGER_WHILE_SENDING, NEVER, Awaited
from prefork.worker.sendfile import Transfer
from prefork.worker.service import Service, endpoint, local_endpoint
from prefork.worker.websocket import upgrade

if TYPE_CHECKING:
    from prefork.net.proxy import ProxyHeader

log = logging.getLogger("prefork")

# Bytes of pipelined requests to hold while a response is being made. Reading goes on up to
# here, because only a read notices that the client has left.
PIPELINE_LIMIT = 64 * 1024

# A body that the application did not read is read to its end and thrown away if that takes no
# more than this many bytes: cheaper than a new connection. Beyond it the connection is closed.
DISCARD_LIMIT = 256 * 1024

# Small pieces of a response's body are written together when so many bytes have come.
GATHERED = 16 * 1024

# A fast client never makes a stream wait. So that the other connections are served, it gives the loop a turn after so
# many bytes, each piece counted for some more than its own: about a millisecond's work either way.
STREAM_A_TURN = 256 * 1024
PIECE = 256

# Pipelined requests that one connection has answered in one turn of the loop, for the same reason.
REQUESTS_A_TURN = 16


class HTTPConnection(asyncio.Protocol):
    """Made by the server for each accepted connection; lives as long as its transport."""

    __slots__ = (
        "__weakref__",
        "_accepted",
        "_answered",
        "_awaited",
        "_client",
        "_discarded",
        "_drained",
        "_exchange",
        "_gathered",
        "_gathered_size",
        "_has_eof",
        "_has_served",
        "_http",
        "_is_advancing",
        "_is_at_once",
        "_is_body_paused",
        "_is_lingering",
        "_is_load",
        "_is_lost",
        "_is_reading",
        "_is_resting",
        "_is_trusted",
        "_linger_end",
        "_origin",
        "_scheme",
        "_sent",
        "_server",
        "_service",
        "_started_at",
        "_tls",
        "_transfer",
        "_transport",
        "_turn",
        "_unwritten",
        "deadline",
    )

    def __init__(self, service: Service, accepted: Accepted, origin: ProxyHeader | None = None) -> None:
        """*accepted* is the transport's socket; *origin*: what a proxy said of the connection before its first byte."""
        self.deadline = NEVER  # on the loop's clock; see `Sweep`
        self._awaited = Awaited.APPLICATION
        self._service = service
        self._http = Connection(service.limits, server=service.server_header)
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # until connection_made
        self._origin = origin
        self._accepted = accepted
        self._client, self._server = endpoint(accepted.peer), local_endpoint(accepted.local)
        self._scheme = "http"
        self._tls: dict[str, Any] | None = None  # made for the first request
        self._exchange: Exchange | None = None  # the one whose response is unfinished
        self._started_at = 0.0  # when its head was complete
        self._sent = 0  # bytes of its response's body
        self._answered = 0  # pipelined requests since the loop has called
        self._discarded = 0  # bytes of body that nobody wanted
        self._is_advancing = False
        self._is_reading = True
        self._is_trusted = False  # what the client says of those it forwards for is believed
        self._is_body_paused = False  # the application is behind
        self._is_resting = False  # requests are buffered, and the other connections have a turn
        self._is_lingering = False  # all is said; reading only until the peer closes
        self._linger_end = 0.0
        self._has_eof = False
        self._has_served = False
        self._is_load = True  # it counts where the workers compare how much they have
        self._is_lost = False
        self._drained: asyncio.Future[None] | None = None  # set while the client is behind
        self._transfer: Transfer | None = None  # of a file, by sendfile
        self._gathered: list[bytes] = []  # small pieces of body that leave together, at the end of the loop's turn
        self._gathered_size = 0  # bytes
        self._is_at_once = False  # instead: no piece waits for the loop
        self._turn = 0  # what was sent of a stream in this turn of the loop, in bytes and then some
        self._unwritten = 0  # the transport's buffer when the write deadline was last set

    # ---- the transport's callbacks ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        get = transport.get_extra_info
        if self._server is None:
            self._server = local_endpoint(get("sockname"))
        if get("sslcontext") is not None:
            self._scheme = "https"
        origin = self._origin
        if origin is not None and not origin.is_local:
            self._client, self._server = origin.client, origin.server or self._server
        self._is_trusted = self._service.forwarding.trusts(self._client, origin)
        self._service.connections.add(self)
        self._service.slot.opened += 1
        self._rearm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        if self._transfer is not None:
            self._transfer.stop()
        self._rearm()
        self._service.leave(self)
        self._service.slot.closed += 1
        self._put_down()
        self._release_writers()
        exchange = self._exchange
        if exchange is not None:
            if not exchange.has_sent_head:
                self._sent = 0
            # 499 is nginx's number for a client that left before its answer.
            self._leave_exchange(exchange.status or 499)
            exchange.disconnect()

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            if self._awaited is Awaited.CLOSE and not self._service.is_draining:
                self.deadline = min(self._service.loop.time() + LINGER, self._linger_end)
            return
        self._answered = 0
        if self._drained is None:
            whole = self._http.receive_request(data)
            if whole is not None:
                self._begin(*whole)
                return
        else:
            self._http.receive_data(data)
        self._advance()

    def eof_received(self) -> bool:
        """The peer has sent its last byte. It may still read, so what it asked for is answered."""
        self._has_eof = True
        if self._is_lingering:
            return False
        if self._exchange is not None and self._scheme == "https":
            self._service.batch.begin_now(self._exchange)  # the transport closes after this
        self._http.receive_data(b"")
        self._advance()
        # TLS transports close by themselves; for the others True keeps the writing side open.
        return self._scheme == "http" and (self._exchange is not None or self._is_behind or self._is_resting)

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
        """Take events until there is none. Not re-entrant: the end of a body that nobody wanted begins the next cycle."""
        if self._is_advancing or self._is_resting:
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
            # Most likely the client is gone altogether; the application is told when it has begun, and may finish all the same.
            self._service.loop.call_soon(self._exchange.disconnect, context=self._service.context)
        self._regulate_reading()
        self._rearm()

    def _rest(self) -> None:
        """Let the others have a turn of the loop; nothing is read meanwhile."""
        self._is_resting = True
        self._service.loop.call_soon(self._go_on_advancing, context=self._service.context)

    def _go_on_advancing(self) -> None:
        self._is_resting = False
        self._answered = 0
        self._advance()

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

    def _begin(self, request: Request, body: bytes = b"") -> None:
        """The batch calls the application, when all that is there was read."""
        service, client, scheme = self._service, self._client, self._scheme
        if self._is_trusted and (request.fields is None or request.fields.forwarded is not NOTHING):
            client, scheme = service.forwarding.apply(client, scheme, request.headers, request.fields)
        if not request.is_plain and scheme != "https" and request.target[:6].lower() == b"https:":
            # RFC 9110 section 7.4. Whoever believed the target would take this connection for an encrypted one.
            self._refuse(Refusal(421, "the target is an https URL, and this connection is not encrypted"))
            return
        self._exchange = exchange = Exchange(request, self, client, self._server, scheme)
        if body:
            exchange.feed_whole(body)
        if self._scheme == "https":  # the connection's own, whatever a proxy says
            exchange.tls = self._tls_facts()
        if not self._has_served:
            self._has_served = True
            if service.gate is not None:
                service.gate.on_first_request()
        service.slot.whole[BEGUN] += 1
        if service.access_log is not None:
            self._started_at = monotonic()  # the loop's clock stands still for a turn
        self._awaited, self.deadline = Awaited.APPLICATION, NEVER
        if request.upgrade is not None and service.websockets is not None and asks_for_websocket(request):
            # A protocol that is not spoken here is not changed to: RFC 9110, section 7.8, lets a server ignore Upgrade.
            self.go_on(exchange, upgrade(self, exchange, service, service.websockets))
        else:
            service.batch.add(exchange)

    def _tls_facts(self) -> dict[str, Any]:
        """They stay as they are: nothing is renegotiated."""
        if self._tls is None:
            self._tls = tls_extension(self._transport.get_extra_info("ssl_object"))
        return self._tls

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
        wanted = self._is_lingering or not (self._is_body_paused or self._is_resting or is_full)
        if wanted == self._is_reading:
            return
        self._is_reading = wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    # ---- the door for applications ----

    def _end(self, exchange: Exchange, task: asyncio.Task[None]) -> None:
        self._service.forget(task)
        self.conclude(exchange, asyncio.CancelledError() if task.cancelled() else task.exception())

    def conclude(self, exchange: Exchange, error: BaseException | None) -> None:
        """The application has returned, or raised *error*: whatever that is ends here."""
        if isinstance(error, ClientDisconnected):
            log.debug("%s was left by its client", _describe(exchange))
        elif isinstance(error, asyncio.CancelledError):
            # The worker's drain is over, or the application cancelled itself.
            log.warning("%s was cancelled", _describe(exchange))
            exchange.fail()
        elif error is not None:
            log.error("%s failed", _describe(exchange), exc_info=error)
            exchange.fail()
        if self._exchange is exchange and not exchange.responded:
            self.abort()  # the application gave up because its client left; nothing will complete this

    # ---- the wire that exchanges write to ----

    def go_on(self, exchange: Exchange, coroutine: Coroutine[Any, Any, None]) -> None:
        # Not in a copy of the current context: with asyncio's loop that may be the one of an earlier request, which
        # paused or resumed the transport.
        task = self._service.start(coroutine, context=self._service.context.copy())
        if not task.done():
            self._service.tasks.add(task)
            task.add_done_callback(partial(self._end, exchange))
        elif task.cancelled() or task.exception() is not None or not exchange.responded:
            self._end(exchange, task)

    def send_continue(self) -> None:
        data = self._http.send_continue()
        if data:
            self._transport.write(data)
            self._rearm()

    def send_interim(self, status: int, headers: Iterable[Field]) -> None:
        self._check_present()
        self._transport.write(self._http.send_interim(status, headers))

    def send_head(self, status: int, headers: FieldLines, body: bytes, more: bool) -> None:
        if self._is_lost or self._is_lingering or self._transport.is_closing():
            raise _gone()
        service = self._service
        self._sent = len(body)
        if not more and not service.ends_connections:
            data = self._http.send_whole(status, headers, body, date=service.date)
            if data:
                self._transport.write(data)
                self._leave_exchange()
                if self._drained is None and self._is_reading:
                    self._await_next()
                else:
                    self._regulate_reading()
                    self._rearm()
                return
        if (service.ends_connections and service.is_to_end(self._could_go_on)) or (
            not more and self._http.unread > DISCARD_LIMIT
        ):
            self._http.close_after()
        data, rest = self._http.send_head(status, headers, body, more, date=service.date)
        if not (more or self._http.keep_alive) and self._scheme == "http":
            self._transport.set_write_buffer_limits(high=0)  # so that `_close` finds it written
        self._transport.write(data)
        if rest:
            self._transport.write(rest)
        if not more:
            self._complete()

    @property
    def _could_go_on(self) -> bool:
        """Another request may follow the one in hand, and it is no upgrade that was answered in HTTP."""
        return self._http.keep_alive and self._exchange is not None and self._exchange.request.upgrade is None

    def send_body(self, data: bytes, more: bool) -> None:
        self._check_present()
        framed = self._http.send_body(data, more)
        self._sent += len(data)
        self._write(framed, more)
        if not more:
            self._complete()

    async def send_file(self, file: int, offset: int, count: int) -> None:
        self._check_present()
        framing = self._http.frame(count) if count else None
        if framing is None:
            return
        before, after = framing
        self._write(before, False)
        self._transfer = transfer = Transfer(self._transport, self._service.sockets, self.drain, count)
        self._rearm()
        try:
            await transfer.run(file, offset)
        except BaseException:
            self.abort()  # part of a message is out
            raise
        finally:
            self._sent += transfer.sent
            self._transfer = None
            self._rearm()
        if after:
            self._transport.write(after)

    def send_trailers(self, trailers: FieldLines) -> None:
        self._check_present()
        self._write(self._http.send_trailers(trailers), False)
        self._complete()

    def _write(self, data: bytes, more: bool) -> None:
        """A write is a system call, so what an application sends in one turn of the loop is gathered into one."""
        if more:
            if not self._turn:
                self._service.loop.call_soon(self._end_turn)
            self._turn += len(data) + PIECE
            if self._is_at_once and self._scheme == "https":
                self._turn = STREAM_A_TURN  # the piece leaves with the end of this one
            if len(data) < GATHERED and not self._is_at_once:
                self._gathered.append(data)
                self._gathered_size += len(data)
                if self._gathered_size >= GATHERED:
                    self._flush()
                return
        if self._gathered:
            self._gathered.append(data)
            self._flush()
        elif data:
            self._transport.write(data)

    def send_at_once(self) -> None:
        self._flush()
        self._is_at_once = True
        if self._scheme == "http":
            # Above a mark of nought a transport does not wait for the end of the loop's turn. Not with TLS, whose
            # transports are never below it.
            self._transport.set_write_buffer_limits(high=0)

    def _end_turn(self) -> None:
        self._turn = 0
        self._flush()

    def _flush(self) -> None:
        gathered, self._gathered, self._gathered_size = self._gathered, [], 0
        if gathered and not self._is_lost:
            self._transport.write(b"".join(gathered))

    def is_writable(self) -> bool:
        return self._drained is None and self._turn < STREAM_A_TURN

    async def drain(self) -> None:
        if self._drained is not None:
            await asyncio.shield(self._drained)
        elif self._turn >= STREAM_A_TURN:
            await asyncio.sleep(0)
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
            raise _gone()

    def switch(self, answer: bytes) -> tuple[asyncio.Transport, bytes]:
        """Send *answer*, the whole 101 of an upgrade, and give the transport away, with what the client has sent since.

        Raises ClientDisconnected.
        """
        self._check_present()
        self._sent = 0
        self._leave_exchange(101)
        unread = self._http.take_buffer()
        self._is_lost = True  # to us
        self._rearm()
        self._service.leave(self)
        self._transport.write(answer)
        if not self._is_reading:
            self._transport.resume_reading()
        return self._transport, unread

    @property
    def service(self) -> Service:
        return self._service

    # ---- the end of an exchange ----

    def _await_next(self) -> None:
        """What `_rearm` would find, without looking."""
        self._awaited = Awaited.NEXT_REQUEST
        self.deadline = self._service.loop.time() + self._service.timeouts.keep_alive

    def _complete(self) -> None:
        """The whole response is with the transport."""
        self._leave_exchange()
        if self._http.request_complete:
            self._next_cycle()
        elif self._has_eof or not self._http.keep_alive or self._http.wants_continue:
            self._linger()
        else:  # the rest of the body is discarded
            self._discarded = 0
            self._regulate_reading()
            self._rearm()

    def _leave_exchange(self, status: int = 0) -> None:
        """The exchange in hand is over. *status*: for the log, if the exchange's own is not what the client got."""
        exchange = self._exchange
        assert exchange is not None
        self._exchange = None
        self._is_body_paused = False
        if self._is_at_once:
            self._is_at_once = False
            if self._scheme == "http":
                self._transport.set_write_buffer_limits()
        service = self._service
        service.slot.whole[REQUESTS] += 1
        if service.access_log is not None:
            request, seconds = exchange.request, monotonic() - self._started_at
            service.access_log.log(
                exchange.client,
                request.method,
                request.target,
                request.version,
                status or exchange.status,
                self._sent if request.method != "HEAD" else 0,
                seconds,
                service.worker_id,
            )

    def _next_cycle(self) -> None:
        if self._service.is_draining:
            self._close()
            return
        if not self._http.start_next_cycle():
            if self._http.is_unexpected_end:
                self._linger()
            else:
                self._close()
            return
        if self._is_advancing:
            return
        if self._http.is_idle and self._drained is None and self._is_reading:
            self._await_next()
            return
        self._answered += 1
        if self._answered >= REQUESTS_A_TURN and self._http.buffered:
            self._rest()
        elif self._drained is None and (whole := self._http.next_request()) is not None:
            self._begin(*whole)
            self._regulate_reading()
            return
        else:
            self._advance()
        self._regulate_reading()
        self._rearm()

    def _close(self) -> None:
        """Everything that was asked is answered: close, without destroying the answer."""
        if self._http.buffered:
            self._linger()
            return
        if self._scheme == "http" and not self._transport.get_write_buffer_size():
            # The transport closes in a turn of the loop or two. A client that is quicker has to keep the
            # connection's port for a minute (TIME_WAIT, RFC 9293 section 3.6.1), and has few of them.
            with suppress(OSError):
                self._accepted.shutdown(socket.SHUT_WR)
        self._transport.close()
        self._put_down()  # now, and not in a turn or two: else the gate would leave the next connection to others
        self._rearm()

    def _put_down(self) -> None:
        if self._is_load:
            self._is_load = False
            self._service.put_down()

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
        answer = self._http.refuse(refusal, date=self._service.date)
        self._sent = len(answer.partition(b"\r\n\r\n")[2])
        self._transport.write(answer)
        if exchange is None:
            service = self._service
            service.slot.begun += 1
            service.slot.requests += 1
            if service.access_log is not None:
                service.access_log.log(self._client, "-", b"-", "-", refusal.status, self._sent, 0.0, service.worker_id)
        else:
            self._leave_exchange(refusal.status)
            exchange.disconnect()
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
            self._unwritten = self._measure_unwritten() if awaited is Awaited.WRITING else 0
            self.deadline = self._service.loop.time() + self._service.patience(awaited)

    def _look(self) -> Awaited:
        if self._is_lost:
            return Awaited.APPLICATION
        if self._drained is not None or self._transfer is not None or self._transport.is_closing():
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
        unwritten = self._measure_unwritten()
        if unwritten and unwritten >= self._unwritten:
            log.info("aborted a response to %s: nothing was taken in time", self._describe_client())
            self.abort()
        else:
            self._rearm(progress=Awaited.WRITING)

    def _measure_unwritten(self) -> int:
        """Less than before if the client has taken anything: the transport's buffer, or what a file lacks."""
        if self._transfer is not None:
            return self._transfer.missing
        return self._transport.get_write_buffer_size()

    # ---- the rest ----

    def _release_writers(self) -> None:
        if self._drained is not None:
            drained, self._drained = self._drained, None
            if not drained.done():
                drained.set_result(None)

    def _describe_client(self) -> str:
        return "a client on a unix socket" if self._client is None else f"{self._client[0]} port {self._client[1]}"


class BegunConnection(HTTPConnection):
    """One whose first bytes somebody else has read from the socket."""

    __slots__ = ("_received",)

    def __init__(self, received: bytes, service: Service, accepted: Accepted) -> None:
        super().__init__(service, accepted)
        self._received = received

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.data_received(self._received)  # the transport has not begun to read
        self._received = b""


def _gone() -> ClientDisconnected:
    return ClientDisconnected("the client went away before its response was complete")


def _describe(exchange: Exchange) -> str:
    request = exchange.request
    return f"request {request.method} {request.target.decode('latin-1')}"
