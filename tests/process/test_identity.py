"""Users, groups and the pid file: names resolved before anything is started, privileges dropped for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from prefork.errors import ConfigError, StartError
from prefork.process import forking
from prefork.process.identity import Identity, owner, resolve
from prefork.process.pidfile import PidFile

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def test_a_user_brings_its_own_group():
    """As login does."""
    assert resolve("root", None) == Identity(0, 0, "root")


def test_numbers_need_no_entry():
    """Containers run as users that /etc/passwd does not know."""
    assert resolve("54321", "12345") == Identity(54321, 12345, None)


def test_a_group_alone_keeps_the_user():
    """The process only changes its group."""
    assert resolve(None, "root") == Identity(None, 0, None)


@pytest.mark.parametrize(("user", "group", "name"), [("nosuchuser", None, "user"), (None, "nosuchgroup", "group")])
def test_unknown_names_are_refused_with_a_sentence(user, group, name):
    """Before the first fork, not in each worker."""
    with pytest.raises(ConfigError, match=f"{name} 'nosuch{name}' does not exist on this machine"):
        resolve(user, group)


@pytest.mark.parametrize(
    ("text", "pair"),
    [("root:root", (0, 0)), ("root", (0, 0)), (":root", (-1, 0)), ("54321:8", (54321, 8)), ("54321", (54321, -1))],
)
def test_owners_are_read_as_chown_takes_them(text, pair):
    """-1 leaves as it is."""
    assert owner(text) == pair


@as_root
def test_privileges_are_dropped_for_good():
    """User, group and supplementary groups; there is no way back."""

    def child():
        Identity(65534, 65534).assume()
        try:
            os.setuid(0)
        except PermissionError:
            return int((os.getuid(), os.getgid(), os.getgroups()) != (65534, 65534, []))
        return 2

    assert os.waitstatus_to_exitcode(os.waitpid(forking.fork(child), 0)[1]) == 0


def test_the_current_identity_needs_no_rights():
    """`--user me` works for everybody."""
    identity = Identity(os.geteuid(), os.getegid())

    identity.assume()

    assert identity.is_current


def test_a_pid_file_holds_the_pid_and_goes_with_the_server(tmp_path):
    """A line of digits, as every init script expects."""
    path = tmp_path / "pid"
    file = PidFile(str(path))
    file.write()

    assert path.read_text() == f"{os.getpid()}\n"

    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_pid_file_of_a_living_server_is_respected(tmp_path):
    """Two servers with one pid file would each be stopped in the other's place."""
    path = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        path.write_text(str(other.pid))
        with pytest.raises(StartError, match=f"belongs to process {other.pid}, which is alive"):
            PidFile(str(path)).write()
        other.communicate(b"\n")

    PidFile(str(path)).write()
    assert path.read_text() == f"{os.getpid()}\n"


def test_a_pid_file_of_somebody_else_is_not_removed(tmp_path):
    """The server that was started after us wrote its own."""
    path = tmp_path / "pid"
    file = PidFile(str(path))
    file.write()
    path.write_text("1\n")

    file.remove()

    assert path.exists()


def test_a_pid_file_that_cannot_be_written_is_named(tmp_path):
    """With the reason."""
    with pytest.raises(ConfigError, match="cannot be written: no such file or directory"):
        PidFile(str(tmp_path / "nowhere" / "pid")).write()
