"""The exchanges that begin in one turn of the loop, run one after the other in one task.

To make a task costs as much as a small application's whole work, and most requests
never wait for anything. So those that one turn of the loop has read are begun
together, after all of them were read, in a task that they share as long as each ends
without a wait. The first one that waits keeps the task for itself, and whatever is
left gets a task for each: an exchange that waits never shares.

What an exchange leaves behind in the task ends the sharing too, be it a context
variable, a reference that may cancel it later, a name or a callback: no request feels
another.

A gateway whose `begin` is no coroutine function calls its application outside of any
task: in the loop's thread that may be one that runs a loop of its own.
"""

from __future__ import annotations

import asyncio
import inspect
from contextvars import Context, copy_context
from sys import getrefcount
from typing import TYPE_CHECKING, Any
from weakref import getweakrefcount

from prefork.gateway.exchange import Exchange

if TYPE_CHECKING:
    from prefork.worker.service import Service


class Batch:
    """Begins exchanges. One per worker."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._shares = inspect.iscoroutinefunction(service.gateway.begin)
        self._exchanges: list[Exchange] = []  # of this turn
        self._begun = 0  # of them
        self._is_due = False  # the loop has been told
        self._task: SharedTask | None = None

    def add(self, exchange: Exchange) -> None:
        """Begin *exchange* after this turn of the loop has read all that is there.

        Called while another one is being begun, it is for the same turn.
        """
        self._exchanges.append(exchange)
        if not self._is_due:
            self._is_due = True
            service = self._service
            if self._shares:
                # Not eagerly: nothing is to begin before all is read.
                self._task = SharedTask(self._run(), loop=service.loop, context=service.context.copy())
            service.loop.call_soon(self._end_turn, context=service.context)

    def begin_now(self, exchange: Exchange) -> None:
        """Begin *exchange*, which may be waiting for the turn's end, before this returns."""
        if exchange in self._exchanges[self._begun :]:
            self._exchanges.remove(exchange)
            self._begin_alone(exchange)

    async def _run(self) -> None:
        """Begin one exchange after the other, as far as they share."""
        exchanges, begin, base = self._exchanges, self._service.gateway.begin, self._service.context
        task = self._task
        assert task is not None
        references, watchers = getrefcount(task), getweakrefcount(task)
        while self._begun < len(exchanges):
            exchange = exchanges[self._begun]
            self._begun += 1
            try:
                coroutine = begin(exchange)
                assert coroutine is not None
                await coroutine
            except BaseException as error:  # noqa: BLE001 - the door for applications
                exchange.wire.conclude(exchange, error)
            else:
                if not exchange.responded:
                    exchange.wire.conclude(exchange, None)
            if (
                task.is_changed
                or getrefcount(task) != references
                or getweakrefcount(task) != watchers
                or not is_equal(copy_context(), base)
            ):
                return

    def _end_turn(self) -> None:
        """The task has run. What it has not begun gets tasks of its own."""
        exchanges, task = self._exchanges, self._task
        if task is not None and not task.done():
            self._service.keep(task)
        while self._begun < len(exchanges):
            exchange = exchanges[self._begun]
            self._begun += 1
            self._begin_alone(exchange)
        exchanges.clear()  # a task that waits may wait for long, and is neither to hold the others nor to go on with them
        self._task, self._exchanges, self._begun, self._is_due = None, [], 0, False

    def _begin_alone(self, exchange: Exchange) -> None:
        try:
            coroutine = self._service.gateway.begin(exchange)
        except BaseException as error:  # noqa: BLE001 - the door for applications
            exchange.wire.conclude(exchange, error)
        else:
            if coroutine is not None:  # it goes on elsewhere, or has ended
                exchange.go_on(coroutine)


class SharedTask(asyncio.Task[None]):
    """A task that tells whether anybody has set something of it."""

    is_changed = False

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__("is_changed", True)
        super().__setattr__(name, value)

    def cancel(self, msg: Any = None) -> bool:
        self.is_changed = True
        return super().cancel(msg)

    def add_done_callback(self, *args: Any, **kwargs: Any) -> None:
        self.is_changed = True
        super().add_done_callback(*args, **kwargs)

    def set_name(self, value: object, /) -> None:
        self.is_changed = True
        super().set_name(value)


def is_equal(context: Context, base: Context) -> bool:
    """Each variable has the very value that it has in *base*."""
    return len(context) == len(base) and (not base or all(context.get(var, base) is base[var] for var in base))
