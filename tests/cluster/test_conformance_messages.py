"""Node's cluster, messages: of any size, both ways, in order, with and without handles."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from tests.harness.client import Client, get
from tests.harness.program import Program
from tests.harness.server import suspend

# One byte to twenty megabytes, and both sides of every size that means something on the way: a pipe's
# worth, a read, the high-water mark.
SIZES = [1, 100, 4095, 4097, 65_535, 65_537, 131_071, 131_073, 1_000_000, 20_000_000]


# ---- order, size, time ----


def test_messages_of_every_size_reach_the_worker_in_order():
    with Program("posting") as master:
        master.fork(f"counts, {2 * len(SIZES)}")
        master.do(
            f"[cluster.workers[1].send(dict(number=n, size=size, text='x' * size)) for n, size in enumerate({SIZES + SIZES[::-1]})] and None"
        )

        assert master.until("counted", worker=1)["last"] == 2 * len(SIZES) - 1
        assert master.told("wrong") == []


def test_messages_of_every_size_reach_the_master_in_order():
    """And all of them before the exit of the worker that sent them."""
    with Program("posting") as master:
        master.do(
            "cluster.on('message', lambda w, m, h: say('came', worker=w.id, number=m['number'], size=len(m['text']))) and None"
        )
        master.fork(f"speaks, {SIZES}")
        master.until("exit", worker=1)

        assert [(told["number"], told["size"]) for told in master.told("came")] == list(enumerate(SIZES))
        assert master.names(1) == ["fork", "online", *["message"] * len(SIZES), "disconnect", "exit"]


def test_both_sides_may_send_at_once():
    """Twenty megabytes each way: neither waits for the other to read first."""
    size = 20_000_000
    with Program("posting") as master:
        master.fork("mirror")
        master.do(f"[cluster.workers[1].send('x' * {size}) for _ in range(3)] and None")

        for number in (1, 2, 3):
            assert master.until("message", number, worker=1)["message"]["size"] == size


@pytest.mark.parametrize("function", ["late", "late_coroutine"])
def test_messages_before_the_first_listener_are_kept(function):
    """Whatever the worker does meanwhile."""
    with Program("posting") as master:
        master.do("(gate, door) = os.pipe()")
        master.fork(f"{function}, gate")
        for number in range(5):
            master.do(f"cluster.workers[1].send({number}, make('pipe')) and None")
        master.do("os.write(door, b'x')")
        master.until("heard", 5, worker=1)

        assert [(told["message"], told["handle"]) for told in master.told("heard")] == [(n, "pipe") for n in range(5)]


@pytest.mark.parametrize("how", ["lambda: None", "sys.exit", "raises"])
def test_messages_of_a_worker_are_told_before_its_exit(how):
    """Also those that it sent in its very last moment."""
    count = 500
    with Program("posting") as master:
        master.do(f"cluster.fork(says_goodbye, {count}, {how}) and None")
        master.until("exit", worker=1)
        names = master.names(1)

    assert names == ["fork", "online", *["message"] * count, "disconnect", "exit"]


def test_what_a_killed_worker_had_sent_is_told_before_its_exit():
    """What the kernel took is there, whatever happened to the sender."""
    with Program("posting") as master:
        master.do("cluster.fork(says_goodbye, 20, lambda: os.kill(os.getpid(), 9)) and None")
        master.until("exit", worker=1)

        assert master.names(1) == ["fork", "online", *["message"] * 20, "disconnect", "exit"]


def test_disconnect_waits_for_what_is_queued():
    """Megabytes sent and the request to leave right behind them: all of it arrives."""
    with Program("posting") as master:
        master.fork("counts, 10", obeys=True)
        master.do(
            "[cluster.workers[1].send(dict(number=n, size=10**6, text='x' * 10**6)) for n in range(10)] and"
            " cluster.workers[1].disconnect() and None"
        )
        master.until("exit", worker=1)

        assert master.until("counted", worker=1)["last"] == 9
        assert master.told("wrong") == []


@pytest.mark.parametrize(
    "message",
    ["text", "", "\u20ac\U0001f600\0", 0, -1.5, 10**30, True, None, [], {}, {"a": [1, {"b": None}]}],
    ids=repr,
)
def test_whatever_json_can_hold_is_a_message(message):
    """None too, which Node refuses (it has undefined)."""
    with Program("posting") as master:
        master.fork()
        master.do(f"cluster.workers[1].send({message!r}) and None")
        master.do(f"cluster.worker.send({message!r}) and None", worker=1)

        assert master.until("heard", worker=1)["message"] == message
        assert master.until("message", worker=1)["message"] == message


@pytest.mark.parametrize(("where", "code"), [(None, "cluster.workers[1]"), (1, "cluster.worker")])
def test_a_message_above_the_limit_is_refused_and_the_channel_lives(where, code):
    with Program("posting") as master:
        master.do("cluster.setup_master(max_message=100_000)")
        master.fork()

        with pytest.raises(AssertionError, match="FrameError|ValueError"):
            master.do(f"{code}.send('x' * 100_001)", worker=where)
        assert master.do("1 + 1", worker=1) == 2


def test_messages_can_be_iterated_over():
    """async for, beside on("message"): the loop ends with the channel, or with break."""
    with Program("posting") as master:
        master.fork("iterates")
        for message in ("one", "two", "enough"):
            master.do(f"cluster.workers[1].send({message!r}) and None")
        master.until("exit", worker=1)

        assert [told["message"] for told in master.told("heard", worker=1)] == ["one", "two", "enough"]
        assert master.until("exit", worker=1)["code"] == 0


def test_iteration_ends_when_the_worker_is_disconnected():
    with Program("posting") as master:
        master.fork("iterates")
        master.do("cluster.workers[1].send('one') and None")
        master.until("heard", worker=1)
        master.do("cluster.workers[1].disconnect() and None")

        assert master.until("left", worker=1)
        assert master.until("exit", worker=1)["code"] == 0


# ---- back-pressure ----


def test_send_says_false_above_the_high_water_mark_and_drain_says_when_it_is_over():
    """Nothing is refused: false is advice, and everything arrives."""
    with Program("posting") as master:
        master.do("fork(counts, 20) and None")
        master.until("online", worker=1)
        suspend(master.pid_of(1))
        said = master.do("[cluster.workers[1].send(dict(number=n, size=50_000, text='x' * 50_000)) for n in range(20)]")
        assert said[0] is True
        assert said[-1] is False
        assert said == sorted(said, reverse=True)
        assert master.told("drain") == []
        os.kill(master.pid_of(1), signal.SIGCONT)

        master.until("drain", worker=1)
        master.until("counted", worker=1)
        assert master.told("wrong") == []
        assert len(master.told("drain")) == 1


def test_small_messages_are_true():
    with Program("posting") as master:
        master.fork()

        assert master.do("[cluster.workers[1].send(n) for n in range(10)]") == [True] * 10
        assert master.do("[cluster.worker.send(n) for n in range(10)]", worker=1) == [True] * 10


def test_asend_waits_until_the_master_reads(tmp_path):
    """Four megabytes towards a master that stands still: the worker holds some of it, not all."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with Program("posting") as master:
        master.fork(f"floods, {str(fifo)!r}")
        suspend(master.pid)
        fifo.write_bytes(b"")
        waiting = master.until("waits")["sent"]
        assert master.told("flooded") == []
        master.signal(signal.SIGCONT)

        assert master.until("flooded")["sent"] == 40
        assert waiting < 40
        master.until("message", 40, worker=1)


