"""Users' messages and their handles: moved or copied, revived, exactly once, and never leaked."""

from __future__ import annotations

import io
import logging
import os
import select
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefork.errors import ChannelClosed, FrameError
from prefork.ipc import channel as module
from prefork.ipc.channel import HANDLE_WEIGHT, HIGH_WATER, RETRIES, Channel, Message
from prefork.ipc.frames import Frame, Kind, encode, header
from prefork.ipc.handles import HandedDescriptor, HandedSocket

Pair = tuple[Channel, Channel]

LARGE = "x" * (4 * 1024 * 1024)


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = Channel.pair()
    yield one, other
    one.close()
    other.close()


def run(*channels: Channel) -> list[list[Message]]:
    """What each of *channels* hears until nothing moves any more."""
    heard: list[list[Message]] = [[] for _ in channels]
    while any(c.wants_write for c in channels) or select.select(channels, [], [], 0)[0]:
        for messages, channel in zip(heard, channels, strict=True):
            channel.flush()
            messages.extend(channel.receive())
    return heard


def one_message(messages: list[Message]) -> Message:
    [message] = messages
    return message


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each next batch of descriptors is lost on arrival, as by a full table. Then all arrive."""
    plan: list[bool] = []
    arrived = module.descriptors._descriptors

    def descriptors(ancillary: Any, came: int) -> Any:
        return arrived(ancillary, came | (socket.MSG_CTRUNC if plan and plan.pop(0) else 0))

    monkeypatch.setattr(module.descriptors, "_descriptors", descriptors)
    return plan


# ---- messages ----


@pytest.mark.parametrize("serialization", ["json", "pickle"])
def test_users_message_of_any_size_arrives(serialization: str):
    """From nothing to far more than a socket pair holds."""
    one, other = Channel.pair(serialization=serialization)
    messages = ["", "x" * 65530, {"a": [1, None, "\u00e9\ud800"]}, LARGE, "x" * 16384, 0]
    for message in messages:
        one.send_user(message)

    _, heard = run(one, other)

    assert [message.body for message in heard] == messages
    assert {message.kind for message in heard} == {Kind.USER}
    one.close()
    other.close()


def test_pickle_carries_what_json_cannot():
    """That is what it is asked for."""
    one, other = Channel.pair(serialization="pickle")
    one.send_user({1: {2, 3}, "when": b"now"})

    assert one_message(other.receive()).body == {1: {2, 3}, "when": b"now"}
    one.close()
    other.close()


class Bomb:
    """Kills whoever unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


def test_pickle_is_refused_where_json_was_agreed():
    """A pickle is a program: it is never run unasked."""
    ours, theirs = socket.socketpair()
    one, other = Channel(ours, serialization="pickle"), Channel(theirs)
    one.send_user(Bomb())

    with pytest.raises(FrameError, match="the other side sent a pickle, and this channel's serialization is json"):
        other.receive()

    one.close()
    other.close()


def test_pickle_that_cannot_be_loaded_costs_one_message_only(caplog: pytest.LogCaptureFixture):
    """The receiver lacks a class: the application's fault, and not the channel's end. Its handle is closed."""
    one, other = Channel.pair(serialization="pickle")
    reader, writer = os.pipe()
    broken = b"cno_such_module\nname\n."
    os.write(one.fileno(), encode(Frame(Kind.PICKLED, broken)))
    letter = bytes(4) + broken
    module.descriptors.send(one._sock, [encode(Frame(Kind.PICKLED, letter, (writer,)))], [writer])
    os.close(writer)
    one.send_user("fine")

    assert [message.body for message in other.receive()] == ["fine"]
    assert len(caplog.records) == 2
    assert os.read(reader, 1) == b""
    os.close(reader)
    one.close()
    other.close()


@pytest.mark.parametrize("with_handle", [False, True])
def test_message_above_the_limit_is_the_senders_error(with_handle: bool):
    """Both sizes are named, and the handle is still the caller's."""
    one, other = Channel.pair(max_size=100)
    handle = os.open("/dev/null", os.O_RDONLY) if with_handle else None
    with pytest.raises(FrameError, match=f"a payload of {106 if with_handle else 102} bytes .* 100 are allowed"):
        one.send_user("x" * 100, handle)

    if handle is not None:
        os.close(handle)
    one.send_user("x" * 98)
    one.send("x" * 200)  # our own have our own limit
    assert [len(message.body) for message in other.receive()] == [98, 200]
    one.close()
    other.close()


