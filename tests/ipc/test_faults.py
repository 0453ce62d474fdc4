"""A descriptor's journey between real processes, one of which dies, stops, or is out of descriptors.

The witness is a pair of sockets: one end travels, the other stays here, and reads the end of the
stream as soon as nobody holds the one that travelled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prefork.errors import ChannelClosed
from prefork.ipc import channel as module
from prefork.ipc import fds
from prefork.ipc.aio import AsyncChannel
from prefork.ipc.channel import Channel, Message

# More than a socket pair holds, whatever the machine's settings.
LARGE = "x" * (4 * 1024 * 1024)

# Seconds after which what did not happen will not happen.
PATIENCE = 20.0

Start = Callable[[Callable[[Channel], Any]], "Peer"]


class Peer:
    """A child at the other end of `channel`. It stops itself where its function says so, or at its end."""

    def __init__(self, function: Callable[[Channel], Any]) -> None:
        self.channel, theirs = Channel.pair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.alarm(60)
                self.channel.close()
                function(theirs)
                stop()
            finally:
                os._exit(1)
        theirs.close()

    def wait_until_stopped(self) -> None:
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def kill(self) -> None:
        """With -9, and reaped."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def hear_to_the_end(self) -> list[Message]:
        """What was said before it died."""
        heard = []
        deadline = time.monotonic() + PATIENCE
        while not self.channel.is_eof:
            assert time.monotonic() < deadline
            select.select([self.channel], [], [], 1)
            heard += self.channel.receive()
        return heard


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.fixture
def start() -> Iterator[Start]:
    peers: list[Peer] = []

    def start(function: Callable[[Channel], Any]) -> Peer:
        peers.append(Peer(function))
        return peers[-1]

    yield start
    for peer in peers:
        peer.kill()
        peer.channel.close()