# ---- ends ----


def test_a_worker_that_sends_after_disconnect_gets_channel_closed():
    """At once and where it is called, not as an event."""
    with Program(
        """
        from prefork.errors import ChannelClosed

        def worker():
            @cluster.worker.on("disconnect")
            def gone():
                try:
                    cluster.worker.send("too late")
                except ChannelClosed as error:
                    say("raised", is_connection_error=isinstance(error, ConnectionError))
            cluster.worker.disconnect()
            cluster.worker.run()

        tell_all()
        cluster.fork(worker)
        sys.exit(cluster.run())
        """
    ) as master:
        assert master.wait_exit() == 0

    assert master.until("raised")["is_connection_error"] is True
    assert "message" not in master.names(1)


# ---- handles ----


@pytest.mark.parametrize("kind", ["tcp", "unix", "udp", "tcp listener", "pipe", "file", "int"])
def test_a_handle_of_every_kind_reaches_the_worker(kind):
    """Sockets as sockets, everything else as a binary file; Node has sockets and servers only."""
    expected = {"int": "pipe"}.get(kind, kind)
    with Program("posting") as master:
        master.fork()
        master.do(f"cluster.workers[1].send('here', make({kind!r})) and None")

        heard = master.until("heard", worker=1)
        assert (heard["message"], heard["handle"]) == ("here", expected)


