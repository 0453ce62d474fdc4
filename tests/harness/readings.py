"""One wire read by several readers: both of our cycles, a parser that remembers nothing yet, and h11.

`Reader.read` feeds pieces to a connection, answers what is asked, and returns all that
was said on both sides. `difference` says, in a sentence, where readers disagree.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import h11

import prefork

ROOM = "prefork.protocol"
DATE = b"date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"

Fields = tuple[tuple[bytes, bytes], ...]


@dataclass
class Message:
    """One request as it was read."""

    method: str
    target: bytes
    version: str
    headers: Fields
    keep_alive: bool
    facts: tuple[Any, ...] = ()  # what only our own readers know
    body: bytes = b""
    trailers: Fields = ()
    is_complete: bool = False


@dataclass
class Reading:
    """All that was read of one connection, what was answered, and how it ended."""

    messages: list[Message] = field(default_factory=list)
    answers: bytes = b""
    refusal: bytes = b""  # the answer to what was refused
    end: tuple[Any, ...] = ()
    states: list[tuple[Any, ...]] = field(default_factory=list)  # after each piece

    @property
    def complete(self) -> list[Message]:
        return [message for message in self.messages if message.is_complete]


class Reader:
    """One copy of the protocol room."""

    def __init__(self, modules: dict[str, Any]) -> None:
        self._events = modules["events"]
        self._connection = modules["connection"].Connection
        self._full = modules["full"].always_full
        self._field_lines = modules["response"].field_lines
        self.limits = modules["limits"].Limits()

    def read(
        self, pieces: Iterable[bytes], limits: Any = None, *, full: bool = False, script: int = 0, early: bool = False
    ) -> Reading:
        """Feed *pieces* and the end of file, and answer in the ways that *script* picks.

        *full* forces h11's cycle for every request. *early* lets some answers begin before
        the request is complete; what they say may then depend on where the pieces end.
        """
        choice = {"choose": self._full} if full else {}
        connection = self._connection(limits or self.limits, **choice)
        return _Dialogue(connection, self._events, self._field_lines, script, full=full, early=early).run(pieces)


def warm() -> Reader:
    """The room as this process has been using it."""
    return Reader({name: importlib.import_module(f"{ROOM}.{name}") for name in _PARTS})


def fresh() -> Reader:
    """Another copy of the room, which has seen nothing yet. Costs some milliseconds."""
    ours = _take_room()
    try:
        return Reader({name: importlib.import_module(f"{ROOM}.{name}") for name in _PARTS})
    finally:
        _take_room()
        sys.modules.update(ours)
        prefork.protocol = ours[ROOM]  # type: ignore[attr-defined]


_PARTS = ("events", "limits", "full", "response", "connection")


def _take_room() -> dict[str, Any]:
    importlib.import_module(f"{ROOM}.connection")
    names = [name for name in sys.modules if name == ROOM or name.startswith(f"{ROOM}.")]
    return {name: sys.modules.pop(name) for name in names}


class _Dialogue:
    """A server that answers in five ways, one after the other."""

    def __init__(self, connection: Any, events: Any, field_lines: Any, script: int, *, full: bool, early: bool) -> None:
        self._full = full
        self._field_lines = field_lines
        self._connection = connection
        self._events = events
        self._script = script
        self._early = early
        self._is_over = False
        self._has_moved_on = False  # to the next cycle, with the answer
        self.reading = Reading()

    def run(self, pieces: Iterable[bytes]) -> Reading:
        http = self._connection
        for piece in (*pieces, b""):
            if piece and not self._full:
                # The short way in, which owners take for the ordinary request.
                whole = http.receive_request(piece)
                while whole is not None:
                    request, body = whole
                    self._take(request)
                    if body:
                        self._take(self._events.Data(body))
                    self._take(self._events.EndOfMessage())
                    whole = http.next_request()
            else:
                http.receive_data(piece)
            while not self._is_over and not isinstance(event := http.next_event(), self._events.Wait):
                self._take(event)
            self.reading.states.append((http.buffered, http.keep_alive, http.wants_continue, http.is_idle))
            if self._is_over:
                break
        return self.reading

    def _take(self, event: Any) -> None:
        events, reading = self._events, self.reading
        if isinstance(event, events.Request):
            reading.messages.append(_message(event))
            if self._early:
                self._answer_early()
        elif isinstance(event, events.Data):
            assert event.data, "a piece of body is never empty"
            reading.messages[-1].body += bytes(event.data)
        elif isinstance(event, events.EndOfMessage):
            reading.messages[-1].trailers = tuple(event.trailers)
            reading.messages[-1].is_complete = True
            self._answer()
        elif isinstance(event, events.Refusal):
            reading.end = ("refused", event.status, event.reason)
            reading.refusal = self._connection.refuse(event, date=DATE)
            self._is_over = True
        else:
            reading.end = ("closed", event.clean)
            self._is_over = True

    @property
    def _way(self) -> int:
        return (self._script + len(self.reading.messages)) % 5

    def _answer_early(self) -> None:
        http = self._connection
        if self._way == 0:
            self.reading.answers += http.send_continue()
        elif self._way == 1:
            self._say(200, [(b"x-early", b"1")], b"early", False)
        elif self._way == 2:
            self._say(200, [], b"early", True)

    def _answer(self) -> None:
        http, way = self._connection, self._way
        body = b"%d bytes" % len(self.reading.messages[-1].body)
        if http.response_complete:
            pass
        elif self._early and way == 2:
            self.reading.answers += http.send_body(body, False)
        elif way == 0:
            self._say(204, [(b"X-Way", b"none")], b"", False)
        elif way == 3:
            self._say(200, [(b"Content-Length", b"%d" % len(body))], b"", True)
            self.reading.answers += http.send_body(body, False)
        elif way == 4:
            self._say(404, [(b"content-type", b"text/plain")], b"", True)
            self.reading.answers += http.send_body(body, True) + http.send_body(b"", False)
        else:
            self._say(200, [], body, False)
        if self._has_moved_on:
            self._has_moved_on = False
        elif http.keep_alive:
            http.start_next_cycle()
        else:
            self.reading.end = ("last",)
            self._is_over = True

    def _say(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes, more: bool) -> None:
        http, lines = self._connection, self._field_lines(headers)
        # The short way out. The other one is taken where it does not lead, and by the full cycle.
        if not (more or self._full or self._early) and (whole := http.send_whole(status, lines, body, date=DATE)):
            self.reading.answers += whole
            self._has_moved_on = True
        else:
            first, rest = http.send_head(status, lines, body, more, date=DATE)
            self.reading.answers += first + rest


def _message(request: Any) -> Message:
    facts = (
        request.path,
        request.query,
        request.content_length,
        bool(request.chunked),
        bool(request.expect_continue),
        request.upgrade,
        bool(request.has_body),
    )
    headers = tuple((bytes(name), bytes(value)) for name, value in request.headers)
    return Message(request.method, bytes(request.target), request.version, headers, bool(request.keep_alive), facts)


def read_by_h11(wire: bytes, count: int) -> list[Message]:
    """The first *count* complete requests in *wire*, or as many as plain h11 reads before it errs or waits."""
    messages: list[Message] = []
    while len(messages) < count:
        while wire.startswith(b"\r\n"):  # h11 does not skip the empty lines that RFC 9112 section 2.2 wants skipped
            wire = wire[2:]
        # A connection each: what follows one request may be broken, and h11 would look at it too early.
        one = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        one.receive_data(wire)
        message = _read_one(one)
        if message is None:
            break
        messages.append(message)
        wire = one.trailing_data[0]
    return messages


def _read_one(one: h11.Connection) -> Message | None:
    message: Message | None = None
    try:
        while True:
            event: Any = one.next_event()
            if isinstance(event, h11.Request):
                headers = tuple(event.headers)
                version = event.http_version.decode()
                message = Message(event.method.decode(), event.target, version, headers, keep_alive=True)
            elif isinstance(event, h11.Data) and message is not None:
                message.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage) and message is not None:
                message.trailers = tuple(event.headers)
                message.is_complete = True
                one.send(h11.Response(status_code=204, headers=[]))
                one.send(h11.EndOfMessage())
                message.keep_alive = one.our_state is not h11.MUST_CLOSE
                return message
            else:
                return None
    except h11.RemoteProtocolError:
        return None


def difference(
    reader: Reader, wire: bytes, pieces: Sequence[bytes], limits: Any = None, script: int = 0, *, early: bool = False
) -> str | None:
    """Where our two cycles, other cuts or h11 disagree about *wire*; None if nowhere."""
    read: Callable[..., Reading] = reader.read
    ours = read(pieces, limits, script=script, early=early)
    full = read(pieces, limits, script=script, early=early, full=True)
    if ours != full:
        return f"the cycles differ: {_first_difference(ours, full)}"
    if not early and len(pieces) > 1:
        whole = read([wire], limits, script=script)
        if said(whole) != said(ours):
            return f"the cut matters: {_first_difference(whole, ours)}"
    return against_h11(wire, ours)


def against_h11(wire: bytes, ours: Reading) -> str | None:
    """What *ours* accepted, h11 has to accept and read alike. Trailing what was refused is nobody's business."""
    complete = ours.complete
    theirs = read_by_h11(wire, len(complete))
    if len(theirs) < len(complete):
        return f"h11 refuses request {len(theirs) + 1}, which we have read as {complete[len(theirs)]}"
    for number, (our, their) in enumerate(zip(complete, theirs, strict=True), 1):
        if _comparable(our) != _comparable(their):
            return f"request {number}: we read {_comparable(our)}, h11 {_comparable(their)}"
    return None


def said(reading: Reading) -> tuple[Any, ...]:
    """All of *reading* that may not depend on where its pieces ended.

    Which of two faults is met first may, and so may how much of a body was told before its fault.
    """
    return reading.complete, reading.answers, reading.end[:1] if reading.end[0] == "refused" else reading.end


def _comparable(message: Message) -> tuple[Any, ...]:
    # h11 lower-cases this one value, and never keeps a connection of 1.0 alive.
    headers = tuple((n, v.lower() if n == b"transfer-encoding" else v) for n, v in message.headers)
    if message.version == "1.0" and not message.target.startswith((b"/", b"*")):
        # For us the authority of an absolute target stands for a Host that is not there.
        headers = tuple((n, v) for n, v in headers if n != b"host")
    keep_alive = message.keep_alive if message.version == "1.1" else None
    return (message.method, message.target, message.version, headers, message.body, message.trailers, keep_alive)


def _first_difference(one: Reading, other: Reading) -> str:
    for name in ("messages", "end", "answers", "refusal", "states"):
        if getattr(one, name) != getattr(other, name):
            return f"{name} {getattr(one, name)!r} and {getattr(other, name)!r}"
    return "nothing"
