"""Node's cluster, event by event: when each comes, with what, and in which order.

Node says of "disconnect" and "exit" only that each comes once; here the order is fixed, whatever ends the worker.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import pytest

from tests.harness.client import Client, get
from tests.harness.program import Program


@dataclass
class Way:
    """A way in which a worker ends, and what "exit" says of it."""

    name: str
    fork: str = "worker"
    master: str = ""  # what the master does then
    worker: str = ""  # or the worker
    code: int | None = None
    signal: str | None = None
    asked: bool = False

    def end(self, master: Program, number: int) -> None:
        if self.master:
            master.tell(self.master.format(number=number))
        if self.worker:
            master.tell(self.worker, worker=number)


WAYS = [
    Way("its function returns", fork="returns", code=0),
    Way("its coroutine returns", fork="returns_later", code=0),
    Way("sys.exit(3)", fork="exits", code=3),
    Way("sys.exit(3) in a coroutine", fork="exits_later", code=3),
    Way("os._exit(7)", worker="os._exit(7)", code=7),
    Way("an exception", fork="raises", code=1),
    Way("an exception in a coroutine", fork="raises_later", code=1),
    Way("SIGKILL from elsewhere", master="os.kill(cluster.workers[{number}].pid, 9)", signal="SIGKILL"),
    Way("SIGSEGV from elsewhere", master="os.kill(cluster.workers[{number}].pid, 11)", signal="SIGSEGV"),
    Way("kill by the master", master="cluster.workers[{number}].kill('SIGKILL')", signal="SIGKILL", asked=True),
    Way("kill by the master with SIGTERM", master="cluster.workers[{number}].kill()", code=0, asked=True),
    Way("destroy by the master", master="cluster.workers[{number}].destroy('SIGKILL')", signal="SIGKILL", asked=True),
    Way("disconnect by the master", master="cluster.workers[{number}].disconnect()", code=0, asked=True),
    Way("disconnect of the cluster", master="cluster.disconnect()", code=0, asked=True),
    Way("disconnect by the worker", worker="cluster.worker.disconnect()", code=0, asked=True),
    Way("destroy by the worker", worker="cluster.worker.destroy()", code=0, asked=True),
    Way("kill by the worker", worker="cluster.worker.kill()", code=0, asked=True),
    Way(
        "disconnect by a serving worker",
        fork="worker, '127.0.0.1:0'",
        worker="cluster.worker.disconnect()",
        code=0,
        asked=True,
    ),
    Way(
        "disconnect of a serving worker",
        fork="worker, '127.0.0.1:0'",
        master="cluster.workers[{number}].disconnect()",
        code=0,
        asked=True,
    ),
    Way(
        "SIGKILL of a serving worker", fork="worker, '127.0.0.1:0'", worker="os.kill(os.getpid(), 9)", signal="SIGKILL"
    ),
    Way("the end of a serving worker", fork="worker, '127.0.0.1:0'", worker="os._exit(7)", code=7),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_disconnect_comes_before_exit_and_each_once_whatever_ends_a_worker(way):
    """And what both say of who wanted it is true or false, never "not known yet"."""
    with Program("ways") as master:
        (number,) = [master.fork(way.fork)]
        if "bind" in way.fork or "127" in way.fork:
            master.until("listening", worker=number)
        way.end(master, number)
        ended = master.until("exit", worker=number, by="cluster")
        master.do("1")  # whatever would be told twice is told by now

        assert (ended["code"], ended["signal"]) == (way.code, way.signal)
        assert ended["asked"] is way.asked
        assert master.until("disconnect", worker=number)["asked"] is way.asked
        assert master.names(number, "listening", "draining", "message") == ["fork", "online", "disconnect", "exit"]


# ---- each event ----


def test_fork_comes_after_the_call_and_before_anything_of_the_child():
    """Also where the child is faster than the master."""
    with Program("ways") as master:
        # The child's first message is there before the master's loop takes its next turn.
        master.do("fork_and_wait()")
        master.until("exit", worker=1)

        assert master.names(1) == ["fork", "online", "message", "disconnect", "exit"]


def test_online_means_that_code_runs_and_is_not_told_in_the_worker():
    with Program("ways") as master:
        master.fork()

        assert master.until("online", worker=1)["state"] == "ONLINE"
        with pytest.raises(AssertionError, match="there is no event 'online'"):
            master.do("cluster.worker.on('online', print)", worker=1)


def test_listening_is_told_once_for_each_address_with_the_real_port(tmp_path):
    """The address is a value that prints as what could be bound; Node's has its parts and a number for its kind."""
    path = tmp_path / "s"
    with Program("ways") as master:
        master.fork(f"worker, ['127.0.0.1:0', '[::1]:0', 'unix:{path}']")
        addresses = [master.until("listening", n, worker=1, by="cluster")["address"] for n in (1, 2, 3)]
        master.do("1", worker=1)

        assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", addresses[0])
        assert re.fullmatch(r"\[::1\]:[1-9]\d*", addresses[1])
        assert addresses[2] == f"unix:{path}"
        assert len(master.told("listening", by="cluster")) == 3
        assert master.told("listening")[-1]["state"] == "LISTENING"


