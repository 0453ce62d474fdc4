"""What is read from an accepted socket before its protocol begins.

A PROXY header, where proxies send one; and on a port with TLS the first byte, because who
speaks plain HTTP to it would otherwise see nothing but a closed connection. Connections
that need neither never come here.

What belongs to the protocol stays in the socket: bytes are looked at with MSG_PEEK, and
taken only once they are known to be a header's. As long as a PROXY header is
incomplete, all that has come belongs to it, so nothing is looked at twice in vain.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from prefork.errors import ProxyRefused, reason_of
from prefork.net.accepted import Accepted
from prefork.net.forwarded import Trusted
from prefork.net.proxy import MAX_HEADER, ProxyHeader, read_proxy_header
from prefork.worker.deadlines import LINGER, Sweep
from prefork.worker.service import Service, endpoint

log = logging.getLogger("prefork")

# The content type of the first record of every client of TLS 1.0 to 1.3 (RFC 8446, section 5.1).
TLS_HANDSHAKE = 0x16

PLAIN_ON_TLS = b"this port speaks HTTPS, and what came is not TLS: use a URL that begins with https://\n"

# What is read at a time from a client that was refused and goes on sending, in bytes.
DISCARD_SIZE = 64 * 1024


class Greeter:
    """Gives accepted connections to *welcome*, with their origin, once their protocol can begin."""

    def __init__(
        self,
        service: Service,
        welcome: Callable[[Accepted, ProxyHeader | None], None],
        *,
        expects_tls: bool,
        proxies: Trusted | None = None,
    ) -> None:
        """*proxies*: who must send a PROXY header; None, and nobody may."""
        self.service = service
        self.welcome = welcome
        self.expects_tls = expects_tls
        self.proxies = proxies
        self.greetings: set[Greeting] = set()
        self._sweep = Sweep(service.loop, self.greetings, lambda: None)

    def greet(self, connection: Accepted) -> None:
        """Ours from now on; it does not block."""
        if self.proxies is not None and not self._is_trusted(connection):
            self.discard(connection)
            return
        greeting = Greeting(self, connection)
        self.greetings.add(greeting)
        greeting.proceed()

    def _is_trusted(self, connection: Accepted) -> bool:
        assert self.proxies is not None
        peer = endpoint(connection.peer)
        if (peer and peer[0]) in self.proxies:
            return True
        log.warning(
            "closed a connection of %s, who is not among those that send PROXY headers (--proxy-allow-ips)",
            _describe(peer),
        )
        return False

    def discard(self, connection: Accepted) -> None:
        """Close one that was never served."""
        connection.close()
        self.service.slot.opened += 1
        self.service.count_closed()
        self.service.something_ended.set()

    def drain(self) -> None:
        """Close those that have not begun."""
        for greeting in list(self.greetings):
            if not greeting.is_refused:
                greeting.end()

    def close(self) -> None:
        for greeting in list(self.greetings):
            greeting.end()
        self._sweep.close()


class Greeting:
    """One connection, until its protocol begins or it is closed."""

    __slots__ = ("_connection", "_greeter", "_header", "_is_watched", "_origin", "_step", "deadline")

    def __init__(self, greeter: Greeter, connection: Accepted) -> None:
        self.deadline = greeter.service.loop.time() + greeter.service.timeouts.head
        self._greeter = greeter
        self._connection = connection
        self._header = b""  # of PROXY, as far as it has been taken
        self._origin: ProxyHeader | None = None
        self._is_watched = False
        self._step: Callable[[], None] = self._look_for_tls if greeter.proxies is None else self._read_proxy_header

    @property
    def is_refused(self) -> bool:
        """It has its answer; what remains is to close so that the answer survives."""
        return self._step == self._discard

    def proceed(self) -> None:
        """Do what can be done with what has come; each step takes the next one's place until there is none."""
        try:
            while self in self._greeter.greetings:
                self._step()
        except (BlockingIOError, InterruptedError):
            self._watch()
        except ProxyRefused as error:
            log.warning("closed a connection of %s: %s", _describe(self._client), error)
            self.end()
        except OSError as error:  # it left
            log.debug("a connection was lost before it began: %s", reason_of(error))
            self.end()

    def on_deadline(self, now: float) -> None:
        self.end()

    def end(self) -> None:
        """Close the connection, which was not served."""
        self._leave()
        self._greeter.discard(self._connection)

    # ---- steps: each raises BlockingIOError while what it needs has not come ----

    def _read_proxy_header(self) -> None:
        seen = self._peek(MAX_HEADER - len(self._header))
        found = read_proxy_header(self._header + seen)
        if found is None:
            self._header += self._connection.recv(len(seen))
            return
        self._origin, size = found
        self._connection.recv(size - len(self._header))
        if self._greeter.expects_tls:
            self._step = self._look_for_tls
        else:
            self._welcome()

    def _look_for_tls(self) -> None:
        if self._peek(1)[0] == TLS_HANDSHAKE:
            self._welcome()
        else:
            self._refuse_plain()

    def _discard(self) -> None:
        if not self._connection.recv(DISCARD_SIZE):
            self.end()

    # ---- what steps are made of ----

    @property
    def _client(self) -> tuple[str, int] | None:
        if self._origin is not None and not self._origin.is_local:
            return self._origin.client
        return endpoint(self._connection.peer)

    def _peek(self, most: int) -> bytes:
        seen = self._connection.recv(most, socket.MSG_PEEK)
        if not seen:
            raise ConnectionResetError(0, "it ended before it began")
        return seen

    def _welcome(self) -> None:
        self._leave()
        self._greeter.welcome(self._connection, self._origin)

    def _refuse_plain(self) -> None:
        """Answer in the clear. To close now would send RST and could destroy the answer (RFC 9112, 9.6)."""
        service = self._greeter.service
        client = self._client  # asked now: a socket whose peer has left does not know it any more
        log.info("refused a client of %s with 400: it did not speak TLS", _describe(client))
        self._connection.send(_plain_answer(service))  # a new socket's buffer has room for it
        self._connection.shutdown(socket.SHUT_WR)
        service.slot.begun += 1
        service.slot.requests += 1
        if service.access_log is not None:
            service.access_log.log(client, "-", b"-", "-", 400, len(PLAIN_ON_TLS), 0.0, service.worker_id)
        self._step = self._discard
        self.deadline = service.loop.time() + LINGER

    def _watch(self) -> None:
        if not self._is_watched:
            self._is_watched = True
            self._greeter.service.loop.add_reader(self._connection.fileno(), self.proceed)

    def _leave(self) -> None:
        """It is no greeting any more; its descriptor is free for a transport."""
        if self._is_watched:
            self._greeter.service.loop.remove_reader(self._connection.fileno())
        self._greeter.greetings.discard(self)


def _plain_answer(service: Service) -> bytes:
    server = b"server: %b\r\n" % service.server_header if service.server_header else b""
    return (
        b"HTTP/1.1 400 Bad Request\r\n%b%bcontent-type: text/plain; charset=utf-8\r\n"
        b"content-length: %d\r\nconnection: close\r\n\r\n%b"
    ) % (service.date, server, len(PLAIN_ON_TLS), PLAIN_ON_TLS)


def _describe(client: tuple[str, int] | None) -> str:
    return "a client without an address" if client is None else f"{client[0]} port {client[1]}"
