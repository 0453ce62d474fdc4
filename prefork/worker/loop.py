"""Which event loop a worker runs: uvloop where it is installed, asyncio otherwise.

The only place that knows uvloop. It is imported before the first fork, so that
workers share its pages; importing it starts no loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prefork.errors import ConfigError

try:
    import uvloop
except ImportError:  # PyPy, a platform without wheels: everything works, only slower
    uvloop = None  # type: ignore[assignment]


def loop_factory(kind: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """The constructor for *kind*: "auto", "uvloop" or "asyncio". ConfigError if uvloop is asked for and missing."""
    if kind == "asyncio" or (kind == "auto" and uvloop is None):
        return asyncio.new_event_loop
    if uvloop is None:
        raise ConfigError("loop = 'uvloop' was asked for, and uvloop is not installed: pip install uvloop")
    return uvloop.new_event_loop


def loop_name(kind: str) -> str:
    """What `loop_factory` would choose, for the start-up line."""
    return "asyncio" if loop_factory(kind) is asyncio.new_event_loop else "uvloop"
