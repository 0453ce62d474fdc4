"""From an address to a listening socket, and from the kernel's refusal to a sentence.

Every socket made here is non-blocking and close-on-exec. Nothing is bound half: where a step
fails, the socket is closed and the socket file removed before ListenError is raised.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from contextlib import suppress
from typing import TypeAlias

from prefork.errors import ListenError, reason_of
from prefork.net.address import Address, FdAddress, TCPAddress, UDPAddress, UnixAddress

# unix(7): sun_path has 108 bytes, of which a path needs one for its final NUL and an abstract
# name one for its leading NUL.
MAX_UNIX_PATH = 107  # bytes

# Below this the kernel wants CAP_NET_BIND_SERVICE, unless the administrator moved the line.
PRIVILEGED_BELOW = 1024
_PRIVILEGED_BELOW_FILE = "/proc/sys/net/ipv4/ip_unprivileged_port_start"

# As getaddrinfo gives them; the last is what a Python without IPv6 makes of an IPv6 address.
_SockAddr: TypeAlias = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]


def bind_tcp(address: TCPAddress, backlog: int, *, reuseport: bool = False) -> socket.socket:
    """Bind to the first thing *address* resolves to that this machine has."""
    resolved = _resolve(address)
    for family, sockaddr in resolved[:-1]:
        try:
            return _listen_tcp(family, sockaddr, backlog, reuseport)
        except OSError as exc:
            # `localhost` may resolve to ::1 where IPv6 is switched off.
            if exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise _tcp_error(address, exc) from exc
    try:
        return _listen_tcp(*resolved[-1], backlog, reuseport)
    except OSError as exc:
        raise _tcp_error(address, exc) from exc


def bind_udp(address: UDPAddress) -> socket.socket:
    """Bind for datagrams to the first thing *address* resolves to."""
    family, sockaddr = _resolve(address, socket.SOCK_DGRAM)[0]
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setblocking(False)
            sock.bind(sockaddr)
        except BaseException:
            sock.close()
            raise
    except OSError as exc:
        raise _tcp_error(address, exc) from exc
    return sock


def _resolve(
    address: TCPAddress | UDPAddress, kind: socket.SocketKind = socket.SOCK_STREAM
) -> list[tuple[socket.AddressFamily, _SockAddr]]:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=kind)
    # UnicodeError: a label of more than 63 bytes is refused before anyone is asked.
    except (socket.gaierror, UnicodeError) as exc:
        why = exc.strerror if isinstance(exc, socket.gaierror) else exc
        raise ListenError(f"cannot listen on {address}: the host does not resolve ({why})") from exc
    return [(family, sockaddr) for family, _, _, _, sockaddr in found]


def _listen_tcp(family: socket.AddressFamily, sockaddr: _SockAddr, backlog: int, reuseport: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Connections of a predecessor in TIME_WAIT must not keep us out.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuseport:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            # So that [::]:8000 and 0.0.0.0:8000 can be bound side by side, on any system alike.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind(sockaddr)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def bound_address(sock: socket.socket) -> TCPAddress:
    host, port, *rest = sock.getsockname()
    scope = rest[1] if len(rest) == 2 else 0
    return TCPAddress(f"{host}%{socket.if_indextoname(scope)}" if scope else host, port)


def _tcp_error(address: TCPAddress | UDPAddress, exc: OSError) -> ListenError:
    lowest = _lowest_free_port()
    if exc.errno == errno.EADDRINUSE:
        why = "it is in use, another process listens there"
    elif exc.errno in (errno.EACCES, errno.EPERM) and 0 < address.port < lowest:
        why = (
            f"port {address.port} is privileged for user {os.geteuid()}; choose one from {lowest} up, or allow it "
            f"with: setcap cap_net_bind_service=+ep {os.path.realpath(sys.executable)}"
        )
    elif exc.errno == errno.EADDRNOTAVAIL:
        why = f"no interface of this machine has the address {address.host}"
    elif exc.errno == errno.EAFNOSUPPORT:
        why = f"this machine does not speak the protocol of {address.host}"
    else:
        why = reason_of(exc)
    return _refused(address, why, exc)


def _lowest_free_port() -> int:
    try:
        with open(_PRIVILEGED_BELOW_FILE) as file:
            return int(file.read())
    except (OSError, ValueError):  # not Linux, or /proc is not there
        return PRIVILEGED_BELOW


def bind_unix(
    address: UnixAddress, backlog: int, mode: int | None, owner: tuple[int, int] | None
) -> tuple[socket.socket, SocketFile | None]:
    name = _sun_path(address)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    socket_file = None
    try:
        sock.setblocking(False)
        if not address.is_abstract:
            _clear_stale(address)
        sock.bind(name)
        if not address.is_abstract:
            socket_file = SocketFile(address.path)
            # Before listen(2), while every connect(2) is still refused: no moment with the wrong rights.
            _set_rights(address, mode, owner)
        sock.listen(backlog)
    except BaseException as exc:
        sock.close()
        if socket_file is not None:
            socket_file.unlink()
        if isinstance(exc, OSError) and not isinstance(exc, ListenError):
            raise _unix_error(address, exc) from exc
        raise
    return sock, socket_file


def _sun_path(address: UnixAddress) -> bytes:
    path = os.fsencode(address.path)
    length = len(path) - 1 if address.is_abstract else len(path)
    if length > MAX_UNIX_PATH:
        error = ListenError(
            f"cannot listen on {address}: the path has {length} bytes, a unix socket's at most {MAX_UNIX_PATH}"
        )
        error.errno = errno.ENAMETOOLONG
        raise error
    return b"\0" + path[1:] if address.is_abstract else path


def _clear_stale(address: UnixAddress) -> None:
    """Unlink what a server that is gone left behind; refuse to take anything else away."""
    try:
        status = os.lstat(address.path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise ListenError(f"cannot listen on {address}: the path exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address.path)
        except FileNotFoundError:  # its owner removed it between our two looks
            return
        except ConnectionRefusedError:
            os.unlink(address.path)
            return
        except PermissionError as exc:
            why = f"the path belongs to user {status.st_uid}, and we may not ask whether it is in use"
            raise _refused(address, why, exc) from exc
        # A full backlog, and another type of socket, are signs of life too.
        except OSError as exc:
            if exc.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
    in_use = ListenError(
        f"cannot listen on {address}: it is in use, a process listens there (the path belongs to user {status.st_uid})"
    )
    in_use.errno = errno.EADDRINUSE
    raise in_use


def _set_rights(address: UnixAddress, mode: int | None, owner: tuple[int, int] | None) -> None:
    try:
        if owner is not None:
            os.chown(address.path, *owner)
        if mode is not None:
            os.chmod(address.path, mode)
    except OSError as exc:
        wanted = [f"owner {owner[0]}:{owner[1]}"] if owner is not None else []
        wanted += [f"mode {mode:o}"] if mode is not None else []
        raise _refused(address, f"{' and '.join(wanted)} cannot be set ({reason_of(exc)})", exc) from exc


def _unix_error(address: UnixAddress, exc: OSError) -> ListenError:
    directory = os.path.dirname(os.path.abspath(address.path))
    if exc.errno == errno.EADDRINUSE:
        why = "it is in use, another process listens there"
    elif exc.errno == errno.ENOENT:
        why = f"the directory {directory} does not exist"
    elif exc.errno == errno.ENOTDIR:
        why = f"{directory} is not a directory"
    elif exc.errno in (errno.EACCES, errno.EPERM):
        why = f"user {os.geteuid()} may not create or remove a socket in {directory}"
    else:
        why = reason_of(exc)
    return _refused(address, why, exc)


def adopt(fd: int) -> socket.socket:
    """Our own copy of a listening socket; the original stays as it is, for whoever gave it."""
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError as exc:
        raise _refused(FdAddress(fd), "the descriptor is not open", exc) from exc
    if not is_socket:
        raise ListenError(f"cannot listen on fd://{fd}: it is not a socket")
    sock = socket.socket(fileno=os.dup(fd))
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise ListenError(f"cannot listen on fd://{fd}: it is a socket that does not listen for connections")
    sock.setblocking(False)
    return sock


class SocketFile:
    """A socket in the file system that we made, known by its inode and not by its name alone."""

    __slots__ = ("_identity", "path")

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)  # a later chdir must not change what is meant
        self._identity = _identity(self.path)

    def unlink(self) -> None:
        """Remove it, unless someone has put another file under the name."""
        with suppress(OSError):  # already gone, or the directory is no longer ours to write
            if _identity(self.path) == self._identity:
                os.unlink(self.path)


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _refused(address: Address, why: str, exc: OSError) -> ListenError:
    error = ListenError(f"cannot listen on {address}: {why}")
    error.errno = exc.errno
    return error
