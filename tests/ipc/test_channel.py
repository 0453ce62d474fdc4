"""Channels over real socket pairs and between real processes."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.errors import ChannelClosed, FrameError
from prefork.ipc import channel as module
from prefork.ipc.channel import HIGH_WATER, Channel, Message
from prefork.ipc.frames import MAX_FDS, Frame, Kind, encode

InChild = Callable[[Callable[[], Any]], Any]
Pair = tuple[Channel, Channel]

# More than a socket pair holds, whatever the machine's settings.
LARGE = "x" * (4 * 1024 * 1024)


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = Channel.pair()
    yield one, other
    one.close()
    other.close()


def bodies(messages: list[Message]) -> list[Any]:
    """What they say, their descriptors closed."""
    for message in messages:
        message.fds.close()
    return [message.body for message in messages]


def transfer(sender: Channel, receiver: Channel) -> list[Message]:
    """Drive both until the sender's queue is empty and everything has arrived."""
    got = receiver.receive()
    while sender.wants_write:
        sender.flush()
        got += receiver.receive()
    while more := receiver.receive():
        got += more
    return got


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_messages_arrive_in_order_with_their_kinds(pair: Pair):
    """Internal and user messages differ by a byte, not by a prefix that a user could write."""
    one, other = pair
    one.send({"do": "drain"})
    one.send(["user", 1, None, "\u00e9\ud800"], kind=Kind.USER)

    control, user = other.receive()

    assert (control.kind, control.body) == (Kind.CONTROL, {"do": "drain"})
    assert (user.kind, user.body) == (Kind.USER, ["user", 1, None, "\u00e9\ud800"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=5))
def test_whatever_json_can_hold_arrives_unchanged(values: list[Any]):
    """Including the empty string, which SEQPACKET would have made an end of file."""
    one, other = Channel.pair()
    try:
        for value in values:
            one.send(value)
        assert bodies(other.receive()) == values
    finally:
        one.close()
        other.close()


def test_channel_works_between_processes(pair: Pair, in_child: InChild):
    """What it is for: the child answers each message and its end is seen."""
    parent, child = pair
    parent.send("question")

    def answer() -> list[Any]:
        parent.close()
        heard = bodies(child.receive())
        child.send("answer")
        return heard

    assert in_child(answer) == ["question"]
    child.close()
    assert bodies(parent.receive()) == ["answer"]
    assert parent.receive() == []
    assert parent.is_eof


def test_descriptor_outlives_the_process_that_sent_it(pair: Pair, in_child: InChild):
    """The message in flight holds its own reference."""
    parent, child = pair

    def send_a_pipe() -> None:
        reader, writer = os.pipe()
        os.write(writer, b"from the dead")
        os.close(writer)
        child.send(b"pipe", kind=Kind.HANDOFF, fds=[reader])

    in_child(send_a_pipe)
    [message] = parent.receive()

    with message.fds:
        reader = message.fds.take()
    assert os.read(reader, 100) == b"from the dead"
    os.close(reader)


def test_each_message_gets_its_own_descriptors(pair: Pair):
    """Several messages in one read, with none, one and two of them."""
    one, other = pair
    paths = {"none": [], "one": ["/dev/null"], "again none": [], "two": ["/dev/zero", "/dev/full"]}
    for name, files in paths.items():
        one.send(name, fds=[os.open(path, os.O_RDWR) for path in files])

    for message, (name, files) in zip(other.receive(), paths.items(), strict=True):
        with message.fds:
            assert message.body == name
            assert len(message.fds) == len(files)
            for path in files:
                fd = message.fds.take()
                assert os.fstat(fd).st_rdev == os.stat(path).st_rdev
                os.close(fd)


def test_sent_descriptor_is_closed_here_once_it_has_left(pair: Pair):
    """The channel owns what it is given."""
    fd = os.open("/dev/null", os.O_RDONLY)

    pair[0].send("yours", fds=[fd])

    assert not is_open(fd)
    bodies(pair[1].receive())


def test_kept_descriptor_stays_the_callers(pair: Pair):
    """Handoff keeps the connection until the worker has accepted it."""
    fd = os.open("/dev/null", os.O_RDONLY)

    pair[0].send("a copy", fds=[fd], keep=True)
    bodies(pair[1].receive())

    assert is_open(fd)
    os.close(fd)