def test_frame_above_the_receivers_limit_ends_the_channel():
    """The two may have been made with different limits."""
    ours, theirs = socket.socketpair()
    one, other = Channel(ours), Channel(theirs, max_size=100)
    one.send_user("x" * 100)

    with pytest.raises(FrameError, match="frame claims 102 bytes, 100 are allowed"):
        other.receive()

    one.close()
    other.close()


@pytest.mark.parametrize("settings", [{"serialization": "xml"}, {"max_size": 0}, {"max_size": 1 << 32}])
def test_impossible_settings_are_refused(settings: dict[str, Any]):
    """When the channel is made, and not when the first message fails."""
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ValueError):
        Channel(ours, **settings)


def test_deeply_nested_json_is_a_broken_frame(pair: Pair):
    """A peer must not end the receiver's loop with a RecursionError."""
    os.write(pair[0].fileno(), encode(Frame(Kind.USER, b"[" * 100_000)))

    with pytest.raises(FrameError, match="a frame of 100000 bytes does not hold JSON"):
        for _ in range(9):
            pair[1].receive()


# ---- handles ----


def test_socket_is_moved_with_what_was_read_of_it(pair: Pair):
    """The sender's object has lost it at once; the receiver's goes on where the sender stopped."""
    client, server = socket.socketpair()
    assert pair[0].send_user({"do": "serve"}, server, received=b"GET /")
    assert server.fileno() == -1

    message = one_message(run(*pair)[1])

    assert isinstance(message.handle, HandedSocket)
    assert (message.body, message.handle.received) == ({"do": "serve"}, b"GET /")
    assert not os.get_inheritable(message.handle.fileno())
    with client, message.handle as handed:
        handed.sendall(b"answer")
        assert client.recv(100) == b"answer"
        handed.close()
        assert client.recv(100) == b""  # nobody else holds it


def test_kept_socket_is_in_both_places(pair: Pair):
    """A duplicate travels."""
    client, server = socket.socketpair()
    pair[0].send_user("a copy", server, keep=True)
    with client, server, one_message(run(*pair)[1]).handle as handed:
        server.sendall(b"one ")
        handed.sendall(b"other")
        assert client.recv(100) == b"one other"


def test_kinds_of_sockets_arrive_as_what_they_are(pair: Pair):
    """TCP, listening, unix and UDP."""
    sockets = [
        socket.create_server(("127.0.0.1", 0)),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
    ]
    kinds = [(sock.family, sock.type, sock.getsockname()) for sock in sockets]
    for sock in sockets:
        pair[0].send_user(None, sock)

    heard = [message.handle for message in run(*pair)[1]]

    assert [(sock.family, sock.type, sock.getsockname()) for sock in heard] == kinds
    with socket.create_connection(heard[0].getsockname()) as client, heard[0].accept()[0] as accepted:
        assert client.getpeername() == accepted.getsockname()
    for sock in heard:
        sock.close()


def test_socket_knows_that_it_does_not_block(pair: Pair):
    """The flag travels with the socket, and the object must agree with it."""
    for timeout in (None, 0.0, 5.0):
        client, server = socket.socketpair()
        server.settimeout(timeout)
        pair[0].send_user(None, server)
        with client, one_message(run(*pair)[1]).handle as handed:
            assert handed.gettimeout() == (None if timeout is None else 0.0)


