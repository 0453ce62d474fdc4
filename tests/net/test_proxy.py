"""The PROXY protocol: what is read, what is refused, and that no cut or change makes it read anything else."""

from __future__ import annotations

import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.errors import ProxyRefused
from prefork.net.proxy import LOCAL, MAX_HEADER, MAX_V1, MAX_V2, NOT_TOLD, SIGNATURE, ProxyHeader, read_proxy_header

TCP4, UDP4, TCP6, UDP6, UNIX, UNIX_DATAGRAM, UNSPEC = 0x11, 0x12, 0x21, 0x22, 0x31, 0x32, 0x00


def v2(family=TCP4, block=b"", *, command=0x21, length=None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(block) if length is None else length) + block


def addresses(client: str, server: str, client_port: int, server_port: int) -> bytes:
    packed = [ipaddress.ip_address(text).packed for text in (client, server)]
    return b"".join(packed) + struct.pack("!HH", client_port, server_port)


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


FOUR = addresses("192.0.2.1", "198.51.100.2", 56324, 443)
SIX = addresses("2001:db8::1", "2001:db8::2", 1, 65535)
READ_FOUR = ProxyHeader(("192.0.2.1", 56324), ("198.51.100.2", 443))
READ_SIX = ProxyHeader(("2001:db8::1", 1), ("2001:db8::2", 65535))

