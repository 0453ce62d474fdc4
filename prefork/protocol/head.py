"""The strict request-head parser: the bytes of one head in, a `Request` or a refusal out.

It never repairs. A head that two servers on one path could read differently is
refused, because that difference is how requests are smuggled. Percent-encoding is
not judged here, and names with underscores pass (WSGI drops them): neither changes
where a message ends.

What is refused, with its status:

    501  CONNECT; a transfer coding other than chunked, before it
    505  a version other than 1.0 and 1.1
    417  an expectation other than 100-continue
    414  a target above its limit
    431  a head above its limit, in bytes or in fields
    413  a Content-Length above the body's limit
    400  everything else:
         line ends   a bare CR or LF anywhere, a line that is folded or led by white space
         bytes       NUL and control bytes; anything but visible ASCII in the target
         names       not a token, empty, white space before the colon, no colon;
                     content_length and transfer_encoding, which CGI-like gateways confuse
         request     not `METHOD target HTTP/x.y` with single spaces
         target      a fragment; `*` outside OPTIONS; host:port; a scheme other than http(s);
                     an absolute form whose authority is not the Host
         Host        missing in 1.1, repeated, empty, not host[:port]
         framing     Content-Length repeated, listed, signed, spaced, not decimal, above 2**63-1;
                     Transfer-Encoding repeated, with Content-Length, in 1.0,
                     or with chunked twice or not last
         Expect      repeated

Header lines repeat: nearly every line a server sees, it has seen before. So a parser
remembers what it accepted, in four sizes: whole heads, request lines, blocks of all
field lines, and single field lines. A head seen before costs one look-up; one with a
new target two more; one with a new field line one for each of its other lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import IPv6Address
from re import Pattern

from prefork.errors import PreforkError
from prefork.protocol.events import Fields, Headers, Request
from prefork.protocol.limits import Limits
from prefork.protocol.memory import Memory

# The largest length a signed 64-bit offset holds: what peers in C can count to.
MAX_LENGTH = 2**63 - 1  # bytes
MAX_LENGTH_DIGITS = 19

# Of a wrong value, what a log line and an answer show at most.
SHOWN = 60  # bytes

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"

# The patterns have one way to match any text, so a long line costs its length and no
# more. The value's white space is stripped after: two `[ \t]*` around it would be quadratic.
_REQUEST_LINE = re.compile(rb"(%b) ([!\"$-~]+) HTTP/1\.([01])" % TOKEN)
_FIELD = re.compile(rb"(%b):([\t -~\x80-\xff]*)" % TOKEN)

_DIGITS = re.compile(rb"[0-9]+")
_ABSOLUTE = re.compile(rb"https?://([^/?]*)(.*)", re.IGNORECASE)

# uri-host [":" port] of RFC 9110 section 7.2, without the sub-delims that RFC 3986 lets a
# name have: no host has them, and a comma there is what two merged Host lines look like.
_HOST = re.compile(rb"(?:(?:[\-._~0-9A-Za-z]|%[0-9A-Fa-f]{2})+|\[([0-9A-Fa-f:.]+)\])(?::[0-9]{0,5})?")

_SINGLE = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"})
_LISTS = frozenset({b"connection", b"upgrade"})
_CONFUSED = frozenset({b"content_length", b"transfer_encoding"})
_PLAIN = {b"host", b"connection"}
_PLAIN_CONNECTIONS = ((), (b"keep-alive",))
_DECISIVE = _SINGLE | _LISTS | _CONFUSED


class Refused(PreforkError):
    """The peer broke HTTP or a limit; inside this room only, the owner gets a `Refusal`."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class HeadRefused(Refused):
    """What was broken stands in a head or a trailer section."""


@dataclass(slots=True, eq=False)
class RequestLine:
    """A checked request line, which says no more than itself: limits and Host are for `parse_head`."""

    method: str
    target: bytes
    path: bytes
    query: bytes
    version: str
    authority: bytes | None  # of an absolute form
    is_plain: bool  # a path, in HTTP/1.1


