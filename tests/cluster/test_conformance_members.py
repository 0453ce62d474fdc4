"""Node's cluster, member by member of the module: is_master, workers, settings, setup_master, fork, disconnect, run.

Where ours differs on purpose the test pins ours; docs/cluster.md has the table.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from prefork import cluster
from tests.harness.client import DEADLINE, get
from tests.harness.program import Program
from tests.harness.server import halted, wait_for_exit

NOBODY = 65534  # user and group
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def _can_nobody_run_python():
    try:
        return subprocess.run([sys.executable, "-c", ""], user=NOBODY, capture_output=True).returncode == 0
    except OSError:
        return False


reachable = pytest.mark.skipif(not _can_nobody_run_python(), reason="this interpreter is out of the reach of others")

# A worker of a fresh interpreter that obeys, in the shape of Node's listings.
LISTING = """
    if cluster.is_master:
        tell_all()
        obey()
        {setup}
        cluster.fork()
        say("returned", code=cluster.run())
    else:
        cluster.worker.on("message", hear)
        cluster.worker.run()
"""


def listing(setup="", **options):
    return Program(LISTING.format(setup=setup), **options)


# ---- is_master, is_worker, worker ----


def test_a_program_is_the_master_and_its_forks_are_workers():
    """is_master and is_worker are opposites on both sides; cluster.worker is there in a worker only."""
    question = "[cluster.is_master, cluster.is_worker, cluster.worker and cluster.worker.id]"
    with Program("console") as master:
        first = master.fork()
        second = master.fork()

        assert master.do(question) == [True, False, None]
        assert master.do(question, worker=first) == [False, True, 1]
        assert master.do(question, worker=second) == [False, True, 2]


def test_a_program_that_never_forks_is_a_master():
    """Whoever imports the cluster and does not use it."""
    assert (cluster.is_master, cluster.is_worker, cluster.worker) == (True, False, None)


@pytest.mark.parametrize("fork", ["listing", "console"])
def test_what_a_worker_starts_is_no_worker(fork):
    """Node takes its variable out of the environment, so that grandchildren do not take themselves for workers."""
    question = "__import__('subprocess').check_output([sys.executable, '-c', 'from prefork import cluster; print(cluster.is_master)'], text=True)"
    with listing() if fork == "listing" else Program("console") as master:
        if fork == "console":
            master.fork()
        master.until("online", worker=1)

        assert master.do(question, worker=1) == "True\n"


# ---- workers ----


def test_workers_are_found_by_their_ids():
    """cluster.workers is a dict of id and handle, in the master only."""
    with Program("console") as master:
        for _ in range(3):
            master.fork()

        assert master.do(
            "[(id, handle.id, handle is cluster.workers[id]) for id, handle in cluster.workers.items()]"
        ) == [
            [1, 1, True],
            [2, 2, True],
            [3, 3, True],
        ]
        assert master.do("len(cluster.workers)", worker=2) == 0


@pytest.mark.parametrize("end", ["cluster.workers[1].disconnect()", "cluster.workers[1].kill('SIGKILL')"])
def test_an_entry_stays_until_the_process_is_reaped(end):
    """Node takes it away at once for a worker that the master disconnects; one rule is easier to rely on."""
    with Program("console") as master:
        master.fork()

        assert master.do(f"({end}, 1 in cluster.workers)[1]") is True
        assert master.until("disconnect", worker=1)["listed"] is True
        assert master.until("exit", worker=1)["listed"] is False
        assert master.do("list(cluster.workers)") == []


# ---- settings, setup_master ----


def test_settings_are_there_to_be_read():
    """Node says that they are not for mutation; ours cannot be."""
    with Program("console") as master:
        assert master.do("cluster.settings.serialization") == "json"
        with pytest.raises(AssertionError, match="FrozenInstanceError"):
            master.do("cluster.settings.silent = True")
        assert master.do("cluster.settings.silent") is False


def test_setup_master_is_cumulative():
    """What one call does not name stays as the one before left it."""
    with Program("console") as master:
        master.do("cluster.setup_master(args=['one'], silent=True)")
        master.do("cluster.setup_master(silent=False)")
        master.do("cluster.setup_master(backlog=7)")

        settings = "[cluster.settings.args, cluster.settings.silent, cluster.settings.backlog]"
        assert master.do(settings) == [["one"], False, 7]


def test_setup_is_told_once_for_each_call_and_after_it():
    """Each with the settings as that call left them, also if several calls were made in one turn."""
    with Program("console") as master:
        master.do("(cluster.setup_master(args=['one']), cluster.setup_master(silent=True), say('called'))")
        second = master.until("setup", 2)

        assert [told["event"] for told in master.told() if told["event"] in ("called", "setup")] == [
            "called",
            "setup",
            "setup",
        ]
        first = master.told("setup")[0]
        assert (first["args"], first["silent"]) == (["one"], False)
        assert (second["args"], second["silent"]) == (["one"], True)


def test_settings_count_for_the_forks_that_follow():
    """A worker keeps what it was forked with."""
    with listing("cluster.setup_master(args=['before'])") as master:
        master.until("online", worker=1)
        master.do("cluster.setup_master(args=['after'])")
        master.fork("")

        assert master.do("sys.argv[1:]", worker=1) == ["before"]
        assert master.do("sys.argv[1:]", worker=2) == ["after"]


def test_a_setting_that_does_not_exist_is_refused_with_its_name():
    """Node takes anything."""
    with Program("console") as master, pytest.raises(AssertionError, match="silnt.*did you mean 'silent'"):
        master.do("cluster.setup_master(silnt=True)")


@pytest.mark.parametrize("setting", ["sharing='none'", "serialization='advanced'", "max_message=0", "backlog='x'"])
def test_a_setting_with_a_value_that_cannot_be_is_refused(setting):
    """When it is set, not when the first worker needs it; what was set before stays."""
    name = setting.partition("=")[0]
    with Program("console") as master:
        before = master.do(f"cluster.settings.{name}")
        with pytest.raises(AssertionError, match=name):
            master.do(f"cluster.setup_master({setting})")
        assert master.do(f"cluster.settings.{name}") == before


def test_exec_args_and_exec_argv_say_what_a_worker_runs(tmp_path):
    """A program of its own, its arguments, and the interpreter's."""
    script = tmp_path / "other.py"
    script.write_text(
        "import sys\nfrom prefork import cluster\nfrom tests.programs.telling import say\n"
        "say('ran', argv=sys.argv, optimize=sys.flags.optimize, worker=cluster.worker.id)\n"
    )
    with Program("console") as master:
        master.do(f"cluster.setup_master(exec={str(script)!r}, args=['a', 'b c'], exec_argv=['-O'])")
        master.do("cluster.fork() and None")
        ran = master.until("ran")
        ended = master.until("exit", worker=1)

    assert (ran["argv"], ran["optimize"], ran["worker"]) == ([str(script), "a", "b c"], 1, 1)
    assert (ended["code"], ended["signal"]) == (0, None)


