"""Signals to a running master: each does what it says, none is lost, at any time of its life."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.harness.client import Client, get
from tests.harness.server import Server, pids_in_group, wait_for_exit

PLAIN = "tests.apps.plain:app"


def begin(server, path):
    """A request whose answer is still to come; returns once a worker holds it."""
    client = Client(server.port)
    client.send(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    return client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_graceful_stop_finishes_what_is_in_flight(number):
    """The answer arrives whole, new clients are refused, the exit code is 0."""
    with Server(PLAIN, workers=2) as server:
        server.wait_ready(2)
        with begin(server, "/announced?seconds=1") as client:
            server.wait_for("announced")
            server.signal(number)
            answer = client.read()
            assert client.is_closed_by_peer()
        code = server.wait_exit()
        with pytest.raises(ConnectionRefusedError):
            Client(server.port)

    assert (code, answer.text, answer.headers["connection"]) == (0, "announced", "close")


def test_a_second_interrupt_stops_at_once():
    """The developer who presses Ctrl-C twice means it."""
    with Server(PLAIN, workers=2) as server:
        server.wait_ready(2)
        with begin(server, "/announced?seconds=60"):
            server.wait_for("announced")
            server.signal(signal.SIGINT)
            server.wait_for("stopping")
            server.signal(signal.SIGINT)

            assert server.wait_exit(5.0) == 0


def test_an_interrupt_of_the_whole_foreground_group_is_one_graceful_stop():
    """A terminal sends Ctrl-C to the workers too; they leave it to the master."""
    with Server(PLAIN, workers=2) as server:
        server.wait_ready(2)
        with begin(server, "/announced?seconds=1") as client:
            server.wait_for("announced")
            os.killpg(server.group, signal.SIGINT)

            assert client.read().text == "announced"
        assert server.wait_exit() == 0


def test_quit_stops_at_once():
    """Nothing is waited for."""
    with Server(PLAIN, workers=2) as server:
        server.wait_ready(2)
        with begin(server, "/announced?seconds=60"):
            server.wait_for("announced")
            server.signal(signal.SIGQUIT)

            assert server.wait_exit(5.0) == 0


def test_requests_over_the_graceful_timeout_are_cut_off():
    """A stop is bounded; the log says what was cut."""
    with Server(PLAIN, workers=1, graceful_timeout=0.3) as server:
        server.wait_ready(1)
        with begin(server, "/announced?seconds=60") as client:
            server.wait_for("announced")
            server.signal(signal.SIGTERM)

            assert client.read().status == 500
            assert client.is_closed_by_peer()
        assert server.wait_exit() == 0

    assert "not finished within 0.3 s (--graceful-timeout)" in server.log


def test_a_wsgi_iterable_that_is_cut_off_is_closed():
    """PEP 3333: close() is called "whether the request completes normally or not"."""
    with Server("tests.apps.streams:app", workers=1, graceful_timeout=0.2) as server:
        server.wait_ready(1)
        with begin(server, "/") as client:
            client.read_until(b"tick")
            server.signal(signal.SIGTERM)
            assert server.wait_exit() == 0

    assert "the stream was closed" in server.log


def test_term_to_one_worker_retires_it_gracefully():
    """Operators do it by hand; the answer in flight is finished, and another worker comes."""
    with Server(PLAIN, workers=1) as server:
        server.wait_ready(1)
        with begin(server, "/announced?seconds=1") as client:
            server.wait_for("announced")
            os.kill(server.worker(1), signal.SIGTERM)
            assert client.read().text == "announced"
        server.wait_ready(2)

    assert re.search(r"worker 1 .* ended: exited with code 0 \(retired\)", server.log)


def test_ttin_and_ttou_add_and_retire_one_worker():
    """One more, one less, never none."""
    with Server(PLAIN, workers=1) as server:
        server.wait_ready(1)
        server.signal(signal.SIGTTIN)
        server.wait_ready(2)
        server.signal(signal.SIGTTOU)
        server.wait_for(r"worker 2 .* ended: exited with code 0")
        server.signal(signal.SIGTTOU)
        server.wait_for("stays at 1 workers")

        assert get(server.port, "/worker").text.startswith("1 ")


def test_usr1_reopens_the_logs_of_master_and_workers(tmp_path):
    """logrotate moves the file away; the next line is in a new one of the same name."""
    path, moved = tmp_path / "access.log", tmp_path / "access.log.1"
    with Server(PLAIN, workers=2, access_log=path, log_level="debug") as server:
        server.wait_ready(2)
        get(server.port, "/before")
        path.rename(moved)
        server.signal(signal.SIGUSR1)
        server.wait_for("reopening the logs")
        server.wait_for("worker 2 .* reopened its logs")
        server.wait_for("worker 1 .* reopened its logs")
        for _ in range(8):
            get(server.port, "/after")

    assert "/before" in moved.read_text()
    assert "/after" not in moved.read_text()
    assert path.read_text().count("/after") == 8


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_signals_that_mean_a_reload_elsewhere_do_not_end_the_server(number):
    """Their default action would; a deploy script written for another server must not stop this one."""
    with Server(PLAIN, workers=1) as server:
        server.wait_ready(1)
        server.signal(number)
        server.wait_for(f"ignored {number.name}")

        assert get(server.port).status == 200


def test_a_storm_of_sigchld_loses_no_exit():
    """Exits are learnt from descriptors, so signals may come and go as they like."""
    with Server(PLAIN, workers=4) as server:
        server.wait_ready(4)
        for number in range(1, 5):
            pid = server.worker(number)
            for _ in range(200):
                server.signal(signal.SIGCHLD)
            os.kill(pid, signal.SIGKILL)
        server.wait_ready(8)

        assert len(re.findall(r"ended: killed by SIGKILL", server.log)) == 4


def test_all_workers_killed_at_once_are_all_replaced():
    """SIGCHLD comes once for many; pidfds come one for each."""
    with Server(PLAIN, workers=8) as server:
        server.wait_ready(8)
        for number in range(1, 9):
            os.kill(server.worker(number), signal.SIGKILL)

        server.wait_ready(16)


def test_a_stop_while_workers_boot_ends_them_at_once():
    """A worker that imports holds no request; thirty seconds of grace would be for nothing."""
    with Server("tests.apps.hangs:app", workers=2) as server:
        server.wait_for("importing", 2)
        server.signal(signal.SIGTERM)

        assert server.wait_exit(5.0) == 0


def test_a_stop_while_the_application_is_preloaded_ends_the_server():
    """Before there are workers, too, and as PID 1, where the default action would not."""
    with Server("tests.apps.hooks:slow_import()", workers=2, preload=True) as server:
        server.wait_for("importing")
        server.signal(signal.SIGTERM)

        assert server.wait_exit(5.0) == 0
    assert "stopped by SIGTERM before anything was started" in server.log


def test_other_signals_while_the_application_is_preloaded_wait(tmp_path):
    """logrotate's USR1 must not kill a server that starts, nor TTIN stop its process."""
    with Server("tests.apps.hooks:second_slow_import()", workers=1, preload=True) as server:
        server.wait_for("importing")
        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTTIN):
            server.signal(number)

        server.wait_ready(2)
        server.wait_for("reopening the logs")


