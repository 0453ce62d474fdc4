"""What a server has to know of a certificate: the names it is for, and whose it is.

Only those two are read, from the DER that TLS has already checked or that the operator
put into our configuration; nothing is verified here. The `ssl` module decodes only
certificates that it has verified, which our own are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

# Tags of X.690 and of RFC 5280, appendix A.
_SEQUENCE = 0x30
_OCTET_STRING = 0x04
_VERSION = 0xA0  # [0], explicit, may be missing
_EXTENSIONS = 0xA3  # [3], explicit
_DNS_NAME = 0x82  # [2] of GeneralName, implicit

_SUBJECT_ALT_NAME = bytes.fromhex("551d11")  # 2.5.29.17

# Where the subject stands in a TBSCertificate, once the version is off: serial number, signature,
# issuer, validity, subject.
_SUBJECT = 4

# RFC 4514, section 3: the names that every reader must know. All others are written in numbers.
_SHORT_NAMES = {
    "2.5.4.3": "CN",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.6": "C",
    "2.5.4.9": "STREET",
    "0.9.2342.19200300.100.1.25": "DC",
    "0.9.2342.19200300.100.1.1": "UID",
}

_ENCODINGS = {
    0x0C: "utf-8",  # UTF8String
    0x13: "ascii",  # PrintableString
    0x16: "ascii",  # IA5String
    0x14: "latin-1",  # TeletexString, as everybody reads it
    0x1E: "utf-16-be",  # BMPString
    0x1C: "utf-32-be",  # UniversalString
}


class Value(NamedTuple):
    """One tag, and what stands below it."""

    tag: int
    content: bytes
    whole: bytes  # with its tag and length


def dns_names(certificate: bytes) -> list[str]:
    """The DNS names of the subjectAltName, in lower case; wildcards as they are. ValueError if it is no certificate."""
    for value in _fields(certificate):
        if value.tag == _EXTENSIONS:
            for extension in _children(_only(value.content, _SEQUENCE)):
                parts = list(_children(extension.content))
                if not parts:
                    raise ValueError("an extension without a name")
                if parts[0].content == _SUBJECT_ALT_NAME:
                    names = _only(_last(parts, _OCTET_STRING).content, _SEQUENCE)
                    return [v.content.decode("ascii").lower() for v in _children(names) if v.tag == _DNS_NAME]
    return []


def subject(certificate: bytes) -> str:
    """The subject's distinguished name as RFC 4514 writes it: `CN=Ann,O=Example`. ValueError if it is no certificate."""
    fields = [value for value in _fields(certificate) if value.tag != _VERSION]
    if len(fields) <= _SUBJECT:
        raise ValueError(f"a certificate has a subject as its field {_SUBJECT + 1}, this one has {len(fields)} fields")
    parts = [
        "+".join(_attribute(pair.content) for pair in _children(relative.content))
        for relative in _children(fields[_SUBJECT].content)
    ]
    return ",".join(reversed(parts))


def _fields(certificate: bytes) -> Iterator[Value]:
    """Those of the TBSCertificate (RFC 5280, section 4.1)."""
    return _children(_only(_only(certificate, _SEQUENCE), _SEQUENCE))


def _attribute(pair: bytes) -> str:
    kind, value = _children(pair)
    number = _dotted(kind.content)
    name = _SHORT_NAMES.get(number)
    encoding = _ENCODINGS.get(value.tag)
    if name is None or encoding is None:
        return f"{name or number}=#{value.whole.hex()}"
    return f"{name}={_escaped(value.content.decode(encoding, 'replace'))}"


def _escaped(text: str) -> str:
    """RFC 4514, section 2.4."""
    escaped = "".join("\\" + char if char in '"+,;<>\\' else "\\00" if char == "\0" else char for char in text)
    if escaped.endswith(" ") and len(text) > 1:
        escaped = escaped[:-1] + "\\ "
    return "\\" + escaped if escaped[:1] in (" ", "#") else escaped


def _dotted(encoded: bytes) -> str:
    """An object identifier in numbers (X.690, section 8.19)."""
    numbers, number = [], 0
    for byte in encoded:
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            numbers.append(number)
            number = 0
    if not numbers:
        raise ValueError("an object identifier is empty")
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, [first, numbers[0] - 40 * first, *numbers[1:]]))


def _only(der: bytes, tag: int) -> bytes:
    """The content of the first value, which must have *tag*."""
    value = next(_children(der), None)
    if value is None or value.tag != tag:
        raise ValueError(f"tag 0x{tag:02x} was expected and {'nothing' if value is None else hex(value.tag)} is there")
    return value.content


def _last(values: list[Value], tag: int) -> Value:
    if not values or values[-1].tag != tag:
        raise ValueError(f"tag 0x{tag:02x} was expected at the end")
    return values[-1]


def _children(der: bytes) -> Iterator[Value]:
    """The values that stand one after the other in *der* (X.690, sections 8.1 and 10.1)."""
    at = 0
    while at < len(der):
        if at + 2 > len(der):
            raise ValueError("a value ends before its length")
        size, start = der[at + 1], at + 2
        if size >= 0x80:
            start += size & 0x7F
            size = int.from_bytes(der[at + 2 : start], "big")
        end = start + size
        if end > len(der):
            raise ValueError(f"a value of {size} bytes does not fit into the {len(der) - start} that are there")
        yield Value(der[at], der[start:end], der[at:end])
        at = end