def test_without_exec_a_fork_runs_the_running_program():
    """The listing with `if cluster.is_master` and `else`, and with the arguments of the program."""
    with Program(LISTING.format(setup=""), "--flag", "value") as master:
        master.until("online", worker=1)

        assert master.do("sys.argv", worker=1) == [str(master.path), "--flag", "value"]
        assert master.do("cluster.is_worker", worker=1) is True


def test_without_exec_the_options_of_the_interpreter_are_kept():
    """Node's execArgv defaults to process.execArgv."""
    with listing(options=("-O", "-X", "utf8=0")) as master:
        master.until("online", worker=1)

        assert master.do("[sys.flags.optimize, sys.flags.utf8_mode]", worker=1) == [1, 0]


def test_a_program_started_as_a_module_is_run_as_one_again():
    """python -m tests.programs.console: its relative imports work in the worker, too."""
    with Program("as_module", options=("-m",)) as master:
        assert master.until("ran")["package"] == "tests.programs"


def test_cwd_is_where_workers_begin(tmp_path):
    """And the master stays where it is."""
    with listing(f"cluster.setup_master(cwd={str(tmp_path)!r})") as master:
        master.until("online", worker=1)

        assert master.do("os.getcwd()", worker=1) == str(tmp_path)
        assert master.do("os.getcwd()") != str(tmp_path)


