"""Who may import whom: strictly downward, siblings never. The tables below are the rule; the code is read with ast."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "prefork"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

GROUND = {"errors", "cpus", "kinds", "config", "log", "emitter", "scoreboard", "counters"}

# What each room, and each module of the ground floor, may import of prefork. A room may also import itself.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "cpus": set(),
    "kinds": set(),
    "config": {"errors", "cpus", "kinds"},
    "log": {"errors", "config"},
    "emitter": {"errors", "config", "log"},
    "scoreboard": {"errors"},
    "counters": {"errors", "scoreboard"},
    "protocol": {"errors"},
    "net": GROUND,
    "ipc": {"errors", "log"},
    "gateway": {"protocol", "errors", "log"},
    "process": {"ipc", "emitter", "errors", "log"},
    "worker": {"protocol", "gateway", "net", "ipc", "process"} | GROUND,
    "cluster": {"worker", "process", "net", "ipc"} | GROUND,
    "control": {"cluster", "worker", "process", "net", "ipc"} | GROUND,
}

# The top of the house sees all of it.
TOP = {"__init__.py", "__main__.py"}

# A narrower door between two rooms: the master knows what a worker is and how to become one, nothing inside it.
DOORS = {
    ("cluster", "worker"): {
        f"prefork.worker.main.{name}" for name in ("Seat", "Shared", "Worker", "join", "listen", "load_function", "run")
    }
}

# Other people's packages, each with its one place. Everything else is the standard library.
THIRD_PARTY = {
    "h11": {"protocol/"},
    "uvloop": {"worker/loop.py"},
    "click": {"control/cli.py"},
    "websockets": {"protocol/session.py", "protocol/deflate.py", "protocol/frames.py"},
}

# An epoll set is shared by every process forked after it was made, and a lock that another thread
# holds at the fork stays locked in the child: the master has neither a loop nor a thread.
ASYNCIO = {
    "gateway/",
    "ipc/aio.py",
    "worker/",
    "control/place.py",  # asks whether a loop is running, in order to refuse
}
NO_THREADS = ("cluster/", "process/", "ipc/")
THREADS = {"threading", "_thread", "concurrent", "multiprocessing", "queue"}

# Imports that may stand in a function, since the package may be missing.
OPTIONAL = {
    ("worker/loop.py", "uvloop"),
    ("protocol/websocket.py", "prefork"),  # protocol.session, which needs websockets
}


@dataclass(frozen=True)
class Import:
    name: str  # dotted, with what is taken from the module: "prefork.ipc.channel.Channel"
    line: int
    in_function: bool

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @property
    def room(self) -> str:
        """The room of prefork it comes from; "" is the package itself."""
        return self.name.partition(".")[2].partition(".")[0]


def imports(source: str) -> list[Import]:
    """Every import of a module, also those for type checkers only: they tie rooms together as well."""
    return list(_walk(ast.parse(source), in_function=False))


def _walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, in_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            yield from (Import(f"{module}.{alias.name}", child.lineno, in_function) for alias in child.names)
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _walk(child, in_function or is_function)


def stands_in(file: str, places: set[str] | tuple[str, ...]) -> bool:
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


def broken_rules(file: str, source: str) -> list[str]:
    """What *file* (a path inside prefork) does that the tables forbid, a sentence each."""
    sentences = []
    for item in imports(source):
        where = f"{file}:{item.line} imports {item.name}"
        if item.in_function and (file, item.package) not in OPTIONAL:
            sentences.append(f"{where} inside a function")
        if item.package == "":
            sentences.append(f"{where} relatively")
        elif item.package == "prefork":
            sentences.extend(f"{where}: {why}" for why in _against_the_layers(file, item))
        elif item.package in THIRD_PARTY:
            if not stands_in(file, THIRD_PARTY[item.package]):
                sentences.append(f"{where}, which belongs to {', '.join(THIRD_PARTY[item.package])}")
        elif item.package not in sys.stdlib_module_names:
            sentences.append(f"{where}, which is not among the dependencies")
        elif item.package == "asyncio" and not stands_in(file, ASYNCIO):
            sentences.append(f"{where}, where no event loop may be")
        elif item.package in THREADS and stands_in(file, NO_THREADS):
            sentences.append(f"{where}, where no thread may be")
    return sentences


def _against_the_layers(file: str, item: Import) -> list[str]:
    if file in TOP:
        return []
    room = Path(file).parts[0].removesuffix(".py")
    if room not in MAY_IMPORT:
        return [f"{room} has no place in the table of layers"]
    if item.room not in MAY_IMPORT[room] | {room}:
        return [f"{room} may not import {item.room or 'the package itself'}"]
    door = DOORS.get((room, item.room))
    return [f"{room} may only import {', '.join(sorted(door))}"] if door and item.name not in door else []


@pytest.mark.parametrize("file", FILES)
def test_a_module_imports_only_what_its_layer_may(file):
    """A cycle, or a room that knows too much, is found here and not in a year."""
    assert broken_rules(file, (PACKAGE / file).read_text()) == []


@pytest.mark.parametrize("file", FILES)
def test_a_module_opens_with_what_it_is(file):
    """The first thing a reader sees; and annotations are never evaluated, in any module alike."""
    tree = ast.parse((PACKAGE / file).read_text())

    assert ast.get_docstring(tree)
    if not file.endswith("__init__.py"):
        assert "__future__.annotations" in [item.name for item in imports((PACKAGE / file).read_text())]


def test_the_table_of_layers_has_no_cycle():
    """Each room's permissions lead strictly down; two that may import one another would pass room by room."""

    def below(room, path=()):
        assert room not in path, f"{' -> '.join((*path, room))} is a cycle"
        for lower in MAY_IMPORT[room]:
            below(lower, (*path, room))

    for room in MAY_IMPORT:
        below(room)


