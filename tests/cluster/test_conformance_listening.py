"""Node's cluster, listening inside a worker: the master keeps what is asked for, under one key for all workers."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

import pytest

from tests.harness.client import DEADLINE, Client, get
from tests.harness.program import Program
from tests.harness.server import halted, suspend

NOBODY = 65534
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def ask(address, text=b"hello"):
    """What an echo server answers."""
    with Client(address) as client:
        client.send(text)
        return client.read_to_end()


def is_refused(port):
    """Whether nobody listens there any more; waits for it to become so."""
    for _ in range(2000):
        try:
            socket.create_connection(("127.0.0.1", port), DEADLINE).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # it was in the queue
            continue
    return False


# ---- one key, one listener ----


def test_port_0_is_the_same_port_for_all_workers():
    """The first to ask creates it, the others get the same."""
    with Program("listeners") as master:
        for _ in range(3):
            master.fork("worker, '127.0.0.1:0'")

        assert len({master.port_of(number) for number in (1, 2, 3)}) == 1


def test_the_second_port_0_of_a_worker_is_another_port():
    """And the n-th of each worker is the n-th of all."""
    with Program("listeners") as master:
        master.fork("tries, '127.0.0.1:0', '127.0.0.1:0', '127.0.0.1:0'")
        master.fork("tries, '127.0.0.1:0', '127.0.0.1:0'")
        first = [master.until("opened", n, worker=1)["where"] for n in (1, 2, 3)]
        second = [master.until("opened", n, worker=2)["where"] for n in (1, 2)]

        assert len(set(first)) == 3
        assert second == first[:2]


def test_the_second_port_0_of_one_call_is_another_port():
    """Several addresses in one cluster.listen count as several calls."""
    with Program("listeners") as master:
        for number in (1, 2):
            master.fork("worker, ['127.0.0.1:0', '127.0.0.1:0']")
            master.until("listening", 2, worker=number)

        assert master.port_of(1, 1) == master.port_of(2, 1)
        assert master.port_of(1, 2) == master.port_of(2, 2)
        assert master.port_of(1, 1) != master.port_of(1, 2)


def test_the_count_begins_again_when_all_of_an_address_are_given_back():
    """The next listen(0) is the first again, and what others hold under that key."""
    with Program("listeners") as master:
        master.fork("tries, '127.0.0.1:0'")
        kept = master.until("opened", worker=1)["where"]
        master.fork("tries, '127.0.0.1:0', '127.0.0.1:0'")
        master.until("opened", 2, worker=2)
        master.do("[one.close() for one in opened] and None", worker=2)
        master.do("tries('127.0.0.1:0')", worker=2)

        assert master.until("opened", 3, worker=2)["where"] == kept


def test_a_worker_may_have_several_listeners(tmp_path):
    """Of every kind at once."""
    path = tmp_path / "s"
    with Program("listeners") as master:
        master.fork(f"worker, ['127.0.0.1:0', '[::1]:0', 'unix:{path}']")
        master.until("listening", 3, worker=1)

        assert get(master.port_of(1)).text == "worker 1\n"
        assert get(("::1", master.port_of(1, 2))).text == "worker 1\n"
        assert get(str(path)).text == "worker 1\n"


def test_workers_share_what_they_accept():
    """The clients of one port are served by all."""
    with Program("listeners") as master:
        master.fork("echoes, '127.0.0.1:0'")
        master.fork("echoes, '127.0.0.1:0'")
        port = master.until("opened", worker=1)["where"]
        assert master.until("opened", worker=2)["where"] == port
        with halted(master.pid_of(1)):
            assert ask(port) == b"worker 2: hello"
        with halted(master.pid_of(2)):
            assert ask(port) == b"worker 1: hello"


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "unix", "udp"])
def test_cluster_listener_gives_the_socket_to_servers_that_are_not_http(kind, tmp_path):
    """TCP, unix, UDP; it is a socket.socket, bound, and listening where that means something."""
    bind = {"tcp": "127.0.0.1:0", "tcp6": "[::1]:0", "unix": f"unix:{tmp_path}/s", "udp": "udp://127.0.0.1:0"}[kind]
    with Program("listeners") as master:
        master.fork(f"tries, {bind!r}")
        master.fork(f"tries, {bind!r}")
        first, second = (master.until("opened", worker=number) for number in (1, 2))

        assert first["where"] == second["where"]
        assert master.do("isinstance(opened[0], socket.socket)", worker=1) is True
        kinds = {"tcp": [2, 1], "tcp6": [10, 1], "unix": [1, 1], "udp": [2, 2]}
        assert master.do("[opened[0].family, opened[0].type]", worker=1) == kinds[kind]
        listening = master.do("opened[0].getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)", worker=1)
        assert bool(listening) is (kind != "udp")


# ---- what fails ----


@pytest.mark.parametrize("call", ["serves, {bind!r}", "tries, {bind!r}"])
def test_an_address_in_use_reaches_the_worker_that_asked(call):
    """As an OSError with the kernel's number; the master lives, and other addresses work."""
    with socket.create_server(("127.0.0.1", 0)) as taken, Program("listeners") as master:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        master.fork(call.format(bind=bind))

        failed = master.until("failed", worker=1)
        assert (failed["kind"], failed["errno"]) == ("ListenError", "EADDRINUSE")
        master.fork("worker, '127.0.0.1:0'")
        assert get(master.port_of(2)).text == "worker 2\n"
        assert master.told("listening", worker=1) == []


