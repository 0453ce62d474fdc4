"""kill -9 under load: what the killed worker held is lost, and nothing else."""

from __future__ import annotations

import pytest

from tests.harness.load import PREFORK, During, Failure, Kill, Load, Tally, judge, kill_one_after_another
from tests.harness.server import Server

KILLED = Kill(pid=7, when=10.0, took=0.05, replacement=8)


def failure(during, *, asked=9.9, failed=10.1, held_by=None):
    return Failure(during, asked, failed, held_by, "made up")


@pytest.mark.parametrize("sharing", ["inherit", "reuseport", "handoff"])
def test_only_requests_that_a_killed_worker_held_fail(sharing):
    """64 connections, six workers killed one after another: `loadtest/kill.py` in short."""
    with Server("tests.apps.plain:app", workers=4, preload=True, sharing=sharing) as server:
        server.wait_ready(4)
        with Load(server.port, connections=64, path="/worker") as load:
            # Each slot lives over a second, so no kill counts as a crash loop.
            kills = kill_one_after_another(server, PREFORK, workers=4, count=6, every=0.3)
    verdict = judge(load.tally, kills)

    assert verdict.unexplained == []
    assert len({kill.replacement for kill in kills}) == 6
    # Every worker that held a connection at first was killed, and all connections were busy.
    assert len(verdict.in_flight) + len(verdict.first) >= 64
    assert len(load.tally.answers) > 4


def test_a_failure_on_a_living_workers_connection_is_never_excused():
    """The test above would be worth nothing if it explained everything."""
    held = failure(During.LATER, held_by=5)

    assert judge(Tally(failures=[held]), [KILLED]).unexplained == [held]


def test_a_failure_before_the_kill_is_never_excused():
    """It cannot be its consequence."""
    early = failure(During.LATER, failed=9.95, held_by=7)

    assert judge(Tally(failures=[early]), [KILLED]).unexplained == [early]


def test_a_first_request_is_excused_only_by_a_kill_while_it_waited():
    """A connection that is queued in the kernel belongs to nobody who can die."""
    during, after = failure(During.FIRST), failure(During.FIRST, asked=10.05)
    verdict = judge(Tally(failures=[during, after]), [KILLED])

    assert (verdict.first, verdict.unexplained) == ([during], [after])


@pytest.mark.parametrize("during", [During.CONNECT, During.SILENCE, During.NONSENSE])
def test_what_no_death_of_a_worker_can_cause_is_never_excused(during):
    """Refused, left waiting, or answered with something else."""
    failed = failure(during, held_by=7)

    assert judge(Tally(failures=[failed]), [KILLED]).unexplained == [failed]