def test_cwd_counts_for_forked_functions_as_well(tmp_path):
    with Program("console") as master:
        master.do(f"cluster.setup_master(cwd={str(tmp_path)!r})")
        master.fork()

        assert master.do("os.getcwd()", worker=1) == str(tmp_path)


@only_root
@pytest.mark.parametrize("call", ["worker", pytest.param("", marks=reachable)])
def test_uid_and_gid_are_who_workers_are(call):
    """No group of root's is left to them."""
    with Program("both_ways") as master:
        master.do(f"cluster.setup_master(uid={NOBODY}, gid={NOBODY})")
        master.fork(call)

        assert master.do("[*os.getresuid(), *os.getresgid()]", worker=1) == [NOBODY] * 6
        assert set(master.do("os.getgroups()", worker=1)) <= {NOBODY}
        assert master.do("os.getuid()") == 0


@pytest.mark.parametrize("call", ["speaker", ""])
def test_silent_workers_speak_to_the_master_alone(call):
    """Their output is in handle.process.stdout and .stderr; the program's own has none of it."""
    with Program("speaking") as master:
        master.do("cluster.setup_master(silent=True)")
        master.do(f"cluster.fork({call})")

        assert master.until("spoken", by="stdout")["text"] == "said aloud\n"
        assert master.until("spoken", by="stderr")["text"] == "said in error\n"
        assert "said aloud" not in [line.strip() for line in master.log.splitlines()]


@pytest.mark.parametrize("call", ["speaker", ""])
def test_workers_that_are_not_silent_share_the_programs_output(call):
    with Program("speaking") as master:
        master.do(f"cluster.fork({call})")
        master.until("exit", worker=1)

        assert master.wait_for("^said aloud$")
        assert master.wait_for("^said in error$")
        assert master.do("[handles[1].process.stdout, handles[1].process.stderr]") == [None, None]


@pytest.mark.parametrize("call", ["speaker", ""])
def test_stdio_says_it_for_each_stream_and_goes_before_silent(call):
    """As in Node, one word for each of 0, 1 and 2; the channel needs no entry here."""
    with Program("speaking") as master:
        master.do("cluster.setup_master(silent=True, stdio=['ignore', 'pipe', 'inherit'])")
        master.do(f"cluster.fork({call})")

        assert master.until("spoken", by="stdout")["text"] == "said aloud\n"
        assert master.wait_for("^said in error$")
        assert master.told("spoken", by="stderr") == []


def test_stdio_may_have_nodes_entry_for_the_channel():
    """There it has to; here it says nothing, and what was written for Node is understood."""
    with Program("speaking") as master:
        master.do("cluster.setup_master(stdio=['ignore', 'pipe', 'pipe', 'ipc'])")
        master.do("cluster.fork(speaker)")

        assert master.until("spoken", by="stdout")["text"] == "said aloud\n"
        assert master.until("spoken", by="stderr")["text"] == "said in error\n"


def test_a_worker_reads_what_the_master_writes_to_its_stdin():
    """stdio 'pipe' for 0: process.stdin is the other end."""
    with Program("speaking") as master:
        master.do("cluster.setup_master(stdio=['pipe', 'inherit', 'inherit'])")
        master.fork("listener")
        master.do("write(1, 'a line\\n')")

        assert master.until("read", worker=1)["line"] == "a line\n"


@pytest.mark.parametrize("call", ["worker", ""])
def test_pickle_carries_what_json_cannot(call):
    """Node's 'advanced': asked for in the settings, for both ends."""
    with Program(
        """
        def worker():
            cluster.worker.on("message", hear)
            cluster.worker.run()

        if cluster.is_worker:
            worker()
        else:
            cluster.setup_master(serialization="pickle")
            cluster.on("message", lambda worker, message, handle: say("pickled", message=repr(message)))
            tell_all()
            obey()
            cluster.run()
        """
    ) as master:
        master.fork(call)
        master.do("cluster.workers[1].send({'code': 'cluster.worker.send((1, {2, 3}, b\"4\", 5j))', 'number': 0})")
        told = master.until("pickled")

    assert told["message"] == "(1, {2, 3}, b'4', 5j)"


