"""From `module:attr` to a callable, and to the interface it speaks.

It imports, and looks at signatures; it calls nothing but a factory written as
`module:factory()`, and it leaves `sys.path` alone.

The one fact: "no such module" and "your module fails to import" are told apart by
where the ImportError was raised, not by its text: a traceback that passes through a
frame that is neither ours nor importlib's comes from the application.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import ModuleType, TracebackType
from typing import Any, get_args

from prefork.errors import ImportFailed, LoadError, NoSuchAttribute, NoSuchModule
from prefork.gateway.message import Request
from prefork.gateway.websocket import WebSocket

# What `module` without `:attr` tries, in this order: uvicorn's and FastAPI's habit,
# PEP 3333's (gunicorn, mod_wsgi), and ours.
DEFAULT_ATTRIBUTES = ("app", "application", "handler")

AUTO = "auto"


class Interface(Enum):
    """How an application is called."""

    NATIVE = "native"  # handler(request)
    ASGI = "asgi"  # await app(scope, receive, send)
    WSGI = "wsgi"  # app(environ, start_response)


class Takes(Enum):
    """What a native handler is called with, by the annotation of its parameter."""

    REQUESTS = "requests"
    WEBSOCKETS = "WebSockets"
    BOTH = "requests and WebSockets"


@dataclass(frozen=True, slots=True)
class Application:
    """What is served: its *name* for people, the callable, and how it is called.

    *guessed*: the signature did not decide; *reason* then says what did, as a clause for the log.
    *takes* is what a native one takes; others say so themselves.
    """

    name: str
    target: Any
    interface: Interface
    guessed: bool
    reason: str = ""
    takes: Takes = Takes.REQUESTS


def load_application(target: str | object, interface: str = AUTO) -> Application:
    """The application that *target* names, or is.

    *target* is "module:attr" (attr may be dotted), "module:factory()", "module"
    alone, or the callable itself; *interface* "auto", "native", "asgi" or "wsgi".
    Raises NoSuchModule, NoSuchAttribute, ImportFailed, or LoadError for a target
    that cannot be understood or called.
    """
    wanted = _wanted(interface)
    if isinstance(target, str):
        name, loaded = resolve(target)
    else:
        name, loaded = _describe(target), target
    _refuse_uncallable(repr(name) if isinstance(target, str) else "the application", loaded)
    if wanted is not None:
        if wanted is Interface.ASGI:
            _refuse_double_callable(name, loaded)
        application = Application(name, loaded, wanted, guessed=False)
    else:
        application = _detect(name, loaded)
    if application.interface is Interface.NATIVE:
        return replace(application, takes=_takes(name, loaded))
    return application


def _wanted(interface: str) -> Interface | None:
    if interface == AUTO:
        return None
    try:
        return Interface(interface)
    except ValueError:
        raise LoadError(f"interface {interface!r} is unknown, allowed are auto, native, asgi and wsgi") from None


# ---- from a name to an object ----


def resolve(target: str) -> tuple[str, object]:
    """The object that *target* names, and its full name for people: "module" alone gives "module:app".

    Raises what `load_application` raises; whether the object can be called is not looked at.
    """
    module_name, colon, attribute = target.partition(":")
    is_factory = attribute.endswith("()")
    path = attribute.removesuffix("()").split(".") if colon else []
    # "app.py" would import `app` and then look for `py` in it.
    is_file = module_name.endswith(".py")
    if is_file or not _is_dotted(module_name.split(".")) or (colon and not _is_dotted(path)):
        raise LoadError(_misspelt(target))
    module = _import(module_name, target)
    if not colon:
        return _default_attribute(module)
    loaded = _attribute(module, path, target)
    return target, _call_factory(loaded, target) if is_factory else loaded


def _is_dotted(parts: Sequence[str]) -> bool:
    return all(part.isidentifier() for part in parts)


def _misspelt(target: str) -> str:
    expected = "expected 'module:attribute', 'module:factory()' or 'module'"
    file, _, attribute = target.partition(":")
    if file.endswith(".py") or os.sep in file:
        module = os.path.normpath(file).removesuffix(".py").strip(f".{os.sep}").replace(os.sep, ".")
        suggestion = f"{module}:{attribute}" if attribute else module
        return f"{target!r} names a file, {expected}: write {suggestion!r}"
    without_arguments = "; a factory is called without arguments" if "(" in target else ""
    return f"{target!r} cannot be understood, {expected}{without_arguments}"


def _import(name: str, target: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if _application_frames(exc.__traceback__) is None and _is_self_or_parent(exc.name, name):
            raise NoSuchModule(_missing_module(exc.name or name, target)) from None
        raise _import_failed(f"module {name!r} was found, but importing it failed", exc) from exc
    except (Exception, SystemExit) as exc:
        raise _import_failed(f"module {name!r} was found, but importing it failed", exc) from exc


def _is_self_or_parent(missing: str | None, name: str) -> bool:
    return missing is not None and f"{name}.".startswith(f"{missing}.")


def _application_frames(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame on that is neither ours nor importlib's."""
    while trace is not None and _is_machinery(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


def _is_machinery(filename: str) -> bool:
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen importlib")


def _missing_module(missing: str, target: str) -> str:
    parent, _, last = missing.rpartition(".")
    if parent:
        package = sys.modules.get(parent)
        if package is not None and not hasattr(package, "__path__"):
            return f"no module {missing!r} (for {target!r}): {parent!r} is a module, not a package"
        where = f"it is looked for in the package {parent!r}"
        siblings: Iterable[str] = getattr(package, "__path__", ())
    else:
        where = (
            f"it is looked for in the current directory ({os.getcwd()}; --chdir changes it), "
            f"in --pythonpath and among the packages of {sys.prefix}"
        )
        siblings = (os.getcwd(),)
    known = [module.name for module in pkgutil.iter_modules(list(siblings))]
    return f"no module {missing!r} (for {target!r}): {where}{_did_you_mean(last, known)}"


def _import_failed(what: str, exc: BaseException) -> ImportFailed:
    """Of the traceback, the part that is the application's: for a SyntaxError in the module itself, none."""
    exc = exc.with_traceback(_application_frames(exc.__traceback__))
    text = "".join(traceback.format_exception(exc))
    summary = "".join(traceback.format_exception_only(exc)).strip().splitlines()[-1]
    return ImportFailed(f"{what}: {summary}", text)


def _default_attribute(module: ModuleType) -> tuple[str, object]:
    for attribute in DEFAULT_ATTRIBUTES:
        if hasattr(module, attribute):
            return f"{module.__name__}:{attribute}", getattr(module, attribute)
    tried = ", ".join(repr(attribute) for attribute in DEFAULT_ATTRIBUTES)
    raise NoSuchAttribute(
        f"{_located(module)} has none of {tried}: name the application, as in '{module.__name__}:name'"
        f"{_it_has(_public_callables(module))}"
    )


def _attribute(module: ModuleType, path: Sequence[str], target: str) -> object:
    found: object = module
    owner = _located(module)
    for depth, attribute in enumerate(path, start=1):
        try:
            value: object = getattr(found, attribute)
        except AttributeError:
            near = _did_you_mean(attribute, _public_callables(found))
            hint = near or (_it_has(_public_callables(found)) if found is module else "")
            raise NoSuchAttribute(f"{owner} has no attribute {attribute!r} (for {target!r}){hint}") from None
        found = value
        owner = f"'{module.__name__}:{'.'.join(path[:depth])}' ({_describe_type(found)})"
    return found


def _call_factory(factory: object, target: str) -> object:
    if not callable(factory):
        raise LoadError(f"{target!r} calls {_describe_type(factory)}, a callable was expected before '()'")
    try:
        made: object = factory()
    except (Exception, SystemExit) as exc:
        raise _import_failed(f"factory {target!r} failed", exc) from exc
    if inspect.iscoroutine(made):
        made.close()
        raise LoadError(f"factory {target!r} is async; it is called before there is an event loop, so it must not be")
    return made


def _located(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    if file is None and hasattr(module, "__path__"):
        return f"module {module.__name__!r} (a directory without __init__.py)"
    return f"module {module.__name__!r} ({file or 'built in'})"


def _public_callables(owner: object) -> list[str]:
    """Names that might have been meant: callables, those defined in the module itself first."""
    if not isinstance(owner, ModuleType):
        return [name for name in dir(owner) if not name.startswith("_")]
    names = [name for name, value in vars(owner).items() if not name.startswith("_") and callable(value)]
    return sorted(names, key=lambda name: getattr(vars(owner)[name], "__module__", None) != owner.__name__)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=2)
    return f"; did you mean {' or '.join(repr(each) for each in near)}?" if near else ""


def _it_has(names: Sequence[str], most: int = 6) -> str:
    return f"; it has {', '.join(repr(name) for name in names[:most])}" if names else ""


# ---- from an object to its interface ----

_ASGI_NAMES = ("scope", "receive", "send")
_WSGI_NAMES = ("environ", "start_response")
_NATIVE_NAMES = ("request",)

# An annotation that cannot be evaluated, because its imports are for type checkers only, is read as words.
_WORDS = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a call by position may look like."""

    names: tuple[str, ...]  # positional parameters, in order
    required: int  # how many of them have no default
    is_open: bool  # *args takes more
    needs_keywords: bool  # a keyword-only parameter has no default
    is_async: bool

    def takes(self, count: int) -> bool:
        return self.required <= count and (self.is_open or count <= len(self.names)) and not self.needs_keywords

    def __str__(self) -> str:
        return f"({', '.join((*self.names, *(['*args'] if self.is_open else [])))})"


def _detect(name: str, target: Any) -> Application:
    _refuse_double_callable(name, target)
    if inspect.isclass(target):
        return Application(name, target, _detect_class(name, target), guessed=False)
    shape = _shape(target)
    if shape is None:
        return _guess(name, target, "its signature cannot be read", _is_async(target))
    by_name = _by_names(shape)
    if by_name is not None:
        return Application(name, target, by_name, guessed=False)
    if shape.is_open and (shape.takes(2) or shape.takes(3)):
        return _guess(name, target, f"its signature {shape} takes any number of arguments", shape.is_async)
    return Application(name, target, _by_count(name, shape), guessed=False)


def _by_names(shape: _Shape) -> Interface | None:
    """The names that everybody uses decide, also where defaults or *args blur the count."""
    if shape.names[:3] == _ASGI_NAMES and shape.takes(3):
        return Interface.ASGI
    if shape.names[:2] == _WSGI_NAMES and shape.takes(2):
        return Interface.WSGI
    if shape.names[:1] == _NATIVE_NAMES and shape.takes(1):
        return Interface.NATIVE
    return None


def _takes(name: str, target: Any) -> Takes:
    """What the annotation of a native handler's first parameter says; without one, requests."""
    if hasattr(target, "websocket"):
        _refuse_plain_sockets(name, target.websocket)
        return Takes.BOTH
    annotation = _first_annotation(target)
    if isinstance(annotation, str):
        words = set(_WORDS.findall(annotation))
        kinds = {kind for kind in (Request, WebSocket) if kind.__name__ in words}
    else:
        kinds = {kind for kind in get_args(annotation) or (annotation,) if kind in (Request, WebSocket)}
    if WebSocket not in kinds:
        return Takes.REQUESTS
    _refuse_plain_sockets(name, target)
    return Takes.BOTH if Request in kinds else Takes.WEBSOCKETS


def _first_annotation(target: Any) -> object:
    for evaluated in (True, False):
        try:
            parameters = inspect.signature(target, eval_str=evaluated).parameters.values()
        except (ValueError, TypeError):
            return None
        except Exception:  # noqa: BLE001 - an annotation is the application's code, and may name anything
            continue
        return next(iter(parameters)).annotation if parameters else None
    return None


def _refuse_plain_sockets(name: str, target: Any) -> None:
    if not _is_async(target):
        raise LoadError(f"{name!r} takes a WebSocket and is a plain function; to converse it must be 'async def'")


def _by_count(name: str, shape: _Shape) -> Interface:
    if shape.required == 3 and shape.takes(3):
        return Interface.ASGI
    if shape.required == 2 and shape.takes(2) and not shape.is_async:
        return Interface.WSGI
    if shape.required <= 1 and shape.takes(1):
        return Interface.NATIVE
    if shape.takes(0):
        factory = f": if it makes the application, write '{name}()'" if ":" in name else ""
        raise LoadError(f"{name!r} takes no arguments, an application takes a request, or ASGI's or WSGI's{factory}")
    is_async = "is async and " if shape.is_async else ""
    raise LoadError(
        f"{name!r} {is_async}takes {shape}, which fits no interface; expected handler(request), "
        f"async app(scope, receive, send) or app(environ, start_response); --interface overrides"
    )


def _guess(name: str, target: object, why: str, is_async: bool) -> Application:
    """Both interfaces are worn by wrappers that take `*args`; a coroutine function cannot be WSGI."""
    interface = Interface.ASGI if is_async else Interface.WSGI
    kind = "a coroutine function" if is_async else "no coroutine function"
    return Application(name, target, interface, guessed=True, reason=f"{why} and it is {kind}")


def _detect_class(name: str, target: type) -> Interface:
    """A class is called like a function: PEP 3333 shows one, and Starlette's endpoints are awaitable ones."""
    shape = _shape(target)
    if shape is not None and hasattr(target, "__await__") and shape.takes(3):
        return Interface.ASGI
    if shape is not None and hasattr(target, "__iter__") and shape.takes(2):
        return Interface.WSGI
    raise LoadError(f"{name!r} is the class {target.__qualname__}, an instance of it was expected")


def _refuse_uncallable(subject: str, target: object) -> None:
    if callable(target):
        return
    hint = ""
    if inspect.ismodule(target):
        hint = f": name an attribute of it, as in '{target.__name__}:{DEFAULT_ATTRIBUTES[0]}'"
    elif inspect.iscoroutine(target):
        target.close()
        hint = ": the function itself is served, not its call"
    raise LoadError(f"{subject} is {_describe_type(target)}, a callable was expected{hint}")


def _refuse_double_callable(name: str, target: Any) -> None:
    """ASGI 2: app(scope) returns the coroutine function (receive, send). Called the ASGI 3 way it cannot work."""
    shape = _shape(target)
    if shape is None or shape.is_async or shape.names[:1] != ("scope",) or shape.takes(3) or not shape.takes(1):
        return
    raise LoadError(
        f"{name!r} is an ASGI 2 application (it takes 'scope' alone), which ended with ASGI 3 in 2019: "
        f"make it async app(scope, receive, send), or wrap it in asgiref.compatibility.guarantee_single_callable"
    )


def _shape(target: Callable[..., Any]) -> _Shape | None:
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (ValueError, TypeError):  # written in C, and silent about its arguments
        return None
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return _Shape(
        names=tuple(each.name for each in positional),
        required=sum(each.default is each.empty for each in positional),
        is_open=any(each.kind is each.VAR_POSITIONAL for each in parameters),
        needs_keywords=any(each.kind is each.KEYWORD_ONLY and each.default is each.empty for each in parameters),
        is_async=_is_async(target),
    )


def _is_async(target: Any) -> bool:
    """A coroutine function, or an instance whose `__call__` is one; through partials and `functools.wraps`."""
    while hasattr(target, "func") and hasattr(target, "keywords"):
        target = target.func
    target = inspect.unwrap(target)
    if inspect.iscoroutinefunction(target):
        return True
    if inspect.isclass(target) or inspect.isroutine(target):
        return False
    return inspect.iscoroutinefunction(inspect.unwrap(type(target).__call__))


# ---- words ----


def _describe(target: object) -> str:
    """The name of an object that came without one."""
    module = getattr(target, "__module__", None)
    name = getattr(target, "__qualname__", None)
    if module and name:
        return f"{module}.{name}"
    return f"{type(target).__module__}.{type(target).__qualname__} instance"


def _describe_type(value: object) -> str:
    if value is None:
        return "None"
    if inspect.isclass(value):
        return f"the class {value.__qualname__}"
    return f"of type {type(value).__qualname__}"
