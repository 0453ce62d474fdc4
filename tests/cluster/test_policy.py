"""What follows the end of a worker: every cause, every delay, and the reasons to give up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.cluster.policy import (
    LONGEST_DELAY,
    SOUND_AFTER,
    Ending,
    ExitCause,
    GiveUp,
    StartAgain,
    after_exit,
    cause_of,
    delay_after,
)
from prefork.process.lifecycle import State, may_become

endings = st.one_of(
    st.builds(
        Ending,
        code=st.integers(0, 255),
        signal=st.none(),
        was_asked=st.booleans(),
        passed_deadline=st.booleans(),
        said_boot_failed=st.booleans(),
        listened_for=st.none() | st.floats(0, 1e6),
    ),
    st.builds(
        Ending,
        code=st.none(),
        signal=st.sampled_from(["SIGKILL", "SIGSEGV", "SIGTERM", "SIGABRT"]),
        was_asked=st.booleans(),
        passed_deadline=st.booleans(),
        listened_for=st.none() | st.floats(0, 1e6),
    ),
)


@pytest.mark.parametrize(
    ("ending", "cause"),
    [
        (Ending(0, None, was_asked=True), ExitCause.RETIRED),
        (Ending(0, None, listened_for=9.0), ExitCause.RETIRED),
        (Ending(0, None), ExitCause.CRASHED),
        (Ending(1, None, listened_for=9.0), ExitCause.CRASHED),
        (Ending(None, "SIGSEGV", listened_for=9.0), ExitCause.CRASHED),
        (Ending(None, "SIGABRT", listened_for=9.0), ExitCause.CRASHED),
        (Ending(None, "SIGKILL", listened_for=9.0), ExitCause.KILLED),
        (Ending(None, "SIGTERM"), ExitCause.KILLED),
        (Ending(None, "SIGTERM", was_asked=True), ExitCause.RETIRED),
        (Ending(3, None, said_boot_failed=True), ExitCause.BOOT_FAILED),
        (Ending(None, "SIGKILL", passed_deadline=True), ExitCause.HUNG),
        (Ending(None, "SIGABRT", passed_deadline=True, said_boot_failed=True), ExitCause.HUNG),
    ],
)
def test_each_ending_has_one_cause(ending, cause):
    """Operators alert on this word, so the master's own doing is never blamed on the worker."""
    assert cause_of(ending) is cause


def test_delays_grow_by_half_up_to_half_a_minute():
    """0, 0.75, 1.1 ... 30: at once for an accident, slower and slower for a loop."""
    assert [round(delay_after(n), 2) for n in range(1, 8)] == [0, 0.75, 1.12, 1.69, 2.53, 3.8, 5.7]
    assert delay_after(100) == delay_after(10**6) == LONGEST_DELAY


@given(st.integers(0, 10**9))
def test_a_delay_is_never_shorter_than_the_one_before(failures):
    """Otherwise a loop would speed up again."""
    assert 0 <= delay_after(failures) <= delay_after(failures + 1) <= LONGEST_DELAY


def test_the_first_death_is_replaced_at_once():
    """Capacity comes back before anybody notices."""
    assert after_exit(Ending(None, "SIGSEGV", listened_for=0.1), 0, anybody_booted=True) == StartAgain(0.0, 1)


def test_a_slot_that_keeps_crashing_waits_longer_each_time():
    """Ten workers a second that die in their first tenth help nobody."""
    failures, delays = 0, []
    for _ in range(5):
        decision = after_exit(Ending(1, None, listened_for=0.1), failures, anybody_booted=True)
        assert isinstance(decision, StartAgain)
        failures = decision.failures
        delays.append(round(decision.delay, 2))

    assert delays == [0, 0.75, 1.12, 1.69, 2.53]


def test_a_minute_of_service_forgives_earlier_crashes():
    """A worker that dies once an hour is replaced at once each time."""
    decision = after_exit(Ending(1, None, listened_for=SOUND_AFTER[ExitCause.CRASHED]), 7, anybody_booted=True)

    assert decision == StartAgain(0.0, 1)


def test_workers_killed_from_outside_are_replaced_at_once_again_and_again():
    """kill -9 is not the application's fault: no backoff as long as the worker did come up and serve."""
    failures = 0
    for _ in range(50):
        decision = after_exit(Ending(None, "SIGKILL", listened_for=1.5), failures, anybody_booted=True)
        assert decision == StartAgain(0.0, 0)
        failures = decision.failures


def test_a_worker_that_retired_is_no_failure_of_its_slot():
    """A crash that follows is the first one."""
    retired = after_exit(Ending(0, None, was_asked=True, listened_for=0.1), 1, anybody_booted=True)
    assert retired == StartAgain(0.0, 0)

    assert after_exit(Ending(7, None, listened_for=0.1), retired.failures, anybody_booted=True) == StartAgain(0.0, 1)


@pytest.mark.parametrize("ending", [Ending(1, None, was_asked=True), Ending(None, "SIGKILL", was_asked=True)])
def test_a_worker_that_breaks_while_it_leaves_did_not_retire(ending):
    """An exception in the drain would go unnoticed for years."""
    assert cause_of(ending) is not ExitCause.RETIRED


@pytest.mark.parametrize(
    "ending",
    [
        Ending(4, None, said_boot_failed=True),
        Ending(1, None),
        Ending(None, "SIGSEGV"),
        Ending(None, "SIGKILL", passed_deadline=True),
    ],
)
def test_a_server_that_never_booted_is_given_up(ending):
    """An import error repeated for ever is worse than an exit code."""
    assert isinstance(after_exit(ending, 0, anybody_booted=False), GiveUp)


def test_a_worker_killed_from_outside_while_booting_is_no_reason_to_give_up():
    """Its replacement may well boot."""
    assert after_exit(Ending(None, "SIGKILL"), 0, anybody_booted=False) == StartAgain(0.0, 1)


@given(endings, st.integers(0, 1000))
def test_a_server_that_once_booted_is_never_given_up(ending, failures):
    """One bad worker must not stop the ones that serve."""
    assert isinstance(after_exit(ending, failures, anybody_booted=True), StartAgain)


def test_no_state_is_entered_twice():
    """Each event is told exactly once because of this."""
    assert not any(may_become(state, earlier) for state in State for earlier in State if earlier <= state)


def test_only_one_that_is_online_begins_to_listen():
    """A message that comes late must not bring a draining worker back among those that are given connections."""
    assert [state for state in State if may_become(state, State.LISTENING)] == [State.ONLINE]


def test_every_living_state_can_end():
    """A process may die at any instant."""
    assert all(may_become(state, State.EXITED) for state in State if state is not State.EXITED)