def test_listening_is_told_for_sockets_of_cluster_listener_too():
    """TCP, UDP: whoever asked for it gets it and the master says so."""
    with Program("ways") as master:
        master.fork("opens, '127.0.0.1:0', 'udp://127.0.0.1:0'")
        ports = master.until("opened", worker=1)["ports"]
        addresses = [master.until("listening", n, worker=1, by="cluster")["address"] for n in (1, 2)]

        assert addresses == [f"127.0.0.1:{ports[0]}", f"udp://127.0.0.1:{ports[1]}"]


def test_message_tells_the_worker_the_message_and_the_handle():
    with Program("ways") as master:
        master.fork()
        master.do("cluster.worker.send({'a': [1, None]})", worker=1)
        told = master.until("message", worker=1, by="cluster")

        assert (told["message"], told["handle"]) == ({"a": [1, None]}, None)


def test_messages_of_the_cluster_itself_are_never_told():
    """Those of a whole life: online, listening, topics, counters, disconnect. In Node a prefix tells them apart."""
    with Program("ways") as master:
        master.fork("worker, '127.0.0.1:0'")
        master.until("listening", worker=1)
        master.do("cluster.worker.subscribe('topic', print) and None", worker=1)
        master.do("cluster.worker.broadcast('topic', 1)", worker=1)
        master.do("cluster.worker.disconnect() and None", worker=1)
        master.until("exit", worker=1)

        assert master.told("message") == []
        assert master.told("heard") == []


@pytest.mark.parametrize(
    "message", ["NODE_CLUSTER", {"cmd": "NODE_HANDLE"}, {"type": "online"}, {"type": "drain"}, {"act": "x"}]
)
def test_no_message_of_a_user_is_taken_for_one_of_the_cluster(message):
    """A byte of the frame tells them apart, so no word is reserved."""
    with Program("ways") as master:
        master.fork()
        master.do(f"cluster.worker.send({message!r})", worker=1)
        master.do(f"cluster.workers[1].send({message!r})")

        master.until("message", worker=1, message=message)
        master.until("heard", worker=1, message=message)
        assert master.do("1 + 1", worker=1) == 2


def test_disconnect_comes_at_the_end_of_the_channel():
    """The process may live on for a while: is_dead is false then."""
    with Program("ways") as master:
        master.fork()
        master.do("cluster.workers[1].disconnect() and None")
        told = master.until("disconnect", worker=1, by="cluster")

        assert (told["connected"], told["dead"], told["listed"]) == (False, False, True)


def test_exit_comes_when_the_process_is_reaped():
    with Program("ways") as master:
        master.fork()
        os.kill(master.pid_of(1), 9)
        told = master.until("exit", worker=1, by="cluster")

        assert (told["connected"], told["dead"], told["listed"], told["state"]) == (False, True, False, "EXITED")
        assert not os.path.exists(f"/proc/{told['pid']}")


def test_the_workers_own_event_comes_before_that_of_the_cluster():
    """Each event of the cluster that is about a worker is told by its handle as well, without the worker."""
    with Program("ways") as master:
        master.do("fork(worker, '127.0.0.1:0') and None")
        master.until("listening", worker=1, by="cluster")
        master.do("cluster.worker.send('hello')", worker=1)
        master.until("message", worker=1, by="cluster")
        master.do("cluster.workers[1].disconnect() and None")
        master.until("exit", worker=1, by="cluster")
        events = [(told["event"], told["by"]) for told in master.told(worker=1) if "by" in told]

    expected = [("fork", "handle"), ("fork", "cluster")] if ("fork", "handle") in events else [("fork", "cluster")]
    for event in ("online", "listening", "message", "draining", "disconnect", "exit"):
        expected += [(event, "handle"), (event, "cluster")]
    assert events == expected


# ---- the numbered rules ----


def test_rule_1_fork_is_before_online_and_online_before_each_listening(tmp_path):
    with Program("ways") as master:
        master.fork(f"worker, ['127.0.0.1:0', 'unix:{tmp_path}/s']")
        master.until("listening", 2, worker=1, by="cluster")

        assert master.names(1) == ["fork", "online", "listening", "listening"]


