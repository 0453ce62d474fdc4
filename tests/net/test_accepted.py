"""What an accepted connection knows without asking."""

from __future__ import annotations

import socket

import pytest

from prefork.net.accepted import Acceptor


@pytest.fixture
def listening(request, tmp_path):
    family, name = request.param
    if family == socket.AF_UNIX:
        name = str(tmp_path / name)
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind(name)
        sock.listen()
        sock.setblocking(False)
        yield sock


ONE, ALL, SIX = (
    (socket.AF_INET, ("127.0.0.1", 0)),
    (socket.AF_INET, ("0.0.0.0", 0)),
    (socket.AF_INET6, ("::1", 0)),
)
UNIX = (socket.AF_UNIX, "s")


def connect(listening):
    client = socket.socket(listening.family, socket.SOCK_STREAM)
    client.connect(listening.getsockname())
    return client


@pytest.mark.parametrize("listening", [ONE, SIX, UNIX], indirect=True, ids=["IPv4", "IPv6", "unix"])
def test_accepted_connection_knows_both_its_addresses(listening):
    with connect(listening) as client, Acceptor(listening).accept() as accepted:
        assert accepted.peer == client.getsockname()
        assert accepted.local == accepted.getsockname() == listening.getsockname()


@pytest.mark.parametrize("listening", [ALL], indirect=True)
def test_address_of_a_socket_that_is_bound_to_all_has_to_be_asked_for(listening):
    with connect(listening), Acceptor(listening).accept() as accepted:
        assert accepted.local is None


@pytest.mark.parametrize("listening", [ONE, UNIX], indirect=True)
def test_accepted_connection_is_a_socket_that_does_not_block_and_is_not_inherited(listening):
    with connect(listening) as client, Acceptor(listening).accept() as accepted:
        assert (accepted.family, accepted.type, accepted.proto) == (listening.family, listening.type, listening.proto)
        assert not accepted.getblocking()
        assert not accepted.get_inheritable()
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        accepted.setblocking(True)
        assert accepted.recv(10) == b"hello"
        assert accepted.recv(10) == b""


@pytest.mark.parametrize("listening", [ONE], indirect=True)
def test_empty_queue_does_not_block(listening):
    with pytest.raises(BlockingIOError):
        Acceptor(listening).accept()