@pytest.fixture
def witness() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The end that stays, and the one that travels."""
    stays, travels = socket.socketpair()
    stays.settimeout(PATIENCE)
    with stays, travels:
        yield stays, travels


Witness = tuple[socket.socket, socket.socket]


def receive(channel: Channel, count: int = 1) -> list[Message]:
    """The next *count* messages, at least."""
    heard: list[Message] = []
    while len(heard) < count:
        assert select.select([channel], [], [], PATIENCE)[0]
        heard += channel.receive()
        assert not channel.is_eof or len(heard) >= count
    return heard


def drive(channel: Channel, seconds: float = 0.0) -> list[Message]:
    """Write and read until nothing is left to do for *seconds*."""
    heard: list[Message] = []
    while True:
        readable, writable, _ = select.select([channel], [channel] if channel.wants_write else [], [], seconds)
        if not readable and not writable:
            return heard
        channel.flush()
        heard += channel.receive()
        if channel.is_eof:
            return heard


def read_alone(channel: Channel) -> None:
    """What a receiver does before it answers."""
    assert select.select([channel], [], [], PATIENCE)[0]
    fds.receive(channel._sock, 65536)


# ---- the receiver dies ----


RECEIVERS: dict[str, Callable[[Channel], Any]] = {
    "unread": lambda channel: None,
    "read, not acknowledged": read_alone,
    "acknowledged": lambda channel: (KEPT.extend(receive(channel)), channel.flush()),
}
KEPT: list[Message] = []  # a child holds on to what it received until it is killed


@pytest.mark.parametrize("body", ["small", LARGE], ids=["small", "large"])
@pytest.mark.parametrize("step", RECEIVERS)
def test_receiver_that_dies_leaves_nobody_with_the_handle(start: Start, witness: Witness, step: str, body: str):
    """At whatever step: our copy is closed with the channel, those of the dead by the kernel."""
    stays, travels = witness

    def be_receiver(channel: Channel) -> None:
        stays.close()
        travels.close()
        RECEIVERS[step](channel)

    peer = start(be_receiver)
    if step == "unread":
        peer.wait_until_stopped()
    peer.channel.send_user(body, travels)
    second = os.open("/dev/null", os.O_RDONLY)
    peer.channel.send_user("behind", second)
    if step != "unread":
        deadline = time.monotonic() + PATIENCE
        while os.waitpid(peer.pid, os.WUNTRACED | os.WNOHANG)[0] == 0:
            assert time.monotonic() < deadline
            select.select([], [peer.channel] if peer.channel.wants_write else [], [], 0.01)
            peer.channel.flush()
    if step == "acknowledged":
        peer.channel.receive()  # the receipt: only the receiver holds it now, and the second is out
        assert peer.channel._unacked is not None
        assert peer.channel._unacked.handle == second

    peer.kill()
    assert peer.hear_to_the_end() == []

    assert stays.recv(1) == b""
    with pytest.raises(ChannelClosed):
        peer.channel.send_user("too late")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second)


def test_handle_for_a_dead_receiver_stays_the_callers(start: Start, witness: Witness):
    """Killed before it was sent anything: the caller may give the handle to another."""
    stays, travels = witness
    peer = start(lambda channel: (stays.close(), travels.close()))
    peer.wait_until_stopped()
    peer.kill()

    with pytest.raises(ChannelClosed):
        peer.channel.send_user("nobody there", travels)

    travels.sendall(b"still here")
    assert stays.recv(100) == b"still here"


@pytest.mark.parametrize("is_acknowledged", [False, True])
def test_receiver_that_is_stopped_costs_nothing_but_time(start: Start, witness: Witness, is_acknowledged: bool):
    """The message waits in the kernel, or the receipt here; when it goes on, all goes on."""
    stays, travels = witness

    def be_receiver(channel: Channel) -> None:
        stays.close()
        travels.close()
        if not is_acknowledged:
            stop()
        heard = receive(channel)
        if is_acknowledged:
            stop()
        heard += receive(channel, 3 - len(heard))
        heard[0].handle.sendall(b"here")
        heard[2].handle.close()

    peer = start(be_receiver)
    peer.channel.send_user("one", travels)
    peer.channel.send_user("two")
    peer.channel.send_user("three", os.open("/dev/null", os.O_RDONLY))
    peer.wait_until_stopped()
    os.kill(peer.pid, signal.SIGCONT)
    deadline = time.monotonic() + PATIENCE
    while peer.channel._unacked is not None:
        assert time.monotonic() < deadline
        drive(peer.channel, 0.05)

    assert stays.recv(100) == b"here"
    peer.kill()
    assert stays.recv(1) == b""


# ---- the sender dies ----


@pytest.mark.parametrize("step", ["before", "sent", "partly sent", "receipt unread", "acknowledged"])
def test_sender_that_dies_has_either_given_the_handle_or_not(start: Start, witness: Witness, step: str):
    """Never half: the whole message with a handle that works, or neither; and a handle that it still had is closed."""
    stays, travels = witness
    other_stays, other_travels = socket.socketpair()
    other_stays.settimeout(PATIENCE)

    def be_sender(channel: Channel) -> None:
        stays.close()
        other_stays.close()
        if step != "before":
            channel.send_user(LARGE if step == "partly sent" else "yours", travels)
            channel.send_user("next", other_travels)
        if step == "acknowledged":
            assert select.select([channel], [], [], PATIENCE)[0]
            channel.receive()

    peer = start(be_sender)
    travels.close()
    other_travels.close()
    heard: list[Message] = []
    if step == "acknowledged":
        heard += receive(peer.channel)
    peer.wait_until_stopped()
    if step == "receipt unread":
        heard += receive(peer.channel)
    peer.kill()
    heard += peer.hear_to_the_end()

    if step in ("before", "partly sent"):
        assert heard == []
    else:
        assert [message.body for message in heard] == (["yours", "next"] if step == "acknowledged" else ["yours"])
        heard[0].handle.sendall(b"works")
        assert stays.recv(100) == b"works"
    for message in heard:
        message.discard()
    assert stays.recv(1) == b""
    assert other_stays.recv(1) == b""
    other_stays.close()


# ---- no descriptor left ----


def fill_table() -> list[int]:
    """Leave this process without a descriptor; returns some that may be closed."""
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 3, highest + 3))
    filled = []
    while True:
        try:
            filled.append(os.dup(0))
        except OSError:
            return filled


@pytest.mark.parametrize("is_freed", [True, False])
def test_receiver_without_descriptors_gets_the_handle_later_or_the_message_alone(
    start: Start, witness: Witness, is_freed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The channel goes on, in order, and the sender's loop sends it again by itself."""
    monkeypatch.setattr(module, "RETRIES", (0.05, 0.1, 0.2))
    stays, travels = witness

    def be_receiver(channel: Channel) -> None:
        stays.close()
        travels.close()
        filled = fill_table()
        assert select.select([channel], [], [], PATIENCE)[0]
        heard = []
        while not heard:  # lost, and what stood before it
            heard = channel.receive()
        if is_freed:
            os.close(filled[0])
        heard += receive(channel, 3 - len(heard))
        channel.send_user([[message.body, message.handle is not None] for message in heard])
        stop()

    peer = start(be_receiver)

    async def main() -> Any:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        channel = AsyncChannel(peer.channel, asyncio.get_running_loop(), heard.put_nowait, lambda: None)
        channel.send_user("before")
        channel.send_user("handle", travels)
        channel.send_user("behind")
        answer = await asyncio.wait_for(heard.get(), PATIENCE)
        channel.close()
        return answer.body

    with caplog.at_level(logging.WARNING, "prefork"):
        answer = asyncio.run(main())

    assert answer == [["before", False], ["handle", is_freed], ["behind", False]]
    assert len(caplog.records) == (0 if is_freed else 1)
    peer.kill()
    assert stays.recv(1) == b""


