"""The exchanges that begin in one turn of the loop, run one after the other in one task.

To make a task costs as much as a small application's whole work, and most requests
never wait for anything. So those that one turn of the loop has read are begun
together, after all of them were read, in a task that they share as long as each ends
without a wait. The first one that waits keeps the task for itself, and whatever is
left gets a task for each: an exchange that waits never shares.

What an exchange could leave behind in the task, context variables or a cancellation,
ends the sharing too: no request feels another.
"""

from __future__ import annotations

import asyncio
from contextvars import Context, copy_context
from typing import TYPE_CHECKING

from prefork.gateway.exchange import Exchange

if TYPE_CHECKING:
    from prefork.worker.service import Service


class Batch:
    """Begins exchanges. One per worker."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._exchanges: list[Exchange] = []  # of this turn
        self._begun = 0  # of them
        self._task: asyncio.Task[None] | None = None

    def add(self, exchange: Exchange) -> None:
        """Begin *exchange* after this turn of the loop has read all that is there.

        Called by an exchange that is being begun, it is for the same turn.
        """
        self._exchanges.append(exchange)
        if self._task is None:
            service = self._service
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
                if coroutine is None:  # it goes on elsewhere, or has ended
                    continue
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
        task, left = self._task, self._exchanges[self._begun :]
        self._exchanges.clear()  # a task that waits may wait for long, and is not to hold the others
        self._task, self._exchanges, self._begun = None, [], 0
        assert task is not None
        if not task.done():
            self._service.keep(task)
        for exchange in left:
            self._begin_alone(exchange)

    def _begin_alone(self, exchange: Exchange) -> None:
        try:
            coroutine = self._service.gateway.begin(exchange)
        except BaseException as error:  # noqa: BLE001 - the door for applications
            exchange.wire.conclude(exchange, error)
        else:
            if coroutine is not None:
                exchange.go_on(coroutine)


def is_equal(context: Context, base: Context) -> bool:
    """Each variable has the very value that it has in *base*."""
    return len(context) == len(base) and (not base or all(context.get(var, base) is base[var] for var in base))
