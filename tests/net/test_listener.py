"""Listeners on real sockets: what is bound, what is refused and in which words, what is cleaned up."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from prefork.errors import ListenError
from prefork.net.address import Address, FdAddress, TCPAddress, UnixAddress, parse_address
from prefork.net.binding import MAX_UNIX_PATH, SocketFile
from prefork.net.listener import Listener
from prefork.net.sharing import Sharing

InChild = Callable[[Callable[[], Any]], Any]

LOOPBACK = TCPAddress("127.0.0.1", 0)
NOBODY = 65534

# Enough connections that each of a few reuseport sockets is certain to get some.
MANY = 200


@contextmanager
def opened(
    address: Address,
    sharing: Sharing = Sharing.INHERIT,
    *,
    slots: int = 2,
    unix_mode: int | None = None,
    unix_owner: tuple[int, int] | None = None,
) -> Iterator[Listener]:
    listener = Listener.open(
        address, sharing=sharing, slots=slots, backlog=1024, unix_mode=unix_mode, unix_owner=unix_owner
    )
    try:
        yield listener
    finally:
        listener.close()


def refusal(address: Address, sharing: Sharing = Sharing.INHERIT, **options: Any) -> ListenError:
    with pytest.raises(ListenError) as caught, opened(address, sharing, **options):
        pass
    return caught.value


def connect(address: Address) -> socket.socket:
    if isinstance(address, UnixAddress):
        client = socket.socket(socket.AF_UNIX)
        client.connect("\0" + address.path[1:] if address.is_abstract else address.path)
        return client
    assert isinstance(address, TCPAddress)
    return socket.create_connection((address.host, address.port), timeout=10)


def accept_all(sock: socket.socket) -> int:
    """How many connections wait on *sock*. It is non-blocking, or this would hang."""
    count = 0
    with suppress(BlockingIOError):
        while True:
            sock.accept()[0].close()
            count += 1
    return count


def can_be_reached(listener: Listener) -> bool:
    with connect(listener.address):
        return sum(accept_all(sock) for sock in listener.sockets) == 1


requires_ipv6 = pytest.mark.skipif(
    not os.path.exists("/proc/net/if_inet6")
    or "00000000000000000000000000000001" not in Path("/proc/net/if_inet6").read_text(),
    reason="this machine has no IPv6 loopback",
)
requires_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


@pytest.fixture
def socket_path(directory: Path) -> str:
    return str(directory / "app.sock")


def test_tcp_listener_says_the_port_that_the_kernel_chose():
    """Tests and supervisors bind port 0 and read the real one."""
    with opened(LOOPBACK) as listener:
        assert isinstance(listener.address, TCPAddress)
        assert listener.address.host == "127.0.0.1"
        assert listener.address.port > 0
        assert can_be_reached(listener)


def test_host_name_becomes_the_address_it_was_bound_to():
    """localhost may be 127.0.0.1 or ::1: the reader of the log must know which."""
    with opened(TCPAddress("localhost", 0)) as listener:
        assert isinstance(listener.address, TCPAddress)
        assert listener.address.host in ("127.0.0.1", "::1")
        assert can_be_reached(listener)


@requires_ipv6
def test_ipv6_listener_leaves_the_ipv4_port_free():
    """[::]:8000 and 0.0.0.0:8000 in one setting must both be bound."""
    with opened(TCPAddress("::", 0)) as six:
        assert isinstance(six.address, TCPAddress)
        with opened(TCPAddress("0.0.0.0", six.address.port)) as four:
            assert str(six.address) == f"[::]:{six.address.port}"
            assert can_be_reached(four)


@requires_ipv6
def test_ipv6_loopback_can_be_reached():
    """The brackets are only spelling."""
    with opened(parse_address("[::1]:0")) as listener:
        assert can_be_reached(listener)


@pytest.mark.parametrize("sharing", Sharing)
def test_sockets_are_non_blocking_and_close_on_exec(sharing: Sharing):
    """A worker that lost the race for a connection must not block; a program it starts must not keep the port."""
    with opened(LOOPBACK, sharing) as listener:
        assert [sock.getblocking() for sock in listener.sockets] == [False] * len(listener.sockets)
        assert [sock.get_inheritable() for sock in listener.sockets] == [False] * len(listener.sockets)


@pytest.mark.parametrize("sharing", [Sharing.INHERIT, Sharing.HANDOFF])
def test_one_socket_serves_all_slots_unless_reuseport(sharing: Sharing):
    """There is one queue, so no slot's death can lose connections."""
    with opened(LOOPBACK, sharing) as listener:
        assert listener.socket_for(0) is listener.socket_for(7)
        assert listener.fileno() == listener.socket_for(0).fileno()

        listener.release(0)
        listener.close_others(1)

        assert can_be_reached(listener)


