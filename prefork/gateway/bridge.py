"""Between an application's thread and the event loop that carries its exchange.

The thread reads and sends as if the network were a file: `read` and `send` block.
The loop reads ahead and writes behind. What lies between is bounded in both
directions, and a side is woken once for what has gathered, not once for each call.

Only the thread ever waits on the condition, and `stop` wakes it for good. `run` calls
`stop` however it ends, so a client that vanishes, a response that breaks HTTP or a
cancelled task cannot leave a thread blocked: its next call raises ClientDisconnected.
"""

from __future__ import annotations

import asyncio
import io
import tempfile
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from itertools import groupby
from typing import IO, Protocol, TypeVar, cast

from prefork.errors import EXITS, ClientDisconnected, GatewayError
from prefork.gateway.body import BodyFile
from prefork.gateway.exchange import Exchange
from prefork.gateway.file import Part, send_part
from prefork.gateway.threads import carriable
from prefork.protocol.response import Field

T = TypeVar("T")

# Bytes in each direction above which the faster side waits for the slower one: four pieces of
# what files and sockets are usually read in, because each wait is two changes of threads. One
# piece, however large, is always let through, since the application already holds it.
HIGH_WATER = 256 * 1024
LOW_WATER = HIGH_WATER // 4

# Pieces of a response below this size, in bytes, are joined to one; a larger one is not worth the copy.
JOINED_SIZE = 16 * 1024

# Bytes of a body kept in memory while it is read before the call. What is longer goes to a
# temporary file, or through a bridge where there are threads. Apache's mod_buffer takes 128 KiB, Django's uploads 2.5 MiB.
SPOOL_SIZE = 1024 * 1024


class RunInThread(Protocol):
    """How the worker lends a thread: `lambda call: loop.run_in_executor(pool, call)`."""

    def __call__(self, call: Callable[[], T], /) -> Awaitable[T]: ...