def test_signals_at_the_very_end_change_neither_the_exit_code_nor_what_is_left(tmp_path):
    """Impatient supervisors send TERM again and again until the process is gone."""
    path = tmp_path / "pid"
    for _ in range(4):
        with Server(PLAIN, workers=1, pidfile=path) as server:
            server.wait_ready(1)
            while server.process.poll() is None:
                server.signal(signal.SIGTERM)

        assert (server.process.returncode, path.exists()) == (0, False)


def test_a_hang_up_of_the_whole_group_loses_nothing():
    """A closed terminal sends it to the workers too."""
    with Server(PLAIN, workers=2) as server:
        server.wait_ready(2)
        with begin(server, "/announced?seconds=0.5") as client:
            server.wait_for("announced")
            os.killpg(server.group, signal.SIGHUP)

            assert client.read().text == "announced"
        assert "ended" not in server.log


def test_scaling_down_and_up_while_workers_boot_is_no_boot_failure():
    """The worker that was retired before it listened did not fail."""
    with Server("tests.apps.slow:app", workers=2) as server:
        server.wait_for("importing", 2)
        server.signal(signal.SIGTTOU)
        server.wait_for("scaling from 2 to 1")
        server.signal(signal.SIGTTIN)

        server.wait_ready(2)
        assert "giving up" not in server.log