class HeadParser:
    """Parses heads within *limits*, and remembers what it accepted."""

    __slots__ = ("_blocks", "_field_lines", "_heads", "_limits", "_request_lines")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._heads: Memory[bytes, Request] = Memory()
        self._request_lines: Memory[bytes, RequestLine] = Memory()
        self._blocks: Memory[bytes, Fields] = Memory()
        self._field_lines: Memory[bytes, tuple[bytes, bytes]] = Memory()

    def parse(self, head: bytes) -> Request:
        """The request of *head*: all bytes of it, from the method to the empty line. Raises HeadRefused."""
        return self._heads.get(head) or self._learn_head(head)

    @property
    def recall(self) -> Callable[[bytes], Request | None]:
        """`parse` for what was parsed before; None for anything else, be it a head or not."""
        return self._heads.get

    def _learn_head(self, head: bytes) -> Request:
        if len(head) > self._limits.head_size:
            raise too_large(head, self._limits)
        end = head.find(b"\r\n")
        raw_line, block = head[:end], head[end + 2 : -2]
        line = self._request_lines.get(raw_line) or self._learn_request_line(raw_line)
        fields = self._blocks.get(block) or self._learn_block(block)
        if line.is_plain and fields.is_plain:
            request = Request(line.method, line.target, line.path, line.query, "1.1", fields.headers, fields=fields)
        else:
            request = _combine(line, fields, self._limits)
        return self._heads.remember(head, request, len(head))

    def _learn_request_line(self, line: bytes) -> RequestLine:
        return self._request_lines.remember(line, _parse_request_line(line, self._limits), len(line))

    def _learn_block(self, block: bytes) -> Fields:
        lines = block[:-2].split(b"\r\n") if block else []
        if len(lines) > self._limits.field_count:
            raise HeadRefused(431, f"{len(lines)} fields in the head, {self._limits.field_count} are allowed")
        recall = self._field_lines.get
        headers = [recall(line) or self._learn_field_line(line) for line in lines]
        return self._blocks.remember(block, _weigh(headers), len(block))

    def _learn_field_line(self, line: bytes) -> tuple[bytes, bytes]:
        return self._field_lines.remember(line, parse_field(line), len(line))


@lru_cache(maxsize=16)
def head_parser(limits: Limits) -> HeadParser:
    """The one parser for *limits*: what one connection has sent, another one sends."""
    return HeadParser(limits)


def parse_head(head: bytes, limits: Limits) -> Request:
    """As `HeadParser.parse`, without a memory."""
    return HeadParser(limits).parse(head)


def parse_field(line: bytes) -> tuple[bytes, bytes]:
    """Name, in lower case, and value of one field line without its CRLF. Raises HeadRefused."""
    match = _FIELD.fullmatch(line)
    if match is None:
        raise _field_fault(line)
    name, value = match.groups()
    return name.lower(), value.strip(b" \t")


def too_large(head: bytes | bytearray, limits: Limits) -> HeadRefused:
    """The refusal of a *head* above its limit, complete or not: is it the target that is too long?"""
    if b"\r\n" not in head[: limits.target_size]:
        return HeadRefused(414, f"the request line is too long: the target may have {limits.target_size} bytes")
    return HeadRefused(431, f"the head is too long: {limits.head_size} bytes are allowed")


def shown(value: bytes) -> str:
    """*value* for a sentence: quoted, escaped, cut."""
    return repr(value if len(value) <= SHOWN else value[:SHOWN] + b"...")[1:]


def _parse_request_line(line: bytes, limits: Limits) -> RequestLine:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise _request_line_fault(line, limits)
    raw_method, target, minor = match.groups()
    if len(target) > limits.target_size:
        raise HeadRefused(414, f"the target has {len(target)} bytes, {limits.target_size} are allowed")
    if raw_method == b"CONNECT":
        raise HeadRefused(501, "CONNECT asks for a tunnel, and this server is no proxy")
    method = raw_method.decode("ascii")
    authority, path, query = _split_target(method, target)
    version = "1.1" if minor == b"1" else "1.0"
    is_plain = minor == b"1" and authority is None
    return RequestLine(method, target, path, query, version, authority, is_plain)