ACCEPTED = {
    "v1 TCP4": (b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n", READ_FOUR),
    "v1 TCP6": (b"PROXY TCP6 2001:db8::1 2001:DB8:0::2 1 65535\r\n", READ_SIX),
    "v1 TCP6 that is IPv4": (b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:198.51.100.2 56324 443\r\n", READ_FOUR),
    "v1 port 0": (b"PROXY TCP4 1.2.3.4 5.6.7.8 0 0\r\n", ProxyHeader(("1.2.3.4", 0), ("5.6.7.8", 0))),
    "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", NOT_TOLD),
    "v1 longest": (b"PROXY UNKNOWN" + b" ffff:f...f:ffff".ljust(MAX_V1 - 15, b"f") + b"\r\n", NOT_TOLD),
    "v2 TCP4": (v2(TCP4, FOUR), READ_FOUR),
    "v2 TCP6": (v2(TCP6, SIX), READ_SIX),
    "v2 TCP4 TLVs": (v2(TCP4, FOUR + tlv(4, b"") + tlv(0xEA, b"\1vpce-0123")), READ_FOUR),
    "v2 longest": (v2(TCP4, FOUR + tlv(4, bytes(MAX_V2 - 16 - 12 - 3))), READ_FOUR),
    "v2 UNIX": (v2(UNIX, bytes(216)), NOT_TOLD),
    "v2 UNSPEC": (v2(UNSPEC), NOT_TOLD),
    "v2 UNSPEC with something": (v2(UNSPEC, b"whatever"), NOT_TOLD),
    "v2 LOCAL": (v2(UNSPEC, command=0x20), LOCAL),
    "v2 LOCAL with addresses": (v2(TCP4, FOUR, command=0x20), LOCAL),
    "v2 LOCAL of any family": (v2(0x77, b"x", command=0x20), LOCAL),
}

REFUSED = {
    "a request": b"GET / HTTP/1.1\r\n\r\n",
    "a request that begins alike": b"PUT / HTTP/1.1\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n",
    "TLS": b"\x16\x03\x01",
    "empty lines": b"\r\n\r\nGET / HTTP/1.1\r\n",
    "white space before": b" PROXY UNKNOWN\r\n",
    "lower case": b"proxy UNKNOWN\r\n",
    "lower case family": b"PROXY tcp4 1.2.3.4 5.6.7.8 1 2\r\n",
    "no family": b"PROXY \r\n",
    "UDP": b"PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n",
    "bare LF": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n",
    "bare LF within": b"PROXY UNKNOWN a\nb\r\n",
    "bare CR within": b"PROXY UNKNOWN a\rb\r\n",
    "NUL": b"PROXY UNKNOWN \0\r\n",
    "word glued on": b"PROXY UNKNOWNX\r\n",
    "two spaces": b"PROXY TCP4  1.2.3.4 5.6.7.8 1 2\r\n",
    "tab": b"PROXY TCP4\t1.2.3.4 5.6.7.8 1 2\r\n",
    "space at the end": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 \r\n",
    "a field too many": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
    "a field too few": b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
    "leading zeros in an address": b"PROXY TCP4 01.2.3.4 5.6.7.8 1 2\r\n",
    "three numbers": b"PROXY TCP4 127.0.1 5.6.7.8 1 2\r\n",
    "256": b"PROXY TCP4 1.2.3.256 5.6.7.8 1 2\r\n",
    "IPv6 in TCP4": b"PROXY TCP4 ::1 ::1 1 2\r\n",
    "IPv4 in TCP6": b"PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n",
    "a zone": b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n",
    "brackets": b"PROXY TCP6 [::1] ::1 1 2\r\n",
    "a name": b"PROXY TCP4 localhost 5.6.7.8 1 2\r\n",
    "port above 65535": b"PROXY TCP4 1.2.3.4 5.6.7.8 65536 2\r\n",
    "port with a leading zero": b"PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n",
    "port with a sign": b"PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n",
    "negative port": b"PROXY TCP4 1.2.3.4 5.6.7.8 -1 2\r\n",
    "other digits": "PROXY TCP4 1.2.3.4 5.6.7.8 \u0661 2\r\n".encode(),
    "no end": b"PROXY UNKNOWN " + b"f" * MAX_V1,
    "an end one byte late": b"PROXY UNKNOWN ".ljust(MAX_V1 - 1, b"f") + b"\r\n",
    "version 1 in binary": v2(TCP4, FOUR, command=0x11),
    "version 3": v2(TCP4, FOUR, command=0x31),
    "unknown command": v2(TCP4, FOUR, command=0x22),
    "unknown family": v2(0x41, FOUR),
    "unknown transport": v2(0x13, FOUR),
    "family without transport": v2(0x10, FOUR),
    "UDP over IPv4": v2(UDP4, FOUR),
    "UDP over IPv6": v2(UDP6, SIX),
    "UNIX datagrams": v2(UNIX_DATAGRAM, bytes(216)),
    "no addresses": v2(TCP4),
    "addresses cut": v2(TCP4, FOUR[:-1]),
    "IPv4 addresses in IPv6": v2(TCP6, FOUR),
    "a short UNIX path": v2(UNIX, bytes(215)),
    "a TLV cut in its head": v2(TCP4, FOUR + b"\4\0"),
    "a TLV that reaches too far": v2(TCP4, FOUR + b"\4\0\2x"),
    "too long": v2(TCP4, FOUR + tlv(4, bytes(MAX_V2 - 16 - 12 - 3 + 1))),
    "too long, not come yet": v2(TCP4, b"", length=0xFFFF),
    "too long, LOCAL": v2(UNSPEC, b"", length=0xFFFF, command=0x20),
}


def read_in_pieces(data: bytes):
    """As a receiver would: one byte more each time, until there is an answer."""
    for size in range(len(data) + 1):
        found = read_proxy_header(data[:size])
        if found is not None:
            return found
    return None


@pytest.mark.parametrize(("data", "header"), ACCEPTED.values(), ids=ACCEPTED)
def test_header_is_read_and_what_follows_is_left(data, header):
    assert read_proxy_header(data) == (header, len(data))
    assert read_proxy_header(data + b"GET / HTTP/1.1\r\n\r\n") == (header, len(data))
    assert read_proxy_header(data + data) == (header, len(data))


@pytest.mark.parametrize(("data", "header"), ACCEPTED.values(), ids=ACCEPTED)
def test_header_is_incomplete_until_its_last_byte(data, header):
    """A receiver that answered early would leave the rest to the HTTP parser."""
    assert [read_proxy_header(data[:size]) for size in range(len(data))] == [None] * len(data)


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_what_could_be_read_in_two_ways_is_refused(data):
    with pytest.raises(ProxyRefused):
        read_proxy_header(data)
    with pytest.raises(ProxyRefused):
        read_in_pieces(data)


def test_sentence_shows_what_came_but_not_all_of_it():
    with pytest.raises(
        ProxyRefused, match=r"^the connection begins with 'GET / HTTP/1.1.*\.\.\.', not with a PROXY header$"
    ):
        read_proxy_header(b"GET / HTTP/1.1\r\n" + b"x" * 5000)


def test_first_byte_decides_whether_it_can_be_a_header():
    """A client that speaks something else is not kept waiting."""
    for data in (bytes([first]) for first in range(256)):
        if data in (b"P", b"\r"):
            assert read_proxy_header(data) is None
        else:
            with pytest.raises(ProxyRefused):
                read_proxy_header(data)


@pytest.mark.parametrize("family", [UNSPEC, TCP4, TCP6, UNIX, 0x10, 0x01, 0xFF])
def test_every_command_byte_is_known_or_refused(family):
    block = {TCP4: FOUR, TCP6: SIX, UNIX: bytes(216)}.get(family, b"")
    for command in range(256):
        data = v2(family, block, command=command)
        if command == 0x20 or (command == 0x21 and family in (UNSPEC, TCP4, TCP6, UNIX)):
            assert read_proxy_header(data) is not None
        else:
            with pytest.raises(ProxyRefused):
                read_proxy_header(data[:14])


ports = st.integers(0, 65535)
fours = st.ip_addresses(v=4).map(str)
sixes = st.ip_addresses(v=6).filter(lambda address: address.ipv4_mapped is None).map(str)
pairs = st.one_of(st.tuples(fours, fours), st.tuples(sixes, sixes))
tlvs = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40)), max_size=5)


