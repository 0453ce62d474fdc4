"""The strict request-head parser: the bytes of one head in, a `Request` or a refusal out.

It never repairs. A head that two servers on one path could read differently is
refused, because that difference is how requests are smuggled. Percent-encoding is
not judged here, and names with underscores pass (WSGI drops them): neither changes
where a message ends.

What is refused, with its status:

    501  CONNECT; a transfer coding other than chunked
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
"""

from __future__ import annotations

import re
from re import Pattern

from prefork.errors import PreforkError
from prefork.protocol.events import Headers, Request
from prefork.protocol.limits import Limits

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
_HOST = re.compile(rb"(?:[\-._~%0-9A-Za-z]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")

_SINGLE = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"})
_LISTS = frozenset({b"connection", b"upgrade"})
_CONFUSED = frozenset({b"content_length", b"transfer_encoding"})
_DECISIVE = _SINGLE | _LISTS | _CONFUSED


class Refused(PreforkError):
    """The peer broke HTTP or a limit; inside this room only, the owner gets a `Refusal`."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class HeadRefused(Refused):
    """What was broken stands in a head or a trailer section."""


def parse_head(head: bytes, limits: Limits) -> Request:
    """The request of *head*: all bytes of it, from the method to the empty line. Raises HeadRefused."""
    if len(head) > limits.head_size:
        raise too_large(head, limits)
    lines = head[:-4].split(b"\r\n")
    method, target, version = _parse_request_line(lines[0], limits)
    if len(lines) - 1 > limits.field_count:
        raise HeadRefused(431, f"{len(lines) - 1} fields in the head, {limits.field_count} are allowed")
    headers = [parse_field(line) for line in lines[1:]]
    decisive = _pick_decisive(headers)

    path, query = _split_target(method, target, _check_host(decisive.get(b"host"), version))
    chunked = _is_chunked(decisive, version)
    length = _parse_length(decisive.get(b"content-length"), limits)
    connection = _members(decisive.get(b"connection", b""))
    return Request(
        method,
        target,
        path,
        query,
        version,
        headers,
        length,
        chunked,
        # RFC 9112 section 9.3: close wins; 1.0 has to ask.
        b"close" not in connection and (version == "1.1" or b"keep-alive" in connection),
        _expects_continue(decisive.get(b"expect"), version) and (chunked or bool(length)),
        decisive.get(b"upgrade") if version == "1.1" and b"upgrade" in connection else None,
    )


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


def _parse_request_line(line: bytes, limits: Limits) -> tuple[str, bytes, str]:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise _request_line_fault(line, limits)
    method, target, minor = match.groups()
    if len(target) > limits.target_size:
        raise HeadRefused(414, f"the target has {len(target)} bytes, {limits.target_size} are allowed")
    if method == b"CONNECT":
        raise HeadRefused(501, "CONNECT asks for a tunnel, and this server is no proxy")
    return method.decode("ascii"), target, "1.1" if minor == b"1" else "1.0"


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


def _check_host(host: bytes | None, version: str) -> bytes | None:
    """RFC 9112 section 3.2: missing (in 1.1), repeated or invalid is a 400."""
    if host is None:
        if version == "1.1":
            raise HeadRefused(400, "HTTP/1.1 needs a Host field and there is none")
        return None
    if not _HOST.fullmatch(host):
        raise HeadRefused(400, f"the Host {shown(host)} is not host or host:port")
    return host


def _split_target(method: str, target: bytes, host: bytes | None) -> tuple[bytes, bytes]:
    """Path and query of the four forms of RFC 9112 section 3.2."""
    if target == b"*":
        if method != "OPTIONS":
            raise HeadRefused(400, f"the target '*' is for OPTIONS, not for {method}")
        return b"*", b""
    if not target.startswith(b"/"):
        target = _strip_authority(target, host)
    path, _, query = target.partition(b"?")
    return path, query


def _strip_authority(target: bytes, host: bytes | None) -> bytes:
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise HeadRefused(400, f"the target {shown(target)} is neither a path nor an http or https URL")
    authority, rest = match.groups()
    if not _HOST.fullmatch(authority):
        raise HeadRefused(400, f"the target's authority {shown(authority)} is not host or host:port")
    # The RFC lets the authority win over Host. Whoever routed by the other one would be deceived.
    if host is not None and host.lower() != authority.lower():
        raise HeadRefused(400, f"the target names {shown(authority)} and the Host field {shown(host)}")
    return rest if rest.startswith(b"/") else b"/" + rest


def _is_chunked(decisive: dict[bytes, bytes], version: str) -> bool:
    """RFC 9112 sections 6.1 and 6.3, with every leniency that they offer refused."""
    value = decisive.get(b"transfer-encoding")
    if value is None:
        return False
    if version == "1.0":
        raise HeadRefused(400, "HTTP/1.0 has no Transfer-Encoding")
    if b"content-length" in decisive:
        raise HeadRefused(400, "Transfer-Encoding and Content-Length exclude each other")
    codings = _members(value)
    if codings == [b"chunked"]:
        return True
    if b"chunked" in codings[:-1] or not all(re.fullmatch(TOKEN, coding) for coding in codings):
        raise HeadRefused(400, f"the Transfer-Encoding {shown(value)} must be chunked, once and last")
    raise HeadRefused(501, f"the Transfer-Encoding {shown(value)} is not implemented, only chunked is")


def _parse_length(value: bytes | None, limits: Limits) -> int | None:
    if value is None:
        return None
    if not _DIGITS.fullmatch(value):
        raise HeadRefused(400, f"the Content-Length {shown(value)} is not a decimal number")
    # The digits are counted first: int() of a long text is quadratic.
    if len(value) > MAX_LENGTH_DIGITS or (length := int(value)) > MAX_LENGTH:
        raise HeadRefused(400, f"the Content-Length {shown(value)} is above {MAX_LENGTH}")
    if 0 < limits.body_size < length:
        raise HeadRefused(413, f"the body has {length} bytes, {limits.body_size} are allowed")
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