@only_root
@pytest.mark.parametrize("call", ["serves, {bind!r}", "tries, {bind!r}"])
def test_an_address_that_is_not_allowed_reaches_the_worker_that_asked(call, tmp_path):
    tmp_path.chmod(0o700)
    with Program("listeners", str(NOBODY)) as master:
        master.fork(call.format(bind=f"unix:{tmp_path}/s"))

        failed = master.until("failed", worker=1)
        assert (failed["kind"], failed["errno"]) == ("ListenError", "EACCES")
        assert master.do("1 + 1") == 2


@pytest.mark.parametrize(
    ("bind", "number"),
    [
        ("192.0.2.1:0", "EADDRNOTAVAIL"),
        ("unix:/nowhere/at/all", "ENOENT"),
        ("udp://192.0.2.1:0", "EADDRNOTAVAIL"),
        ("fd://999", "EBADF"),
    ],
)
def test_what_the_kernel_refuses_has_its_number(bind, number):
    with Program("listeners") as master:
        master.fork(f"tries, {bind!r}, '127.0.0.1:0'")

        assert master.until("failed", worker=1)["errno"] == number
        assert master.until("opened", worker=1)["where"] > 0


def test_an_address_that_cannot_be_understood_is_a_value_error():
    """Found where it was written, without asking anybody."""
    with Program("listeners") as master:
        master.fork()

        with pytest.raises(AssertionError, match="AddressError"):
            master.do("cluster.listener('nonsense:x:y')", worker=1)


def test_asking_again_works_once_the_address_is_free():
    """The master forgets what failed; the next one who asks is the first."""
    with socket.create_server(("127.0.0.1", 0)) as taken, Program("listeners") as master:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        master.do("(gate, door) = os.pipe()")
        master.fork(f"tries, {bind!r}, gate, {bind!r}")
        master.until("failed", worker=1, errno="EADDRINUSE")
        taken.close()
        master.do("os.write(door, b'x')")

        assert f"127.0.0.1:{master.until('opened', worker=1)['where']}" == bind


# ---- giving back ----


def test_the_address_is_free_when_the_last_user_has_given_it_back():
    """Not before: the others still serve there."""
    with Program("listeners") as master:
        master.fork("tries, '127.0.0.1:0'")
        master.fork("tries, '127.0.0.1:0'")
        port = master.until("opened", worker=1)["where"]
        master.until("opened", worker=2)
        master.do("opened.pop().close()", worker=1)
        master.do("1", worker=1)
        socket.create_connection(("127.0.0.1", port), DEADLINE).close()
        master.do("opened.pop().close()", worker=2)

        assert is_refused(port)
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("end", ["cluster.workers[1].disconnect()", "cluster.workers[1].kill('SIGKILL')"])
def test_the_address_is_free_when_the_last_worker_is_gone(end):
    """Without workers there is no listener; who wants one all the time uses keep or serve."""
    with Program("listeners") as master:
        master.fork("worker, '127.0.0.1:0'")
        port = master.port_of(1)
        master.do(f"{end} and None")
        master.until("exit", worker=1)

        assert is_refused(port)
        master.fork(f"worker, '127.0.0.1:{port}'")
        assert get(port).text == "worker 2\n"