def write_v1(hosts, client_port, server_port) -> bytes:
    family = "TCP6" if ":" in hosts[0] else "TCP4"
    return f"PROXY {family} {hosts[0]} {hosts[1]} {client_port} {server_port}\r\n".encode()


def write_v2(hosts, client_port, server_port, extras) -> bytes:
    family = TCP6 if ":" in hosts[0] else TCP4
    block = addresses(*hosts, client_port, server_port) + b"".join(tlv(*extra) for extra in extras)
    return v2(family, block)


@given(pairs, ports, ports, tlvs, st.binary(max_size=50))
def test_what_a_proxy_writes_is_what_is_read(hosts, client_port, server_port, extras, rest):
    expected = ProxyHeader((hosts[0], client_port), (hosts[1], server_port))
    for data in (write_v1(hosts, client_port, server_port), write_v2(hosts, client_port, server_port, extras)):
        assert read_proxy_header(data + rest) == (expected, len(data))
        assert read_in_pieces(data) == (expected, len(data))


@given(st.sampled_from([data for data, _ in ACCEPTED.values()]), st.data())
def test_mutated_headers_are_read_refused_or_waited_for(data, draw):
    """Nothing else is raised, and the answer does not depend on how the bytes were cut."""
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.integers(0, len(changed) - 1))
        changed[at : at + draw.draw(st.integers(0, 2))] = draw.draw(st.binary(max_size=2))
        if not changed:
            return
    check_any(bytes(changed))


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=300).map(lambda rest: SIGNATURE + rest)))
def test_any_bytes_are_read_refused_or_waited_for(data):
    check_any(data)


def check_any(data: bytes) -> None:
    try:
        whole = read_proxy_header(data)
    except ProxyRefused:
        with pytest.raises(ProxyRefused):
            read_in_pieces(data)
        return
    assert read_in_pieces(data) == whole
    if whole is None:
        assert len(data) < MAX_HEADER
    else:
        header, size = whole
        assert 0 < size <= min(len(data), MAX_HEADER)
        for end in (header.client, header.server):
            assert end is None or (socket.inet_pton(socket.AF_INET6 if ":" in end[0] else socket.AF_INET, end[0]))