def test_files_and_descriptors_arrive_as_files_of_their_mode(pair: Pair, tmp_path: Any):
    """Unbuffered, so that nothing is read ahead or written late."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    text = path.open("a", encoding="utf-8")
    text.write(" and more")
    reader, writer = os.pipe()
    handles = [text, os.open(path, os.O_RDWR), open(path, "rb"), reader, writer]  # noqa: SIM115 - they are moved
    for handle in handles:
        pair[0].send_user(None, handle)
    assert text.closed

    heard = [message.handle for message in run(*pair)[1]]

    assert [type(handed) for handed in heard] == [io.FileIO] * 5
    assert [handed.mode for handed in heard] == ["wb", "rb+", "rb", "rb", "wb"]
    assert heard[2].read() == b"content and more"  # it was flushed before it left
    heard[4].write(b"through")
    assert heard[3].read(100) == b"through"
    for handed in heard:
        handed.close()


def test_kept_file_is_flushed_before_its_duplicate_leaves(pair: Pair, tmp_path: Any):
    """Otherwise what it holds back would come behind what the receiver writes."""
    with (tmp_path / "file").open("w", encoding="utf-8") as file:
        file.write("first ")
        pair[0].send_user(None, file, keep=True)
        with one_message(run(*pair)[1]).handle as handed:
            handed.write(b"second")
    assert (tmp_path / "file").read_bytes() == b"first second"


def test_directory_arrives_as_a_descriptor(pair: Pair, tmp_path: Any):
    """Python has no file object for it, and openat(2) has a use for it."""
    (tmp_path / "file").write_bytes(b"")
    pair[0].send_user(None, os.open(tmp_path, os.O_RDONLY))

    with one_message(run(*pair)[1]).handle as handed:
        assert isinstance(handed, HandedDescriptor)
        assert os.listdir(handed.fileno()) == ["file"]
        fd = handed.fileno()
    assert not is_open(fd)
    with pytest.raises(ValueError, match="the descriptor was closed"):
        handed.fileno()


def test_what_cannot_travel_is_a_sentence(pair: Pair):
    """And nothing is sent."""
    with socket.socket() as plain:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        with context.wrap_socket(plain, do_handshake_on_connect=False) as secure:
            with pytest.raises(TypeError, match="a TLS socket cannot be handed over: its keys would stay"):
                pair[0].send_user(None, secure)
    for handle in ("text", True, object()):
        with pytest.raises(TypeError, match="a handle is a socket, a file or a descriptor's number, not "):
            pair[0].send_user(None, handle)
    with pytest.raises(TypeError, match="a Channel.* cannot be moved, for it has no close"):
        pair[0].send_user(None, type("ChannelLike", (), {"fileno": lambda self: 0})())
    with pytest.raises(TypeError, match="bytes that were received go with the handle"):
        pair[0].send_user(None, received=b"bytes")
    with pytest.raises(OSError, match="Bad file descriptor"):
        pair[0].send_user(None, 9999)
    closed = socket.socket()
    closed.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        pair[0].send_user(None, closed)
    with pytest.raises(ValueError, match="a user's message carries a handle, not descriptors"):
        pair[0].send(None, kind=Kind.USER, fds=[os.open("/dev/null", os.O_RDONLY)])

    assert run(*pair) == [[], []]


@pytest.mark.parametrize("is_known", [True, False])
def test_handle_stays_the_callers_if_sending_raises(pair: Pair, is_known: bool):
    """It may go to somebody else then."""
    one, other = pair
    other.close()
    if is_known:
        one.receive()
    client, server = socket.socketpair()
    with client, server, open("/dev/null", "rb") as file:
        for handle in (server, file, server.fileno()):
            with pytest.raises(ChannelClosed):
                one.send_user("nobody there", handle)
            one._why_not, one._is_broken = (one._why_not, True) if is_known else ("", False)
        assert not file.closed
        server.sendall(b"still here")
        assert client.recv(100) == b"still here"
    with pytest.raises(TypeError):
        one.send_user({1, 2}, 0)
    assert is_open(0)


def test_discarded_message_closes_its_handle(pair: Pair):
    """Somebody must."""
    reader, writer = os.pipe()
    pair[0].send_user(None, writer)

    one_message(run(*pair)[1]).discard()

    assert os.read(reader, 1) == b""
    os.close(reader)


# ---- exactly once ----


def test_one_handle_is_out_and_later_messages_wait_behind_it(pair: Pair):
    """So the order is kept even if it must be sent again."""
    one, other = pair
    for number in range(3):
        one.send_user(number, os.open("/dev/null", os.O_RDONLY))
        one.send_user(f"behind {number}")
    one.send("control does not wait")

    first = other.receive()
    assert [message.body for message in first] == [0, "control does not wait"]
    rest = run(*pair)[1]

    assert [message.body for message in rest] == ["behind 0", 1, "behind 1", 2, "behind 2"]
    assert [message.handle is not None for message in rest] == [False, True, False, True, False]
    for message in (*first, *rest):
        message.discard()


def test_copy_is_kept_until_the_receipt(pair: Pair):
    """It is what could be sent again."""
    reader, writer = os.pipe()
    pair[0].send_user(None, writer)
    assert is_open(writer)

    for message in pair[1].receive():
        message.discard()
    assert is_open(writer)
    pair[0].receive()

    assert not is_open(writer)
    os.close(reader)


def test_waiting_handles_count_towards_the_high_water_mark(pair: Pair):
    """Descriptors are scarcer than bytes."""
    sent = 0
    while pair[0].send_user(sent, os.open("/dev/null", os.O_RDONLY)):
        sent += 1

    assert pair[0].is_backed_up
    assert sent == HIGH_WATER // HANDLE_WEIGHT
    heard = run(*pair)[1]
    assert [message.body for message in heard] == list(range(sent + 1))
    assert not pair[0].is_backed_up
    assert pair[0]._queued == 0
    for message in heard:
        message.discard()


@pytest.mark.parametrize("size", [0, 10, 200_000, 4_000_000])
@pytest.mark.parametrize("failures", [1, 3])
def test_lost_handle_is_sent_again(pair: Pair, lose: list[bool], size: int, failures: int):
    """With its message, which the receiver has dropped: both arrive once, and in order."""
    lose += [True] * failures
    client, server = socket.socketpair()
    one = pair[0]
    one.send_user("before")
    one.send_user("x" * size, server, received=b"read")
    one.send_user("behind")

    heard = run(*pair)[1]
    for delay in RETRIES[:failures]:
        assert [message.body for message in heard] == ["before"]
        assert one.retry_at is not None
        assert one.retry_at - module.time.monotonic() < delay
        one.retry()
        heard += run(*pair)[1]

    assert [message.body for message in heard] == ["before", "x" * size, "behind"]
    assert one.retry_at is None
    with client, heard[1].handle as handed:
        assert handed.received == b"read"
        handed.close()
        assert client.recv(1) == b""


def test_handle_that_is_lost_again_and_again_is_given_up(
    pair: Pair, lose: list[bool], caplog: pytest.LogCaptureFixture
):
    """The message arrives without it, our copy is closed, and the log says so."""
    lose += [True] * 4
    client, server = socket.socketpair()
    pair[0].send_user("lonely", server, received=b"read")
    pair[0].send_user("behind", os.open("/dev/null", os.O_RDONLY))

    with caplog.at_level(logging.WARNING, "prefork"):
        for _ in RETRIES:
            assert run(*pair)[1] == []
            pair[0].retry()
        heard = run(*pair)[1]

    assert [message.body for message in heard] == ["lonely", "behind"]
    assert [message.handle is None for message in heard] == [True, False]
    heard[1].discard()
    assert client.recv(1) == b""
    client.close()
    [record] = caplog.records
    assert record.getMessage() == "a handle is given up after 4 attempts: the receiver had no room for it"


def test_lost_descriptors_of_our_own_messages_are_told(pair: Pair, lose: list[bool]):
    """Whoever sent them keeps a copy until it is answered, and this is what is answered."""
    lose += [True]
    pair[0].send("before")
    pair[0].send(b"1", kind=Kind.HANDOFF, fds=[os.open("/dev/null", os.O_RDONLY)])
    pair[0].send(b"2", kind=Kind.HANDOFF, fds=[os.open("/dev/null", os.O_RDONLY)])

    before, lost, arrived = run(*pair)[1]

    assert (before.is_lost, lost.is_lost, arrived.is_lost) == (False, True, False)
    assert (lost.body, len(lost.fds), len(arrived.fds)) == (b"1", 0, 1)
    arrived.discard()


def test_retry_that_is_not_due_does_nothing(pair: Pair):
    """Drivers' timers may be late."""
    pair[0].retry()
    pair[0].send_user(None, os.open("/dev/null", os.O_RDONLY))
    pair[0].retry()

    one_message(run(*pair)[1]).discard()
    assert run(*pair) == [[], []]


