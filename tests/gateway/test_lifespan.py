"""ASGI startup and shutdown, against the words of the Lifespan specification."""

from __future__ import annotations

import asyncio
import logging

import pytest

from prefork.errors import LifespanFailed
from prefork.gateway.lifespan import Lifespan
from tests.harness.loop import go

STARTED = {"type": "lifespan.startup.complete"}
STOPPED = {"type": "lifespan.shutdown.complete"}


async def well_behaved(scope, receive, send):
    """The specification's example."""
    assert await receive() == {"type": "lifespan.startup"}
    scope["state"]["db"] = "open"
    await send(STARTED)
    assert await receive() == {"type": "lifespan.shutdown"}
    scope["state"]["db"] = "closed"
    await send(STOPPED)


def start(app, mode="auto"):
    """Start and stop *app*; whether it took part, and the state between the two."""

    async def run():
        state = {}
        lifespan = Lifespan(app, state, mode)
        await lifespan.startup()
        seen = (lifespan.supported, dict(state))
        await lifespan.shutdown()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return seen

    return go(run())


def test_application_starts_before_the_requests_and_stops_after_them():
    """What it put into the state is there for the requests."""

    async def run():
        state = {}
        lifespan = Lifespan(well_behaved, state)
        await lifespan.startup()
        assert (lifespan.supported, state) == (True, {"db": "open"})
        await lifespan.shutdown()
        assert state == {"db": "closed"}

    go(run())


def test_scope_names_its_versions():
    """Version 2.0 added the failed messages; "1.0" is assumed where it is missing."""
    seen = {}

    async def app(scope, receive, send):
        seen.update(scope)
        await well_behaved(scope, receive, send)

    start(app)
    assert (seen["type"], seen["asgi"]) == ("lifespan", {"version": "3.0", "spec_version": "2.0"})


def test_off_does_not_call_the_application():
    """For those that hang or fail on a scope they do not know."""

    async def app(scope, receive, send):
        raise AssertionError

    assert start(app, "off") == (False, {})


async def refuses_unknown_scopes(scope, receive, send):
    raise NotImplementedError(scope["type"])


async def ignores_the_scope(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})


async def returns_at_once(scope, receive, send):
    pass


def is_no_coroutine_function(scope, receive, send):
    return None


@pytest.mark.parametrize(
    "app",
    [refuses_unknown_scopes, ignores_the_scope, returns_at_once, is_no_coroutine_function],
    ids=lambda a: a.__name__,
)
def test_auto_goes_on_without_an_application_that_does_not_take_part(app, caplog):
    """ "The server must continue but not send any lifespan events"."""
    with caplog.at_level(logging.DEBUG, "prefork"):
        assert start(app) == (False, {})

    assert [record.levelname for record in caplog.records if record.name == "prefork"] == ["DEBUG"]


@pytest.mark.parametrize("app", [refuses_unknown_scopes, ignores_the_scope, returns_at_once], ids=lambda a: a.__name__)
def test_on_refuses_an_application_that_does_not_take_part(app):
    """Who asks for it depends on it."""
    with pytest.raises(LifespanFailed, match="must take part in the lifespan protocol"):
        start(app, "on")


async def fails_in_its_startup(scope, receive, send):
    await receive()
    raise OSError("no database")


def test_auto_warns_of_an_exception_in_the_startup_itself(caplog):
    """It must go on by the specification, but this is hardly an application that does not know lifespan."""
    with caplog.at_level(logging.INFO, "prefork"):
        assert start(fails_in_its_startup) == (False, {})

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "OSError: no database" in record.getMessage()
    assert record.exc_info[2] is not None


def test_on_fails_with_the_exception_of_the_startup():
    """With the traceback, since nobody else will show it."""
    with pytest.raises(LifespanFailed, match="it raised OSError: no database") as failed:
        start(fails_in_its_startup, "on")

    assert "fails_in_its_startup" in failed.value.traceback


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize("raises", [False, True])
def test_startup_failed_keeps_the_server_from_starting(mode, raises):
    """ "If a server sees this it should log/print the message provided and then exit", in both modes."""

    async def app(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})
        if raises:
            raise OSError("no database")
        await receive()

    with pytest.raises(LifespanFailed, match="^the application's startup failed: no database$") as failed:
        start(app, mode)
    assert ("OSError" in failed.value.traceback) == raises