def test_a_unix_path_is_gone_with_its_last_user(tmp_path):
    path = tmp_path / "s"
    with Program("listeners") as master:
        master.fork(f"worker, 'unix:{path}'")
        master.until("listening", worker=1)
        assert stat.S_ISSOCK(path.stat().st_mode)
        master.do("cluster.workers[1].kill('SIGKILL')")
        master.until("exit", worker=1)
        master.do("1")

        assert not path.exists()


def test_what_kept_workers_listen_on_outlives_each_of_them():
    """Node has a gap during a full restart. With keep, a client that comes in between waits in the backlog."""
    with Program("listeners") as master:
        master.do("cluster.keep(1, worker, '127.0.0.1:0')")
        port = master.port_of(1)
        os.kill(master.pid_of(1), 9)
        answers = {get(port).text for _ in range(1)}

        assert answers <= {"worker 2\n", "worker 3\n"}
        assert master.port_of(2) == port


# ---- addresses ----


def test_a_relative_unix_path_is_the_workers(tmp_path):
    """Relative to where the worker is; the master may be elsewhere."""
    with Program("listeners") as master:
        master.do(f"cluster.setup_master(cwd={str(tmp_path)!r})")
        master.fork("worker, 'unix:s'")
        master.until("listening", worker=1)

        assert get(str(tmp_path / "s")).text == "worker 1\n"


def test_a_unix_path_whose_absolute_form_is_too_long_works_if_it_is_relative(tmp_path):
    """108 bytes are all the kernel has. Where master and worker share a directory the short form does, as in Node."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with Program("listeners", cwd=deep) as master:
        master.fork("worker, 'unix:s'")
        master.until("listening", worker=1)

        assert stat.S_ISSOCK((deep / "s").stat().st_mode)


def test_the_backlog_is_that_of_the_first_who_asked():
    """As in Node, where later ones are not heard."""
    with Program("listeners") as master:
        master.fork("worker, '127.0.0.1:0', {'backlog': 3}")
        port = master.port_of(1)
        master.fork("worker, '127.0.0.1:0', {'backlog': 300}")
        assert master.port_of(2) == port

        assert master.do("backlogs()", worker=2) == [3]


def test_fd_means_a_descriptor_of_the_master():
    """What a service manager has opened for it, say; the worker's own of that number is something else."""
    with Program("listeners") as master:
        master.do("inherited = socket.create_server(('127.0.0.1', 0))")
        port, fd = master.do("[inherited.getsockname()[1], inherited.fileno()]")
        master.fork(f"tries, 'fd://{fd}'")

        assert master.until("opened", worker=1)["where"] == port
        master.do("os.kill(cluster.workers[1].pid, 9)")
        master.until("exit", worker=1)
        master.fork(f"worker, 'fd://{fd}'")
        master.until("listening", worker=2)
        assert get(port).text == "worker 2\n"


def test_a_descriptor_of_the_master_outlives_its_users():
    """It was not ours to make, so it is not ours to close."""
    with Program("listeners") as master:
        master.do("inherited = socket.create_server(('127.0.0.1', 0))")
        fd = master.do("inherited.fileno()")
        master.fork(f"worker, 'fd://{fd}'")
        master.until("listening", worker=1)
        master.do("cluster.workers[1].disconnect() and None")
        master.until("exit", worker=1)

        assert master.do("inherited.getsockname()[1]") > 0


# ---- how connections are shared ----


def test_with_reuseport_each_worker_has_a_socket_of_its_own():
    """Node's reusePort and exclusive go past the master; here it keeps them, so that no queue dies with a worker."""
    with Program("listeners") as master:
        for number in (1, 2):
            master.fork("shares, 'reuseport', '127.0.0.1:0'")
            master.until("opened", worker=number)
        inode = "os.stat(opened[0].fileno()).st_ino"
        first, second = (master.do(inode, worker=number) for number in (1, 2))

        assert master.until("opened", worker=1)["where"] == master.until("opened", worker=2)["where"]
        assert first != second


