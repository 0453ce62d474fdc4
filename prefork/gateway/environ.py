"""The environ of PEP 3333 for an exchange, `wsgi.input` excepted.

Text is bytes decoded as latin-1, as the PEP demands. What repeats from request to
request is made once: the variables of a block of header lines, those of a target,
those of the address that was connected to. Each environ is a new dict all the same,
because an application may write to its own.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from prefork.gateway.exchange import Exchange
from prefork.protocol.events import Fields, Headers
from prefork.protocol.memory import Memory

Environ = dict[str, Any]

DEFAULT_PORTS = {"http": "80", "https": "443"}

# What a header line takes more in a dict of str than on the wire, roughly, in bytes.
OVERHEAD = 100


class Target(NamedTuple):
    """What a request's target says to an application."""

    script_name: str
    path_info: str
    query: str
    whole: str


class EnvironMaker:
    """Makes the environs of one application."""

    def __init__(self, constants: Environ, root_path: str) -> None:
        """*constants* are in every environ; *root_path* becomes SCRIPT_NAME."""
        self._root = root_path.rstrip("/").encode().decode("latin-1")
        # In one dict from the start, in the order of CGI: a copy of it never has to grow.
        self._blank: Environ = {
            "REQUEST_METHOD": "",
            "SCRIPT_NAME": "",
            "PATH_INFO": "",
            "QUERY_STRING": "",
            "RAW_URI": "",
            "REQUEST_URI": "",
            "SERVER_PROTOCOL": "",
            "SERVER_NAME": "",
            "SERVER_PORT": "",
            "REMOTE_ADDR": "",  # nothing for a Unix socket's client, and CGI has no way to leave it out
            "wsgi.url_scheme": "",
            "wsgi.errors": None,
            **constants,
        }
        self._by_fields: Memory[Fields, Environ] = Memory()
        self._by_target: Memory[bytes, Target] = Memory()

    def make(self, exchange: Exchange) -> Environ:
        """What the client asked for and over which connection (PEP 3333, "environ Variables"; RFC 3875)."""
        request = exchange.request
        target = self._by_target.get(request.target) or self._add_target(request.target, request.path, request.query)
        fields = request.fields
        environ = ((fields and self._by_fields.get(fields)) or self._add_fields(fields, request.headers)).copy()
        environ["REQUEST_METHOD"] = request.method
        environ["SCRIPT_NAME"], environ["PATH_INFO"], environ["QUERY_STRING"], whole = target
        environ["RAW_URI"] = environ["REQUEST_URI"] = whole
        environ["SERVER_PROTOCOL"] = "HTTP/1.1" if request.version == "1.1" else "HTTP/1.0"
        environ["wsgi.url_scheme"] = exchange.scheme
        environ["wsgi.errors"] = sys.stderr
        server, client = exchange.server, exchange.client
        if server is not None and server[1] is not None:
            environ["SERVER_NAME"], environ["SERVER_PORT"] = server[0], str(server[1])
        else:
            environ["SERVER_NAME"], environ["SERVER_PORT"] = _called(environ.get("HTTP_HOST", ""), exchange.scheme)
        if client is not None:
            environ["REMOTE_ADDR"], environ["REMOTE_PORT"] = client[0], str(client[1])
        return environ

    def _add_target(self, raw: bytes, path: bytes, query: bytes) -> Target:
        script_name, path_info = _split_path(path, self._root)
        target = Target(script_name, path_info, query.decode("latin-1"), raw.decode("latin-1"))
        return self._by_target.remember(raw, target, len(raw))

    def _add_fields(self, fields: Fields | None, headers: Headers) -> Environ:
        environ = self._blank | variables(headers)
        if fields is None:
            return environ
        return self._by_fields.remember(fields, environ, sum(len(n) + len(v) + OVERHEAD for n, v in headers))


def variables(headers: Headers) -> Environ:
    """Header fields as CGI names them, repeated ones joined (RFC 9110, section 5.3).

    A field whose name has an underscore is left out: it would pass for the one with
    a hyphen that a proxy set.
    """
    found: Environ = {}
    for raw_name, value in headers:
        if b"_" in raw_name:
            continue
        name = raw_name.decode("latin-1").upper().replace("-", "_")
        if name not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            name = "HTTP_" + name
        text = value.decode("latin-1")
        if name in found:
            text = found[name] + ("; " if name == "HTTP_COOKIE" else ",") + text
        found[name] = text
    return found


def _split_path(raw_path: bytes, root: str) -> tuple[str, str]:
    """SCRIPT_NAME and PATH_INFO. A proxy in front may have left *root* in the path or taken it off."""
    path = unquote_to_bytes(raw_path).decode("latin-1")
    if not path.startswith("/"):  # OPTIONS *
        path = ""
    if path == root or path.startswith(root + "/"):
        path = path[len(root) :]
    return root, path


def _called(host: str, scheme: str) -> tuple[str, str]:
    """SERVER_NAME and SERVER_PORT, neither of which may be empty: on a Unix socket, what the client called us."""
    name, colon, port = host.rpartition(":")
    if not colon or port.endswith("]"):  # no port: the last colon is one of an IPv6 address
        name, port = host, ""
    return name or "localhost", port or DEFAULT_PORTS.get(scheme, "80")