def test_json_refuses_what_it_cannot_carry():
    """At send, in the caller's face: nothing is queued."""
    with Program("console") as master:
        master.fork()

        with pytest.raises(AssertionError, match="TypeError"):
            master.do("cluster.workers[1].send({1, 2})")
        with pytest.raises(AssertionError, match="TypeError"):
            master.do("cluster.worker.send({1, 2})", worker=1)
        assert master.do("1 + 1", worker=1) == 2


# ---- fork ----


def test_fork_returns_at_once_and_is_told_later():
    """Listeners attached right after the call see "fork"; nothing was told before it returned."""
    with Program(
        """
        def worker(): ...

        worker = cluster.fork(worker)
        say("returned", worker=worker.id, pid=worker.pid)
        tell_all()
        sys.exit(cluster.run())
        """
    ) as master:
        assert master.wait_exit() == 0
        returned = master.until("returned")

    assert returned["worker"] == 1
    assert master.told("fork")[0]["pid"] == returned["pid"]
    assert [told["event"] for told in master.told() if told["event"] != "setup"][:2] == ["returned", "fork"]


def test_ids_count_up_and_are_never_used_again():
    """Not those of workers that have ended either."""
    with Program("console") as master:
        assert [master.fork() for _ in range(3)] == [1, 2, 3]
        for number in (1, 2, 3):
            master.do(f"cluster.workers[{number}].kill('SIGKILL')")
            master.until("exit", worker=number)

        assert [master.fork() for _ in range(2)] == [4, 5]


@pytest.mark.parametrize("call", ["worker", ""])
def test_env_is_for_one_fork(call):
    """The master's environment at that moment, and what is named on top of it."""
    ask = "[os.environ.get('SHARED'), os.environ.get('OWN')]"
    separator = ", " if call else ""
    with Program("both_ways") as master:
        master.do("os.environ.update(SHARED='1')")
        master.fork(f"{call}{separator}env={{'OWN': 'a'}}")
        master.do("os.environ.update(SHARED='2')")
        master.fork(f"{call}{separator}env={{'OWN': 'b', 'SHARED': '3'}}")
        master.fork(call)

        assert master.do(ask, worker=1) == ["1", "a"]
        assert master.do(ask, worker=2) == ["3", "b"]
        assert master.do(ask, worker=3) == ["2", None]
        assert master.do(ask) == ["2", None]


def test_a_forked_function_gets_its_arguments_and_what_the_program_has_made():
    """Node cannot: its workers start from nothing. Memory is shared until somebody writes to it."""
    with Program(
        """
        table = {"made": "before the fork"}

        def worker(first, second):
            say("ran", args=[first, second], table=table, same=id(table) == int(second))

        cluster.fork(worker, 1, id(table))
        table["made"] = "after the fork"
        sys.exit(cluster.run())
        """
    ) as master:
        assert master.wait_exit() == 0
        ran = master.until("ran")

    assert ran["args"][0] == 1
    assert (ran["table"], ran["same"]) == ({"made": "before the fork"}, True)


def test_a_forked_coroutine_function_runs_in_a_loop():
    with Program(
        """
        async def worker():
            await asyncio.sleep(0)
            say("ran", loop=asyncio.get_running_loop().is_running())

        tell_all()
        cluster.fork(worker)
        sys.exit(cluster.run())
        """
    ) as master:
        assert master.wait_exit() == 0
        assert master.until("ran")["loop"] is True
        assert master.until("exit", worker=1)["code"] == 0


def test_a_worker_cannot_fork():
    """As in Node, where cluster.fork is not there; here the error says who can."""
    with Program("console") as master:
        master.fork()

        with pytest.raises(AssertionError, match="worker"):
            master.do("cluster.fork(worker)", worker=1)
        assert master.names(1) == ["fork", "online"]


@pytest.mark.parametrize("call", ["setup_master()", "run()", "disconnect()", "broadcast(1)", "keep(1, print)"])
def test_what_belongs_to_the_master_is_refused_in_a_worker(call):
    with Program("console") as master:
        master.fork()

        with pytest.raises(AssertionError, match="Error"):
            master.do(f"cluster.{call}", worker=1)
        assert master.do("cluster.is_worker", worker=1) is True