def _weigh(headers: Headers) -> Fields:
    """*headers* with what they decide, as far as that does not depend on the request line."""
    decisive = _pick_decisive(headers)
    host = decisive.get(b"host")
    if host is not None and not _is_host(host):
        raise HeadRefused(400, f"the Host {shown(host)} is not host or host:port")
    connection = tuple(_members(decisive[b"connection"])) if b"connection" in decisive else ()
    return Fields(
        headers,
        host,
        _parse_length(decisive.get(b"content-length")),
        decisive.get(b"transfer-encoding"),
        connection,
        decisive.get(b"expect"),
        decisive.get(b"upgrade"),
        is_plain=host is not None and decisive.keys() <= _PLAIN and connection in _PLAIN_CONNECTIONS,
    )


def _combine(line: RequestLine, fields: Fields, limits: Limits) -> Request:
    """What line and fields say together."""
    version, host, length, headers = line.version, fields.host, fields.content_length, fields.headers
    if host is None and version == "1.1":
        raise HeadRefused(400, "HTTP/1.1 needs a Host field and there is none")
    if host is None and line.authority is not None:  # HTTP/1.0 to an absolute target: section 3.2.2
        headers = [(b"host", line.authority), *headers]
        fields = replace(fields, headers=headers, host=line.authority)  # no longer those of other requests
    # The RFC lets the authority win over Host. Whoever routed by the other one would be deceived.
    elif line.authority is not None and host is not None and host.lower() != line.authority.lower():
        raise HeadRefused(400, f"the target names {shown(line.authority)} and the Host field {shown(host)}")
    chunked = _is_chunked(fields, version)
    if length is not None and 0 < limits.body_size < length:
        raise HeadRefused(413, f"the body has {length} bytes, {limits.body_size} are allowed")
    return Request(
        line.method,
        line.target,
        line.path,
        line.query,
        version,
        headers,
        length,
        chunked,
        # RFC 9112 section 9.3: close wins; 1.0 has to ask.
        b"close" not in fields.connection and (version == "1.1" or b"keep-alive" in fields.connection),
        _expects_continue(fields.expect, version) and (chunked or bool(length)),
        fields.upgrade if version == "1.1" and b"upgrade" in fields.connection else None,
        fields,
    )


