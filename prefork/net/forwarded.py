"""Whom to believe about the client, and what they say: Forwarded and X-Forwarded-*.

    forwarding = Forwarding(Trusted.parse("127.0.0.1, ::1, unix"), ["x-forwarded-for", "x-forwarded-proto"])
    is_trusted = forwarding.trusts(client)          # once per connection
    if is_trusted:
        client, scheme = forwarding.apply(client, scheme, headers)

Each proxy appends what it saw, so the right end is the nearest and the left end
may be invented by the client. Elements are read from the right: those of trusted
proxies are passed, and the first other one is the client. Whatever cannot be read
ends the walk, and nothing left of it counts.

Only the fields that are named are obeyed: a proxy that sets X-Forwarded-For usually
passes a client's own Forwarded on as it came. Host, port and path are not taken from
such fields; a proxy passes Host on, and the path's prefix is a setting.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, cast

from prefork.errors import ConfigError
from prefork.net.proxy import Endpoint, ProxyHeader, plain_address

EVERYBODY = "*"
UNIX = "unix"

FORWARDED = "forwarded"
FOR = "x-forwarded-for"
PROTO = "x-forwarded-proto"
X_FORWARDED = (FOR, PROTO)

# Some proxies tell the scheme of a WebSocket's URL. That a connection is for one is told by its request.
SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}

# More proxies than these do not stand in a row; a client that invents a list of them gains nothing.
MOST_HOPS = 32

# Answers for field values that came before, by the values. Those above this many bytes are not kept,
# so that the memory is bounded: about 1 MB a worker.
MOST_REMEMBERED = 1024
LONGEST_REMEMBERED = 512  # bytes

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Fields = Iterable[tuple[bytes, bytes]]


class Trusted:
    """Peers whose word counts: addresses, networks, `unix` for those on unix sockets, `*` for everybody."""

    def __init__(self, networks: Sequence[Network] = (), *, unix: bool = False, everybody: bool = False) -> None:
        self._networks = tuple(networks)
        self._unix = unix or everybody
        self._everybody = everybody

    @classmethod
    def parse(cls, words: str | Iterable[str]) -> Self:
        """From "127.0.0.1, 10.0.0.0/8, ::1, unix", or its items. Raises ConfigError."""
        items = [item.strip() for item in (words.split(",") if isinstance(words, str) else words)]
        items = [item for item in items if item]
        return cls(
            [_network(item) for item in items if item not in (EVERYBODY, UNIX)],
            unix=UNIX in items,
            everybody=EVERYBODY in items,
        )

    def __contains__(self, host: object) -> bool:
        """*host* is an address as text, or None for a peer on a unix socket."""
        if host is None:
            return self._unix
        if self._everybody:
            return True
        try:
            address = _plain(ipaddress.ip_address(str(host)))
        except ValueError:
            return False
        return any(address in network for network in self._networks)

    def __bool__(self) -> bool:
        return bool(self._networks) or self._unix


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not an address, a network, {UNIX} or {EVERYBODY}: {error}") from None
    # ::ffff:10.0.0.0/104 is meant for clients that are compared as IPv4.
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


def _plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What trusted proxies say of a request; None: nothing that counts. Port 0 of *client*: not told."""

    client: Endpoint | None = None
    scheme: str | None = None  # http or https


NOTHING = Forwarded()


class Block(Protocol):
    """What requests with equal fields share."""

    forwarded: object  # None: not looked for yet


