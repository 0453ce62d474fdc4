"""The worker that this process is, and its line to the master: `prefork.cluster.worker`.

The line needs no event loop: a program may send, and ask for a listener, from plain code. What
arrives meanwhile is kept, in order, until somebody reads: the loop of `cluster.listen`, of an
async target, or of `Worker.run`. Inside a running loop the first use attaches the line to it.

Everything may be called from any thread once a loop reads the line; before that, from one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import signal
import socket
import threading
import time
from asyncio import events as running
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from prefork.emitter import Emitter, Listener
from prefork.errors import ChannelClosed, ClusterError, FrameError, ListenError
from prefork.ipc.aio import AsyncChannel
from prefork.ipc.channel import Channel, Message
from prefork.ipc.frames import MAX_SIZE, Kind
from prefork.ipc.handoff import Verdict, decode_offers, encode_answer
from prefork.net.address import Address, absolute, parse_address
from prefork.net.sharing import Sharing
from prefork.process.lifecycle import State, may_become
from prefork.scoreboard import Scoreboard
from prefork.worker.loop import loop_factory
from prefork.worker.topics import Subscription, Subscriptions

log = logging.getLogger("prefork")
T = TypeVar("T")

EVENTS = ("message", "draining", "disconnect")

# The master answers within a turn of its loop; a listener of its program may hold it up for a while.
ANSWER_TIMEOUT = 10.0  # seconds

# What was sent leaves before the process does, if the master reads at all.
FLUSH_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class Seat:
    """Where and as whom a worker runs. Fits into an environment variable."""

    id: int
    slot: int
    generation: int
    master: int  # the pid of the process that forked it
    serialization: str = "json"
    max_message: int = MAX_SIZE
    graceful_timeout: float = 30.0

    def to_text(self, channel: int, board: int) -> str:
        """For a fresh interpreter, with the numbers of the descriptors that it gets."""
        return json.dumps([asdict(self), channel, board])

    @classmethod
    def from_text(cls, text: str) -> tuple[Seat, int, int]:
        fields, channel, board = json.loads(text)
        return cls(**fields), channel, board


@dataclass(frozen=True, slots=True)
class Shared:
    """A listener that the master shares with this worker."""

    index: int  # its number in the master
    address: Address  # as bound
    sharing: Sharing
    socket: socket.socket | None  # None: the master accepts, and hands connections over


class Serves(Protocol):
    """The HTTP server of this worker, while there is one."""

    def leave(self) -> None:
        """Accept nothing more; finish what is in flight; then end the worker's line."""

    def leave_at_once(self) -> None: ...

    def take_over(self, message: Message) -> None:
        """A connection that the master accepted for us."""

    def adopt(self, connection: socket.socket, received: bytes) -> bool: ...


@dataclass(frozen=True, slots=True)
class ThisProcess:
    """Node spells it `cluster.worker.process.pid`."""

    pid: int


