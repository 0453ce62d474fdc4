"""The opening handshake of a WebSocket (RFC 6455, section 4.2): a checked request in, a 101 or a refusal out.

Nothing here needs the WebSocket library, so a server without the extra can still
tell what was asked of it, and say what it lacks. What follows the 101 is the
business of `protocol.session`, which `load_sessions` imports when it is first needed.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefork.errors import MissingExtra, PreforkError, ResponseError
from prefork.protocol.events import Headers, Request
from prefork.protocol.head import TOKEN, shown
from prefork.protocol.response import field_lines

if TYPE_CHECKING:
    from types import ModuleType

# Section 1.3 picked a value that no server could echo by accident.
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

VERSION = b"13"

_TOKEN = re.compile(TOKEN)

# 16 bytes in base64: the last of 24 characters is padding, as is the one before it.
_KEY = re.compile(rb"[A-Za-z0-9+/]{21}[AQgw]==")

# Fields of the 101 that the handshake itself decides.
_OURS = frozenset(
    {
        b"upgrade",
        b"sec-websocket-accept",
        b"sec-websocket-protocol",
        b"sec-websocket-extensions",
        b"sec-websocket-version",
    }
)


class HandshakeRefused(PreforkError):
    """The request asks for a WebSocket in a way that cannot be granted: answer *status* with *headers*."""

    def __init__(self, status: int, reason: str, headers: Headers) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Handshake:
    """What the client offers: its key, *subprotocols* in its order, and its extensions, still one string."""

    key: bytes
    subprotocols: tuple[str, ...]
    extensions: str


def asks_for_websocket(request: Request) -> bool:
    """True if the request's Upgrade names websocket; whether it does so correctly is for `check` to say."""
    upgrade = request.upgrade
    return upgrade is not None and b"websocket" in (word.strip(b" \t") for word in upgrade.lower().split(b","))


def check(request: Request) -> Handshake:
    """The offer in *request*, which `asks_for_websocket`. Raises HandshakeRefused."""
    fields = _own_fields(request)
    if request.method != "GET":
        raise _refused(400, f"a WebSocket is opened by GET, not by {request.method}")
    if request.version != "1.1":
        raise _refused(400, f"a WebSocket is opened by HTTP/1.1, not by HTTP/{request.version}")
    if request.has_body:
        # Its bytes and the first frame's could be read differently by a proxy in between.
        raise _refused(400, "a request that opens a WebSocket has no body")
    _check_version(fields.get(b"sec-websocket-version", []))
    key = _single(fields.get(b"sec-websocket-key", []))
    protocols = b",".join(fields.get(b"sec-websocket-protocol", []))
    extensions = b",".join(fields.get(b"sec-websocket-extensions", []))
    return Handshake(key, _subprotocols(protocols), extensions.decode("latin-1"))


def switching(
    handshake: Handshake,
    *,
    subprotocol: str | None,
    extensions: str | None,
    headers: Iterable[tuple[bytes, bytes]],
    date: bytes,
    server: bytes,
) -> bytes:
    """The 101 that accepts *handshake*; *extensions* is what was agreed on, *headers* the application's.

    *date* and *server* are lines to add where the application gave none, or empty. Raises ResponseError for a subprotocol that was not offered and for fields that
    are not the application's to set, or not fields at all.
    """
    lines = [
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-accept: ",
        accept_key(handshake.key),
        b"\r\n",
    ]
    if subprotocol is not None:
        if subprotocol not in handshake.subprotocols:
            offered = ", ".join(handshake.subprotocols) or "none"
            raise ResponseError(f"subprotocol {subprotocol!r} was not offered by the client, offered was {offered}")
        lines.append(b"sec-websocket-protocol: %b\r\n" % subprotocol.encode("latin-1"))
    if extensions is not None:
        lines.append(b"sec-websocket-extensions: %b\r\n" % extensions.encode("latin-1"))
    lines.append(_application_lines(headers, date, server))
    return b"".join(lines)


def accept_key(key: bytes) -> bytes:
    """Sec-WebSocket-Accept for a Sec-WebSocket-Key: it proves that a WebSocket server has read the request."""
    return b64encode(hashlib.sha1(key + GUID, usedforsecurity=False).digest())


def load_sessions() -> ModuleType:
    """`protocol.session`, imported now: it takes 20 ms and 5 MB. Raises MissingExtra."""
    try:
        from prefork.protocol import session
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "websockets":
            raise
        raise MissingExtra("WebSocket needs the package websockets: pip install 'prefork[websocket]'") from exc
    return session


# ---- the request ----


def _own_fields(request: Request) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in request.headers:
        if name.startswith(b"sec-websocket-"):
            found.setdefault(name, []).append(value)
    return found


def _check_version(versions: list[bytes]) -> None:
    if versions == [VERSION]:
        return
    said = shown(b", ".join(versions)) if versions else "missing"
    # RFC 9110, section 15.5.22: "The server MUST send an Upgrade header field in a 426 response".
    headers = [(b"sec-websocket-version", VERSION), (b"upgrade", b"websocket")]
    raise _refused(426, f"Sec-WebSocket-Version is {said}, 13 is spoken here", headers)


def _single(keys: list[bytes]) -> bytes:
    if len(keys) != 1:
        raise _refused(400, f"Sec-WebSocket-Key is there {len(keys)} times, once was expected")
    key = keys[0]
    if not _KEY.fullmatch(key) or len(binascii.a2b_base64(key)) != 16:
        raise _refused(400, f"Sec-WebSocket-Key is {shown(key)}, 16 bytes in base64 were expected")
    return key


def _subprotocols(value: bytes) -> tuple[str, ...]:
    words = [word.strip(b" \t") for word in value.split(b",")]
    offered = [word for word in words if word]
    for word in offered:
        if not _TOKEN.fullmatch(word):
            raise _refused(400, f"Sec-WebSocket-Protocol names {shown(word)}, a token was expected")
    return tuple(word.decode("ascii") for word in offered)


def _refused(status: int, reason: str, headers: Headers | None = None) -> HandshakeRefused:
    return HandshakeRefused(status, reason, headers or [])


# ---- the answer ----


def _application_lines(headers: Iterable[tuple[bytes, bytes]], date: bytes, server: bytes) -> bytes:
    fields = field_lines(headers)
    for name, _ in fields:
        if name.lower() in _OURS:
            raise ResponseError(f"the field {shown(name)} of a WebSocket's handshake is not the application's to set")
    ours = (b"" if fields.has_date else date) + (b"" if fields.has_server else server)
    return fields.lines + ours + b"\r\n"
