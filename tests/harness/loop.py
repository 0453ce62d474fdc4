"""Coroutines run to their end, within a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

from tests.harness.client import DEADLINE

T = TypeVar("T")


def go(coroutine: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, but a coroutine that hangs fails."""

    async def guarded() -> T:
        async with asyncio.timeout(DEADLINE):
            return await coroutine

    return asyncio.run(guarded())


def in_threads(pool: Executor) -> Callable[[Callable[[], T]], asyncio.Future[T]]:
    """The `run_in_thread` of a worker whose threads are those of *pool*."""
    return lambda call: asyncio.get_running_loop().run_in_executor(pool, call)