@pytest.mark.parametrize("kind", ["tcp", "unix", "udp", "tcp listener", "pipe", "file", "int"])
def test_a_handle_of_every_kind_reaches_the_master(kind):
    expected = {"int": "pipe"}.get(kind, kind)
    with Program("posting") as master:
        master.fork()
        master.do(f"cluster.worker.send('here', make({kind!r})) and None", worker=1)

        told = master.until("message", worker=1)
        assert (told["message"], told["handle"]) == ("here", expected)


def test_what_cannot_be_sent_as_a_handle_is_a_type_error():
    """And nothing of the message has left."""
    with Program("posting") as master:
        master.fork()

        with pytest.raises(AssertionError, match="TypeError"):
            master.do("cluster.workers[1].send('here', object())")
        with pytest.raises(AssertionError, match="OSError|ValueError"):
            master.do("cluster.workers[1].send('here', 9999)")
        assert master.do("1 + 1", worker=1) == 2
        assert master.told("heard") == []


def test_the_senders_copy_is_closed_unless_it_keeps_it():
    """Node closes it after the acknowledgement, unless keepOpen."""
    with Program("posting") as master:
        master.fork()
        master.do("given, kept = make('tcp'), make('tcp')")
        master.do(
            "cluster.workers[1].send('given', given) and cluster.workers[1].send('kept', kept, keep=True) and None"
        )
        master.until("heard", 2, worker=1)

        assert master.do("[given.fileno() >= 0, kept.fileno() >= 0]") == [False, True]


def test_no_descriptor_is_left_in_the_sender():
    with Program("posting") as master:
        master.fork()
        master.do("made.clear()")
        before = master.do("descriptors()")
        for kind in ("tcp", "udp", "tcp listener", "pipe", "file", "int"):
            master.do(f"cluster.workers[1].send('here', make({kind!r})) and None")
        master.until("heard", 6, worker=1)
        # Behind its receipts: by now the master knows that the last one has arrived.
        master.do("cluster.worker.send('done') and None", worker=1)
        master.until("message", worker=1)
        master.do("[one.close() for one in made] and made.clear()")

        assert master.do("descriptors()") == before


def test_a_handle_sent_twice_is_refused_the_second_time():
    """In Node the second message comes without it, and its receiver has to look for that."""
    with Program("posting") as master:
        master.fork()
        master.do("given = make('tcp')")
        master.do("cluster.workers[1].send('once', given) and None")

        with pytest.raises(AssertionError, match="OSError|ValueError"):
            master.do("cluster.workers[1].send('twice', given)")
        master.do("1", worker=1)
        assert [told["message"] for told in master.told("heard")] == ["once"]


def test_each_handle_comes_with_the_message_that_announced_it():
    """Several in one read, some with and some without: none is given to its neighbour."""
    kinds = ["tcp", None, "udp", None, None, "pipe", "file", None, "tcp listener"] * 5
    with Program("posting") as master:
        master.fork()
        suspend(master.pid_of(1))
        master.do(f"[cluster.workers[1].send(n, kind and make(kind)) for n, kind in enumerate({kinds!r})] and None")
        os.kill(master.pid_of(1), signal.SIGCONT)
        master.until("heard", len(kinds), worker=1)

        assert [(told["message"], told["handle"]) for told in master.told("heard")] == list(enumerate(kinds))


def test_both_sides_may_send_handles_at_once():
    """Node had a deadlock there: each waited for the other's acknowledgement."""
    count = 200
    with Program("posting") as master:
        master.fork("mirror")
        before = master.do("descriptors()")
        master.do(f"[cluster.workers[1].send(n, make('tcp')) for n in range({count})] and None")
        master.until("message", count, worker=1)

        told = master.told("message", worker=1)
        assert [(one["message"], one["handle"]) for one in told] == [(n, "tcp") for n in range(count)]
        master.do("[one.close() for one in made] and made.clear()")
        assert master.do("descriptors()") == before


def test_a_large_message_brings_its_handle():
    with Program("posting") as master:
        master.fork()
        master.do("cluster.workers[1].send('x' * 10_000_000, make('tcp')) and None")

        heard = master.until("heard", worker=1)
        assert (heard["message"]["size"], heard["handle"]) == (10_000_000, "tcp")


def test_a_handed_over_socket_talks():
    """Whoever is at the other end does not learn of it."""
    with Program("posting") as master:
        master.fork()
        master.do("cluster.workers[1].send('here', make('tcp')) and None")
        master.until("heard", worker=1)
        master.do("hands = []; cluster.worker.on('message', lambda m, h: h and hands.append(h)) and None", worker=1)
        master.do("cluster.workers[1].send('another', make('tcp')) and None")
        master.until("heard", 2, worker=1)
        master.do("made[1].sendall(b'question') and None")
        assert master.do("hands[0].recv(100).decode()", worker=1) == "question"
        master.do("hands[0].sendall(b'answer')", worker=1)

        assert master.do("made[1].recv(100).decode()") == "answer"