def _pick_decisive(headers: Headers) -> dict[bytes, bytes]:
    """The fields that decide framing, routing and the connection's fate, lists joined."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name not in _DECISIVE:
            continue
        if name in _CONFUSED:
            raise HeadRefused(400, f"the field name {shown(name)} is too easily taken for the one with a hyphen")
        if name not in found:
            found[name] = value
        elif name in _LISTS:
            found[name] += b", " + value
        else:
            raise HeadRefused(400, f"the field {name.decode()} may be given once only")
    return found


def _split_target(method: str, target: bytes) -> tuple[bytes | None, bytes, bytes]:
    """Authority, path and query of the four forms of RFC 9112 section 3.2."""
    authority = None
    if target == b"*":
        if method != "OPTIONS":
            raise HeadRefused(400, f"the target '*' is for OPTIONS, not for {method}")
        return None, b"*", b""
    if not target.startswith(b"/"):
        authority, target = _strip_authority(target)
    path, _, query = target.partition(b"?")
    return authority, path, query


def _strip_authority(target: bytes) -> tuple[bytes, bytes]:
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise HeadRefused(400, f"the target {shown(target)} is neither a path nor an http or https URL")
    authority, rest = match.groups()
    if not _is_host(authority):
        raise HeadRefused(400, f"the target's authority {shown(authority)} is not host or host:port")
    return authority, rest if rest.startswith(b"/") else b"/" + rest


def _is_host(value: bytes) -> bool:
    match = _HOST.fullmatch(value)
    return match is not None and (match[1] is None or _is_ipv6(match[1].decode("ascii")))


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _is_chunked(fields: Fields, version: str) -> bool:
    """RFC 9112 sections 6.1 and 6.3, with every leniency that they offer refused."""
    value = fields.transfer_encoding
    if value is None:
        return False
    if version == "1.0":
        raise HeadRefused(400, "HTTP/1.0 has no Transfer-Encoding")
    if fields.content_length is not None:
        raise HeadRefused(400, "Transfer-Encoding and Content-Length exclude each other")
    codings = _members(value)
    if codings == [b"chunked"]:
        return True
    # Without chunked at its end the length of a request cannot be known (RFC 9112 section 6.3, rule 4).
    if (
        codings.count(b"chunked") != 1
        or codings[-1] != b"chunked"
        or not all(re.fullmatch(TOKEN, coding) for coding in codings)
    ):
        raise HeadRefused(400, f"the Transfer-Encoding {shown(value)} must be chunked, once and last")
    raise HeadRefused(501, f"the Transfer-Encoding {shown(value)} is not implemented, only chunked is")


def _parse_length(value: bytes | None) -> int | None:
    if value is None:
        return None
    if not _DIGITS.fullmatch(value):
        raise HeadRefused(400, f"the Content-Length {shown(value)} is not a decimal number")
    # The digits are counted first: int() of a long text is quadratic.
    if len(value) > MAX_LENGTH_DIGITS or (length := int(value)) > MAX_LENGTH:
        raise HeadRefused(400, f"the Content-Length {shown(value)} is above {MAX_LENGTH}")
    return length


def _expects_continue(value: bytes | None, version: str) -> bool:
    """RFC 9110 section 10.1.1: an expectation of a 1.0 client is not one."""
    if value is None or version == "1.0":
        return False
    if value.lower() != b"100-continue":
        raise HeadRefused(417, f"the expectation {shown(value)} cannot be met, only 100-continue can")
    return True


def _members(value: bytes) -> list[bytes]:
    return [member.strip(b" \t") for member in value.lower().split(b",")]


# Looked at only when a line was refused, in this order, to say why.
_LINE_FAULTS: tuple[tuple[Pattern[bytes], str], ...] = (
    (re.compile(rb"\n"), "holds a bare LF"),
    (re.compile(rb"\r"), "holds a bare CR"),
    (re.compile(rb"\0"), "holds a NUL"),
    (re.compile(rb"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]"), "holds a control byte"),
)
_FIELD_FAULTS = (
    *_LINE_FAULTS,
    (re.compile(rb"\A[ \t]"), "begins with white space, and folded lines are not allowed"),
    (re.compile(rb"\A[^:]*\Z"), "has no colon"),
    (re.compile(rb"\A[^:]*[ \t]:"), "has white space before its colon"),
    (re.compile(rb"\A:"), "has no name"),
    (re.compile(rb""), "has a name that is not a token"),
)
_REQUEST_FAULTS = (
    *_LINE_FAULTS,
    (re.compile(rb"\A[^ ]+ [^ ]*[\x80-\xff]"), "has a target that is not ASCII"),
    (re.compile(rb"\A[^ ]+ [^ ]*#"), "has a fragment in its target"),
    (re.compile(rb""), "is not 'METHOD target HTTP/1.1'"),
)
_OTHER_VERSION = re.compile(rb"%b [!-~]+ HTTP/([0-9]\.[0-9])" % TOKEN)


def _field_fault(line: bytes) -> HeadRefused:
    # The name only: the value may be a secret, and reasons are logged.
    name = line.partition(b":")[0]
    return HeadRefused(400, f"the field line {shown(name)} {_first_fault(line, _FIELD_FAULTS)}")


def _request_line_fault(line: bytes, limits: Limits) -> HeadRefused:
    version = _OTHER_VERSION.fullmatch(line)
    if version is not None and version[1] not in (b"1.0", b"1.1"):
        return HeadRefused(505, f"HTTP/{version[1].decode()} is not spoken here, HTTP/1.1 and HTTP/1.0 are")
    return HeadRefused(400, f"the request line {shown(line)} {_first_fault(line, _REQUEST_FAULTS)}")


def _first_fault(line: bytes, faults: tuple[tuple[Pattern[bytes], str], ...]) -> str:
    return next(fault for pattern, fault in faults if pattern.search(line))