@pytest.mark.parametrize("sharing", Sharing)
def test_second_server_is_refused_as_in_use(sharing: Sharing):
    """With SO_REUSEPORT alone the kernel would let it in and split the traffic between the two."""
    with opened(LOOPBACK, sharing) as first:
        for other in Sharing:
            error = refusal(first.address, other)

            assert error.errno == errno.EADDRINUSE
            assert str(error) == f"cannot listen on {first.address}: it is in use, another process listens there"


def test_port_can_be_bound_again_at_once():
    """Connections in TIME_WAIT must not delay a restart."""
    with opened(LOOPBACK) as first:
        client = connect(first.address)
        first.socket_for(0).accept()[0].close()  # the side that closes first is left in TIME_WAIT
        client.close()
        address = first.address

    with opened(address) as second:
        assert can_be_reached(second)


def test_reuseport_spreads_connections_over_the_slots():
    """The first socket joins the group late, after it has proved the port free: it must get its share too."""
    with opened(LOOPBACK, Sharing.REUSEPORT, slots=3) as listener, ExitStack() as clients:
        for _ in range(MANY):
            clients.enter_context(connect(listener.address))

        shares = [accept_all(listener.socket_for(slot)) for slot in range(3)]

        assert sum(shares) == MANY
        assert min(shares) > 0


def test_reuseport_keeps_queued_connections_when_a_worker_closes_its_copy(in_child: InChild):
    """The master holds every slot's socket, so a dead worker's queue waits for its replacement."""
    with opened(LOOPBACK, Sharing.REUSEPORT, slots=2) as listener, ExitStack() as clients:
        for _ in range(MANY):
            clients.enter_context(connect(listener.address))

        def worker() -> int:
            listener.close_others(0)
            held = len(listener.sockets)
            listener.close()
            return held

        assert in_child(worker) == 1
        assert sum(accept_all(listener.socket_for(slot)) for slot in range(2)) == MANY


def test_reuseport_worker_accepts_from_its_own_slot_only(in_child: InChild):
    """A sibling's queue is none of its business."""
    with opened(LOOPBACK, Sharing.REUSEPORT, slots=2) as listener, ExitStack() as clients:
        for _ in range(MANY):
            clients.enter_context(connect(listener.address))

        def worker() -> list[int]:
            listener.close_others(1)
            return [accept_all(sock) for sock in listener.sockets]

        [share] = in_child(worker)

        assert 0 < share < MANY
        assert share + accept_all(listener.socket_for(0)) == MANY


def test_reuseport_owner_binds_a_new_slot_when_it_is_asked_for():
    """Scaling up adds slots to a running server."""
    with opened(LOOPBACK, Sharing.REUSEPORT, slots=1) as listener:
        new = listener.socket_for(5)

        assert new is listener.socket_for(5)
        assert new.getsockname() == listener.socket_for(0).getsockname()
        assert len(listener.sockets) == 2


def test_reuseport_child_binds_nothing(in_child: InChild):
    """A socket the master does not hold would lose its queue with the worker."""
    with opened(LOOPBACK, Sharing.REUSEPORT, slots=1) as listener:

        def worker() -> str:
            with pytest.raises(ListenError) as caught:
                listener.socket_for(5)
            return str(caught.value)

        assert (
            in_child(worker) == f"slot 5 has no socket on {listener.address}, and only process {os.getpid()} binds one"
        )