def test_a_stop_right_after_the_start_is_never_lost():
    """Whatever the instant, the master ends with 0 and leaves nothing."""
    for round_ in range(8):
        with Server(PLAIN, workers=2) as server:
            server.wait_for(["starts 2", "listening on", "event|is listening", "worker 2"][round_ % 4])
            server.signal(signal.SIGTERM)

            assert server.wait_exit() == 0


def test_more_signals_while_stopping_change_nothing():
    """TTIN must not start workers again, a second TERM must not cut the first short."""
    with Server(PLAIN, workers=2) as server:
        server.wait_ready(2)
        with begin(server, "/announced?seconds=1") as client:
            server.wait_for("announced")
            server.signal(signal.SIGTERM)
            server.wait_for("stopping")
            for number in (signal.SIGTTIN, signal.SIGTERM, signal.SIGTTOU, signal.SIGUSR1, signal.SIGCHLD):
                server.signal(number)

            assert client.read().text == "announced"
        assert server.wait_exit() == 0
    assert "worker 3" not in server.log


def test_a_worker_that_dies_while_stopping_is_not_replaced():
    """... and the stop still ends with 0."""
    with Server(PLAIN, workers=2) as server:
        server.wait_ready(2)
        pids = [server.worker(1), server.worker(2)]
        with begin(server, "/announced?seconds=60"):
            server.wait_for("announced")
            server.signal(signal.SIGTERM)
            server.wait_for("stopping")
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

            assert server.wait_exit() == 0
    assert "worker 3" not in server.log


UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def may_unshare():
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_unshare(), reason="a PID namespace of our own is not allowed here")
def test_it_works_as_pid_1_of_a_container():
    """TERM works though PID 1 has no default actions, and orphans of the application are reaped."""
    command = [*UNSHARE, sys.executable, "-m", "prefork", "serve", "tests.apps.orphans:app"]
    with Server(None, command=[*command, "--workers", "2", "--bind", "127.0.0.1:0"]) as server:
        server.wait_ready(2)
        assert get(server.port, "/pid1").text == "1"
        for _ in range(5):
            get(server.port, "/orphan")
        server.wait_for("orphan is gone", 5)
        assert get(server.port, "/zombies").text == "0"
        master = next(pid for pid in pids_in_group(server.group) if is_pid_1(pid))
        os.kill(master, signal.SIGTERM)

        assert server.wait_exit() == 0
    assert "ended: exited with code 0" in server.log


def is_pid_1(pid):
    with open(f"/proc/{pid}/status") as file:
        fields = next(line.split() for line in file if line.startswith("NSpid"))
    return len(fields) == 3 and fields[2] == "1"


def test_a_stopped_and_continued_master_kills_nobody():
    """A suspended laptop wakes up with all its workers."""
    with Server(PLAIN, workers=2, boot_timeout=1) as server:
        server.wait_ready(2)
        server.signal(signal.SIGSTOP)
        before = server.worker(1)
        assert not wait_for_exit(before, 1.5)
        server.signal(signal.SIGCONT)

        assert get(server.port).status == 200
        assert "hangs" not in server.log
