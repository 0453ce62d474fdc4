"""ASGI's lifespan: one long call of the application around the life of an event loop.

Follows the Lifespan specification, version 2.0. It sets no deadline: whoever calls
`startup` and `shutdown` knows how long a worker may take.

The one fact: an application that raises when called with a lifespan scope "does not
support lifespan" and is served without, so only `lifespan.startup.failed` and mode
"on" keep a worker from starting.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable
from contextlib import suppress
from enum import Enum
from typing import Any

from prefork.errors import GatewayError, LifespanFailed
from prefork.gateway.asgi import ASGI_VERSION, ASGIApplication, Message, Scope

LIFESPAN_SPEC_VERSION = "2.0"

log = logging.getLogger("prefork")


class Phase(Enum):
    """How far the application has come, and which answer is due."""

    STARTING = "'lifespan.startup.complete' or '.failed' is due"
    RUNNING = "none is due before 'lifespan.shutdown' was received"
    STOPPING = "'lifespan.shutdown.complete' or '.failed' is due"
    OVER = "the last answer was given"


class Lifespan:
    """Startup and shutdown of an ASGI application in this event loop."""

    def __init__(self, app: ASGIApplication, state: dict[str, Any], mode: str = "auto") -> None:
        """*state* is handed to the application to fill. *mode* "on": it must take part; "off": it is not asked."""
        self._app = app
        self._state = state
        self._mode = mode
        self._phase = Phase.STARTING
        self._startup_told = False  # the application received `lifespan.startup`
        self._failure: str | None = None  # the message of startup.failed or shutdown.failed
        self._task: asyncio.Task[None] | None = None
        # Each is also set when the application's call is over, so that nobody waits for what cannot come.
        self._started = asyncio.Event()  # it answered to `lifespan.startup`
        self._stopped = asyncio.Event()  # it answered to `lifespan.shutdown`
        self._exhausted = asyncio.Event()  # it waits for a message after the last
        self._stop = asyncio.Event()  # `lifespan.shutdown` may be received
        self.supported = False  # startup was completed

    async def startup(self) -> None:
        """Let the application start; when this returns, requests may come.

        Raises LifespanFailed if the application said `lifespan.startup.failed`, and
        in mode "on" also if it raised or returned instead of answering.
        """
        if self._mode == "off":
            return
        self._task = asyncio.create_task(self._run(), name="lifespan")
        self._task.add_done_callback(self._on_end)
        try:
            await self._started.wait()
        except asyncio.CancelledError:
            await self._end()
            raise
        if self._failure is not None:
            raised = _raised(self._task)
            await self._end()
            raise _failed("startup", self._failure, raised)
        if self._phase is Phase.RUNNING:
            self.supported = True
            return
        self._unsupported(self._task)

    async def shutdown(self) -> None:
        """Let the application clean up and wait until it has.

        Does nothing if there was no startup, or the application returned on its own
        since. Raises LifespanFailed if it said `lifespan.shutdown.failed` or raised,
        now or while it was serving.
        """
        if self._task is None or not self.supported:
            return
        self.supported = False
        self._stop.set()
        try:
            await self._stopped.wait()
            if self._failure is None:
                await self._exhausted.wait()
        finally:
            raised = _raised(self._task)
            await self._end()
        if self._failure is not None:
            raise _failed("shutdown", self._failure, raised)
        if raised is not None:
            raise LifespanFailed(f"the application raised in its lifespan: {_name(raised)}", _trace(raised))

    # ---- the application's side ----

    async def _run(self) -> None:
        scope: Scope = {
            "type": "lifespan",
            "asgi": {"version": ASGI_VERSION, "spec_version": LIFESPAN_SPEC_VERSION},
            "state": self._state,
        }
        try:
            called: Awaitable[None] = self._app(scope, self._receive, self._send)
            await called
        except (SystemExit, KeyboardInterrupt) as exc:
            # Out of a task these would end the whole loop. Whoever calls sys.exit() while starting
            # means that it cannot start, whatever the mode.
            if self._phase is Phase.STARTING:
                self._phase = Phase.OVER
                self._failure = f"it raised {_name(exc)}"
            raise RuntimeError(f"the application raised {_name(exc)}") from exc

    async def _receive(self) -> Message:
        if not self._startup_told:
            self._startup_told = True
            return {"type": "lifespan.startup"}
        await self._stop.wait()
        if self._phase is Phase.RUNNING:
            self._phase = Phase.STOPPING
            return {"type": "lifespan.shutdown"}
        # No message follows the last one: what is written as `while True: await receive()` waits here until it is ended.
        self._exhausted.set()
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await never

    async def _send(self, message: Message) -> None:
        kind = message.get("type")
        match self._phase, kind:
            case Phase.STARTING, "lifespan.startup.complete":
                self._phase = Phase.RUNNING
                self._started.set()
            case Phase.STOPPING, "lifespan.shutdown.complete":
                self._phase = Phase.OVER
                self._stopped.set()
            case (Phase.STARTING, "lifespan.startup.failed") | (Phase.STOPPING, "lifespan.shutdown.failed"):
                self._phase = Phase.OVER
                self._failure = str(message.get("message", ""))
                self._started.set()
                self._stopped.set()
            case _:
                raise GatewayError(f"ASGI message {kind!r} is out of turn in the lifespan: {self._phase.value}")

    # ---- inside ----

    def _on_end(self, task: asyncio.Task[None]) -> None:
        for event in (self._started, self._stopped, self._exhausted):
            event.set()

    async def _end(self) -> None:
        """Take the application's call down, if it is not over. What it raises now was told before."""
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await self._task

    def _unsupported(self, task: asyncio.Task[None]) -> None:
        raised = _raised(task)
        how = f"it raised {_name(raised)}" if raised else "it returned without an answer to 'lifespan.startup'"
        if self._mode == "on":
            message = f"the application must take part in the lifespan protocol (lifespan is 'on'), but {how}"
            raise LifespanFailed(message, _trace(raised) if raised else "")
        if raised is None or not self._startup_told or isinstance(raised, GatewayError):
            log.debug("the application does not support lifespan, going on without: %s", how)
            return
        # It asked for its startup event, so it may well have meant to start: ASGI has us go on, silence would be cruel.
        log.warning(
            "the application failed in its lifespan startup, going on without as ASGI requires: %s; "
            "lifespan 'on' would refuse to start",
            how,
            exc_info=raised,
        )


def _raised(task: asyncio.Task[None]) -> BaseException | None:
    if not task.done():
        return None
    if task.cancelled():
        return asyncio.CancelledError("the lifespan was cancelled by the application itself")
    return task.exception()


def _failed(phase: str, told: str, raised: BaseException | None) -> LifespanFailed:
    """Frameworks put a whole traceback into *told*: then its last line goes into the message."""
    lines = told.strip().splitlines()
    why = f": {lines[-1].strip()}" if lines else ", it does not say why"
    trace = told if len(lines) > 1 else _trace(raised) if raised is not None else ""
    return LifespanFailed(f"the application's {phase} failed{why}", trace)


def _name(exc: BaseException) -> str:
    return "".join(traceback.format_exception_only(exc)).strip()


def _trace(exc: BaseException) -> str:
    """The application's part of the traceback: without our frames, which called it."""
    trace = exc.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(exc), exc, trace))