class Forwarding:
    """Answers who the client of a request is, for requests whose peer is trusted."""

    def __init__(self, trusted: Trusted, names: Iterable[str] = (FOR, PROTO)) -> None:
        """*names*: `forwarded`, or some of `X_FORWARDED`; none: no field is obeyed. Raises ConfigError for both."""
        self._trusted = trusted
        self._names = {name.encode("ascii") for name in names}
        unknown = self._names - {name.encode("ascii") for name in (FORWARDED, *X_FORWARDED)}
        if unknown:
            raise ConfigError(f"{min(unknown).decode()!r} is not one of {', '.join((FORWARDED, *X_FORWARDED))}")
        self._is_standard = FORWARDED.encode() in self._names
        if self._is_standard and len(self._names) > 1:
            raise ConfigError("forwarded and x-forwarded-... exclude each other: which would win?")
        self._remembered: dict[tuple[tuple[bytes, bytes], ...], Forwarded] = {}
        self._peers: dict[str | None, bool] = {}  # whether they are trusted

    def trusts(self, client: Endpoint | None, proxied: ProxyHeader | None = None) -> bool:
        """Whether the fields of requests from *client* (None: on a unix socket) are obeyed: asked once per connection.

        *proxied* is the PROXY header the connection began with, if it did: then *client*
        is the one it told, and one it could not tell is nobody to trust.
        """
        if not self._names:
            return False
        if proxied is not None and not proxied.is_local and proxied.client is None:
            return False
        peer = None if client is None else client[0]
        is_trusted = self._peers.get(peer)
        if is_trusted is None:
            if len(self._peers) >= MOST_REMEMBERED:
                self._peers.clear()
            is_trusted = self._peers[peer] = peer in self._trusted
        return is_trusted

    def apply(
        self, client: Endpoint | None, scheme: str, headers: Fields, block: Block | None = None
    ) -> tuple[Endpoint | None, str]:
        """Client and scheme of a request whose peer is trusted; *client* and *scheme* are the connection's own.

        *block* keeps what *headers* say: requests that share it have equal ones.
        """
        told = None if block is None else cast("Forwarded | None", block.forwarded)
        if told is None:
            told = self.resolve(headers)
            if block is not None:
                block.forwarded = told
        return told.client or client, told.scheme or scheme

    def resolve(self, headers: Fields) -> Forwarded:
        """Everything that the named fields of *headers* say. The peer must be trusted."""
        names = self._names
        found = tuple([field for field in headers if field[0] in names])
        if not found:
            return NOTHING
        told = self._remembered.get(found)
        if told is None:
            told = self._resolve(found)
            if sum(len(value) for _, value in found) <= LONGEST_REMEMBERED:
                if len(self._remembered) >= MOST_REMEMBERED:
                    self._remembered.clear()
                self._remembered[found] = told
        return told

    def _resolve(self, found: Fields) -> Forwarded:
        values: dict[bytes, str] = {}
        for name, value in found:
            text = value.decode("latin-1")
            values[name] = f"{values[name]},{text}" if name in values else text
        if self._is_standard:
            return self._resolve_standard(values[b"forwarded"])
        return self._resolve_x({name.decode(): value for name, value in values.items()})

    # ---- Forwarded ----

    def _resolve_standard(self, value: str) -> Forwarded:
        """RFC 7239, section 4. What the element of the client's own hop says is what counts."""
        told, client = NOTHING, None
        for element in _from_the_right(value):
            pairs = _parse_element(element)
            if pairs is None:
                break
            node = _parse_node(pairs.get("for", ""), bare_ipv6=False)
            # The element was added by a trusted hop, even where it does not name its client.
            client = node or client
            told = Forwarded(client, _scheme(pairs.get("proto")))
            if node is None or node[0] not in self._trusted:
                break
        return told

    # ---- X-Forwarded-* ----

    def _resolve_x(self, values: dict[str, str]) -> Forwarded:
        nodes = values[FOR].split(",") if FOR in values else []
        client, depth = self._walk(nodes)
        told = {name: _pick(value.split(","), depth, len(nodes)) for name, value in values.items()}
        return Forwarded(client, _scheme(told.get(PROTO)))

    def _walk(self, nodes: list[str]) -> tuple[Endpoint | None, int]:
        """The client, and its place from the right: 0 is what the peer itself appended."""
        client, depth = None, 0
        for place, text in enumerate(reversed(nodes[-MOST_HOPS:])):
            node = _parse_node(text.strip(" \t"), bare_ipv6=True)
            if node is None:
                break
            client, depth = node, place
            if node[0] not in self._trusted:
                break
        return client, depth


def _pick(members: list[str], depth: int, hops: int) -> str:
    """The client's member of a list that has grown along with X-Forwarded-For; otherwise the one the peer wrote."""
    place = depth if len(members) == hops else 0
    return members[-1 - place].strip(" \t")


def _from_the_right(value: str) -> Iterator[str]:
    """The elements of a Forwarded value, last one first.

    From this side a quote that a client left open cannot swallow what proxies appended to it.
    """
    in_quotes = False
    end = len(value)
    count = 0
    for at in range(len(value) - 1, -1, -1):
        if value[at] == '"':
            in_quotes = not in_quotes
        elif value[at] == "," and not in_quotes:
            yield value[at + 1 : end].strip(" \t")
            end = at
            count += 1
            if count == MOST_HOPS:
                return
    yield value[:end].strip(" \t")


_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# A backslash is nowhere needed in a node, a host or a scheme, and turns the sense of a quote read from the right.
_PAIR = re.compile(rf'({_TOKEN})=(?:({_TOKEN})|"([^"\\]*)")')


def _parse_element(element: str) -> dict[str, str] | None:
    """The pairs of one element, names in lower case; None if it is malformed or says something twice."""
    pairs: dict[str, str] = {}
    at = 0
    while match := _PAIR.match(element, at):
        name = match[1].lower()
        if name in pairs:
            return None
        pairs[name] = match[2] if match[2] is not None else match[3]
        at = match.end()
        if at == len(element):
            return pairs
        if element[at] != ";":
            return None
        at += 1
    return None


_NODE = re.compile(r"(?:([0-9.]+)|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{1,5}|_[0-9A-Za-z._\-]+))?")
_BARE_IPV6 = re.compile(r"[0-9A-Fa-f:.]+")


def _parse_node(text: str, *, bare_ipv6: bool) -> Endpoint | None:
    """Address and port (0: not told) of RFC 7239, section 6; None for `unknown`, `_hidden` and what is malformed."""
    match = _NODE.fullmatch(text)
    if match is not None:
        host, port = match[1] or match[2], match[3]
        number = int(port) if port and not port.startswith("_") else 0
        kind: type[ipaddress.IPv4Address | ipaddress.IPv6Address]
        kind = ipaddress.IPv4Address if match[1] else ipaddress.IPv6Address
    elif bare_ipv6 and _BARE_IPV6.fullmatch(text):
        host, number, kind = text, 0, ipaddress.IPv6Address
    else:
        return None
    try:
        return (plain_address(kind(host)), number) if number <= 65535 else None
    except ValueError:
        return None


def _scheme(text: str | None) -> str | None:
    return SCHEMES.get((text or "").lower())