class Worker:
    """This worker: who it is, its messages, its way out.

    Events: message(message, handle); draining(), when it begins to leave; disconnect(), when the
    line to the master has ended. Messages that come before the first listener are kept for it.
    """

    def __init__(self, seat: Seat, channel: Channel, board: Scoreboard) -> None:
        self.id = seat.id
        self.slot = seat.slot
        self.generation = seat.generation
        self.master = seat.master  # its pid
        self.pid = os.getpid()
        self.process = ThisProcess(self.pid)
        self.seat = seat
        self.board = board
        self.state = State.ONLINE
        self.exited_after_disconnect: bool | None = None  # True once it is leaving of its own will, or was asked to
        self.controls: dict[str, Callable[[dict[str, Any]], None]] = {"drain": lambda _: self._leave()}
        self.inherited: dict[tuple[str, int], Shared] = {}  # listeners that the fork brought, by what was asked for
        self.server: Serves | None = None
        self._channel = channel
        self._line: AsyncChannel | None = None  # the channel, while a loop reads it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.get_ident()
        self._lock = threading.RLock()  # of the channel, while no loop reads it
        self._emitter = Emitter(EVENTS)
        self.off = self._emitter.off
        self._unread: deque[Message] = deque()  # came while an answer was awaited
        self._kept: deque[tuple[Any, Any]] = deque()  # users' messages that nobody listens for yet
        self._answer: dict[str, Any] | None = None
        self._answer_fds: list[socket.socket] = []
        self._questions = 0
        self._asked: dict[str, int] = {}  # how often for each address, since we were last without one
        self._used: dict[str, int] = {}  # how many of those were not given back
        self._is_leaving = False
        self._has_ended = False
        self._ended: asyncio.Event | None = None
        self._subscriptions = Subscriptions(self._send_about_topics)

    def describe(self) -> str:
        return f"worker {self.id} (pid {self.pid}, generation {self.generation})"

    __repr__ = __str__ = describe

    # ---- messages ----

    def on(self, event: str, listener: Listener | None = None) -> Any:
        """Call *listener* at every *event*; without one, a decorator."""
        return self._listen(self._emitter.on, event, listener)

    def once(self, event: str, listener: Listener | None = None) -> Any:
        """Call *listener* at the next *event* only; without one, a decorator."""
        return self._listen(self._emitter.once, event, listener)

    def send(self, message: Any, handle: Any = None, *, keep: bool = False, received: bytes = b"") -> bool:
        """Send *message* to the master; false advises to send no more for now (it is sent all the same).

        *handle* (a socket, a listener, a pipe, a file, a descriptor) goes with it, and is moved
        unless *keep*; *received* are bytes that were read from it already. Raises ChannelClosed,
        and TypeError or ValueError for what cannot be sent.
        """
        line = self._line
        if line is not None and threading.get_ident() == self._thread and not self._loop_is_over:
            return line.send_user(message, handle, keep=keep, received=received)
        return self._do(lambda: self._way_out.send_user(message, handle, keep=keep, received=received))

    async def asend(self, message: Any, handle: Any = None, *, keep: bool = False, received: bytes = b"") -> None:
        """As `send`, and wait until the master has caught up, if it is behind."""
        self._attach_if_running()
        if not self.send(message, handle, keep=keep, received=received):
            assert self._line is not None
            await self._line.drained()

    async def messages(self) -> AsyncIterator[tuple[Any, Any]]:
        """Message and handle of each that arrives, until the line ends."""
        arrived: asyncio.Queue[tuple[Any, Any] | None] = asyncio.Queue()
        heard = self.on("message", lambda message, handle: arrived.put_nowait((message, handle)))
        ended = self.once("disconnect", lambda: arrived.put_nowait(None))
        try:
            while not (self._has_ended and arrived.empty()) and (pair := await arrived.get()) is not None:
                yield pair
        finally:
            self.off("message", heard)
            self.off("disconnect", ended)

    def broadcast(self, topic: str, message: Any) -> None:
        """Send *message* (what JSON can hold) to the subscribers of *topic* in every worker, this one's included."""
        self._do(lambda: self._subscriptions.broadcast(topic, message))

    def subscribe(self, topic: str, listener: Listener | None = None, **options: Any) -> Subscription:
        """Hear what is broadcast under *topic*: by a *listener*, or from the subscription, which is an async iterator."""
        return self._do(lambda: self._subscriptions.subscribe(topic, listener, **options))

    def serve(self, connection: socket.socket) -> bool:
        """Have the HTTP server of `cluster.listen` serve *connection*, which another process handed over.

        Bytes that came with it are served first. False, and it stays the caller's, if the server is leaving.
        """
        if self.server is None:
            raise ClusterError("serve() needs the HTTP server of cluster.listen(), which does not run in this worker")
        return self.server.adopt(connection, getattr(connection, "received", b""))

    # ---- listeners ----

    def share(self, bind: str, **wishes: Any) -> Shared:
        """The listener for *bind*, from the master: the same one for all workers that ask. Raises ListenError.

        *wishes* (sharing, pick, backlog) are those of the first who asks; what is not among them the master decides.
        """
        address = absolute(parse_address(bind))
        key = str(address)
        index = self._asked.get(key, 0)
        found = self.inherited.pop((key, index), None)
        if found is None:
            found = self._do(lambda: self._ask_for_listener(address, index, wishes))
        self._asked[key] = index + 1
        self._used[key] = self._used.get(key, 0) + 1
        return found

    def listener(self, bind: str, sharing: str | None = None) -> SharedSocket:
        """See `prefork.cluster.listener`."""
        if sharing is not None and Sharing(sharing) is Sharing.HANDOFF:
            raise ClusterError("a listener with sharing 'handoff' accepts in the master: cluster.listen() can serve it")
        shared = self.share(bind, sharing=sharing or "shared")
        assert shared.socket is not None
        ours = SharedSocket(fileno=shared.socket.detach())
        ours.give_back = lambda: self.unshare(shared, str(absolute(parse_address(bind))))
        self.tell_listening([shared])
        return ours

    def tell_listening(self, listeners: list[Shared], application: str | None = None) -> None:
        """From here on we accept on *listeners*."""
        if may_become(self.state, State.LISTENING):
            self.state = State.LISTENING
        body = {"type": "listening", "listeners": [shared.index for shared in listeners], "application": application}
        self.tell(body)

    def unshare(self, shared: Shared, key: str) -> None:
        """We do not accept any more on what we asked for as *key*."""
        self._used[key] -= 1
        if not self._used[key]:  # the next one is the first again
            del self._asked[key]
        self.tell({"type": "unlisten", "listener": shared.index})

    # ---- leaving ----

    def is_connected(self) -> bool:
        """Whether the line to the master is up."""
        return not self._has_ended and not self._channel.is_closed

    def is_dead(self) -> bool:
        """Never, to itself."""
        return False

    def disconnect(self) -> Worker:
        """Leave: accept nothing more, finish what is in flight, end the line. Again, it has no effect."""
        self._do(self._leave)
        return self

    def destroy(self, signal: object = None) -> None:
        """Leave at once: what is in flight is cut off. *signal* is ignored, as in Node."""
        self._do(self._say_that_we_leave)
        if self.server is not None:
            self._do(self.server.leave_at_once)
            return
        self.finish()
        if threading.get_ident() == self._thread:
            raise SystemExit(0)
        os._exit(0)

    kill = destroy

    # ---- driving the line ----

    @property
    def is_awaited(self) -> bool:
        """Something of the program waits for messages."""
        return bool(self._emitter.listeners("message")) or self._subscriptions.is_awaited

    def run(self) -> None:
        """Read the line until it ends."""
        if running._get_running_loop() is not None:
            raise ClusterError("worker.run() was called inside a running event loop, which reads the line already")
        loop = self._loop
        if loop is None or loop.is_closed():
            loop = loop_factory("auto")()
        self.attach(loop)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # the program may handle it as it likes
            loop.add_signal_handler(signal.SIGTERM, self.disconnect)
        loop.run_until_complete(self.wait_ended())

    async def wait_ended(self) -> None:
        """Until the line has ended."""
        if self._ended is None:
            self._ended = asyncio.Event()
        if not self._has_ended:
            await self._ended.wait()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """From here on *loop* reads the line."""
        if self._loop is loop and self._line is not None:
            return
        if self._has_ended or self._channel.is_closed:
            return
        self._loop = loop
        self._thread = threading.get_ident()
        self._line = AsyncChannel(self._channel, loop, self._on_message, self._on_end)
        self.tell({"type": "attached"})
        loop.call_soon(self._catch_up)

    def tell(self, body: dict[str, Any]) -> None:
        """A message of prefork's own to the master, if it is still there."""
        with suppress(ChannelClosed):
            self._do(lambda: self._way_out.send(body))

    def acknowledge(self, body: bytes) -> None:
        """What became of connections that were handed over."""
        with suppress(ChannelClosed):  # the master is gone; that is told by the line's end
            self._way_out.send(body, kind=Kind.ACK)

    def end_line(self) -> None:
        """All is said: what is queued still leaves, then the line ends. The process may go on."""
        if self._has_ended:
            return
        assert self._loop is not None
        if self._channel.has_unsent and self.is_connected() and not self._channel.is_eof:
            self._loop.call_later(0.002, self.end_line)
            return
        if self._line is not None:
            self._line.close()
        self._tell_ended()

    def finish(self, timeout: float = FLUSH_TIMEOUT) -> None:
        """The process ends: what was sent leaves first."""
        if not self._channel.is_closed:
            with suppress(ChannelClosed, OSError):
                self._channel.flush_blocking(timeout)

    # ---- within ----

    @property
    def _way_out(self) -> AsyncChannel | Channel:
        return self._channel if self._line is None or self._loop_is_over else self._line

    @property
    def _loop_is_over(self) -> bool:
        return self._loop is not None and self._loop.is_closed()

    def _do(self, call: Callable[[], T]) -> T:
        """*call*, where it may touch the line: here, or on the thread of the loop that reads it."""
        self._attach_if_running()
        loop = self._loop
        if loop is None or not loop.is_running() or threading.get_ident() == self._thread:
            with self._lock:
                return call()
        return _call_on_loop(loop, call)

    def _attach_if_running(self) -> None:
        loop = running._get_running_loop()
        if loop is not None and (self._line is None or self._loop_is_over):
            self.attach(loop)

    def _listen(self, add: Callable[[str, Any], Any], event: str, listener: Listener | None) -> Any:
        if listener is None:
            return lambda function: self._listen(add, event, function)
        added = add(event, listener)
        self._attach_if_running()
        if event == "message" and self._kept and self._loop is not None and not self._loop_is_over:
            self._loop.call_soon_threadsafe(self._catch_up)
        return added

    def _on_message(self, message: Message) -> None:
        match message.kind:
            case Kind.USER:
                if self._kept or not self._emitter.emit("message", message.body, message.handle):
                    self._kept.append((message.body, message.handle))
                    self._give_kept()
            case Kind.PUBLISH:
                self._subscriptions.deliver(message.body)
            case Kind.HANDOFF if self.server is not None:
                self.server.take_over(message)
            case Kind.HANDOFF:
                self.acknowledge(encode_answer(Verdict.REFUSED, decode_offers(message.body)[1]))
            case Kind.CONTROL if message.body["type"] == "listener":
                self._answer = message.body
                self._answer_fds = [message.fds.take_socket() for _ in range(len(message.fds))]
            case Kind.CONTROL:
                heard = self.controls.get(message.body["type"])
                if heard is not None:
                    heard(message.body)

    def _catch_up(self) -> None:
        """What came while nobody read the line."""
        while self._unread:
            message = self._unread.popleft()
            with message.fds:
                self._on_message(message)
        self._give_kept()
        if self._channel.is_eof and not self._has_ended:
            self._on_end()

    def _give_kept(self) -> None:
        while self._kept and self._emitter.listeners("message"):
            self._emitter.emit("message", *self._kept.popleft())

    def _send_about_topics(self, body: Any, /, *, kind: Kind = Kind.CONTROL) -> bool:
        return self._way_out.send(body, kind=kind)

    def _on_end(self) -> None:
        """The master is gone, or has let go of us."""
        self._tell_ended()
        orphaned = self.controls.get("orphaned")
        if orphaned is not None:
            orphaned({})

    def _tell_ended(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self.state = State.DISCONNECTED
            self.exited_after_disconnect = bool(self.exited_after_disconnect)
            self._subscriptions.close()
            self._emitter.emit("disconnect")
            if self._ended is not None:
                self._ended.set()

    def _say_that_we_leave(self) -> None:
        if self.exited_after_disconnect is None:
            self.exited_after_disconnect = True
            self.state = State.DRAINING
            self.tell({"type": "draining"})
            self._emitter.emit("draining")

    def _leave(self) -> None:
        if self._is_leaving:
            return
        self._is_leaving = True
        self._say_that_we_leave()
        if self.server is not None:
            self.server.leave()
        elif self._loop is not None and not self._loop_is_over:
            self.end_line()
        else:
            self.finish()
            self._channel.close()
            self._tell_ended()

    def _ask_for_listener(self, address: Address, index: int, wishes: dict[str, Any]) -> Shared:
        self._questions += 1
        question = {
            "type": "listen",
            "question": self._questions,
            "address": str(address),
            "index": index,
            "wishes": wishes,
        }
        self._way_out.send(question)
        answer = self._await_answer(self._questions, str(address))
        if "error" in answer:
            refusal = ListenError(answer["error"])
            refusal.errno = answer["errno"]
            raise refusal
        sockets = self._answer_fds
        self._answer_fds = []
        address, sharing = parse_address(answer["address"]), Sharing(answer["sharing"])
        return Shared(answer["listener"], address, sharing, sockets[0] if sockets else None)

    def _await_answer(self, question: int, what: str) -> dict[str, Any]:
        """Read the line until the answer is there; the rest waits for its reader."""
        deadline = time.monotonic() + ANSWER_TIMEOUT
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        while True:
            self._channel.flush()
            try:
                arrived = self._channel.receive()
            except FrameError as error:
                raise ClusterError(f"the master's answer about {what} cannot be understood: {error}") from error
            found = None
            for message in arrived:
                if message.kind is Kind.CONTROL and message.body.get("question") == question:
                    with message.fds:
                        self._on_message(message)
                    found = message
                else:
                    self._unread.append(message)
            if self._loop is not None and self._unread and not self._loop_is_over:
                self._loop.call_soon(self._catch_up)
            if found is not None:
                if found.is_lost:
                    lost = ListenError(f"cannot listen on {what}: no descriptor is left in this process")
                    lost.errno = 24
                    raise lost
                return dict(found.body)
            if self._channel.is_eof:
                raise ChannelClosed(f"the master has gone before it answered about {what}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise ClusterError(f"the master did not answer about {what} within {ANSWER_TIMEOUT:g} s")
            poll.poll(left * 1000)


class SharedSocket(socket.socket):
    """A socket that the master shares among workers; closing it tells the master, which counts its users."""

    give_back: Callable[[], None] | None = None

    def close(self) -> None:
        super().close()
        give_back, self.give_back = self.give_back, None
        if give_back is not None:
            give_back()


def _call_on_loop(loop: Any, call: Callable[[], T]) -> T:
    """*call* on the thread of *loop*, and wait for it."""
    done = threading.Event()
    result: list[Any] = []

    def run() -> None:
        try:
            result.extend((call(), None))
        except BaseException as error:  # noqa: BLE001 - it belongs to the thread that waits
            result.extend((None, error))
        done.set()

    loop.call_soon_threadsafe(run)
    done.wait()
    value, error = result
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]