def test_a_handed_over_socket_is_served_by_the_receivers_http_server():
    """The master accepts for itself, and gives the client away."""
    with Program("posting") as master:
        master.fork("server")
        master.until("listening", worker=1)
        master.do("front = socket.create_server(('127.0.0.1', 0))")
        with Client(master.do("front.getsockname()[1]")) as client:
            master.do("cluster.workers[1].send('serve', front.accept()[0]) and None")
            assert master.until("served", worker=1)["taken"] is True

            assert client.get("/a").text == "worker 1: GET /a \n"
            assert client.get("/b").text == "worker 1: GET /b \n"


@pytest.mark.parametrize("cut", [1, 17, 40, 60, None])
def test_bytes_that_were_read_already_go_with_the_socket(cut):
    """In Node they are lost. Cut anywhere, in the head or in the body."""
    request = b"POST /early HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\nwords"
    with Program("posting") as master:
        master.fork("server")
        master.until("listening", worker=1)
        master.do("front = socket.create_server(('127.0.0.1', 0))")
        with Client(master.do("front.getsockname()[1]")) as client:
            client.send(request[:cut])
            early = len(request[:cut])
            master.do("peer = front.accept()[0]")
            master.do(f"early = peer.recv({early}, socket.MSG_WAITALL)")
            master.do("cluster.workers[1].send('serve', peer, received=early) and None")
            master.until("served", worker=1)
            if cut:
                client.send(request[cut:])

            assert client.read().text == "worker 1: POST /early words\n"


def test_a_worker_hands_a_socket_to_another_through_the_master():
    """The way of a chat server, or of a balancer that knows more than we do."""
    with Program("posting") as master:
        master.do("cluster.on('message', lambda w, m, h: h and cluster.workers[2].send(m, h)) and None")
        master.fork()
        master.fork("server")
        master.until("listening", worker=2)
        port = master.do("(front := socket.create_server(('127.0.0.1', 0))).getsockname()[1]", worker=1)
        with Client(port) as client:
            master.do("cluster.worker.send('pass on', front.accept()[0]) and None", worker=1)
            assert master.until("served", worker=2)["taken"] is True

            assert client.get("/").text == "worker 2: GET / \n"


def test_a_handle_that_nobody_took_is_closed_with_the_worker():
    """A client whose socket was sent to a worker that has died sees the end, not silence."""
    with Program("posting") as master:
        master.fork()
        master.do("front = socket.create_server(('127.0.0.1', 0))")
        with socket.create_connection(("127.0.0.1", master.do("front.getsockname()[1]"))) as client:
            client.settimeout(20)
            suspend(master.pid_of(1))
            master.do("cluster.workers[1].send('here', front.accept()[0]) and None")
            os.kill(master.pid_of(1), 9)
            master.until("exit", worker=1)

            try:
                assert client.recv(1) == b""
            except ConnectionResetError:
                pass


# ---- beyond Node ----


def test_what_one_worker_broadcasts_every_subscriber_hears_in_order():
    """Across workers, through the master, without a line of the program's own."""
    with Program("posting") as master:
        for number in (1, 2, 3):
            master.fork()
            if number > 1:
                master.do(
                    "cluster.worker.subscribe('news', lambda m: say('news', worker=cluster.worker.id, m=m)) and None",
                    worker=number,
                )
        master.do("1", worker=2)
        master.do("1", worker=3)
        master.do("[cluster.worker.broadcast('news', n) for n in range(20)] and None", worker=1)
        for number in (2, 3):
            master.until("news", 20, worker=number)

            assert [told["m"] for told in master.told("news", worker=number)] == list(range(20))
        assert master.told("news", worker=1) == []


def test_a_counter_is_one_for_all_workers():
    with Program("posting") as master:
        master.do("counter = cluster.counter('visits')")
        for number in (1, 2, 3):
            master.fork()
            master.do("[cluster.counter('visits').add(1) for _ in range(100)] and None", worker=number)

        assert master.do("counter.value") == 300


def test_a_serving_worker_hears_its_messages():
    """The loop of cluster.listen reads them, between two requests."""
    with Program("posting") as master:
        master.fork("worker, '127.0.0.1:0'")
        port = master.port_of(1)
        for number in range(5):
            assert get(port, f"/{number}").text == f"worker 1: GET /{number} \n"
            assert master.do("1 + 1", worker=1) == 2
