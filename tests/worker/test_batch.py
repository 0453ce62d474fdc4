"""Exchanges that share a task: which do, and that none of them can tell."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextvars import ContextVar, copy_context

import pytest

from prefork.worker.batch import Batch, is_equal

DEADLINE = 5.0  # seconds

user: ContextVar[object] = ContextVar("user")


class Wire:
    def __init__(self) -> None:
        self.concluded: list[BaseException | None] = []

    def conclude(self, exchange, error):
        self.concluded.append(error)


class Exchange:
    """As much of one as the batch knows."""

    def __init__(self, service, run, name=""):
        self.service, self.run, self.name = service, run, name
        self.wire = Wire()
        self.responded = False
        self.task = None

    def go_on(self, coroutine):
        self.service.keep(asyncio.get_running_loop().create_task(coroutine, context=self.service.context.copy()))

    def __repr__(self):
        return self.name


class Service:
    """As much of one as the batch knows; it is the gateway, too."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.context = copy_context()
        self.gateway = self
        self.tasks: set[asyncio.Task[None]] = set()
        self.batch = Batch(self)

    async def begin(self, exchange):
        await exchange.run(exchange)

    def keep(self, task):
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class PlainService(Service):
    """Its gateway needs no task to begin."""

    def begin(self, exchange):
        return exchange.run(exchange)


def name_of_task():
    """Not the task: who keeps it ends the sharing."""
    task = asyncio.current_task()
    return task and task.get_name()


async def end(exchange):
    exchange.task = name_of_task()
    exchange.responded = True


async def turns():
    """Enough of them for whatever does not wait."""
    for _ in range(4):
        await asyncio.sleep(0)


def run(test, service=Service):
    async def bounded():
        async with asyncio.timeout(DEADLINE):
            await test(service())

    asyncio.run(bounded())


def test_exchanges_of_one_turn_that_never_wait_share_a_task():
    async def test(service):
        exchanges = [Exchange(service, end) for _ in range(5)]
        for exchange in exchanges:
            service.batch.add(exchange)
        assert not any(exchange.task for exchange in exchanges), "begun before all was read"
        await turns()
        assert len({exchange.task for exchange in exchanges}) == 1
        assert not service.tasks
        later = Exchange(service, end)
        service.batch.add(later)
        await turns()
        assert later.task != exchanges[0].task

    run(test)


def test_exchange_that_waits_keeps_its_task_to_itself():
    async def test(service):
        release = asyncio.Event()

        async def wait(exchange):
            exchange.task = name_of_task()
            await release.wait()
            assert name_of_task() == exchange.task
            exchange.responded = True

        kinds = [end, wait, end, wait, end]
        exchanges = [Exchange(service, kind) for kind in kinds]
        for exchange in exchanges:
            service.batch.add(exchange)
        await turns()
        assert [exchange.responded for exchange in exchanges] == [kind is end for kind in kinds]
        assert len({exchanges[n].task for n in (1, 2, 3, 4)}) == 4
        assert len(service.tasks) == 2
        release.set()
        await turns()
        assert all(exchange.responded for exchange in exchanges)
        assert not service.tasks

    run(test)


def test_what_an_exchange_sets_in_its_context_no_other_one_sees():
    async def test(service):
        seen = []

        async def sign_in(exchange):
            seen.append(user.get("nobody"))
            user.set(exchange)
            exchange.responded = True

        for _ in range(5):
            service.batch.add(Exchange(service, sign_in))
        await turns()
        assert seen == ["nobody"] * 5

    run(test)


def test_what_an_exchange_changes_in_its_context_no_other_one_sees():
    """A value that is equal to the one before is another object all the same, and may be changed."""

    async def test(service):
        seen = []

        async def collect(exchange):
            seen.append(len(user.get()))
            user.set([])
            user.get().append(exchange)
            user.set([])
            exchange.responded = True

        async def note(exchange):
            seen.append(len(user.get()))
            if user.get() is not shared:
                user.get().append(exchange)
            exchange.responded = True

        for kind in (collect, note, note, note):
            service.batch.add(Exchange(service, kind))
        await turns()
        assert seen == [0, 0, 0, 0]

    shared: list[object] = []
    token = user.set(shared)
    try:
        run(test)
    finally:
        user.reset(token)


async def cancel(exchange):
    asyncio.current_task().cancel()


async def cancel_and_think_again(exchange):
    asyncio.current_task().cancel()
    asyncio.current_task().uncancel()


async def keep_the_task(exchange):
    """As a watchdog does that nobody calls off."""
    exchange.kept = asyncio.current_task().cancel


async def leave_a_timeout_open(exchange):
    async def pieces():
        async with asyncio.timeout(60):
            yield

    exchange.kept = pieces()
    await anext(exchange.kept)


async def watch_weakly(exchange):
    """As anyio does."""
    exchange.kept = weakref.WeakKeyDictionary({asyncio.current_task(): exchange})


async def set_an_attribute(exchange):
    asyncio.current_task().user = exchange


async def set_a_name(exchange):
    asyncio.current_task().set_name("mine")


async def clean_up_at_the_end(exchange):
    asyncio.current_task().add_done_callback(lambda _: None)