def test_reuseport_released_slot_gets_no_more_connections():
    """Scaling down: nobody would accept what the kernel put there."""
    with opened(LOOPBACK, Sharing.REUSEPORT, slots=2) as listener, ExitStack() as clients:
        listener.release(0)
        for _ in range(20):
            clients.enter_context(connect(listener.address))

        assert accept_all(listener.socket_for(1)) == 20


def test_reuseport_listener_has_no_single_descriptor():
    """Polling one of several would leave the others unheard."""
    with opened(LOOPBACK, Sharing.REUSEPORT, slots=2) as listener:
        with pytest.raises(ListenError, match="a socket for each of 2 slots, not one for all"):
            listener.fileno()


def test_closed_listener_has_no_descriptor_and_closes_again_quietly():
    """Ways out of a server cross."""
    with opened(LOOPBACK) as listener:
        listener.close()
        listener.close()

        assert listener.fileno() == -1
        assert listener.sockets == ()


@pytest.mark.parametrize("sharing", Sharing)
def test_closed_listener_binds_nothing_more(sharing: Sharing):
    """A late question for a socket must not open the port again."""
    with opened(LOOPBACK, sharing) as listener:
        listener.close()

        with pytest.raises(ListenError, match="is closed, and slot"):
            listener.socket_for(0)


def lowest_unprivileged_port() -> int:
    return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())


@requires_root
@pytest.mark.skipif("lowest_unprivileged_port() <= 1")
def test_privileged_port_is_named_with_both_ways_out(in_child: InChild):
    """The commonest first failure of all: it must say what to do."""
    port = lowest_unprivileged_port() - 1

    def unprivileged() -> list[Any]:
        os.setgroups([])
        os.setresuid(NOBODY, NOBODY, NOBODY)
        error = refusal(TCPAddress("127.0.0.1", port))
        return [error.errno, str(error)]

    number, message = in_child(unprivileged)

    assert number == errno.EACCES
    assert f"port {port} is privileged for user {NOBODY}; choose one from {port + 1} up" in message
    assert "setcap cap_net_bind_service=+ep /" in message


def test_address_of_no_interface_is_named():
    """192.0.2.0/24 is for documentation (RFC 5737), so no machine has it."""
    error = refusal(TCPAddress("192.0.2.1", 0))

    assert error.errno == errno.EADDRNOTAVAIL
    assert str(error) == "cannot listen on 192.0.2.1:0: no interface of this machine has the address 192.0.2.1"


@pytest.mark.parametrize("host", ["nowhere.invalid", "x" * 64])
def test_host_that_does_not_resolve_is_named(host: str):
    """RFC 6761 6.4 keeps .invalid free of names, RFC 1035 2.3.4 keeps labels under 64 bytes."""
    assert str(refusal(TCPAddress(host, 80))).startswith(f"cannot listen on {host}:80: the host does not resolve (")


def test_unix_listener_is_reached_and_removes_its_file(socket_path: str):
    """What a server made it takes away again."""
    with opened(UnixAddress(socket_path)) as listener:
        assert listener.address == UnixAddress(socket_path)
        assert can_be_reached(listener)

    assert not os.path.lexists(socket_path)


def test_unix_listener_falls_back_from_reuseport_to_inherit(socket_path: str):
    """The kernel spreads nothing over unix sockets; the effective sharing is there to be printed."""
    with opened(UnixAddress(socket_path), Sharing.REUSEPORT) as listener:
        assert listener.sharing is Sharing.INHERIT
        assert listener.socket_for(0) is listener.socket_for(1)


def test_unix_file_survives_the_close_of_a_child(socket_path: str, in_child: InChild):
    """Each retired worker closes its copy; the server goes on."""
    with opened(UnixAddress(socket_path)) as listener:
        in_child(listener.close)

        assert can_be_reached(listener)


def test_unix_file_that_is_no_longer_ours_is_left_alone(socket_path: str):
    """A successor may have taken the path while we drained."""
    with opened(UnixAddress(socket_path)):
        os.rename(socket_path, f"{socket_path}.old")
        Path(socket_path).write_text("somebody else's")

    assert Path(socket_path).read_text() == "somebody else's"


def test_unix_file_already_removed_is_no_error(socket_path: str):
    """Somebody cleaned up before us."""
    with opened(UnixAddress(socket_path)):
        os.unlink(socket_path)