def test_large_message_with_descriptors_is_sent_in_parts(pair: Pair):
    """The descriptors leave with the first part and are not sent again with the others."""
    one, other = pair
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(MAX_FDS)]

    assert one.send(LARGE, fds=fds) is False
    assert one.wants_write
    assert not any(is_open(fd) for fd in fds)
    one.send("behind", fds=[os.open("/dev/null", os.O_RDONLY)])
    large, behind = transfer(one, other)

    assert (len(large.fds), len(behind.fds)) == (MAX_FDS, 1)
    assert bodies([large, behind]) == [LARGE, "behind"]
    assert not one.wants_write


def test_queued_descriptors_wait_with_their_message(pair: Pair):
    """Nothing overtakes: order is the channel's promise."""
    one, other = pair
    one.send(LARGE)
    fd = os.open("/dev/null", os.O_RDONLY)
    one.send("later", fds=[fd])

    assert is_open(fd)
    assert bodies(transfer(one, other)) == [LARGE, "later"]
    assert not is_open(fd)


def test_send_advises_to_stop_above_the_high_water_mark(pair: Pair):
    """It is advice: nothing is refused, and everything arrives."""
    one, other = pair
    sent = 0
    while one.send("x" * 1000):
        sent += 1
    one.send("more")

    assert one.wants_write
    assert len(bodies(transfer(one, other))) == sent + 2
    assert one.send("again")
    assert sent * 1000 > HIGH_WATER


def test_both_sides_may_send_more_than_fits_at_once(pair: Pair):
    """Two blocking writers would wait for one another for ever."""
    one, other = pair
    one.send(LARGE)
    other.send(LARGE)

    heard_by_one, heard_by_other = [], []
    while one.wants_write or other.wants_write or not (heard_by_one and heard_by_other):
        one.flush()
        other.flush()
        heard_by_one += bodies(one.receive())
        heard_by_other += bodies(other.receive())

    assert heard_by_one == heard_by_other == [LARGE]