def test_receipt_overtakes_what_waits_but_never_breaks_into_a_frame(pair: Pair):
    """Two sides that have much to say, and handles to receive."""
    for end in pair:
        end.send_user(LARGE)
        end.send_user("handle", os.open("/dev/null", os.O_RDONLY))
        end.send_user(LARGE)

    for heard in run(*pair):
        assert [message.body for message in heard] == [LARGE, "handle", LARGE]
        heard[1].discard()


plans = st.lists(st.tuples(st.booleans(), st.sampled_from([0, 100, 70_000, 300_000])), max_size=6)


def test_receipt_leaves_before_what_waits(pair: Pair):
    """The other side holds a descriptor until it comes, and all its users' messages."""
    one, other = pair
    for _ in range(3):
        one.send(LARGE)
    reader, writer = os.pipe()
    other.send_user(None, writer)
    one.receive()[0].discard()

    while one.wants_write and other._unacked is not None:
        one.flush()
        other.receive()

    assert one._queued > len(LARGE)  # of two that waited
    assert os.read(reader, 1) == b""
    os.close(reader)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(plans, plans),
    st.lists(st.booleans(), max_size=3),
    st.sampled_from([1, 3, 7, 4096, 65536]),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=60),
)
def test_any_interleaving_of_two_sides_with_handles_delivers_everything_once(
    plans: tuple[list[tuple[bool, int]], list[tuple[bool, int]]],
    losses: list[bool],
    read_size: int,
    steps: list[tuple[int, int]],
):
    """In order, with each handle at its message, whatever was lost on the way, and nothing stays open."""
    before = set(os.listdir("/proc/self/fd"))
    arrived = module.descriptors._descriptors

    def descriptors(ancillary: Any, came: int) -> Any:
        return arrived(ancillary, came | (socket.MSG_CTRUNC if losses and losses.pop() else 0))

    ends = Channel.pair()
    unsent = [list(enumerate(plan)) for plan in plans]
    heard: list[list[Message]] = [[], []]

    def step(side: int, what: int) -> None:
        if what == 0 and unsent[side]:
            number, (has_handle, size) = unsent[side].pop(0)
            ends[side].send_user([number, "x" * size], os.open("/dev/null", os.O_RDONLY) if has_handle else None)
        elif what == 1:
            ends[side].flush()
        elif what == 2:
            heard[side] += ends[side].receive()
        else:
            ends[side].retry()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.descriptors, "_descriptors", descriptors)
        patch.setattr(module, "READ_SIZE", read_size)
        for side, what in steps:
            step(side, what)
        while any(len(heard[1 - side]) < len(plans[side]) or ends[side]._unacked for side in (0, 1)):
            for what in range(4):
                step(0, what)
                step(1, what)
    for side, plan in enumerate(plans):
        got = heard[1 - side]
        assert [message.body[0] for message in got] == list(range(len(plan)))
        assert [(message.handle is not None, len(message.body[1])) for message in got] == plan
        assert ends[side]._queued == 0
        for message in got:
            message.discard()
        ends[side].close()
    assert set(os.listdir("/proc/self/fd")) == before


