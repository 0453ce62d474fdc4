"""What the tests of this room share: a driver that reads wire bytes to the end, and the same by h11."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import h11
import pytest
from hypothesis import settings

from prefork.protocol.connection import Connection
from prefork.protocol.events import Closed, Data, EndOfMessage, Headers, Refusal, Request, Wait
from prefork.protocol.limits import Limits

# The machine's speed is not what these tests are about.
settings.register_profile("protocol", deadline=None)
settings.load_profile("protocol")


@dataclass
class Message:
    """One request as it was read."""

    method: str
    target: bytes
    headers: Headers
    body: bytes = b""
    trailers: Headers = field(default_factory=list)
    is_complete: bool = False


@dataclass
class Reading:
    """All that was read of one connection, and how it ended."""

    messages: list[Message] = field(default_factory=list)
    end: Refusal | Closed | None = None

    @property
    def status(self) -> int | None:
        return self.end.status if isinstance(self.end, Refusal) else None


def as_h11_shows(headers: Headers) -> Headers:
    """h11 lower-cases this one value."""
    return [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in headers]


def read_by_us(pieces: Iterable[bytes], limits: Limits) -> Reading:
    """Feed *pieces* and the end of file to a Connection that answers every request with 204."""
    connection = Connection(limits)
    reading = Reading()
    for piece in (*pieces, b""):
        connection.receive_data(piece)
        while not isinstance(event := connection.next_event(), Wait):
            if isinstance(event, Request):
                reading.messages.append(Message(event.method, event.target, as_h11_shows(event.headers)))
            elif isinstance(event, Data):
                assert event.data
                reading.messages[-1].body += event.data
            elif isinstance(event, EndOfMessage):
                reading.messages[-1].trailers = event.trailers
                reading.messages[-1].is_complete = True
                connection.send_head(204, [], b"", False, date=b"")
                if connection.keep_alive:
                    connection.start_next_cycle()
            else:
                assert reading.end is None, "the end is told once"
                reading.end = event
    return reading


def read_by_h11(wire: bytes) -> list[Message]:
    """The requests in *wire* as a plain h11 server reads them. Raises h11.RemoteProtocolError."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(wire)
    connection.receive_data(b"")
    messages: list[Message] = []
    while True:
        event: Any = connection.next_event()
        if isinstance(event, h11.Request):
            messages.append(Message(event.method.decode(), event.target, list(event.headers)))
        elif isinstance(event, h11.Data):
            messages[-1].body += event.data
        elif isinstance(event, h11.EndOfMessage):
            messages[-1].trailers = list(event.headers)
            messages[-1].is_complete = True
            connection.send(h11.Response(status_code=204, headers=[]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is h11.MUST_CLOSE:
                return messages
            connection.start_next_cycle()
        else:
            return messages


@pytest.fixture(scope="session")
def read() -> Callable[[Iterable[bytes], Limits], Reading]:
    return read_by_us


@pytest.fixture(scope="session")
def h11_read() -> Callable[[bytes], list[Message]]:
    return read_by_h11