def test_flood_does_not_keep_the_receiver_for_ever(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """One call takes a bounded share, and the rest is still there."""
    monkeypatch.setattr(module, "READS_PER_CALL", 1)
    one, other = pair
    for _ in range(100):
        one.send("x" * 1000)

    first = bodies(other.receive())

    assert 0 < len(first) < 100
    assert len(first) + len(bodies(transfer(one, other))) == 100


def test_end_is_seen_after_the_last_words(pair: Pair):
    """A worker that says why it goes, and goes, is heard."""
    one, other = pair
    one.send("farewell")
    one.close()

    assert bodies(other.receive()) == ["farewell"]
    assert other.receive() == []
    assert other.is_eof
    assert not other.is_closed
    with pytest.raises(ChannelClosed, match="the other end of the channel is gone"):
        other.send("too late")


def test_end_is_seen_although_our_own_words_were_not_read(pair: Pair):
    """The kernel says ECONNRESET then, which is the same end."""
    one, other = pair
    other.send("never read")
    one.send("farewell")
    one.close()

    assert bodies(other.receive()) == ["farewell"]
    assert other.receive() == []
    assert other.is_eof


def test_failed_write_leaves_the_last_words_readable(pair: Pair):
    """The writer learns first, the reader must not lose what came before."""
    one, other = pair
    one.send("farewell")
    one.close()

    with pytest.raises(ChannelClosed):
        other.send("into the void")
    assert bodies(other.receive()) == ["farewell"]


def test_failed_flush_drops_the_queue_and_its_descriptors(pair: Pair):
    """Nobody is left to read it, and a loop that polls for writing must come to rest."""
    one, other = pair
    fd = os.open("/dev/null", os.O_RDONLY)
    one.send(LARGE)
    one.send("queued", fds=[fd])
    other.close()

    one.flush()

    assert not one.wants_write
    assert not is_open(fd)
    with pytest.raises(ChannelClosed):
        one.send("more")


def test_unfinished_message_at_the_end_is_dropped_with_its_descriptors(pair: Pair):
    """The sender was killed in the middle of it: there is nothing to deliver, and nothing to leak."""
    one, other = pair
    one.send(LARGE, fds=[os.open("/dev/null", os.O_RDONLY)])
    assert other.receive() == []
    one.close()

    while not other.is_eof:
        assert other.receive() == []


def test_close_drops_queued_and_half_received_descriptors(pair: Pair):
    """The watch over descriptors of every test here is the assertion."""
    one, other = pair
    one.send(LARGE, fds=[os.open("/dev/null", os.O_RDONLY)])
    one.send("queued", fds=[os.open("/dev/null", os.O_RDONLY)])
    other.receive()

    for end in pair:
        end.close()
        end.close()

    assert one.is_closed
    assert one.fileno() == -1
    assert not one.wants_write
    assert one.receive() == []
    with pytest.raises(ChannelClosed, match="this end of the channel was closed"):
        one.send("more")


def test_refused_send_closes_what_it_was_given(pair: Pair):
    """The caller has given it away and could not know whether to close it."""
    one, other = pair
    attempts: list[tuple[type[Exception], Any]] = [(TypeError, {1, 2}), (ValueError, recursive())]
    for error, message in attempts:
        fd = os.open("/dev/null", os.O_RDONLY)
        with pytest.raises(error):
            one.send(message, fds=[fd])
        assert not is_open(fd)
    with pytest.raises(FrameError):
        one.send("too many", fds=[os.open("/dev/null", os.O_RDONLY) for _ in range(MAX_FDS + 1)])

    one.send("still fine")
    assert bodies(other.receive()) == ["still fine"]
    one.close()
    fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(ChannelClosed):
        one.send("closed", fds=[fd])
    assert not is_open(fd)


def recursive() -> list[Any]:
    snake: list[Any] = []
    snake.append(snake)
    return snake


@pytest.mark.parametrize("keep", [True, False])
def test_descriptor_that_is_not_open_is_the_senders_error(pair: Pair, keep: bool):
    """And not the channel's, which goes on."""
    one, other = pair
    with pytest.raises(OSError, match="Bad file descriptor"):
        one.send("broken", fds=[os.dup(0), 9999] if not keep else [0, 9999], keep=keep)

    one.send("fine")
    assert bodies(other.receive()) == ["fine"]


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "frame is of kind 47, known are 1 to 7"),
        (encode(Frame(Kind.USER, b"{not json")), "a frame of 9 bytes does not hold JSON: "),
        (encode(Frame(Kind.USER, b"\xff\xfe\xfd")), "a frame of 3 bytes does not hold JSON: "),
    ],
)
def test_peer_that_does_not_keep_to_the_frames_ends_the_channel(pair: Pair, wire: bytes, why: str):
    """A program that writes to a descriptor it does not know; messages with descriptors came before it."""
    one, other = pair
    one.send("before", fds=[os.open("/dev/null", os.O_RDONLY)])
    os.write(one.fileno(), wire)
    one.send("behind", fds=[os.open("/dev/null", os.O_RDONLY)])

    with pytest.raises(FrameError) as caught:
        other.receive()

    assert str(caught.value).startswith(why)
    assert other.is_eof
    assert other.receive() == []
    assert not other.is_closed  # a loop that watches it must be able to say which descriptor it forgets


def test_flush_blocking_waits_for_a_reader(pair: Pair):
    """The reason for an exit, said before the exit, by a process whose loop has ended."""
    parent, child = pair
    pid = os.fork()
    if pid == 0:
        try:
            parent.close()
            child.send(LARGE)
            os._exit(0 if child.flush_blocking(30) else 1)
        finally:
            os._exit(2)
    child.close()

    heard = []
    while not parent.is_eof:
        select.select([parent], [], [])
        heard += bodies(parent.receive())

    assert heard == [LARGE]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_flush_blocking_gives_up_at_its_timeout(pair: Pair):
    """A peer that is stopped must not keep us from exiting."""
    pair[0].send(LARGE)
    started = time.monotonic()

    assert pair[0].flush_blocking(0.05) is False
    assert time.monotonic() - started >= 0.05


def test_flush_blocking_says_whether_everything_has_left(pair: Pair):
    """True at once with nothing to say; false when the other side is gone."""
    assert pair[0].flush_blocking(0) is True
    pair[0].send(LARGE)
    pair[1].close()
    assert pair[0].flush_blocking(10) is False


def test_ends_of_a_pair_close_on_exec(pair: Pair):
    """A program that a worker starts would keep the channel alive after the worker's death."""
    assert [os.get_inheritable(end.fileno()) for end in pair] == [False, False]