def test_unix_file_is_removed_after_a_change_of_directory(socket_path: str, monkeypatch: pytest.MonkeyPatch):
    """A relative path means what it meant when it was bound."""
    monkeypatch.chdir(os.path.dirname(socket_path))
    with opened(UnixAddress("app.sock")) as listener:
        monkeypatch.chdir("/")

        assert can_be_reached(listener)

    assert not os.path.lexists(socket_path)


def test_stale_unix_socket_is_replaced(socket_path: str):
    """A killed server leaves its file; the next start must not need a hand."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(socket_path)
        dead.listen()

    with opened(UnixAddress(socket_path)) as listener:
        assert can_be_reached(listener)


def test_live_unix_socket_is_left_alone(socket_path: str):
    """Two servers on one path: the second must go, not the first."""
    with opened(UnixAddress(socket_path)) as first:
        error = refusal(UnixAddress(socket_path))
        accept_all(first.socket_for(0))  # the probe

        assert error.errno == errno.EADDRINUSE
        assert "it is in use, a process listens there" in str(error)
        assert f"(the path belongs to user {os.geteuid()})" in str(error)
        assert can_be_reached(first)


def test_live_unix_socket_with_a_full_backlog_is_left_alone(socket_path: str):
    """A server too busy to accept is alive."""
    with socket.socket(socket.AF_UNIX) as busy, ExitStack() as clients:
        busy.bind(socket_path)
        busy.listen(0)
        with suppress(BlockingIOError):
            while True:
                client = clients.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(socket_path)

        assert refusal(UnixAddress(socket_path)).errno == errno.EADDRINUSE
        assert os.path.exists(socket_path)


def test_live_datagram_socket_is_left_alone(socket_path: str):
    """It refuses our kind of connection, and is alive all the same."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(socket_path)

        assert refusal(UnixAddress(socket_path)).errno == errno.EADDRINUSE
        assert os.path.exists(socket_path)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_path_that_is_not_a_socket_is_left_alone(socket_path: str, kind: str):
    """A mistyped path must not cost a file."""
    if kind == "file":
        Path(socket_path).write_text("precious")
    elif kind == "directory":
        os.mkdir(socket_path)
    else:
        os.symlink("elsewhere", socket_path)

    assert "the path exists and is not a socket" in str(refusal(UnixAddress(socket_path)))
    assert os.path.lexists(socket_path)


@requires_root
def test_socket_of_another_user_that_may_not_be_asked_is_left_alone(in_child: InChild, socket_path: str):
    """Not being allowed to connect says nothing about whether someone else may."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(socket_path)
        other.listen()
        os.chmod(socket_path, 0o600)

        def unprivileged() -> list[Any]:
            os.setgroups([])
            os.setresuid(NOBODY, NOBODY, NOBODY)
            error = refusal(UnixAddress(socket_path))
            return [error.errno, str(error)]

        number, message = in_child(unprivileged)

        assert number == errno.EACCES
        assert "the path belongs to user 0, and we may not ask whether it is in use" in message


@requires_root
def test_directory_without_permission_is_named(in_child: InChild):
    """/run belongs to root, and so does every second unix socket's directory."""

    def unprivileged() -> str:
        os.setgroups([])
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return str(refusal(UnixAddress("/etc/app.sock")))

    assert f"user {NOBODY} may not create or remove a socket in /etc" in in_child(unprivileged)


def test_directory_that_does_not_exist_is_named():
    """The kernel's own words are `No such file or directory`, of which the file is to be expected."""
    error = refusal(UnixAddress("/nowhere/at/all/app.sock"))

    assert error.errno == errno.ENOENT
    assert str(error) == "cannot listen on unix:/nowhere/at/all/app.sock: the directory /nowhere/at/all does not exist"


def test_directory_that_is_a_file_is_named(socket_path: str):
    """The path goes on below something that has no below."""
    Path(socket_path).touch()

    assert str(refusal(UnixAddress(f"{socket_path}/app.sock"))).endswith(f": {socket_path} is not a directory")