def test_a_worker_may_bind_for_itself():
    """Node's listen(handle) and exclusive: a socket that is made without us is nobody else's business."""
    with Program("listeners") as master:
        master.fork()
        port = master.do("(own := socket.create_server(('127.0.0.1', 0))).getsockname()[1]", worker=1)

        socket.create_connection(("127.0.0.1", port), DEADLINE).close()
        assert master.told("listening") == []


def test_handoff_gives_connections_to_all_workers():
    with Program("listeners") as master:
        for number in (1, 2, 3):
            master.fork("worker, '127.0.0.1:0', {'sharing': 'handoff'}")
            master.until("listening", worker=number)
        port = master.port_of(1)
        clients = [Client(port) for _ in range(12)]
        answers = [client.get("/").text for client in clients]
        for client in clients:
            client.close()

        assert {answers.count(f"worker {number}\n") for number in (1, 2, 3)} == {4}


def test_a_connection_that_a_dying_worker_was_given_goes_to_another():
    """In Node it hangs: the acknowledgement that would free it never comes."""
    with Program("listeners") as master:
        for number in (1, 2):
            master.fork("worker, '127.0.0.1:0', {'sharing': 'handoff'}")
            master.until("listening", worker=number)
        port = master.port_of(1)
        suspend(master.pid_of(1))
        clients = [Client(port) for _ in range(6)]
        for client in clients:
            client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        os.kill(master.pid_of(1), 9)
        answers = [client.read().text for client in clients]
        for client in clients:
            client.close()

        assert answers == ["worker 2\n"] * 6


def test_a_connection_that_a_leaving_worker_refuses_goes_to_another():
    """It closed its listener while the connection was on its way; the client does not learn of it."""
    with Program("listeners") as master:
        for number in (1, 2):
            master.fork("worker, '127.0.0.1:0', {'sharing': 'handoff'}")
            master.until("listening", worker=number)
        port = master.port_of(1)
        master.tell("cluster.worker.disconnect()", worker=1)
        clients = [Client(port) for _ in range(20)]
        answers = {client.get("/").status for client in clients}
        for client in clients:
            client.close()

        assert answers == {200}


def test_an_accept_that_fails_in_the_master_harms_nobody():
    """Out of descriptors: logged, and tried again when there are some."""
    with Program("listeners") as master:
        master.fork("worker, '127.0.0.1:0', {'sharing': 'handoff'}")
        port = master.port_of(1)
        master.do("import resource; limit = resource.getrlimit(resource.RLIMIT_NOFILE)")
        master.do(
            "highest = max(map(int, os.listdir('/proc/self/fd')));"
            " spare = [os.dup(0) for _ in range(highest)];"
            " resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, limit[1]))"
        )
        with Client(port) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            master.wait_for("too many open files")
            master.do("resource.setrlimit(resource.RLIMIT_NOFILE, limit)")

            assert client.read().text == "worker 1\n"


@pytest.mark.parametrize("sharing", ["inherit", "handoff", "reuseport"])
def test_a_listener_keeps_its_worker_alive(sharing):
    """Nothing else has to: no message listener, no timer. In Node it is a fake handle that does it."""
    with Program("listeners") as master:
        master.fork(f"serves, '127.0.0.1:0', {{'sharing': {sharing!r}}}")
        port = master.port_of(1)

        assert [get(port).status for _ in range(3)] == [200, 200, 200]
        assert master.names(1) == ["fork", "online", "listening"]


def test_when_the_last_worker_of_a_handoff_goes_its_clients_are_let_go():
    """Those that wait are not served by nobody for ever: the connection ends."""
    with Program("listeners") as master:
        master.fork("worker, '127.0.0.1:0', {'sharing': 'handoff'}")
        port = master.port_of(1)
        suspend(master.pid_of(1))
        with Client(port) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            os.kill(master.pid_of(1), 9)
            master.until("exit", worker=1)

            with suppress(ConnectionResetError):
                assert client.read_to_end() == b""
        assert is_refused(port)


def test_a_listener_that_the_master_accepts_from_cannot_be_had_as_a_socket():
    """There is nothing that the worker could accept from; the error says what to use instead."""
    with Program("listeners") as master:
        master.fork()

        with pytest.raises(AssertionError, match="ClusterError.*handoff.*cluster.listen"):
            master.do("cluster.listener('127.0.0.1:0', sharing='handoff')", worker=1)