@pytest.mark.parametrize(
    "leave",
    [
        cancel,
        cancel_and_think_again,
        keep_the_task,
        leave_a_timeout_open,
        watch_weakly,
        set_an_attribute,
        set_a_name,
        clean_up_at_the_end,
    ],
)
def test_task_in_which_an_exchange_has_left_something_is_not_shared(leave):
    async def test(service):
        async def leave_and_end(exchange):
            await leave(exchange)
            exchange.responded = True

        async def wait(exchange):
            task = asyncio.current_task()
            assert not hasattr(task, "user")
            assert task.get_name() != "mine"
            seen.append(id(task))
            await asyncio.sleep(0)
            exchange.responded = True

        seen = []
        first, second = Exchange(service, leave_and_end), Exchange(service, wait)
        service.batch.add(first)
        service.batch.add(second)
        shared = id(service.batch._task)
        await turns()
        assert first.responded
        assert second.responded
        assert seen != [shared]

    run(test)


@pytest.mark.parametrize("error", [RuntimeError("mine"), asyncio.CancelledError(), ExceptionGroup("g", [ValueError()])])
def test_what_an_exchange_raises_is_its_own(error):
    async def test(service):
        async def fail(exchange):
            raise error

        def fail_at_once(exchange):
            raise error

        exchanges = [Exchange(service, kind) for kind in (end, fail, end, fail_at_once, end)]
        for exchange in exchanges:
            service.batch.add(exchange)
        await turns()
        assert [exchange.wire.concluded for exchange in exchanges] == [[], [error], [], [error], []]
        assert [exchange.responded for exchange in exchanges] == [True, False, True, False, True]

    run(test)


def test_exchange_that_returns_without_a_response_is_concluded():
    async def test(service):
        async def forget(exchange):
            pass

        exchange = Exchange(service, forget)
        service.batch.add(exchange)
        await turns()
        assert exchange.wire.concluded == [None]

    run(test)


def end_plainly(exchange):
    exchange.task = name_of_task()
    exchange.responded = True


def test_plain_gateway_begins_outside_of_any_task_after_all_was_read():
    async def test(service):
        exchanges = [Exchange(service, end_plainly) for _ in range(3)]
        for exchange in exchanges:
            service.batch.add(exchange)
        assert not any(exchange.responded for exchange in exchanges)
        await turns()
        assert [exchange.responded for exchange in exchanges] == [True] * 3
        assert [exchange.task for exchange in exchanges] == [None] * 3

    run(test, PlainService)


def test_what_a_plain_gateway_leaves_to_do_has_a_task_of_its_own():
    async def test(service):
        exchanges = [Exchange(service, kind) for kind in (end, end_plainly, end)]
        for exchange in exchanges:
            service.batch.add(exchange)
        await turns()
        assert all(exchange.responded for exchange in exchanges)
        assert exchanges[0].task != exchanges[2].task
        assert not service.tasks

    run(test, PlainService)


def test_what_a_plain_gateway_raises_is_that_exchanges_own():
    error = RuntimeError("mine")

    async def test(service):
        def fail(exchange):
            raise error

        exchanges = [Exchange(service, kind) for kind in (fail, end_plainly)]
        for exchange in exchanges:
            service.batch.add(exchange)
        await turns()
        assert [exchange.wire.concluded for exchange in exchanges] == [[error], []]

    run(test, PlainService)


def test_exchange_that_a_thread_or_a_callback_goes_on_with_is_not_concluded():
    async def test(service):
        exchange = Exchange(service, lambda _: None)
        service.batch.add(exchange)
        await turns()
        assert exchange.wire.concluded == []

    run(test, PlainService)


@pytest.mark.parametrize("service", [Service, PlainService])
def test_next_request_of_a_connection_joins_the_turn(service):
    """Pipelined requests: what was begun by the end of another exchange is answered with the same write."""

    async def test(service):
        second = Exchange(service, end_plainly if isinstance(service, PlainService) else end)
        together = []

        def add():
            service.batch.add(second)
            asyncio.get_running_loop().call_soon(lambda: together.append(second.responded))

        async def end_and_add(exchange):
            await end(exchange)
            add()

        def end_plainly_and_add(exchange):
            end_plainly(exchange)
            add()

        first = Exchange(service, end_plainly_and_add if isinstance(service, PlainService) else end_and_add)
        service.batch.add(first)
        await turns()
        assert together == [True]
        assert second.task == first.task

    run(test, service)


def test_exchange_that_waits_long_holds_none_of_the_others():
    async def test(service):
        release = asyncio.Event()

        async def wait(exchange):
            await release.wait()
            exchange.responded = True

        ended = Exchange(service, end)
        service.batch.add(ended)
        service.batch.add(Exchange(service, wait))
        await turns()
        gone = weakref.ref(ended)
        del ended
        gc.collect()
        assert gone() is None
        release.set()
        await turns()

    run(test)


def test_equal_contexts():
    base = copy_context()
    assert is_equal(base.copy(), base)
    changed = base.copy()
    token = changed.run(user.set, [])
    assert not is_equal(changed, base)
    assert is_equal(changed.copy(), changed)
    same_length = changed.copy()
    same_length.run(user.set, [])
    assert not is_equal(same_length, changed)
    changed.run(user.reset, token)
    assert is_equal(changed, base)
