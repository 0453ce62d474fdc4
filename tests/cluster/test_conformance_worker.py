"""Node's cluster, the worker object: as the master sees it, and as the worker itself does."""

from __future__ import annotations

import os
import signal

import pytest

from tests.harness.client import Client, get
from tests.harness.program import Program
from tests.harness.server import halted, wait_for_exit

# Ends a worker that its master's death has left behind, at the latest: process.identity.DEATH_GRACE and a margin.
ORPHAN_DEADLINE = 8.0  # seconds


# ---- id, process ----


def test_both_sides_agree_on_id_and_process():
    """worker.id and worker.process.pid, here and there."""
    with Program("ways") as master:
        master.fork()
        question = "[{0}.id, {0}.pid, {0}.process.pid, {0}.slot, {0}.generation]"

        here = master.do(question.format("cluster.workers[1]"))
        assert here == master.do(question.format("cluster.worker"), worker=1)
        assert here[:3] == [1, master.pid_of(1), master.pid_of(1)]
        assert master.do("os.getpid()", worker=1) == master.pid_of(1)


def test_a_handle_describes_itself():
    """Every log line about a worker names it in the same words."""
    with Program("ways") as master:
        master.fork()

        assert master.do("cluster.workers[1].describe()").startswith(f"worker 1 (pid {master.pid_of(1)}")
        assert master.do("str(cluster.workers[1])") == master.do("cluster.workers[1].describe()")


# ---- disconnect ----


@pytest.mark.parametrize(("code", "where"), [("cluster.workers[1]", None), ("cluster.worker", 1)])
def test_disconnect_returns_the_worker(code, where):
    """So that calls can be chained, as in Node."""
    with Program("ways") as master:
        master.fork()

        assert master.do(f"{code}.disconnect() is {code}", worker=where) is True
        assert master.until("exit", worker=1)["code"] == 0


