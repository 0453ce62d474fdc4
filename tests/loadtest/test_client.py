"""The WebSocket load client's frames: RFC 6455, section 5.2."""

from __future__ import annotations

import pytest

from loadtest.client import masked, plain

SIZES = (1, 4, 125, 126, 65535, 65536)


@pytest.mark.parametrize("size", SIZES)
def test_a_servers_frame_is_the_length_and_the_payload(size):
    payload = bytes(range(256)) * (size // 256 + 1)
    payload = payload[:size]
    head = {1: 2, 4: 2, 125: 2, 126: 4, 65535: 4, 65536: 10}[size]

    assert plain(payload)[head:] == payload
    assert len(plain(payload)) == head + size


@pytest.mark.parametrize("size", SIZES)
def test_a_clients_frame_unmasks_to_the_same(size):
    payload = bytes(range(256)) * (size // 256 + 1)
    payload = payload[:size]
    head = len(plain(payload)) - size
    frame = masked(payload)
    mask, body = frame[head : head + 4], frame[head + 4 :]

    assert frame[0] == 0x82
    assert frame[1] == plain(payload)[1] | 0x80
    assert bytes(byte ^ mask[index % 4] for index, byte in enumerate(body)) == payload