@pytest.mark.parametrize(
    ("file", "source", "sentence"),
    [
        ("protocol/head.py", "import prefork.net.address", "protocol may not import net"),
        ("errors.py", "from prefork.log import logger", "errors may not import log"),
        ("ipc/frames.py", "from prefork import config", "ipc may not import config"),
        ("net/tls.py", "import prefork", "net may not import the package itself"),
        ("cluster/master.py", "from prefork.worker.server import Server", "cluster may only import"),
        ("kitchen/sink.py", "from prefork.errors import ConfigError", "has no place in the table"),
        ("worker/main.py", "def f():\n    from prefork.log import logger", "inside a function"),
        ("worker/main.py", "class A:\n    async def f(self):\n        import json", "inside a function"),
        ("worker/server.py", "import uvloop", "belongs to worker/loop.py"),
        ("ipc/channel.py", "import asyncio.events", "where no event loop may be"),
        ("cluster/api.py", "if TYPE_CHECKING:\n    import asyncio", "where no event loop may be"),
        ("cluster/reactor.py", "from threading import Lock", "where no thread may be"),
        ("net/proxy.py", "import requests", "not among the dependencies"),
        ("net/tls.py", "from . import address", "relatively"),
    ],
)
def test_the_test_sees_what_is_forbidden(file, source, sentence):
    """A check that finds nothing in broken code would find nothing for ever."""
    [found] = broken_rules(file, source)

    assert sentence in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("worker/loop.py", "def f():\n    import uvloop"),
        ("cluster/api.py", "from prefork.worker.main import Worker, run"),
        ("gateway/wsgi.py", "import asyncio\nfrom prefork.protocol.events import Headers"),
        ("__init__.py", "from prefork import cluster"),
        ("protocol/full.py", "import h11\nfrom prefork.protocol import events"),
    ],
)
def test_the_test_lets_pass_what_is_allowed(file, source):
    """Otherwise everybody would learn to work around it."""
    assert broken_rules(file, source) == []