@pytest.mark.parametrize(("code", "where"), [("cluster.workers[1]", None), ("cluster.worker", 1)])
def test_disconnect_lets_exchanges_finish_and_accepts_nothing_more(code, where):
    """All that is in flight is answered, by the worker that has it; then the channel ends, then the process."""
    with Program("ways") as master:
        master.fork("worker, '127.0.0.1:0'")
        port = master.port_of(1)
        with Client(port) as client:
            client.send(b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n")
            master.until("waits", worker=1)
            master.do(f"{code}.disconnect() and None", worker=where)
            master.until("draining", worker=1)
            master.do("1", worker=1)  # it has heard of it, and the channel works while it drains
            with pytest.raises(ConnectionRefusedError):
                Client(port)
            master.do("go.set()", worker=1)

            answer = client.read()
            assert (answer.text, answer.headers["connection"]) == ("waited\n", "close")
        ended = master.until("exit", worker=1)
        assert (ended["code"], ended["asked"]) == (0, True)


def test_who_comes_while_the_last_worker_leaves_is_served_by_its_replacement():
    """Node refuses: the listener has gone. One that is forked at "draining" has the time of the drain to ask for it."""
    with Program("ways") as master:
        master.do("cluster.on('draining', lambda old: cluster.fork(worker, '127.0.0.1:0')) and None")
        master.fork("worker, '127.0.0.1:0'")
        port = master.port_of(1)
        with Client(port) as client:
            client.send(b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n")
            master.until("waits", worker=1)
            master.do("cluster.workers[1].disconnect() and None")
            assert get(port).text == "worker 2\n"
            master.do("go.set()", worker=1)

            assert client.read().text == "waited\n"


def test_a_worker_that_reads_no_messages_yet_is_asked_by_sigterm():
    """It imports, or computes: a message would wait for ever. Whoever has cleaning up to do handles the signal."""
    with Program("ways") as master:
        master.fork("sleeps")
        master.until("begun")
        master.do("cluster.workers[1].disconnect() and None")
        ended = master.until("exit", worker=1)

        assert (ended["signal"], ended["asked"]) == ("SIGTERM", True)


@pytest.mark.parametrize(("code", "where"), [("cluster.workers[1]", None), ("cluster.worker", 1)])
def test_disconnect_again_does_nothing(code, where):
    with Program("ways") as master:
        master.do("worker_1 = fork(worker, '127.0.0.1:0')")
        master.until("listening", worker=1)
        master.do(f"[{code}.disconnect() for _ in range(3)] and None", worker=where)
        ended = master.until("exit", worker=1)
        master.do("worker_1.disconnect() and None")

        assert (ended["code"], ended["asked"]) == (0, True)
        assert master.names(1) == ["fork", "online", "listening", "draining", "disconnect", "exit"]


def test_connections_that_a_worker_has_opened_are_its_own_business():
    """disconnect does not close them, and the function that uses them runs to its end."""
    with Program(
        """
        async def worker(port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            cluster.worker.disconnect()
            writer.write(b"after disconnect\\n")
            say("read", line=(await reader.readline()).decode())
            writer.close()

        import socket
        server = socket.create_server(("127.0.0.1", 0))
        tell_all()

        @cluster.on("draining")
        def answer(worker):
            peer, _ = server.accept()
            say("sent", line=peer.recv(100).decode())
            peer.sendall(b"the end\\n")

        cluster.fork(worker, server.getsockname()[1])
        sys.exit(cluster.run())
        """
    ) as master:
        assert master.wait_exit() == 0

    assert master.until("sent")["line"] == "after disconnect\n"
    assert master.until("read")["line"] == "the end\n"
    assert master.until("exit", worker=1)["code"] == 0


def test_a_worker_that_does_not_leave_is_killed_after_the_grace():
    """Node has no limit: one open connection, and a shutdown never ends."""
    with Program("ways") as master:
        master.do("cluster.setup_master(graceful_timeout=0.2)")
        master.fork("worker, '127.0.0.1:0'")
        with Client(master.port_of(1)) as client:
            client.send(b"GET /stuck HTTP/1.1\r\nHost: test\r\n\r\n")
            master.until("stuck", worker=1)
            master.do("cluster.workers[1].disconnect() and None")
            ended = master.until("exit", worker=1)

        assert (ended["signal"], ended["asked"]) == ("SIGKILL", True)


# ---- kill, destroy ----


@pytest.mark.parametrize("name", ["kill", "destroy"])
@pytest.mark.parametrize("number", ["'SIGKILL'", "signal.SIGKILL", "9"])
def test_kill_sends_a_signal_by_name_or_number(name, number):
    """Right away. destroy is another name for it."""
    with Program("ways") as master:
        master.fork()
        master.do(f"cluster.workers[1].{name}({number})")

        assert master.until("exit", worker=1)["signal"] == "SIGKILL"


def test_kill_sends_term_if_nothing_is_said():
    """A worker takes it as the wish that it leaves; a process without a handler would die of it."""
    with Program("ways") as master:
        master.fork("told, signal.SIGTERM")
        master.until("ready")
        master.do("cluster.workers[1].kill()")
        master.until("caught", number=signal.SIGTERM)

        assert master.until("exit", worker=1)["code"] == 5


def test_kill_counts_as_asked_for():
    """Node's flag stays false, so its own example takes the worker it has just killed for a crash, and forks again."""
    with Program("ways") as master:
        master.fork()
        master.do("cluster.workers[1].kill('SIGKILL')")

        assert master.until("disconnect", worker=1)["asked"] is True
        assert master.until("exit", worker=1)["asked"] is True


@pytest.mark.parametrize("number", ["SIGUSR1", "SIGWINCH", "SIGSTOP", "SIGCONT"])
def test_a_signal_that_ends_nothing_is_no_wish_that_it_ends(number):
    """A worker that was told to reopen its logs, and crashes a day later, has crashed."""
    with Program("ways") as master:
        master.fork("worker, '127.0.0.1:0'")
        master.until("listening", worker=1)
        master.do(f"cluster.workers[1].kill({number!r})")
        assert master.do("cluster.workers[1].exited_after_disconnect") is None
        os.kill(master.pid_of(1), 9)

        assert master.until("exit", worker=1)["asked"] is False


def test_kill_of_a_worker_that_has_ended_hits_nobody():
    """Its number may belong to somebody else by now."""
    with Program("ways") as master:
        master.do("first = cluster.fork(worker)")
        master.until("online", worker=1)
        os.kill(master.pid_of(1), 9)
        master.until("exit", worker=1)
        master.do("(first.kill(), first.destroy(), first.disconnect())[0]")

        assert master.do("[first.is_dead(), first.exited_after_disconnect]") == [True, False]


@pytest.mark.parametrize("number", ["'SIGKIL'", "999", "-1"])
def test_kill_with_a_signal_that_does_not_exist_raises(number):
    """And the worker lives, unasked."""
    with Program("ways") as master:
        master.fork()

        with pytest.raises(AssertionError, match="ValueError"):
            master.do(f"cluster.workers[1].kill({number})")
        assert master.do("cluster.workers[1].exited_after_disconnect") is None
        assert master.do("1 + 1", worker=1) == 2


@pytest.mark.parametrize("name", ["kill", "destroy"])
def test_a_worker_that_destroys_itself_exits_with_0_as_asked(name):
    """In a worker kill is disconnect, then the end."""
    with Program("ways") as master:
        master.fork()
        master.tell(f"cluster.worker.{name}()", worker=1)
        ended = master.until("exit", worker=1)

        assert (ended["code"], ended["asked"]) == (0, True)


# ---- is_connected, is_dead ----


def test_is_connected_and_is_dead_follow_the_life_of_a_worker():
    """Alive, without a channel, dead: in both of the last listeners as Node's documentation has it."""
    with Program("ways") as master:
        master.fork()
        assert master.do("[cluster.workers[1].is_connected(), cluster.workers[1].is_dead()]") == [True, False]
        assert master.do("[cluster.worker.is_connected(), cluster.worker.is_dead()]", worker=1) == [True, False]
        master.do("cluster.workers[1].disconnect() and None")
        master.until("exit", worker=1)

        assert [(told["event"], told["connected"], told["dead"]) for told in master.told(worker=1, by="cluster")] == [
            ("fork", True, False),
            ("online", True, False),
            ("draining", True, False),
            ("disconnect", False, False),
            ("exit", False, True),
        ]


def test_a_worker_hears_that_it_is_disconnected():
    """Its own "disconnect", with exited_after_disconnect set, and is_connected false."""
    with Program("console") as master:
        master.fork()
        master.do("cluster.workers[1].disconnect() and None")
        master.until("exit", worker=1)

        assert master.until("disconnects", worker=1)["asked"] is True


# ---- errors ----


def test_sending_to_a_worker_that_is_gone_raises_where_it_is_called():
    """Node emits "error", which ends the master if nobody listens."""
    with Program("ways") as master:
        master.do("first = cluster.fork(worker)")
        master.until("online", worker=1)
        os.kill(master.pid_of(1), 9)
        master.until("exit", worker=1)

        with pytest.raises(AssertionError, match="ChannelClosed"):
            master.do("first.send('hello')")
        assert master.do("1 + 1") == 2


def test_there_is_no_error_event():
    """What fails raises; nothing can be forgotten to be listened for."""
    with Program("ways") as master:
        master.fork()
        for code, where in (("cluster.workers[1]", None), ("cluster.worker", 1), ("cluster", None)):
            with pytest.raises(AssertionError, match="there is no event 'error'"):
                master.do(f"{code}.on('error', print)", worker=where)


def test_a_fork_that_fails_raises_and_leaves_no_worker():
    """Node says so by an "error" event of the worker. No number is used up, no descriptor left open."""
    with Program("ways") as master:
        master.do("import resource; limit = resource.getrlimit(resource.RLIMIT_NOFILE)")
        before = master.do("len(os.listdir('/proc/self/fd'))")
        master.do("resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir('/proc/self/fd'))), limit[1]))")
        with pytest.raises(AssertionError, match="OSError.*[Tt]oo many open files"):
            master.do("cluster.fork(worker)")
        master.do("resource.setrlimit(resource.RLIMIT_NOFILE, limit)")

        assert master.do("list(cluster.workers)") == []
        assert master.do("len(os.listdir('/proc/self/fd'))") == before
        assert master.fork() == 1


@pytest.mark.parametrize("setting", ["exec='/nowhere/at/all.py'", "cwd='/nowhere'"])
def test_a_program_that_cannot_be_started_is_an_exit_with_a_code(setting):
    """The fork has succeeded, as far as the master can know; the log says what is missing."""
    with Program("both_ways") as master:
        master.do(f"cluster.setup_master({setting})")
        master.do("cluster.fork() and None")
        ended = master.until("exit", worker=1)

        assert ended["code"] > 0
        assert master.names(1, "online") == ["fork", "disconnect", "exit"]
        assert "/nowhere" in master.log or "o such file" in master.log


# ---- the master's death ----


@pytest.mark.parametrize("fork", ["worker", "worker, '127.0.0.1:0'", "sleeps", "spins", "stuck_in_c", "works, 3600"])
def test_no_worker_survives_a_master_killed_with_9(fork):
    """Not even one whose code is stuck, holds the interpreter's lock or never looks at its channel."""
    with Program("ways") as master:
        master.do(f"cluster.fork({fork}) and None")
        master.until("online", worker=1)
        if fork.startswith(("sleeps", "spins", "stuck", "works")):
            master.until("begun")
        pid = master.pid_of(1)
        master.signal(signal.SIGKILL)

        assert wait_for_exit(pid, ORPHAN_DEADLINE)


def test_no_worker_of_a_fresh_interpreter_survives_a_master_killed_with_9():
    with Program("both_ways") as master:
        master.fork("")
        pid = master.pid_of(1)
        master.signal(signal.SIGKILL)

        assert wait_for_exit(pid, ORPHAN_DEADLINE)


def test_a_worker_whose_master_is_gone_hears_disconnect_and_leaves():
    """As in Node its listeners run; unlike there, an exchange in flight is finished first."""
    with Program("console") as master:
        master.fork("worker, '127.0.0.1:0'")
        master.until("listening", worker=1)
        pid = master.pid_of(1)
        master.signal(signal.SIGKILL)

        assert wait_for_exit(pid, ORPHAN_DEADLINE)
        assert master.until("disconnects", worker=1)["asked"] is False


def test_no_sibling_hides_the_masters_death_from_a_worker():
    """One that was forked later has a copy of every descriptor of the master, until it lets go of them."""
    with Program("console") as master:
        master.fork()
        master.fork()
        with halted(master.pid_of(2)):
            master.signal(signal.SIGKILL)
            assert wait_for_exit(master.pid_of(1), ORPHAN_DEADLINE)
            assert master.until("disconnects", worker=1)["asked"] is False


def test_a_worker_whose_master_is_gone_answers_what_it_has():
    with Program("ways") as master:
        master.fork("worker, '127.0.0.1:0'")
        with Client(master.port_of(1)) as client:
            client.send(b"GET /soon HTTP/1.1\r\nHost: test\r\n\r\n")
            master.until("waits", worker=1)
            master.signal(signal.SIGKILL)

            assert client.read().text == "soon\n"


def test_a_worker_that_closes_its_channel_is_disconnected_and_leaves():
    """Node's process.disconnect(): the same as being asked."""
    with Program("ways") as master:
        master.fork("worker, '127.0.0.1:0'")
        assert get(master.port_of(1)).text == "worker 1\n"
        master.tell("cluster.worker.disconnect()", worker=1)

        assert master.until("exit", worker=1)["code"] == 0
        assert master.names(1)[-2:] == ["disconnect", "exit"]