def test_startup_failed_with_a_traceback_is_told_in_one_line():
    """Starlette sends the whole traceback as its message; the log line gets the end of it."""
    told = "Traceback (most recent call last):\n  File ...\nOSError: no database\n"

    async def app(scope, receive, send):
        await send({"type": "lifespan.startup.failed", "message": told})

    with pytest.raises(LifespanFailed, match="^the application's startup failed: OSError: no database$") as failed:
        start(app)
    assert failed.value.traceback == told


def test_startup_failed_without_a_message_says_so():
    """The message is optional."""

    async def app(scope, receive, send):
        await send({"type": "lifespan.startup.failed"})

    with pytest.raises(LifespanFailed, match="startup failed, it does not say why"):
        start(app)


def test_cancelled_startup_takes_the_application_down():
    """A worker told to stop while it boots must not leave the application running behind it."""
    ended = []

    async def app(scope, receive, send):
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append(1)

    async def run():
        starting = asyncio.create_task(Lifespan(app, {}).startup())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    go(run())
    assert ended == [1]


def test_shutdown_failed_is_told():
    """ "It should log/print the message provided and then terminate"."""

    async def app(scope, receive, send):
        await receive()
        await send(STARTED)
        await receive()
        await send({"type": "lifespan.shutdown.failed", "message": "queue not empty"})

    with pytest.raises(LifespanFailed, match="^the application's shutdown failed: queue not empty$"):
        start(app)


def test_exception_in_the_shutdown_is_told_with_its_traceback():
    """Otherwise it would be lost with the task."""

    async def app(scope, receive, send):
        await receive()
        await send(STARTED)
        await receive()
        raise LookupError("gone")

    with pytest.raises(LifespanFailed, match="raised in its lifespan: LookupError: gone") as failed:
        start(app)
    assert "LookupError" in failed.value.traceback


def test_exception_while_serving_is_told_at_the_shutdown():
    """The lifespan's task has nobody else who looks at it."""
    fail = asyncio.Event()

    async def app(scope, receive, send):
        await receive()
        await send(STARTED)
        await fail.wait()
        raise LookupError("gone")

    async def run():
        lifespan = Lifespan(app, {})
        await lifespan.startup()
        fail.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(LifespanFailed, match="LookupError: gone"):
            await lifespan.shutdown()

    go(run())


def test_application_that_returns_after_its_startup_has_nothing_to_stop():
    """Some only start."""

    async def app(scope, receive, send):
        await receive()
        await send(STARTED)

    assert start(app) == (True, {})


def test_application_that_never_returns_is_ended_after_its_last_message():
    """`while True: await receive()` without a return is common, and must not hold the worker."""

    async def app(scope, receive, send):
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})

    assert start(app) == (True, {})


def test_work_after_the_last_message_is_waited_for():
    """It is late, but cutting it off would lose it."""
    done = []

    async def app(scope, receive, send):
        await well_behaved(scope, receive, send)
        for _ in range(5):
            await asyncio.sleep(0)
        done.append(1)

    start(app)
    assert done == [1]


def test_answer_before_the_question_counts():
    """Sending without receiving is no error, and both events still come."""
    seen = []

    async def app(scope, receive, send):
        await send(STARTED)
        seen.append((await receive())["type"])
        seen.append((await receive())["type"])
        await send(STOPPED)

    assert start(app) == (True, {})
    assert seen == ["lifespan.startup", "lifespan.shutdown"]


def test_answer_out_of_turn_is_refused_in_the_applications_frame():
    """A second complete, or the shutdown's before the shutdown."""
    refused = []

    async def app(scope, receive, send):
        await send(STARTED)
        for message in (STARTED, STOPPED, {"type": "http.response.start"}):
            try:
                await send(message)
            except Exception as exc:
                refused.append(str(exc))

    start(app)
    assert len(refused) == 3
    assert refused[0].startswith("ASGI message 'lifespan.startup.complete' is out of turn")


def test_shutdown_without_startup_does_nothing():
    """A worker that failed earlier stops like any other."""
    go(Lifespan(well_behaved, {}).shutdown())


def test_second_shutdown_does_nothing():
    """Draining and stopping may both ask for it."""

    async def run():
        lifespan = Lifespan(well_behaved, {})
        await lifespan.startup()
        await lifespan.shutdown()
        await lifespan.shutdown()

    go(run())