# ---- disconnect, run ----


def test_disconnect_calls_back_once_when_all_workers_are_gone():
    """After the last exit, not after the last request for it."""
    with Program("console") as master:
        for _ in range(3):
            master.fork()
        master.do("cluster.disconnect(lambda: say('gone', left=len(cluster.workers)))")
        gone = master.until("gone")
        events = [
            told["event"] for told in master.told() if told["event"] in ("exit", "gone") and told.get("by") != "handle"
        ]

        assert events == ["exit", "exit", "exit", "gone"]
        assert gone["left"] == 0
        assert all(told["asked"] is True and told["code"] == 0 for told in master.told("exit"))
    assert len(master.told("gone")) == 1


def test_disconnect_without_workers_calls_back_all_the_same_and_later():
    with Program("console") as master:
        master.do("(cluster.disconnect(lambda: say('gone')), say('called'))")
        master.until("gone")

    assert [told["event"] for told in master.told() if told["event"] in ("called", "gone")] == ["called", "gone"]


def test_disconnect_twice_calls_back_twice_and_leaves_once():
    """Node has to skip those that have no channel any more; here asking again is no error at all."""
    with Program("console") as master:
        master.fork()
        master.do("[cluster.disconnect(lambda n=n: say('gone', n=n)) for n in (1, 2)] and None")
        master.until("gone", n=1)
        master.until("gone", n=2)

        assert master.names(1, "draining") == ["fork", "online", "disconnect", "exit"]
        master.do("cluster.disconnect(lambda: say('gone', n=3))")
        master.until("gone", n=3)


def test_run_returns_when_no_worker_is_left():
    """0, and the program goes on."""
    with Program("console") as master:
        master.fork()
        assert master.finish() == 0
        assert master.until("returned")["code"] == 0


def test_run_waits_for_a_timer():
    """Who wants to fork again in a second must not be ended before."""
    with Program(
        """
        def worker(): ...

        tell_all()

        @cluster.once("exit")
        def again(worker, code, signal):
            cluster.call_later(0.05, lambda: cluster.fork(globals()["worker"]))

        cluster.fork(worker)
        say("returned", code=cluster.run())
        """
    ) as master:
        assert master.wait_exit() == 0

    assert master.names(1) == master.names(2) == ["fork", "online", "disconnect", "exit"]


def test_a_cancelled_timer_is_not_waited_for():
    with Program(
        """
        timer = cluster.call_later(3600, lambda: say("never"))
        timer.cancel()
        say("returned", code=cluster.run())
        """
    ) as master:
        assert master.wait_exit() == 0
        assert master.until("returned")["code"] == 0


def test_term_ends_the_cluster_gracefully():
    """Each worker is asked to leave; run returns, and the program may say good-bye."""
    with Program("console") as master:
        master.fork()
        master.fork()

        assert master.terminate() == 0
        assert [master.until("exit", worker=number)["code"] for number in (1, 2)] == [0, 0]
        assert master.until("returned")["code"] == 0


def test_a_cluster_that_stops_forks_no_more():
    """The listing that forks on every exit, whatever its cause, ends all the same when it is told to."""
    with Program(
        """
        def work():
            cluster.worker.on("message", hear)

        tell_all()

        @cluster.on("exit")
        def again(worker, code, signal):
            try:
                cluster.fork(work)
            except Exception as error:
                say("refused", kind=type(error).__name__)

        obey()
        cluster.fork(work)
        say("returned", code=cluster.run())
        """
    ) as master:
        master.until("online", worker=1)
        os.kill(master.pid_of(1), 9)
        master.until("online", worker=2)
        assert master.terminate() == 0

    assert master.until("refused")["kind"] == "ClusterStopping"
    assert master.told("fork", worker=3) == []
    assert master.until("returned")["code"] == 0


# ---- scheduling, Cluster ----


