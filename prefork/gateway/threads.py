"""A fixed number of threads that work for one event loop.

The loop posts jobs; a thread works on each, and then the loop ends it. What costs in
handing over is the waking and the changing of hands of the interpreter's lock, not
the work. So threads are posted to freely, since a busy one needs no waking, and what
they have to tell reaches the loop together, with one wake for all of it.

The threads are daemons: one that hangs ends with the process.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from prefork.errors import EXITS, ApplicationExited

T = TypeVar("T")


class Job(Protocol):
    """What is done in a thread for the loop."""

    def work(self) -> None:
        """In a thread. Raises nothing."""

    def end(self) -> None:
        """In the loop, once, after `work` has returned."""

    def accompany(self) -> None:
        """In the loop: the worker leaves; what is under way shall be known as a task, that can be cancelled."""


class Threads:
    """Lends its threads: whole jobs with `post`, single calls by being called."""

    def __init__(self, count: int, loop: asyncio.AbstractEventLoop) -> None:
        self._count = count
        self.loop = loop
        self._threads: list[threading.Thread] = []
        self._queue: SimpleQueue[Job | None] = SimpleQueue()  # None: nothing comes after it
        self._unfinished: set[Job] = set()
        self._told: deque[Callable[[], object]] = deque()
        self._worked: deque[Job] = deque()
        self._is_announced = False  # the loop has been woken and has not looked yet
        self._all_ended = asyncio.Event()
        self.is_draining = False
        self.on_room: Callable[[], object] | None = None  # called in the loop when a thread may have become free

    # ---- the loop ----

    def __call__(self, call: Callable[[], T], /) -> asyncio.Future[T]:
        """Call *call* in a thread. Cancelled before a thread has begun with it, it is never called."""
        future: asyncio.Future[T] = self.loop.create_future()
        self.post(_Call(call, future))
        return future

    def post(self, job: Job) -> None:
        """Give *job* to a thread."""
        if len(self._threads) < self._count:
            self._start()
        self._unfinished.add(job)
        self._queue.put(job)

    def is_full(self) -> bool:
        """A job that is posted now has to wait."""
        return len(self._unfinished) >= self._count

    def drain(self) -> None:
        """The worker leaves."""
        self.is_draining = True
        for job in tuple(self._unfinished):
            job.accompany()

    async def wait(self, timeout: float) -> None:
        """Until no job is unfinished, *timeout* seconds at the most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._unfinished:
                    self._all_ended.clear()
                    await self._all_ended.wait()

    def close(self) -> None:
        """Each thread ends after the job it has. Those that nobody has begun are left."""
        for _ in self._threads:
            self._queue.put(None)

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name=f"prefork_{len(self._threads)}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _settle(self) -> None:
        self._is_announced = False
        told, worked = self._told, self._worked
        try:
            while told:
                told.popleft()()
            while worked:
                job = worked.popleft()
                self._unfinished.discard(job)
                job.end()
        finally:
            if told or worked:  # one of them raised; the others must not wait for the next
                self.loop.call_soon(self._settle)
        if not self._unfinished:
            self._all_ended.set()
        if self.on_room is not None:
            self.on_room()

    # ---- a thread ----

    def tell(self, callback: Callable[[], object]) -> None:
        """Have *callback* called in the loop soon."""
        self._told.append(callback)
        self._announce()

    def _work(self) -> None:
        get, worked = self._queue.get, self._worked
        while job := get():
            copy_context().run(job.work)  # what a job sets in context variables ends with it
            worked.append(job)
            del job  # or the last request would live until the next one
            self._announce()

    def _announce(self) -> None:
        # In this order, and the other way round in `_settle`: whatever is appended is seen.
        if not self._is_announced:
            self._is_announced = True
            with suppress(RuntimeError):  # the loop was closed while the application worked
                self.loop.call_soon_threadsafe(self._settle)


class _Call(Generic[T]):
    """One call, its outcome for a future."""

    def __init__(self, call: Callable[[], T], future: asyncio.Future[T]) -> None:
        self._call = call
        self._future = future
        self._result: Any = None
        self._error: BaseException | None = None

    def work(self) -> None:
        if self._future.cancelled():
            return
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 - told by `end`
            self._error = error

    def end(self) -> None:
        if self._future.done():
            return
        if self._error is None:
            self._future.set_result(self._result)
        else:
            self._future.set_exception(carriable(self._error))

    def accompany(self) -> None:
        """Whoever awaits the future is a task."""


def carriable(error: BaseException) -> BaseException:
    """*error*, or what stands for it where it must not come: a future refuses one, the others would end the loop."""
    replacement: Exception
    if isinstance(error, EXITS):
        replacement = ApplicationExited(error)
    elif isinstance(error, StopIteration):
        replacement = RuntimeError("the application raised StopIteration")
    else:
        return error
    replacement.__cause__ = error
    return replacement
