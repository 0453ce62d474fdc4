"""The PROXY protocol, versions 1 and 2: what a proxy says of its client before the first byte of the client's own.

Nothing here does I/O or knows whom to trust. `read_proxy_header` is given all bytes
so far and says what they hold. Source: haproxy's doc/proxy-protocol.txt.

A header that two implementations could read differently is refused: one space, no
leading zero, one case, known families only, lengths that add up.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from dataclasses import dataclass

from prefork.errors import ProxyRefused

Endpoint = tuple[str, int]

# Section 2.1: the longest line, of two IPv6 addresses for UNKNOWN, with its CRLF.
MAX_V1 = 107  # bytes

# The length field allows 65551. nginx reads 4096 (NGX_PROXY_PROTOCOL_MAX_HEADER), enough for a client
# certificate among the TLVs; the specification asks senders to stay below 536.
MAX_V2 = 4096  # bytes

# What a reader has to buffer for either version.
MAX_HEADER = max(MAX_V1, MAX_V2)  # bytes

# Section 2.2. No line of text and no TLS record begins like this.
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"

_FIXED = struct.Struct("!12sBBH")  # signature, version and command, family and transport, length of the rest

_WORD = b"PROXY "
_PORT = rb"(0|[1-9][0-9]{0,4})"
_TCP4 = re.compile(rb"PROXY TCP4 ([0-9.]{7,15}) ([0-9.]{7,15}) %b %b\r\n" % (_PORT, _PORT))
_TCP6 = re.compile(rb"PROXY TCP6 ([0-9A-Fa-f:.]{2,45}) ([0-9A-Fa-f:.]{2,45}) %b %b\r\n" % (_PORT, _PORT))
_UNKNOWN = re.compile(rb"PROXY UNKNOWN( [ -~]*)?\r\n")

_LOCAL, _PROXY = 0x20, 0x21
_UNSPEC = 0x00
_UNIX = 0x31
_UNIX_SIZE = 216  # two paths of 108 bytes
_INTERNET = {0x11: 4, 0x21: 16}  # bytes of an address
_DATAGRAMS = frozenset({0x12, 0x22, 0x32})

# Of a wrong value, what a sentence shows at most.
_SHOWN = 60  # bytes


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """Who is at the other side of the proxy.

    *is_local*: the proxy speaks for itself (a health check), and the connection's own
    ends are the true ones. Otherwise *client* and *server* None mean that the proxy
    cannot tell (UNKNOWN, UNSPEC) or that they have no address (UNIX).
    """

    client: Endpoint | None
    server: Endpoint | None
    is_local: bool = False


LOCAL = ProxyHeader(None, None, is_local=True)
NOT_TOLD = ProxyHeader(None, None)


def read_proxy_header(data: bytes) -> tuple[ProxyHeader, int] | None:
    """The header that *data* begins with, and its size in bytes; None: not complete so far.

    Never None for *data* of `MAX_HEADER` bytes. Raises ProxyRefused, as soon as no
    further byte could make a header of it.
    """
    if data[:1] == SIGNATURE[:1]:
        return _read_v2(data)
    return _read_v1(data)


# ---- version 1: a line of text ----


def _read_v1(data: bytes) -> tuple[ProxyHeader, int] | None:
    if data[: len(_WORD)] != _WORD[: len(data)]:
        raise ProxyRefused(f"the connection begins with {_shown(data)}, not with a PROXY header")
    start = data[:MAX_V1]
    end = start.find(b"\n") + 1
    if not end:
        if len(data) >= MAX_V1:
            raise ProxyRefused(f"the PROXY line does not end within {MAX_V1} bytes")
        return None
    return _parse_line(start[:end]), end


def _parse_line(line: bytes) -> ProxyHeader:
    family: type[ipaddress.IPv4Address | ipaddress.IPv6Address]
    if match := _TCP4.fullmatch(line):
        family = ipaddress.IPv4Address
    elif match := _TCP6.fullmatch(line):
        family = ipaddress.IPv6Address
    elif _UNKNOWN.fullmatch(line):
        return NOT_TOLD
    else:
        raise ProxyRefused(f"the PROXY line {_shown(line)} is not 'PROXY TCP4|TCP6 client server port port' or UNKNOWN")
    client, server, client_port, server_port = (group.decode("ascii") for group in match.groups())
    return ProxyHeader(
        (_address(client, family), _port(client_port)),
        (_address(server, family), _port(server_port)),
    )


def _address(text: str, family: type[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> str:
    try:
        return plain_address(family(text))
    except ValueError:
        raise ProxyRefused(
            f"the PROXY line's {text!r} is not an {family.__name__.removesuffix('Address')} address"
        ) from None


def _port(text: str) -> int:
    port = int(text)
    if port > 65535:
        raise ProxyRefused(f"the PROXY line's port {port} is above 65535")
    return port


def plain_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """*address* as text, an IPv4 one that is dressed as IPv6 (::ffff:192.0.2.1) as what it is."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


