"""Listeners: order, once, removal while emitting, and failures that stop nobody."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.emitter import Emitter
from prefork.errors import PreforkError, UnknownEvent


@pytest.fixture
def emitter():
    return Emitter(["fork", "online", "exit"])


@pytest.fixture
def failures():
    """What reaches the "prefork" logger, whatever another test has configured."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)

    handler = Keep()
    logging.getLogger("prefork").addHandler(handler)
    yield records
    logging.getLogger("prefork").removeHandler(handler)


def test_listeners_are_called_with_the_arguments_in_the_order_they_were_added(emitter):
    """A hook that registers before another must see the event before it."""
    calls = []
    emitter.on("exit", lambda *args: calls.append(("first", args)))
    emitter.on("exit", lambda *args: calls.append(("second", args)))
    emitter.emit("exit", 3, None, "SIGKILL")

    assert calls == [("first", (3, None, "SIGKILL")), ("second", (3, None, "SIGKILL"))]


def test_on_without_a_listener_decorates_and_leaves_the_function_as_it_is(emitter):
    """`@cluster.on("exit")` above a function must not turn its name into something else."""

    @emitter.on("exit")
    def gone(code):
        return code

    assert gone(5) == 5
    assert emitter.listeners("exit") == (gone,)


def test_emit_says_whether_anybody_listened(emitter):
    """Node's return value: the caller may have a default when nobody does."""
    silent = emitter.emit("fork")
    emitter.on("fork", lambda: None)

    assert (silent, emitter.emit("fork")) == (False, True)


def test_once_is_called_once(emitter):
    """Also as a decorator."""
    calls = []
    emitter.once("online", lambda: calls.append("given"))

    @emitter.once("online")
    def decorated():
        calls.append("decorated")

    emitter.emit("online")
    emitter.emit("online")

    assert calls == ["given", "decorated"]


def test_once_is_called_once_although_an_earlier_listener_emits_the_same_event(emitter):
    """The inner emit has already called it when the outer one gets there."""
    calls = []

    @emitter.once("online")
    def again():
        emitter.emit("online")

    emitter.once("online", lambda: calls.append("once"))
    emitter.emit("online")

    assert calls == ["once"]


def test_off_removes_the_latest_of_equal_listeners(emitter):
    """As in Node: each `on` needs its own `off`."""
    calls = []

    def listener():
        calls.append("called")

    emitter.on("fork", listener)
    emitter.on("fork", listener)
    emitter.off("fork", listener)
    emitter.emit("fork")

    assert calls == ["called"]


def test_off_knows_a_bound_method_though_each_access_makes_a_new_one(emitter):
    """`on("exit", self.gone)` and `off("exit", self.gone)` pass two different objects."""

    class Watcher:
        def gone(self):
            raise AssertionError("it was removed")

    watcher = Watcher()
    emitter.on("exit", watcher.gone)
    emitter.off("exit", watcher.gone)

    assert emitter.listeners("exit") == ()


def test_off_of_a_stranger_is_no_error(emitter):
    """Cleaning up twice is common and harmless."""
    emitter.off("exit", print)

    assert emitter.listeners("exit") == ()


def test_a_listener_added_while_emitting_waits_for_the_next_emit(emitter):
    """Otherwise a listener that adds itself again would never come to an end."""
    calls = []

    def adds():
        calls.append("adds")
        emitter.once("fork", lambda: calls.append("added"))

    emitter.once("fork", adds)
    emitter.emit("fork")
    first = list(calls)
    emitter.emit("fork")

    assert first == ["adds"]
    assert calls == ["adds", "added"]


def test_a_listener_removed_while_emitting_is_still_called_this_time(emitter):
    """As in Node: who listened when it happened hears of it."""
    calls = []

    def last():
        calls.append("last")

    emitter.on("fork", lambda: emitter.off("fork", last))
    emitter.on("fork", last)
    emitter.emit("fork")
    emitter.emit("fork")

    assert calls == ["last"]


def test_a_failing_listener_is_logged_with_its_traceback_and_stops_nobody(emitter, failures):
    """A metrics hook with a bug must not keep a dead worker from being replaced."""
    calls = []

    @emitter.on("exit")
    def broken():
        raise ZeroDivisionError("in the hook")

    emitter.on("exit", lambda: calls.append("still called"))
    emitter.emit("exit")

    assert calls == ["still called"]
    [record] = failures
    assert "broken" in record.getMessage()
    assert "'exit'" in record.getMessage()
    assert isinstance(record.exc_info[1], ZeroDivisionError)


def test_a_listener_that_wants_to_leave_may(emitter):
    """SystemExit and KeyboardInterrupt are not failures."""
    emitter.on("exit", lambda: exec("raise SystemExit(3)"))

    with pytest.raises(SystemExit):
        emitter.emit("exit")


@pytest.mark.parametrize("use", ["on", "once", "emit", "listeners"])
def test_an_unknown_event_is_refused_with_the_known_ones(emitter, use):
    """A listener for "exti" would otherwise wait for ever, in silence."""
    with pytest.raises(UnknownEvent) as caught:
        getattr(emitter, use)("exti")

    assert str(caught.value) == "there is no event 'exti', did you mean 'exit'? (the events are fork, online, exit)"
    assert isinstance(caught.value, PreforkError)


def test_what_cannot_be_called_is_refused_when_it_is_added(emitter):
    """The mistake is in the line that adds it, not in the emit of tomorrow night."""
    with pytest.raises(TypeError, match="a listener of 'exit' must be a function, not 'print'"):
        emitter.on("exit", "print")


def test_an_async_listener_is_refused_when_it_is_added(emitter):
    """Nobody would await it: an emitter has no loop."""

    async def later():
        pass

    with pytest.raises(TypeError, match="must be a plain function, and .*later is async"):
        emitter.on("exit", later)


@given(st.lists(st.sampled_from(["on", "once", "off", "emit"])))
def test_any_sequence_of_calls_behaves_like_a_list_of_listeners(actions):
    """A model in three lines: on and once append, off drops the latest, emit calls all and drops the once."""
    emitter = Emitter(["exit"])
    model: list[str] = []
    calls: list[None] = []
    expected = 0

    def listener():
        calls.append(None)

    for action in actions:
        if action == "emit":
            expected += len(model)
            model = [kind for kind in model if kind == "on"]
            emitter.emit("exit")
        elif action == "off":
            model = model[:-1]
            emitter.off("exit", listener)
        else:
            model.append(action)
            getattr(emitter, action)("exit", listener)

    assert len(calls) == expected
    assert len(emitter.listeners("exit")) == len(model)
