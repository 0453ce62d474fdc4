"""Descriptors over real sockets: they arrive, close on exec, and none is lost in silence."""

from __future__ import annotations

import array
import os
import resource
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prefork.errors import FrameError
from prefork.ipc import fds
from prefork.ipc.fds import Fds
from prefork.ipc.frames import MAX_FDS

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def write_ends(count: int) -> tuple[int, list[int]]:
    """The reading end of a pipe and *count* descriptors of its writing end."""
    reader, writer = os.pipe()
    return reader, [writer, *(os.dup(writer) for _ in range(count - 1))]


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_descriptors_arrive_in_order_and_close_on_exec(pair: Pair):
    """A program that a worker starts must not inherit a client's connection."""
    files = [os.open(path, os.O_RDONLY) for path in ("/dev/null", "/dev/zero")]

    assert fds.send(pair[0], [b"two"], files) == 3
    data, came, is_lost = fds.receive(pair[1], 100)

    assert (data, is_lost) == (b"two", False)
    assert [os.fstat(fd).st_rdev for fd in came] == [os.fstat(fd).st_rdev for fd in files]
    assert [os.get_inheritable(fd) for fd in came] == [False, False]
    fds.close_all([*files, *came])


def test_as_many_as_are_allowed_fit_into_one_message(pair: Pair):
    """The receiver's buffer is made for exactly these."""
    reader, writers = write_ends(MAX_FDS)

    fds.send(pair[0], [b"x"], writers)
    _, came, _ = fds.receive(pair[1], 100)

    assert len(came) == MAX_FDS
    fds.close_all([reader, *writers, *came])


@pytest.mark.parametrize(
    "receive", [fds.receive, lambda sock, size: fds.receive_into(sock, memoryview(bytearray(size)))]
)
def test_truncated_descriptors_are_told_and_those_that_came_are_closed(pair: Pair, receive: Any):
    """Some are lost already; keeping the others would give them to the wrong frame."""
    reader, writers = write_ends(MAX_FDS + 4)
    pair[0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", writers))])
    fds.close_all(writers)

    _, came, is_lost = receive(pair[1], 100)

    assert (list(came), is_lost) == ([], True)
    assert os.read(reader, 1) == b""  # nobody holds a writing end
    os.close(reader)


def test_full_descriptor_table_is_told_and_costs_no_byte(pair: Pair, in_child: Callable[[Callable[[], Any]], Any]):
    """The kernel drops what has no room and says so with the same flag."""
    reader, writers = write_ends(1)
    fds.send(pair[0], [b"x"], writers)

    def without_room() -> list[Any]:
        highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))
        while True:
            try:
                os.dup(0)
            except OSError:
                break
        data, came, is_lost = fds.receive(pair[1], 100)
        return [data.decode(), list(came), is_lost]

    assert in_child(without_room) == ["x", [], True]
    fds.close_all([reader, *writers])


def test_calls_do_not_block_on_a_blocking_socket(pair: Pair):
    """Another process may share the description, and with it the flag."""
    for sock in pair:
        sock.setblocking(True)

    with pytest.raises(BlockingIOError):
        fds.receive(pair[1], 100)
    with pytest.raises(BlockingIOError):
        while True:
            fds.send(pair[0], [bytes(65536)])


def test_end_of_the_stream_is_empty(pair: Pair):
    """Like recv(2)."""
    pair[0].close()

    assert fds.receive(pair[1], 100) == (b"", (), False)


def test_owner_closes_what_nobody_took():
    """One owner at every moment: neither leaks nor double closes."""
    reader, writers = write_ends(3)

    with Fds(writers) as owned:
        taken = owned.take()
        assert taken == writers[0]
        assert len(owned) == 2

    assert [is_open(fd) for fd in writers] == [True, False, False]
    fds.close_all([reader, taken])


def test_owner_closes_when_its_block_raises():
    """A handler that fails must not cost a descriptor."""
    reader, writers = write_ends(1)

    with pytest.raises(ZeroDivisionError), Fds(writers):
        1 / 0

    assert not is_open(writers[0])
    os.close(reader)


def test_owner_has_nothing_left_after_close():
    """And closes nothing that took the same number since."""
    reader, writers = write_ends(1)
    owned = Fds(writers)
    owned.close()
    again = os.dup(reader)

    owned.close()

    assert again == writers[0]
    assert is_open(again)
    with pytest.raises(FrameError, match="the message came with 1 descriptors and none is left"):
        owned.take()
    fds.close_all([reader, again])


def test_socket_is_taken_as_a_socket_of_its_own_kind(pair: Pair):
    """Family and type are asked of the kernel."""
    with Fds([os.dup(pair[0].fileno())]) as owned, owned.take_socket() as taken:
        assert (taken.family, taken.type) == (socket.AF_UNIX, socket.SOCK_STREAM)


def test_descriptor_that_is_no_socket_stays_owned():
    """It is still closed with the rest."""
    reader, writers = write_ends(1)

    with Fds(writers) as owned:
        with pytest.raises(FrameError, match="is not a socket"):
            owned.take_socket()
        assert len(owned) == 1

    assert not is_open(writers[0])
    os.close(reader)