# ---- the end ----


@pytest.mark.parametrize("step", ["partly sent", "unread", "read", "waiting to be sent again"])
@pytest.mark.parametrize("first", [0, 1])
def test_handles_are_closed_when_the_channel_ends(pair: Pair, lose: list[bool], step: str, first: int):
    """Ours that is out, those that wait behind it, and theirs that nobody read."""
    lose += [step == "waiting to be sent again"]
    client, server = socket.socketpair()
    waiting, waits = socket.socketpair()
    pair[0].send_user(LARGE if step == "partly sent" else None, server)
    pair[0].send_user(None, waits)
    if step != "unread":
        for message in pair[1].receive():
            message.discard()
    if step == "waiting to be sent again":
        pair[0].receive()
        assert pair[0].retry_at is not None

    pair[first].close()
    while not pair[1 - first].is_eof:
        for message in pair[1 - first].receive():
            message.discard()
    assert not pair[0].is_backed_up
    assert pair[0].retry_at is None
    pair[0].retry()
    pair[1 - first].close()

    with client, waiting:
        assert client.recv(1) == b""
        assert waiting.recv(1) == b""


def test_last_words_wait_for_their_receipts():
    """An exit right behind a message with a handle must not cost either; what comes in meanwhile is kept."""
    parent, child = Channel.pair()
    pid = os.fork()
    if pid == 0:
        try:
            parent.close()
            for number in range(3):
                child.send_user(number, os.open("/dev/null", os.O_RDONLY))
            child.send_user("bye")
            is_flushed = child.flush_blocking(30)
            os._exit(0 if is_flushed and [m.body for m in child.receive()] == ["hello"] else 1)
        finally:
            os._exit(2)
    child.close()
    parent.send_user("hello")
    heard: list[Message] = []
    while not parent.is_eof:
        select.select([parent], [], [], 20)
        heard += parent.receive()

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [message.body for message in heard] == [0, 1, 2, "bye"]
    for message in heard:
        message.discard()
    parent.close()


