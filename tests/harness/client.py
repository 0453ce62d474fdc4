"""A raw HTTP/1.1 client: exact bytes out, whole responses in, every wait with a deadline."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass, field
from typing import Self

DEADLINE = 20.0  # seconds


@dataclass
class Answer:
    """One response as it stood on the wire, transfer coding removed."""

    status: int
    reason: str
    headers: dict[str, str]
    body: bytes
    trailers: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.body.decode()


class Client:
    """One connection. *address* is a port on 127.0.0.1, a (host, port) pair, or the path of a unix socket."""

    def __init__(self, address: int | tuple[str, int] | str, deadline: float = DEADLINE) -> None:
        if isinstance(address, str):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(deadline)
            self.socket.connect(address)
        else:
            where = ("127.0.0.1", address) if isinstance(address, int) else address
            self.socket = socket.create_connection(where, deadline)
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def get(self, path: str = "/", *headers: str) -> Answer:
        """GET *path*; *headers* are whole lines."""
        return self.request("GET", path, *headers)

    def request(self, method: str, path: str, *headers: str, body: bytes = b"") -> Answer:
        """A request with a known length, and its answer."""
        lines = [f"{method} {path} HTTP/1.1", "Host: test", *headers]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return self.read(method)

    def read(self, method: str = "GET") -> Answer:
        """The next response. Raises EOFError if the connection ends before one is complete."""
        head = self.read_until(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.[01] (\d{3}) ?(.*)", lines[0])
        assert match, f"not a status line: {lines[0]!r}"
        headers = _fields(lines[1:])
        status = int(match[1])
        answer = Answer(status, match[2], headers, b"")
        if method == "HEAD" or status in (204, 304) or status < 200:
            return answer
        if headers.get("transfer-encoding") == "chunked":
            answer.body, answer.trailers = self._read_chunks()
        elif "content-length" in headers:
            answer.body = self.read_exactly(int(headers["content-length"]))
        else:
            answer.body = self.read_to_end()
        return answer

    def read_until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            self._fill()
        found, _, self._buffer = self._buffer.partition(end)
        return found

    def read_exactly(self, size: int) -> bytes:
        pieces = [self._buffer[:size]]
        self._buffer = self._buffer[size:]
        missing = size - len(pieces[0])
        while missing:
            data = self.socket.recv(min(missing, 1 << 20))
            if not data:
                raise EOFError(f"the connection ended {missing} bytes before the end")
            pieces.append(data)
            missing -= len(data)
        return b"".join(pieces)

    def read_to_end(self) -> bytes:
        """Everything until the server closes. A reset raises ConnectionResetError."""
        pieces = [self._buffer]
        self._buffer = b""
        while data := self.socket.recv(1 << 20):
            pieces.append(data)
        return b"".join(pieces)

    def is_closed_by_peer(self) -> bool:
        """Wait for the server to close: True if it did so without sending anything more."""
        try:
            return not self._buffer and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _read_chunks(self) -> tuple[bytes, dict[str, str]]:
        pieces = []
        while size := int(self.read_until(b"\r\n").split(b";")[0], 16):
            pieces.append(self.read_exactly(size))
            assert self.read_exactly(2) == b"\r\n"
        lines = []
        while line := self.read_until(b"\r\n"):
            lines.append(line.decode("latin-1"))
        return b"".join(pieces), _fields(lines)

    def _fill(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise EOFError(f"the connection ended after {self._buffer!r}")
        self._buffer += data


def _fields(lines: list[str]) -> dict[str, str]:
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def get(address: int | tuple[str, int] | str, path: str = "/", *headers: str) -> Answer:
    """One GET on a connection of its own."""
    with Client(address) as client:
        return client.get(path, "Connection: close", *headers)
