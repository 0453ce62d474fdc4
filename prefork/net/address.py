"""Addresses to bind, from text to values and back. No socket is opened and no name resolved here.

    127.0.0.1:8000   localhost:8000   [::1]:8000   the same with tcp:// in front
    :8000            every IPv4 interface (0.0.0.0)
    8000             this machine only (127.0.0.1)
    unix:/run/app.sock   unix:app.sock   unix:@name (Linux's abstract namespace)
    fd://3           a listening socket we were started with
    udp://127.0.0.1:8000   udp://:8000   datagrams, for servers that are not HTTP

An address that exists is valid, and `parse_address(str(address)) == address`.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import TypeAlias

from prefork.errors import AddressError

FORMS = "host:port, [ipv6]:port, :port, unix:/path, unix:@name or fd://number"

HIGHEST_PORT = 65535
# A descriptor is a C int.
HIGHEST_FD = 2**31 - 1

EVERY_INTERFACE = "0.0.0.0"
# A bare port must not open a machine to its network by accident: the same as Django's runserver.
THIS_MACHINE = "127.0.0.1"

# RFC 1123 2.1, plus the underscore that container networks use in their names.
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_LOOKS_LIKE_IPV4 = re.compile(r"[0-9.]+")
_NUMBER = re.compile(r"[0-9]{1,10}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class TCPAddress:
    """A host (name, IPv4, or IPv6 without its brackets) and a port; port 0 lets the kernel choose."""

    host: str
    port: int

    def __post_init__(self) -> None:
        _check_host(self.host)
        if not 0 <= self.port <= HIGHEST_PORT:
            raise AddressError(f"port {self.port} is out of range: 0 to {HIGHEST_PORT} are allowed")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def url(self, scheme: str) -> str:
        """What a person would type: `http://127.0.0.1:8000`."""
        return f"{scheme}://{self}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A path in the file system, or `@name` in the abstract namespace."""

    path: str

    def __post_init__(self) -> None:
        if self.path in ("", "@"):
            raise AddressError("a unix address needs a path: unix:/path or unix:@name")
        if "\0" in self.path:
            raise AddressError(f"a unix path cannot hold a NUL: {self.path!r}")

    @property
    def is_abstract(self) -> bool:
        return self.path.startswith("@")

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def url(self, scheme: str) -> str:
        """The same as `str`: a unix socket has no URL that anyone agrees on."""
        return str(self)


@dataclass(frozen=True, slots=True)
class FdAddress:
    """A listening socket that whoever started us left open under this number."""

    fd: int

    def __post_init__(self) -> None:
        if not 0 <= self.fd <= HIGHEST_FD:
            raise AddressError(f"descriptor {self.fd} is out of range: 0 to {HIGHEST_FD} are allowed")

    def __str__(self) -> str:
        return f"fd://{self.fd}"

    def url(self, scheme: str) -> str:
        """The same as `str`: the address behind it is not ours to know."""
        return str(self)


@dataclass(frozen=True, slots=True)
class UDPAddress:
    """A host and a port for datagrams."""

    host: str
    port: int

    def __post_init__(self) -> None:
        TCPAddress(self.host, self.port)  # the same rules

    def __str__(self) -> str:
        return f"udp://{TCPAddress(self.host, self.port)}"

    def url(self, scheme: str) -> str:
        """The same as `str`: HTTP is not spoken here."""
        return str(self)


Address: TypeAlias = TCPAddress | UnixAddress | FdAddress | UDPAddress


def parse_address(text: str) -> Address:
    """The address *text* spells. Raises AddressError, which names the text and the forms there are."""
    try:
        if text.startswith("unix:"):
            return UnixAddress(text.removeprefix("unix:"))
        if text.startswith("fd://"):
            return FdAddress(_number(text.removeprefix("fd://"), "descriptor"))
        if text.startswith("udp://"):
            tcp = _parse_tcp(text.removeprefix("udp://"))
            return UDPAddress(tcp.host, tcp.port)
        return _parse_tcp(text.removeprefix("tcp://"))
    except AddressError as error:
        raise AddressError(f"{text!r} is not an address to bind: {error}") from None


def absolute(address: Address) -> Address:
    """*address*, so that it means the same after a change of the current directory, and in another process."""
    if isinstance(address, UnixAddress) and not address.is_abstract:
        return UnixAddress(os.path.abspath(address.path))
    return address


def _parse_tcp(text: str) -> TCPAddress:
    if scheme := _SCHEME.match(text):
        raise AddressError(f"{scheme[0]} is not known here; write {FORMS}")
    if _NUMBER.fullmatch(text):
        return TCPAddress(THIS_MACHINE, _number(text, "port"))
    host, colon, port = text.rpartition(":")
    if not colon:
        raise AddressError(f"it has no port; write {FORMS}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            raise AddressError(f"only an IPv6 address goes into brackets, {host!r} is none")
    elif ":" in host:
        raise AddressError("an IPv6 address goes into brackets, as in [::1]:8000")
    return TCPAddress(host or EVERY_INTERFACE, _number(port, "port"))


def _check_host(host: str) -> None:
    if ":" in host:
        _check_ip(host, ipaddress.IPv6Address, "IPv6")
    elif _LOOKS_LIKE_IPV4.fullmatch(host):
        _check_ip(host, ipaddress.IPv4Address, "IPv4")
    elif not _NAME.fullmatch(host):
        raise AddressError(f"{host!r} is neither an IP address nor a host name")


def _check_ip(host: str, kind: type[ipaddress.IPv4Address | ipaddress.IPv6Address], name: str) -> None:
    try:
        kind(host)
    except ValueError:
        raise AddressError(f"{host!r} is not an {name} address") from None


def _number(text: str, what: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise AddressError(f"{text!r} is not a {what}: digits are allowed")
    return int(text)