def test_last_words_are_not_said_if_a_handle_was_not_acknowledged(pair: Pair):
    """Neither by a peer that is stopped, nor by one that leaves."""
    pair[0].send_user(None, os.open("/dev/null", os.O_RDONLY))
    assert pair[0].flush_blocking(0.01) is False
    pair[1].close()
    assert pair[0].flush_blocking(10) is False


# ---- peers that break the rules ----


@pytest.mark.parametrize(
    ("wire", "count", "why"),
    [
        (header(Kind.RECEIPT, 1) + b"\x01", 0, "the other side acknowledges a handle that was not sent"),
        (header(Kind.RECEIPT, 1, 1) + b"\x01", 1, "a receipt claims descriptors"),
        (header(Kind.USER, 6, 2) + bytes(6), 2, "a user's message claims 2 descriptors, 1 is allowed"),
        (header(Kind.USER, 3, 1) + bytes(3), 1, "a user's message with a handle is cut short: it has 3 bytes"),
        (header(Kind.USER, 4, 1) + b"\0\0\0\x01", 1, "a user's message with a handle is cut short: it has 4 bytes"),
        (header(Kind.USER, 5, 1) + b"\0\0\0\0{", 1, "a frame of 1 bytes does not hold JSON"),
        (header(Kind.PICKLED, 4, 1) + bytes(4), 1, "the other side sent a pickle, and this channel's"),
    ],
)
def test_broken_rules_end_the_channel_and_leave_nothing_open(pair: Pair, wire: bytes, count: int, why: str):
    """The watch over descriptors is half of the assertion."""
    one, other = pair
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    module.descriptors.send(one._sock, [wire], fds)
    module.descriptors.close_all(fds)

    with pytest.raises(FrameError) as caught:
        other.receive()

    assert str(caught.value).startswith(why)
    assert other.is_eof


def test_receipt_for_a_handle_that_has_not_left_is_refused(pair: Pair):
    """Our copy would be closed, and another descriptor sent under its number."""
    one, other = pair
    one.send_user(LARGE, os.open("/dev/null", os.O_RDONLY))
    os.write(other.fileno(), encode(Frame(Kind.RECEIPT, b"\x01")))

    with pytest.raises(FrameError, match="acknowledges a handle that was not sent"):
        one.receive()


def test_flood_of_handles_that_does_not_wait_for_receipts_is_refused(pair: Pair):
    """The receipts would fill our memory."""
    one, other = pair
    other.send("x" * 4_000_000)  # our receipt cannot leave
    with open("/dev/null", "rb") as file:
        for _ in range(2):
            module.descriptors.send(one._sock, [header(Kind.USER, 5, 1) + b"\0\0\0\x000"], [file.fileno()])

    with pytest.raises(FrameError, match="a second handle came before the first was acknowledged"):
        other.receive()


def test_receipt_that_comes_after_our_writing_failed_is_no_broken_rule(pair: Pair):
    """Its handle was dropped with the queue; the peer's last words behind it are still heard."""
    one, other = pair
    one.send_user(None, os.open("/dev/null", os.O_RDONLY))
    one_message(other.receive()).discard()
    other.send_user("farewell")
    other.close()
    with pytest.raises(ChannelClosed):
        one.send("too late")

    assert one_message(one.receive()).body == "farewell"