def test_path_as_long_as_the_kernel_allows_is_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The limit is in bytes, of which some letters need more than one."""
    monkeypatch.chdir(tmp_path)
    name = "é" * 53 + "a"

    assert len(name.encode()) == MAX_UNIX_PATH
    with opened(UnixAddress(name)):
        assert os.path.exists(name)
    assert "the path has 108 bytes, a unix socket's at most 107" in str(refusal(UnixAddress(name + "a")))


def test_abstract_listener_has_no_file_and_is_refused_when_in_use():
    """Its name vanishes with its last descriptor."""
    address = UnixAddress(f"@prefork-test-{os.getpid()}")
    with opened(address) as listener:
        assert can_be_reached(listener)
        assert str(refusal(address)) == f"cannot listen on {address}: it is in use, another process listens there"

    with opened(address) as again:
        assert can_be_reached(again)


def test_abstract_name_may_be_as_long_as_a_path():
    """Its leading NUL takes the place of a path's final one."""
    name = f"@{os.getpid()}-".ljust(MAX_UNIX_PATH + 1, "x")
    with opened(UnixAddress(name)) as listener:
        assert can_be_reached(listener)

    assert refusal(UnixAddress(name + "x")).errno == errno.ENAMETOOLONG


def test_unix_mode_is_set(socket_path: str):
    """A front server of the same group must get in, and nobody else."""
    with opened(UnixAddress(socket_path), unix_mode=0o660):
        assert stat.S_IMODE(os.stat(socket_path).st_mode) == 0o660


@requires_root
def test_unix_owner_is_set(socket_path: str):
    """A server that starts as root gives the socket to the front server's user."""
    with opened(UnixAddress(socket_path), unix_owner=(NOBODY, 1)):
        status = os.stat(socket_path)

        assert (status.st_uid, status.st_gid) == (NOBODY, 1)


@requires_root
def test_unix_owner_that_cannot_be_set_leaves_no_file(in_child: InChild, socket_path: str):
    """A refused start leaves nothing behind."""

    def unprivileged() -> str:
        os.setgroups([])
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return str(refusal(UnixAddress(socket_path), unix_owner=(0, 0), unix_mode=0o600))

    message = in_child(unprivileged)

    assert "owner 0:0 and mode 600 cannot be set (operation not permitted)" in message
    assert not os.path.lexists(socket_path)


def test_inherited_descriptor_is_served_and_left_open():
    """Whoever passed it may want to pass it again."""
    with socket.create_server(("127.0.0.1", 0)) as given:
        with opened(FdAddress(given.fileno()), Sharing.REUSEPORT) as listener:
            assert listener.sharing is Sharing.INHERIT
            assert listener.address == FdAddress(given.fileno())
            with connect(TCPAddress(*given.getsockname())):
                assert accept_all(listener.socket_for(0)) == 1

        with connect(TCPAddress(*given.getsockname())):
            assert accept_all(given) == 1


def test_inherited_unix_socket_keeps_its_file(socket_path: str):
    """We did not make it."""
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(socket_path)
        given.listen()
        with opened(FdAddress(given.fileno())):
            pass

        assert os.path.exists(socket_path)


def test_descriptor_that_is_not_open_is_named():
    """A unit file that forgot its socket unit."""
    error = refusal(FdAddress(9999))

    assert error.errno == errno.EBADF
    assert str(error) == "cannot listen on fd://9999: the descriptor is not open"


def test_descriptor_that_is_not_a_socket_is_named():
    """A number off by one finds a pipe or a log."""
    with open("/dev/null") as file:
        assert str(refusal(FdAddress(file.fileno()))) == f"cannot listen on fd://{file.fileno()}: it is not a socket"


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_socket_that_does_not_listen_is_named(kind: socket.SocketKind):
    """A connection, or a datagram socket, cannot be accepted from."""
    with socket.socket(socket.AF_INET, kind) as other:
        assert "it is a socket that does not listen for connections" in str(refusal(FdAddress(other.fileno())))


def test_socket_file_knows_its_inode_and_not_only_its_name(socket_path: str):
    """Two files of one name are told apart."""
    Path(socket_path).touch()
    known = SocketFile(socket_path)
    Path(f"{socket_path}.new").touch()
    os.replace(f"{socket_path}.new", socket_path)

    known.unlink()

    assert os.path.exists(socket_path)