# ---- many ----


def exchange(channel: Channel, count: int) -> list[list[Any]]:
    """Send *count* handles and receive as many: number and kind of each."""
    heard: list[list[Any]] = []
    sent = 0
    while len(heard) < count or channel._unacked is not None or channel.wants_write:
        while sent < count and not channel.is_backed_up:
            channel.send_user(sent, os.open("/dev/null", os.O_RDONLY))
            sent += 1
        ready = select.select([channel], [channel] if channel.wants_write else [], [], PATIENCE)
        assert ready != ([], [], [])
        channel.flush()
        for message in channel.receive():
            heard.append([message.body, message.handle is not None])
            message.discard()
        if channel.is_eof:
            break
    return heard


def count_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_both_sides_may_send_handles_at_once(start: Start):
    """A thousand each: receipts overtake, so neither waits for the other for ever."""

    def be_other(channel: Channel) -> None:
        before = count_open()
        heard = exchange(channel, 1000)
        channel.send_user([heard == [[number, True] for number in range(1000)], count_open() - before])
        assert channel.flush_blocking(PATIENCE)

    peer = start(be_other)
    heard = exchange(peer.channel, 1000)
    peer.wait_until_stopped()
    heard += [[message.body, False] for message in drive(peer.channel)]
    assert heard == [*([number, True] for number in range(1000)), [[True, 0], False]]


def test_ten_thousand_handles_pass_and_none_is_leaked(start: Start):
    """On neither side; the watch over descriptors of every test here looks at ours."""

    def be_receiver(channel: Channel) -> None:
        before = count_open()
        numbers = []
        while len(numbers) < 10_000:
            for message in receive(channel):
                assert message.handle is not None
                message.discard()
                numbers.append(message.body)
        channel.send_user([numbers == list(range(10_000)), count_open() - before])

    peer = start(be_receiver)
    before = count_open()
    sent = 0
    while sent < 10_000 or peer.channel._unacked is not None:
        while sent < 10_000 and not peer.channel.is_backed_up:
            peer.channel.send_user(sent, os.open("/dev/null", os.O_RDONLY))
            sent += 1
        assert select.select([peer.channel], [], [], PATIENCE)[0]
        heard = peer.channel.receive()
    assert count_open() == before
    peer.wait_until_stopped()
    assert [message.body for message in [*heard, *drive(peer.channel)]] == [[True, 0]]


def test_ten_megabytes_travel_with_a_handle(start: Start, witness: Witness):
    """In many parts, the handle with the first."""
    stays, travels = witness

    def be_receiver(channel: Channel) -> None:
        stays.close()
        travels.close()
        [message] = receive(channel)
        message.handle.sendall(f"{len(message.body)} and {len(message.handle.received)}".encode())

    peer = start(be_receiver)
    peer.channel.send_user("x" * 10_000_000, travels, received=b"read before")
    assert peer.channel.flush_blocking(PATIENCE)

    assert stays.recv(100) == b"10000000 and 11"