def test_sharing_is_chosen_for_each_listener():
    """Node has one policy for all of them, and it cannot be changed after the first fork."""
    with Program("console") as master:
        master.fork("worker, '127.0.0.1:0', {'sharing': 'handoff'}")
        master.fork("worker, '127.0.0.1:0', {'sharing': 'reuseport'}")
        master.fork("worker, '127.0.0.1:0', {'sharing': 'inherit'}")

        for number in (1, 2, 3):
            assert get(master.port_of(number)).text == f"worker {number}\n"


def test_a_udp_socket_is_always_shared():
    """There is nothing to accept, so there is nothing to hand out: as in Node."""
    with Program(
        """
        import select

        def worker():
            udp = cluster.listener("udp://127.0.0.1:0")
            say("bound", worker=cluster.worker.id, port=udp.getsockname()[1])
            while True:
                select.select([udp], [], [])
                try:
                    data, peer = udp.recvfrom(100)
                except BlockingIOError:  # a sibling was faster
                    continue
                udp.sendto(data + str(cluster.worker.id).encode(), peer)

        cluster.setup_master(sharing="handoff")
        tell_all()
        cluster.fork(worker)
        cluster.fork(worker)
        cluster.run()
        """
    ) as master:
        first, second = (master.until("bound", worker=number)["port"] for number in (1, 2))
        answers = []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(DEADLINE)
            for other in (2, 1):
                with halted(master.pid_of(other)):
                    client.sendto(b"hello ", ("127.0.0.1", first))
                    answers.append(client.recv(100))

    assert first == second
    assert answers == [b"hello 1", b"hello 2"]


def test_a_second_cluster_has_its_own_workers_and_events():
    """The class behind the names of the module is there for programs that want two."""
    with Program(
        """
        other = cluster.Cluster()

        def worker(): ...

        tell_all()
        tell_all(other, by="other")
        cluster.fork(worker)
        code = cluster.run()
        handle = other.fork(worker)
        say("forked", id=handle.id, here=list(other.workers), there=list(cluster.workers))
        say("returned", codes=[code, other.run()])
        """
    ) as master:
        assert master.wait_exit() == 0

    assert master.until("forked")["id"] == 1
    assert (master.until("forked")["here"], master.until("forked")["there"]) == ([1], [])
    assert [told["event"] for told in master.told(by="other")] == ["setup", "fork", "online", "disconnect", "exit"]
    assert master.names(1) == ["fork", "online", "disconnect", "exit"]


# ---- beyond Node ----


def test_broadcast_reaches_every_worker_and_skips_the_dead():
    """Node's listings loop over cluster.workers, and die of the one whose channel has just closed."""
    with Program("console") as master:
        for _ in range(3):
            master.fork()
        # Killed and not yet reaped: nothing of it is known in this turn.
        master.do(
            "(cluster.workers[2].kill('SIGKILL'), os.waitid(os.P_PID, cluster.workers[2].pid, os.WEXITED | os.WNOWAIT),"
            " cluster.broadcast('hello'))[0]"
        )
        master.until("exit", worker=2)
        master.do("cluster.broadcast('again')")
        for number in (1, 3):
            master.until("heard", worker=number, message="hello")
            master.until("heard", worker=number, message="again")

        assert master.names(1) == ["fork", "online"]


def test_keep_replaces_the_workers_that_die():
    """What the listings do by hand on "exit", with backoff and a reason to give up."""
    with Program("console") as master:
        master.do("cluster.keep(2, worker)")
        for number in (1, 2):
            master.until("online", worker=number)
        os.kill(master.pid_of(1), 9)
        master.until("exit", worker=1)
        master.until("online", worker=3)

        assert wait_for_exit(master.pid_of(1))
        assert master.do("sorted(cluster.workers)") == [2, 3]
        assert master.terminate() == 0


@pytest.mark.parametrize("event", ["on", "once"])
def test_a_listener_for_an_event_that_never_comes_is_refused(event):
    """A typo in Node waits for ever."""
    with pytest.raises(ValueError, match="did you mean 'exit'"):
        getattr(cluster, event)("exti", print)


def test_on_is_a_decorator_without_a_listener():
    @cluster.on("exit")
    def listener(worker, code, signal): ...

    cluster.off("exit", listener)

    assert callable(listener)