class Bridge:
    """One exchange, as a thread may use it while `run` carries it."""

    def __init__(self, exchange: Exchange, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """*loop*: needed where none is running, in a thread."""
        self._exchange = exchange
        self._loop = loop or asyncio.get_running_loop()
        self._changed = threading.Condition()  # guards all that follows
        self._stopped: str | None = None  # why the thread must give up
        self._is_over = False  # ... because its call has returned long since

        self._is_reading = False
        self._reader: asyncio.Task[None] | None = None
        self._input: deque[bytes] = deque()
        self._input_size = 0
        self._input_ended = False
        self._input_is_full = False  # the loop waits for room
        self._input_room = asyncio.Event()

        self._head: tuple[int, Iterable[Field]] | None = None
        self._output: list[bytes] = []
        self._file: Part | None = None  # the end of the response, behind the output
        self._is_sending_file = False
        self._output_size = 0
        self._output_ended = False
        self._output_announced = False  # the loop has been woken and has not looked yet
        self._output_ready = asyncio.Event()

    # ---- the loop ----

    async def run(self, call: Callable[[], T], run_in_thread: RunInThread) -> T:
        """Run *call* in a thread and carry its exchange until it returns: see `carry`."""
        return await self.carry(asyncio.ensure_future(run_in_thread(lambda: _within_a_future(call))))

    async def carry(self, thread: asyncio.Future[T]) -> T:
        """Carry the exchange until *thread* is done, the outcome of a thread's call.

        Raises what the call raised; ClientDisconnected in its place if the thread had
        been told that the client is gone, because the one follows from the other.
        """
        thread.add_done_callback(lambda _: self._output_ready.set())
        try:
            await self._carry(thread)
            return self._outcome(thread)
        except Exception as exc:
            self.stop(str(exc))
            # The application still owes its close(), and the slot its truth about what is in flight.
            await asyncio.wait((thread,))
            if not thread.cancelled():
                thread.exception()  # seen: asyncio would call it "never retrieved"
            raise
        except asyncio.CancelledError:
            self.stop("the request was cancelled")
            raise
        finally:
            self._is_over = self._stopped is None
            self.stop("the handler has returned")
            thread.cancel()  # a call that no thread has picked up yet is withdrawn
            if self._reader is not None:
                self._reader.cancel()

    def read_ahead(self) -> None:
        """Begin to read the body before the thread asks: saves it a wait."""
        self._is_reading = True
        self._start_reading()

    def stop(self, reason: str) -> None:
        """From any thread: every call of the application's thread raises ClientDisconnected from now on."""
        with self._changed:
            if self._stopped is None:
                self._stopped = reason
            self._changed.notify_all()

    @property
    def is_stopped(self) -> bool:
        """Every further call raises."""
        return self._stopped is not None

    # ---- the application's thread ----

    def read(self) -> bytes:
        """The next piece of the body, b"" at its end. Blocks until there is one."""
        with self._changed:
            if not self._is_reading:
                self._is_reading = True
                self._in_loop(self._start_reading)
            while not self._input and not self._input_ended and self._stopped is None:
                self._changed.wait()
            self._check()
            if not self._input:
                return b""
            data = self._input.popleft()
            self._input_size -= len(data)
            has_caught_up = self._input_is_full and self._input_size <= LOW_WATER
            if has_caught_up:
                self._input_is_full = False
        if has_caught_up:
            self._in_loop(self._input_room.set)
        return data

    def start(self, status: int, headers: Iterable[Field]) -> None:
        """Begin the response; it leaves with the first piece."""
        with self._changed:
            self._head = (status, headers)

    def send_at_once(self) -> None:
        """The loop sends while the thread goes on, which PEP 3333 is content with."""

    def send(self, data: bytes | Part, more: bool) -> None:
        """Hand over a piece; *more* false completes the response. Blocks while the client is slow.

        Part of a file completes it too, and blocks until the file is not needed any more.
        """
        if isinstance(data, Part):
            self._send_file(data)
            return
        with self._changed:
            while self._output_size >= HIGH_WATER and self._stopped is None:
                self._changed.wait()
            self._check()
            if self._output_ended:
                raise GatewayError("a piece of body was sent after the response was complete")
            self._output.append(data)
            self._output_size += len(data)
            self._output_ended = not more
            is_news, self._output_announced = not self._output_announced, True
        if is_news:
            self._in_loop(self._output_ready.set)

    # ---- inside ----

    def _send_file(self, file: Part) -> None:
        with self._changed:
            self._check()
            self._file = file
            self._output_ended = True
            self._in_loop(self._output_ready.set)
            # To the end of a transfer even if all is lost: a descriptor that is closed meanwhile may become another file.
            self._changed.wait_for(lambda: not self._is_sending_file and (self._file is None or bool(self._stopped)))
            self._file = None

    async def _carry(self, thread: asyncio.Future[T]) -> None:
        """Pass pieces on until the thread has ended and nothing is left."""
        while True:
            is_last = thread.done()  # looked at before the pieces: what came before the end is seen
            await self._pass_on()
            if is_last:
                return
            await self._output_ready.wait()
            self._output_ready.clear()

    async def _pass_on(self) -> None:
        """As few writes as possible for all that has gathered."""
        with self._changed:
            head, self._head = self._head, None
            pieces, self._output = self._output, []
            file, self._file = self._file, None
            self._is_sending_file = file is not None
            more = not self._output_ended or file is not None
            self._output_size = 0
            self._output_announced = False
            self._changed.notify_all()
        try:
            if head is not None:
                self._exchange.start(*head)
            if pieces:
                *others, last = _joined(pieces)
                for piece in others:
                    await self._exchange.write(piece, True)
                await self._exchange.write(last, more)
            if file is not None:
                await send_part(self._exchange, file, False)
        finally:
            if file is not None:
                with self._changed:
                    self._is_sending_file = False
                    self._changed.notify_all()

    def _outcome(self, thread: asyncio.Future[T]) -> T:
        try:
            return thread.result()
        except Exception as exc:
            if self._stopped is None or self._exchange.responded:  # a whole response has lost nothing
                raise
            raise ClientDisconnected(self._stopped) from exc

    def _start_reading(self) -> None:
        if self._stopped is None:
            self._reader = self._loop.create_task(self._read_body())

    async def _read_body(self) -> None:
        try:
            while data := await self._exchange.read():
                if self._give(data):
                    await self._input_room.wait()
                    self._input_room.clear()
        except ClientDisconnected as exc:
            self.stop(str(exc))
        except BaseException:
            self.stop("the body of the request could not be read")
            raise
        else:
            self._give_end()

    def _give(self, data: bytes) -> bool:
        """True if the thread should catch up first."""
        with self._changed:
            self._input.append(data)
            self._input_size += len(data)
            self._input_is_full = self._input_size >= HIGH_WATER
            self._changed.notify_all()
            return self._input_is_full

    def _give_end(self) -> None:
        with self._changed:
            self._input_ended = True
            self._changed.notify_all()

    def _check(self) -> None:
        if self._is_over:
            raise GatewayError("the request or its body was used after the handler had returned")
        if self._stopped is not None:
            raise ClientDisconnected(self._stopped)

    def _in_loop(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop was closed while the application worked
            self.stop("the event loop is closed")
            raise ClientDisconnected("the event loop is closed") from None


def open_body(bridge: Bridge, exchange: Exchange) -> IO[bytes]:
    """The body as a binary file that blocks until the bytes asked for are there."""
    if not exchange.request.has_body:
        return io.BytesIO()
    return cast(IO[bytes], BodyFile(bridge.read))


@asynccontextmanager
async def spooled_body(exchange: Exchange) -> AsyncIterator[IO[bytes]]:
    """The whole body, read before the block begins, for an application called in the loop's own thread."""
    pieces: deque[bytes] = deque()
    size = 0
    while size <= SPOOL_SIZE and (data := await exchange.read()):
        pieces.append(data)
        size += len(data)
    if size <= SPOOL_SIZE:
        yield file_of(pieces)
        return
    with tempfile.TemporaryFile() as file:
        file.writelines(pieces)
        pieces.clear()
        while data := await exchange.read():
            file.write(data)
        file.seek(0)
        yield file


def file_of(pieces: deque[bytes]) -> IO[bytes]:
    """*pieces*, which are taken out as they are read, as a file."""
    if len(pieces) > 1:
        return cast(IO[bytes], BodyFile(lambda: pieces.popleft() if pieces else b""))
    return io.BytesIO(pieces[0] if pieces else b"")


def outside_the_loop(call: Callable[[], T]) -> T:
    """*call* in the loop's own thread, as if no loop were running there.

    Blocking code asks: Django refuses its database where a loop runs, and `asyncio.run`
    refuses to start another. It holds up the loop either way.
    """
    loop = asyncio.get_running_loop()
    asyncio._set_running_loop(None)
    try:
        return call()
    finally:
        asyncio._set_running_loop(loop)


def _joined(pieces: list[bytes]) -> Iterator[bytes]:
    """*pieces*, small neighbours as one."""
    for is_small, run in groupby(pieces, lambda piece: len(piece) < JOINED_SIZE):
        if is_small:
            yield b"".join(run)
        else:
            yield from run


def _within_a_future(call: Callable[[], T]) -> T:
    try:
        return call()
    except (StopIteration, *EXITS) as exc:
        raise carriable(exc) from exc
