"""What no row of Node's tables asks: a second cluster, listeners of every sharing, messages before anybody reads."""

from __future__ import annotations

import os
import signal

import pytest

from tests.harness.client import get
from tests.harness.program import Program
from tests.harness.server import wait_for_exit


def test_a_second_cluster_leaves_the_first_one_alone():
    """Its workers close what belongs to the first: a copy of a channel would hide its master's death."""
    with Program(
        """
        def work():
            cluster.worker.on("message", hear)

        other = cluster.Cluster()
        other.on("online", lambda worker: say("other", worker=worker.id, pid=worker.pid))
        tell_all()
        obey()
        cluster.fork(work)

        @cluster.once("online")
        def begin(worker):
            other.fork(work)
            say("held", descriptors=len(os.listdir("/proc/self/fd")))
            other.run()

        cluster.run()
        """
    ) as program:
        first = program.until("online", worker=1)["pid"]
        second = program.until("other", worker=1)["pid"]

        assert len(os.listdir(f"/proc/{second}/fd")) <= len(os.listdir(f"/proc/{first}/fd"))
        os.kill(program.pid, signal.SIGKILL)
        assert wait_for_exit(first, 10.0)
        assert wait_for_exit(second, 10.0)


@pytest.mark.parametrize("sharing", ["inherit", "reuseport", "handoff"])
def test_workers_that_are_not_in_the_first_slots_share_a_listener_too(sharing):
    """Under reuseport every socket of the group must have somebody who accepts from it."""
    with Program("ways") as master:
        master.fork("worker")  # slot 0 listens to nothing
        for _ in range(2):
            master.fork(f"worker, '127.0.0.1:0', {{'sharing': '{sharing}'}}")
        port = master.port_of(2)
        assert master.port_of(3) == port

        answers = {get(port).text for _ in range(40)}

    assert answers <= {"worker 2\n", "worker 3\n"}


def test_what_was_sent_before_a_worker_reads_is_heard_before_it_is_asked_to_leave():
    """A master that forks, sends and disconnects in one breath loses nothing."""
    with Program(
        """
        def work():
            @cluster.worker.on("message")
            def heard(message, handle):
                cluster.worker.send(["heard", message])

        tell_all()
        worker = cluster.fork(work)
        worker.send("before")
        worker.disconnect()
        say("returned", code=cluster.run())
        """
    ) as program:
        assert program.until("message", worker=1)["message"] == ["heard", "before"]
        ended = program.until("exit", worker=1)

        assert (ended["code"], ended["signal"]) == (0, None)
        assert program.until("returned")["code"] == 0


def test_a_worker_knows_its_own_state():
    """As Node's does, and the master's handle."""
    with Program("ways") as master:
        master.fork("worker, '127.0.0.1:0'")
        master.port_of(1)

        assert master.do("str(cluster.worker.state.name)", worker=1) == "LISTENING"
