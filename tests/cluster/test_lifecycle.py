"""The lives of workers: events in order, replacement, backoff, and a server that cannot boot."""

from __future__ import annotations

import os
import re
import signal
import sys

import pytest

from tests.harness.client import Client, get
from tests.harness.server import Server, pids_in_group, wait_for_exit

PLAIN = "tests.apps.plain:app"
HOOKS = "tests.apps.hooks:register"


def events_of(log, worker):
    return re.findall(rf"^event (\w+) {worker}\b.*$", log, re.MULTILINE)


def test_each_worker_tells_fork_online_listening_and_exit_once_and_in_order():
    """Programs that follow a worker's life need no checks for missing or repeated steps."""
    with Server(PLAIN, workers=3, hooks=HOOKS) as server:
        server.wait_ready(3)
        server.signal(signal.SIGTERM)
        server.wait_exit()

    for worker in (1, 2, 3):
        assert events_of(server.log, worker) == ["fork", "online", "listening", "exit"]


def test_listening_is_told_once_for_each_address(tmp_path):
    """With the real port where port 0 was asked for."""
    path = tmp_path / "s.sock"
    with Server(PLAIN, workers=1, hooks=HOOKS, bind=["127.0.0.1:0", f"unix:{path}", "[::1]:0"]) as server:
        server.wait_ready(1)

        addresses = [server.wait_for(r"^event listening 1 (\S+)$", n)[1] for n in (1, 2, 3)]
    assert addresses[0] == f"127.0.0.1:{server.port}"
    assert addresses[1] == f"unix:{path}"
    assert re.fullmatch(r"\[::1\]:[1-9]\d*", addresses[2])


def test_a_worker_holds_nothing_of_its_siblings():
    """A copy of the master's end of a sibling's channel would hide the master's death from that sibling."""
    with Server(PLAIN, workers=4) as server:
        server.wait_ready(4)
        held = [len(os.listdir(f"/proc/{server.worker(number)}/fd")) for number in (1, 2, 3, 4)]

    assert held == [held[0]] * 4


def test_a_child_that_cannot_be_watched_does_not_live():
    """Out of descriptors right after a fork: unwatched it would serve on, and outlive every stop."""
    with Server(None, command=[sys.executable, "-m", "tests.apps.unwatchable"]) as server:
        server.wait_for("cannot start a worker in slot 0: .*too many open files.*; trying again in 0.75 s")
        server.wait_ready(1)

        assert len(pids_in_group(server.group)) == 2
        assert get(server.port).text == "hello"


def test_hooks_run_in_the_master_before_the_first_fork():
    """A command-line user can register listeners too."""
    with Server(PLAIN, workers=2, hooks="tests.apps.hooks:stubborn") as server:
        server.wait_ready(2)

    assert server.log.index("hooks run with 0 workers, master True") < server.log.index("event fork 1")


def test_a_failing_listener_is_logged_and_stops_nothing():
    """A typo in a hook must not take the server down."""
    with Server(PLAIN, workers=1, hooks="tests.apps.hooks:failing_listener") as server:
        server.wait_ready(1)
        assert get(server.port).status == 200

    assert "RuntimeError: this listener fails" in server.log


def test_a_killed_worker_is_replaced_at_once():
    """The exit event names the signal, and says that it came from outside."""
    with Server(PLAIN, workers=2, hooks=HOOKS) as server:
        server.wait_ready(2)
        os.kill(server.worker(1), signal.SIGKILL)

        server.wait_for(r"^event exit 1 None SIGKILL killed$")
        server.wait_for(r"^event listening 3 ")
        assert get(server.port).status == 200


def test_a_worker_that_leaves_by_itself_is_replaced():
    """`cluster.worker.disconnect()` in a handler: its answer arrives, it exits with 0."""
    with Server(PLAIN, workers=1, hooks=HOOKS) as server:
        server.wait_ready(1)
        answer = get(server.port, "/leave")

        assert answer.text == "leaving"
        server.wait_for(r"^event exit 1 0 None retired$")
        server.wait_for(r"^event listening 2 ")


def test_a_crash_tells_its_exit_code():
    """os._exit(9) in a handler: the client of that request is the only one who loses."""
    with Server(PLAIN, workers=1, hooks=HOOKS) as server:
        server.wait_ready(1)
        with pytest.raises((EOFError, ConnectionError)):
            get(server.port, "/exit?code=9")

        server.wait_for(r"^event exit 1 9 None crashed$")
        server.wait_for(r"^event listening 2 ")


def test_a_crash_loop_backs_off_and_says_so_while_its_sibling_serves():
    """A slot that dies a tenth of a second after each start is started less and less often."""
    with Server("tests.apps.hooks:slot_one_dies()", workers=2) as server:
        server.wait_ready(2)
        for times, delay in ((2, "0.75"), (3, "1.1"), (4, "1.7")):
            server.wait_for(rf"slot 1 failed {times} times in a row, .*: crashed; starting another in {delay} s")
        starts = len(re.findall(r"is listening, ", server.log))

        assert starts <= 1 + 5
        assert get(server.port).text == "1 0"


