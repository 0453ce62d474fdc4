"""Events with listeners, as Node's EventEmitter has them: on, once, off, emit.

Listeners are called at once, in the order they were added, on the thread that
emits. An emitter never waits and owns no loop, so a listener is a plain function.

A listener that fails is logged with its traceback; the others are called all the
same. Whoever emits need not fear what is listening.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TypeVar, overload

from prefork.errors import ClusterStopping, UnknownEvent, did_you_mean
from prefork.log import logger

Listener = Callable[..., object]
L = TypeVar("L", bound=Listener)


class Emitter:
    """A fixed set of event names and, for each, its listeners."""

    def __init__(self, events: Iterable[str]) -> None:
        self._entries: dict[str, list[_Entry]] = {event: [] for event in events}

    @overload
    def on(self, event: str, listener: None = None) -> Callable[[L], L]: ...
    @overload
    def on(self, event: str, listener: L) -> L: ...
    def on(self, event: str, listener: L | None = None) -> L | Callable[[L], L]:
        """Call *listener* at every *event*; without one, a decorator. The same listener may be added twice."""
        return self._add(event, listener, once=False)

    @overload
    def once(self, event: str, listener: None = None) -> Callable[[L], L]: ...
    @overload
    def once(self, event: str, listener: L) -> L: ...
    def once(self, event: str, listener: L | None = None) -> L | Callable[[L], L]:
        """Call *listener* at the next *event* only; without one, a decorator."""
        return self._add(event, listener, once=True)

    def off(self, event: str, listener: Listener) -> None:
        """Remove *listener*: the latest, if it was added twice. One that is not there is no error."""
        entries = self._named(event)
        for index in range(len(entries) - 1, -1, -1):
            if entries[index].listener == listener:
                del entries[index]
                return

    def emit(self, event: str, *args: object) -> bool:
        """Call the listeners of *event* with *args*; True if there was any.

        Those are the listeners at this moment: what a listener adds or removes counts
        from the next emit on, as in Node.
        """
        entries = self._entries.get(event)
        if not entries:
            return bool(self._named(event))
        for entry in tuple(entries):
            if entry.is_once:
                if entry.is_spent:  # a listener before it emitted the same event
                    continue
                entry.is_spent = True
                if entry in entries:
                    entries.remove(entry)
            try:
                entry.listener(*args)
            except ClusterStopping as error:
                logger.info("listener %s of event %r ended: %s", _name(entry.listener), event, error)
            except Exception:  # noqa: BLE001 - one of the three doors: a listener may raise whatever it likes
                logger.exception("listener %s of event %r failed", _name(entry.listener), event)
        return True

    def listeners(self, event: str) -> tuple[Listener, ...]:
        """The listeners of *event*, in the order they would be called."""
        return tuple(entry.listener for entry in self._named(event))

    def _add(self, event: str, listener: L | None, *, once: bool) -> L | Callable[[L], L]:
        entries = self._named(event)
        if listener is None:
            return lambda function: self._attach(entries, event, function, once)
        return self._attach(entries, event, listener, once)

    def _attach(self, entries: list[_Entry], event: str, listener: L, once: bool) -> L:
        if not callable(listener):
            raise TypeError(f"a listener of {event!r} must be a function, not {listener!r}")
        if inspect.iscoroutinefunction(listener):
            raise TypeError(f"a listener of {event!r} must be a plain function, and {_name(listener)} is async")
        entries.append(_Entry(listener, once))
        return listener

    def _named(self, event: str) -> list[_Entry]:
        try:
            return self._entries[event]
        except KeyError:
            hint = did_you_mean(str(event), self._entries)
            known = ", ".join(self._entries)
            raise UnknownEvent(f"there is no event {event!r}{hint} (the events are {known})") from None


class _Entry:
    """One listener of one event. Entries differ even where their listeners are equal."""

    __slots__ = ("is_once", "is_spent", "listener")

    def __init__(self, listener: Listener, is_once: bool) -> None:
        self.listener = listener
        self.is_once = is_once
        self.is_spent = False


def _name(listener: Listener) -> str:
    return getattr(listener, "__qualname__", None) or repr(listener)
