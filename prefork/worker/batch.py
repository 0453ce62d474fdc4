"""The exchanges that begin in one turn of the loop, run one after the other in one task.

To make a task costs as much as a small application's whole work, and most requests
never wait for anything. So those that one turn of the loop has read are begun
together, after all of them were read, in a task that they share as long as each ends
without a wait. The first one that waits keeps the task for itself, and whatever is
left gets a task for each: an exchange that waits never shares.

What an exchange could leave behind in the task, context variables or a cancellation,
ends the sharing too: no request feels another.

A gateway whose `begin` is no coroutine function calls its application outside of any
task: in the loop's thread that may be one that runs a loop of its own.
"""

from __future__ import annotations

import asyncio
import inspect
from contextvars import Context, copy_context
from typing import TYPE_CHECKING

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
        self._task: asyncio.Task[None] | None = None

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
                self._task = asyncio.Task(self._run(), loop=service.loop, context=service.context.copy())
            service.loop.call_soon(self._end_turn, context=service.context)

    async def _run(self) -> None:
        """Begin one exchange after the other, as far as they share."""
        exchanges, begin, base = self._exchanges, self._service.gateway.begin, self._service.context
        task = asyncio.current_task(self._service.loop)
        assert task is not None
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
            if task.cancelling() or not is_equal(copy_context(), base):
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


def is_equal(context: Context, base: Context) -> bool:
    """Each variable has the very value that it has in *base*."""
    return len(context) == len(base) and (not base or all(context.get(var, base) is base[var] for var in base))
