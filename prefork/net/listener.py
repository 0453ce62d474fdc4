"""A bound, listening address and the sockets that stand for it.

It never accepts: that is the worker's part, or the master's under handoff. The process that opens
a listener owns it: only that process binds more sockets or unlinks a socket file. Its children
hold copies, and closing a copy hurts nobody, because a connection queued on a socket lives as
long as one process has that socket open. This is why, under reuseport, the master keeps every
slot's socket: the queue of a dead worker goes to the next one in its slot.
"""

from __future__ import annotations

import os
import socket

from prefork.errors import ListenError
from prefork.net.address import Address, FdAddress, TCPAddress, UDPAddress, UnixAddress
from prefork.net.binding import SocketFile, adopt, bind_tcp, bind_udp, bind_unix, bound_address
from prefork.net.sharing import Sharing, effective_sharing

# Sockets are kept by slot. Where all slots share one socket it is kept under this number.
_SHARED = 0


class Listener:
    """An address that is bound and listening, shared by the slots of one server."""

    __slots__ = ("_backlog", "_is_closed", "_owner", "_socket_file", "_sockets", "address", "sharing")

    def __init__(
        self,
        address: Address,
        sharing: Sharing,
        sockets: dict[int, socket.socket],
        *,
        backlog: int,
        socket_file: SocketFile | None = None,
    ) -> None:
        self.address = address  # as bound: numeric host, real port, absolute path
        self.sharing = sharing  # as it is, which for unix and fd is never reuseport
        self._sockets = sockets
        self._backlog = backlog
        self._socket_file = socket_file
        self._owner = os.getpid()
        self._is_closed = False

    @classmethod
    def open(
        cls,
        address: Address,
        *,
        sharing: Sharing,
        slots: int,
        backlog: int,
        unix_mode: int | None = None,
        unix_owner: tuple[int, int] | None = None,
        first: int = _SHARED,
    ) -> Listener:
        """Bind and listen. Raises ListenError with a sentence that says what stood in the way.

        *slots* sockets are made for reuseport, numbered from *first*, and one otherwise. *backlog* is in
        connections, for each socket. *unix_mode* and *unix_owner* (uid, gid) apply to a socket file.
        """
        sharing = effective_sharing(sharing, address)
        if isinstance(address, FdAddress):
            return cls(address, sharing, {_SHARED: adopt(address.fd)}, backlog=backlog)
        if isinstance(address, UDPAddress):
            sock = bind_udp(address)
            bound = bound_address(sock)
            return cls(UDPAddress(bound.host, bound.port), sharing, {_SHARED: sock}, backlog=backlog)
        if isinstance(address, UnixAddress):
            sock, socket_file = bind_unix(address, backlog, unix_mode, unix_owner)
            path = address if socket_file is None else UnixAddress(socket_file.path)
            return cls(path, sharing, {_SHARED: sock}, backlog=backlog, socket_file=socket_file)
        sock = bind_tcp(address, backlog)
        number = first if sharing is Sharing.REUSEPORT else _SHARED
        listener = cls(bound_address(sock), sharing, {number: sock}, backlog=backlog)
        if sharing is Sharing.REUSEPORT:
            listener._open_slots(sock, range(first, first + slots))
        return listener

    def socket_for(self, slot: int) -> socket.socket:
        """The socket *slot* accepts from; under reuseport a new slot's is bound now, by the owner only."""
        if self.sharing is not Sharing.REUSEPORT:
            slot = _SHARED
        if slot not in self._sockets:
            self._sockets[slot] = self._bind_slot(slot)
        return self._sockets[slot]

    def release(self, slot: int) -> None:
        """Close the socket of a slot that will not come back; what waits in its queue is reset."""
        if self.sharing is Sharing.REUSEPORT and slot in self._sockets:
            self._sockets.pop(slot).close()

    def close_others(self, slot: int) -> None:
        """In a child: close our copies of the other slots' sockets."""
        if self.sharing is Sharing.REUSEPORT:
            for other in [number for number in self._sockets if number != slot]:
                self._sockets.pop(other).close()

    def close(self) -> None:
        """Close every socket, and unlink the socket file if this process made it and it is still ours."""
        # Unlinked first: whoever finds the path must not find it dead.
        if self._socket_file is not None and self._owner == os.getpid():
            self._socket_file.unlink()
        self._socket_file = None
        self._is_closed = True
        while self._sockets:
            self._sockets.popitem()[1].close()

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """Every socket this process holds, in the order of their slots."""
        return tuple(self._sockets[slot] for slot in sorted(self._sockets))

    def fileno(self) -> int:
        """The descriptor of the one shared socket, -1 once closed: a master polls it under handoff."""
        if self.sharing is Sharing.REUSEPORT:
            raise ListenError(f"{self.address} has a socket for each of {len(self._sockets)} slots, not one for all")
        return self._sockets[_SHARED].fileno() if self._sockets else -1

    def _open_slots(self, first: socket.socket, slots: range) -> None:
        try:
            # The first socket was bound and listens without SO_REUSEPORT: the kernel has proved
            # that nobody else holds the port, even one who would share it. Joining the group only
            # now leaves no moment in which a second server could slip in. See socket(7).
            first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            for slot in slots:
                self.socket_for(slot)
        except BaseException:
            self.close()
            raise

    def _bind_slot(self, slot: int) -> socket.socket:
        if self._is_closed:
            raise ListenError(f"{self.address} is closed, and slot {slot} has no socket on it")
        if self._owner != os.getpid():
            raise ListenError(f"slot {slot} has no socket on {self.address}, and only process {self._owner} binds one")
        assert isinstance(self.address, TCPAddress)
        return bind_tcp(self.address, self._backlog, reuseport=True)