def test_rule_2_a_long_drain_stands_before_disconnect_and_not_between_it_and_exit():
    """Node leaves the order open. Here: draining at the beginning, disconnect at its end, exit right after."""
    with Program("ways") as master:
        master.fork("worker, '127.0.0.1:0'")
        with Client(master.port_of(1)) as client:
            client.send(b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n")
            master.until("waits", worker=1)
            master.do("cluster.workers[1].disconnect() and None")
            master.until("draining", worker=1, by="cluster")
            master.do("1", worker=1)  # the channel works while it drains
            assert master.told("disconnect") == []
            master.do("go.set()", worker=1)

            assert client.read().text == "waited\n"
        master.until("exit", worker=1)

        assert master.names(1) == ["fork", "online", "listening", "draining", "disconnect", "exit"]


def test_rule_3_an_entry_is_removed_before_the_last_of_the_two():
    """The last is always exit."""
    with Program("ways") as master:
        master.fork()
        os.kill(master.pid_of(1), 9)

        assert master.until("exit", worker=1)["listed"] is False
        assert master.told("disconnect", worker=1)[0]["listed"] is True


@pytest.mark.parametrize(
    ("end", "asked"),
    [("cluster.workers[1].disconnect() and None", True), ("os.kill(cluster.workers[1].pid, 9)", False)],
)
def test_rule_4_exited_after_disconnect_is_a_boolean_from_the_first_of_the_two_on(end, asked):
    """And None before: nobody has ended it yet."""
    with Program("ways") as master:
        master.fork()
        assert master.do("cluster.workers[1].exited_after_disconnect") is None
        master.do(end)
        master.until("exit", worker=1)

        assert [master.told(event, worker=1)[0]["asked"] for event in ("fork", "online")] == [None, None]
        assert [master.told(event, worker=1)[0]["asked"] for event in ("disconnect", "exit")] == [asked, asked]


def test_rule_5_the_state_goes_one_way():
    """FORKED, ONLINE, LISTENING, DRAINING, DISCONNECTED, EXITED: documented here, and never revisited."""
    with Program("ways") as master:
        master.fork("worker, '127.0.0.1:0'")
        master.until("listening", worker=1)
        master.do("cluster.workers[1].disconnect() and None")
        master.until("exit", worker=1)
        states = {told["event"]: told["state"] for told in master.told(worker=1, by="cluster")}

    assert states == {
        "fork": "FORKED",
        "online": "ONLINE",
        "listening": "LISTENING",
        "draining": "DRAINING",
        "disconnect": "DISCONNECTED",
        "exit": "EXITED",
    }


def test_rule_6_a_replacement_can_be_started_when_the_drain_begins():
    """Node tells of a shutdown when it is over; a program that forks on "disconnect" has a gap as long as the drain."""
    with Program("ways") as master:
        master.do("cluster.on('draining', lambda old: cluster.fork(worker, bind)) and None")
        master.do("bind = '127.0.0.1:0'")
        master.fork("worker, bind")
        port = master.port_of(1)
        with Client(port) as client:
            client.send(b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n")
            master.until("waits", worker=1)
            master.do("cluster.workers[1].disconnect() and None")

            assert master.port_of(2) == port
            assert get(port).text == "worker 2\n"
            assert master.told("disconnect") == []
            master.do("go.set()", worker=1)
            assert client.read().text == "waited\n"


def test_draining_is_told_once_whoever_asked_and_however_often():
    with Program("ways") as master:
        master.fork("worker, '127.0.0.1:0'")
        master.until("listening", worker=1)
        master.do("[cluster.workers[1].disconnect() for _ in range(3)] and None")
        master.tell("cluster.worker.disconnect()", worker=1)
        master.until("exit", worker=1)

        assert master.names(1).count("draining") == 1


def test_exactly_one_of_code_and_signal_is_none_and_the_cause_is_a_word():
    """exit_cause is beyond Node: an "exit" listener need not guess from numbers."""
    with Program("ways") as master:
        master.do("cluster.on('exit', lambda w, c, s: say('cause', worker=w.id, cause=str(w.exit_cause))) and None")
        for end in ("disconnect()", "kill('SIGKILL')"):
            master.do(f"cluster.workers[{master.fork()}].{end} and None")
        master.tell("os._exit(9)", worker=master.fork())
        os.kill(master.pid_of(master.fork()), 9)
        master.do("cluster.fork(returns) and None")
        causes = [master.until("cause", worker=number)["cause"] for number in (1, 2, 3, 4, 5)]
        exits = [master.until("exit", worker=number) for number in (1, 2, 3, 4, 5)]

    assert causes == ["retired", "killed", "crashed", "killed", "finished"]
    endings = [(told["code"], told["signal"]) for told in exits]
    assert endings == [(0, None), (None, "SIGKILL"), (9, None), (None, "SIGKILL"), (0, None)]


def test_a_listener_that_raises_is_logged_and_the_others_are_called():
    """In Node it ends the master, and with it everything."""
    with Program("ways") as master:
        master.do("cluster.on('online', lambda worker: 1 / 0) and None")
        master.do("cluster.on('online', lambda worker: say('after')) and None")
        master.fork()
        master.until("after")

        assert "ZeroDivisionError" in master.log
        assert master.do("1 + 1", worker=1) == 2