def test_an_application_that_fails_to_import_ends_the_server_with_its_traceback_printed_once():
    """Eight copies of a traceback, or a server that tries for ever, hide the one line that matters."""
    with Server("tests.apps.broken:app", workers=4) as server:
        code = server.wait_exit()

    assert code == 4
    assert "RuntimeError: the database of this application is missing" in server.log
    assert server.log.count("Traceback (most recent call last)") == 1
    assert "no worker has ever booted" in server.log
    assert "prefork/worker" not in server.log  # the application's own frames, not ours


def test_a_lifespan_that_refuses_ends_the_server_with_its_message():
    """uvicorn's exit code for it is 3 as well."""
    with Server("tests.apps.lifespans:refuses", workers=2) as server:
        code = server.wait_exit()

    assert code == 3
    assert server.log.count("the cache is cold") == 1


def test_lifespan_runs_once_per_worker():
    """Startup before listening, shutdown after the drain."""
    with Server("tests.apps.lifespans:tells", workers=2) as server:
        server.wait_ready(2)
        assert get(server.port).text == "hello"
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0

    assert server.log.count("lifespan.startup") == 2
    assert server.log.count("lifespan.shutdown") == 2


def test_an_application_that_hangs_at_import_is_shown_and_given_up():
    """The stacks name the line that hangs; nothing is left running."""
    with Server("tests.apps.hangs:app", workers=1, boot_timeout=0.5) as server:
        code = server.wait_exit()

    assert code == 3
    assert "did not boot within 0.5 s (--boot-timeout)" in server.log
    assert re.search(r'File ".*hangs\.py", line \d+ in <module>', server.log)


def test_a_preloaded_application_is_imported_once_by_the_master():
    """... and every worker has it already."""
    with Server("tests.apps.preloaded:app", workers=3, preload=True) as server:
        server.wait_ready(3)
        imported_by = get(server.port).text

        assert server.log.count("imported by") == 1
        assert imported_by == str(server.pid)


def test_a_preloaded_application_that_fails_to_import_ends_the_server_before_any_fork():
    """Same exit code, same single traceback."""
    with Server("tests.apps.broken:app", workers=4, preload=True, hooks=HOOKS) as server:
        code = server.wait_exit()

    assert code == 4
    assert "RuntimeError: the database of this application is missing" in server.log
    assert server.log.count("Traceback (most recent call last)") == 1
    assert "event fork" not in server.log


def test_a_worker_that_talks_nonsense_to_its_master_is_killed_and_replaced():
    """Memory corruption in an extension must not reach the master."""
    with Server("tests.apps.garbage:app", workers=1) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            server.wait_for("worker 1 .* cannot be understood any more: .*; it is killed")
        server.wait_ready(2)

        assert "Traceback" not in server.log


@pytest.mark.parametrize("path", ["/slow?seconds=60", "/block?seconds=60", "/stuck"])
def test_workers_do_not_outlive_a_master_killed_with_9(path):
    """Not even one whose event loop stands still, or whose C code holds the interpreter's lock."""
    with Server(PLAIN, workers=2) as server:
        server.wait_ready(2)
        pids = [server.worker(1), server.worker(2)]
        with Client(server.port) as client:
            client.send(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
            if not path.startswith("/slow"):
                server.wait_for("blocking the loop|stuck in C")
            server.signal(signal.SIGKILL)

            assert all(wait_for_exit(pid, 8.0) for pid in pids)


def test_requests_in_flight_are_finished_when_the_master_is_killed_with_9():
    """The workers have a few seconds, and use them."""
    with Server(PLAIN, workers=1) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.send(b"GET /announced?seconds=1 HTTP/1.1\r\nHost: test\r\n\r\n")
            server.wait_for("announced")
            server.signal(signal.SIGKILL)

            assert client.read().text == "announced"


@pytest.mark.parametrize("lifespan", ["auto", "on"])
def test_an_application_that_exits_in_its_startup_ends_the_server_with_its_words(lifespan):
    """sys.exit("...") in a start-up means that it cannot start, whatever the mode."""
    with Server("tests.apps.lifespans:exits", workers=2, lifespan=lifespan) as server:
        code = server.wait_exit()

    assert code == 3
    assert "the configuration of this application is missing" in server.log
    assert "never retrieved" not in server.log


def test_a_worker_that_leaves_by_itself_and_cannot_end_is_killed_and_replaced():
    """Otherwise one slot after another would be lost to a shutdown that hangs."""
    with Server("tests.apps.lifespans:never_stops", workers=1, graceful_timeout=0.2) as server:
        server.wait_ready(1)
        assert get(server.port).text == "leaving"

        server.wait_for(r"worker 1 .* ended: killed by SIGKILL, it did not end within 7\.2 s of being asked to")
        server.wait_ready(2)