# ---- version 2: binary ----


def _read_v2(data: bytes) -> tuple[ProxyHeader, int] | None:
    if data[: len(SIGNATURE)] != SIGNATURE[: len(data)]:
        raise ProxyRefused(f"the connection begins with {_shown(data)}, not with a PROXY header")
    _check_command(data[12:13])
    _check_family(data[12:14])
    if len(data) < _FIXED.size:
        return None
    _, command, family, length = _FIXED.unpack_from(data)
    size = _FIXED.size + length
    if size > MAX_V2:
        raise ProxyRefused(f"the PROXY header claims {size} bytes, {MAX_V2} are allowed")
    if len(data) < size:
        return None
    # "The receiver must accept this connection as valid and must use the real connection endpoints
    # and discard the protocol block including the family which is ignored."
    header = LOCAL if command == _LOCAL else _parse_block(family, data[_FIXED.size : size])
    return header, size


def _check_command(byte: bytes) -> None:
    if byte and byte[0] not in (_LOCAL, _PROXY):
        raise ProxyRefused(f"the PROXY header has version and command 0x{byte[0]:02x}: 0x20 and 0x21 are known")


def _check_family(two: bytes) -> None:
    if len(two) < 2 or two[0] == _LOCAL:
        return
    family = two[1]
    if family in _DATAGRAMS:
        raise ProxyRefused(f"the PROXY header tells of datagrams (0x{family:02x}), and this is a stream")
    if family not in (_UNSPEC, _UNIX, *_INTERNET):
        raise ProxyRefused(
            f"the PROXY header has family and transport 0x{family:02x}: 0x00, 0x11, 0x21, 0x31 are known"
        )


def _parse_block(family: int, block: bytes) -> ProxyHeader:
    if family == _UNSPEC:
        return NOT_TOLD  # what follows has no form that a receiver could check
    if family == _UNIX:
        _check_block(block, _UNIX_SIZE)
        return NOT_TOLD
    width = _INTERNET[family]
    addresses = 2 * width
    _check_block(block, addresses + 4)
    client_port, server_port = struct.unpack_from("!HH", block, addresses)
    client = plain_address(ipaddress.ip_address(block[:width]))
    server = plain_address(ipaddress.ip_address(block[width:addresses]))
    return ProxyHeader((client, client_port), (server, server_port))


def _check_block(block: bytes, least: int) -> None:
    """*block* holds *least* bytes of addresses, and TLVs whose lengths end where the header does."""
    if len(block) < least:
        raise ProxyRefused(f"the PROXY header has {len(block)} bytes of addresses, its family needs {least}")
    at = least
    while at < len(block):
        if len(block) < at + 3 or len(block) < (end := at + 3 + int.from_bytes(block[at + 1 : at + 3], "big")):
            raise ProxyRefused("a TLV reaches beyond the end of its PROXY header")
        at = end


def _shown(data: bytes) -> str:
    return repr(data if len(data) <= _SHOWN else data[:_SHOWN] + b"...")[1:]
