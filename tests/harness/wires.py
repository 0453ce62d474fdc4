"""Bytes as clients send them: generated from the grammar of RFC 9112, and mutated.

Everything is drawn from a `random.Random` that the caller gives, so that hypothesis
(`strategies.randoms()`), a seeded script and a coverage-guided fuzzer share one grammar.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random

# A parser that remembers lines must have met some of them before.
BROWSER = (
    b"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:130.0) Gecko/20100101 Firefox/130.0",
    b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    b"Accept-Language: en-US,en;q=0.5",
    b"Accept-Encoding: gzip, deflate, br",
    b"Cookie: session=0123456789abcdef; theme=dark",
    b"Referer: http://example.com/a?b=c",
    b"Upgrade-Insecure-Requests: 1",
    b"Sec-Fetch-Mode: navigate",
    b"Cache-Control: max-age=0",
    b"Content-Type: application/json",
    b"X-Empty:",
    b"x:y",
)
HOSTS = (b"a", b"example.com", b"example.com:8080", b"[::1]:80", b"127.0.0.1", b"my_service")
METHODS = (b"GET", b"GET", b"GET", b"POST", b"POST", b"HEAD", b"PUT", b"OPTIONS", b"DELETE", b"BREW", b"get")
TARGETS = (b"/", b"/a", b"/a/b?c=d&e=%20f", b"//a", b"/?", b'/"quoted"', b"/a:b@c", b"http://example.com/a", b"*")
CONNECTIONS = (
    b"close",
    b"keep-alive",
    b"Close",
    b"keep-alive, close",
    b"upgrade",
    b"x, Upgrade ,close",
    b"",
    b",,close,",
)

# Each of these lines is on some server's list of what it once took, or took for something else.
HOSTILE = (
    b"Content-Length: 5, 5", b"Content-Length: +5", b"Content-Length: -5", b"Content-Length: 5 5", b"Content-Length:",
    b"Content-Length: 0x5", b"Content-Length: 5_0", b"Content-Length: 5;", b"Content-Length: \x0b5",
    b"Content-Length: 18446744073709551621", b"Content-Length : 5", b"Content-Length\t: 5", b" Content-Length: 5",
    b"Content_Length: 5", b"Content-Length: 5\r", b"Content-Length: \xb2", b"Content-Length: 1e1", b'Content-Length: "5"',
    b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding: identity",
    b"Transfer-Encoding: xchunked", b"Transfer-Encoding: chunked;q=1", b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding : chunked", b"Transfer-Encoding:\nchunked", b"X: y\nTransfer-Encoding: chunked",
    b"X: y\rTransfer-Encoding: chunked", b"\tTransfer-Encoding: chunked", b"Transfer_Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: chunked,", b"Transfer-Encoding: ,chunked",
    b'Transfer-Encoding: "chunked"', b"Transfer-Encoding: chunked\xa0", b"Transfer-Encoding:", b"\0Transfer-Encoding: chunked",
    b"Host: b", b"Host: a, b", b"Host: a b", b"Host:", b"Host: a/b", b"Host: u@a", b"Host : a", b" folded", b"\tfolded",
    b"no colon", b": no name", b"bad name: x", b"X: \0", b"X: a\x7fb", b"X: a\rb", b"X: a\nb", b"X\0Y: a", b"X(Y): a",
    b"Expect: 100-continue", b"Expect: 100-Continue", b"Expect: 200-ok", b"Expect:", b"Upgrade: websocket",
    b"Connection: Transfer-Encoding", b"Connection: Content-Length", b"Trailer: X", b"TE: trailers",
)  # fmt: skip
SIZES = (b"", b"+1", b"-1", b"0x1", b"1_0", b" 1", b"1 ", b"1\t", b"g", b"f" * 16, b"f" * 17, b"1;", b'1;a="', b"1;a\nb",
         b"1;\r", b"1\n", b"1\r", b"\xb2", b"1,1", b"00000000000000000001")  # fmt: skip
SNIPPETS = (b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b"\0", b"\x0b", b"\x0c", b"\x7f", b"\x80", b"\x85", b"\xa0", b"\xff",
            b" ", b"\t", b":", b",", b";", b"=", b'"', b"#", b"?", b"/", b"0", b"5", b"a", b"+", b"-", b"_", b".", b"")  # fmt: skip
EXTENSIONS = (b"", b"", b"", b";a", b"; a=b", b';a="\\"b ;"', b";a;b=c", b";a = b")
TOKEN = b"!#$%&'*+-.^_`|~0123456789ABCXYZabcxyz"


def wire(random: Random) -> bytes:
    """One connection's worth: valid requests one behind the other, and often something wrong in them."""
    whole = b"".join(request(random) for _ in range(random.choice((1, 1, 1, 2, 3))))
    for _ in range(random.choice((0, 0, 1, 1, 2, 4))):
        whole = mutated(random, whole)
    return whole


def request(random: Random) -> bytes:
    """A valid request, unless one of its lines was drawn from `HOSTILE`."""
    host = random.choice(HOSTS)
    method, target = random.choice(METHODS), random.choice(TARGETS)
    if target == b"*":
        method = b"OPTIONS"
    elif target.startswith(b"http"):
        host = b"example.com"
    framing, content = body(random)
    lines = [b"Host: " + host, *framing, *(field(random) for _ in range(random.randrange(6)))]
    if random.random() < 0.2:
        lines.append(b"Connection: " + random.choice(CONNECTIONS))
    if random.random() < 0.1:
        lines.append(b"Expect: 100-continue")
    if random.random() < 0.15:
        lines.append(random.choice(HOSTILE))
    if random.random() < 0.5:
        random.shuffle(lines)
    version = b"HTTP/1.0" if random.random() < 0.1 else b"HTTP/1.1"
    blank = b"\r\n" if random.random() < 0.05 else b""
    return blank + b"\r\n".join([b"%b %b %b" % (method, target, version), *lines, b"", b""]) + content


def field(random: Random) -> bytes:
    if random.random() < 0.6:
        return random.choice(BROWSER)
    name = bytes(random.choice(TOKEN) for _ in range(random.randrange(1, 8)))
    value = bytes(random.choice(b'abc ,;=\t"09\x80\xff') for _ in range(random.randrange(8)))
    return b"x-%b:%b%b%b" % (name, random.choice((b" ", b"", b"\t ")), value, random.choice((b"", b"", b" ", b"\t")))


def body(random: Random) -> tuple[list[bytes], bytes]:
    """The fields that announce it, and itself."""
    kind = random.random()
    if kind < 0.4:
        return [], b""
    content = bytes(random.choice(b"ab\r\n0:G") for _ in range(random.choice((0, 1, 5, 10, 40))))
    if kind < 0.7:
        return [
            random.choice((b"Content-Length: %d", b"content-length:%d", b"Content-Length: 0%d ")) % len(content)
        ], content
    return [random.choice((b"Transfer-Encoding: chunked", b"transfer-encoding:CHUNKED\t"))], chunked(random, content)


def chunked(random: Random, content: bytes) -> bytes:
    pieces = []
    while content:
        size = random.randint(1, len(content))
        number = random.choice((b"%x", b"%X", b"0%x")) % size
        if random.random() < 0.03:
            number = random.choice(SIZES)
        pieces.append(number + random.choice(EXTENSIONS) + b"\r\n" + content[:size] + b"\r\n")
        content = content[size:]
    trailers = b"".join(field(random) + b"\r\n" for _ in range(random.choice((0, 0, 0, 1, 2))))
    if random.random() < 0.05:
        trailers += random.choice(HOSTILE) + b"\r\n"
    return b"".join(
        [*pieces, random.choice((b"0", b"0", b"000")), random.choice(EXTENSIONS), b"\r\n", trailers, b"\r\n"]
    )


def mutated(random: Random, whole: bytes) -> bytes:
    """*whole* with one thing wrong."""
    return random.choice(_MUTATIONS)(random, whole)


def neighbours(random: Random, whole: bytes, count: int) -> list[bytes]:
    """*count* wires that differ from *whole* hardly at all, *whole* itself among them: food for a cache that mixes up."""
    return [whole, *(random.choice(_NEARLY)(random, whole) for _ in range(count - 1))]


def cut(random: Random, whole: bytes) -> list[bytes]:
    """*whole* as it may arrive."""
    if not whole or random.random() < 0.3:
        return [whole]
    if random.random() < 0.2:
        return [whole[at : at + 1] for at in range(len(whole))]
    places = sorted({0, *(random.randrange(len(whole)) for _ in range(random.choice((1, 2, 5)))), len(whole)})
    return [whole[start:stop] for start, stop in pairwise(places)]


def _replace(random: Random, whole: bytes) -> bytes:
    at = random.randrange(len(whole) + 1)
    return whole[:at] + random.choice(SNIPPETS) + whole[at + random.randrange(3) :]


def _any_byte(random: Random, whole: bytes) -> bytes:
    at = random.randrange(len(whole) + 1)
    return whole[:at] + bytes([random.randrange(256)]) + whole[at + 1 :]


def _drop(random: Random, whole: bytes) -> bytes:
    at = random.randrange(len(whole) + 1)
    return whole[:at] + whole[at + random.randrange(1, 4) :]


def _swap_case(random: Random, whole: bytes) -> bytes:
    at = random.randrange(len(whole) + 1)
    return whole[:at] + whole[at : at + 1].swapcase() + whole[at + 1 :]


def _truncate(random: Random, whole: bytes) -> bytes:
    return whole[: random.randrange(len(whole) + 1)]


def _insert_hostile(random: Random, whole: bytes) -> bytes:
    lines = whole.split(b"\r\n")
    lines.insert(random.randrange(len(lines) + 1), random.choice(HOSTILE))
    return b"\r\n".join(lines)


def _double_line(random: Random, whole: bytes) -> bytes:
    lines = whole.split(b"\r\n")
    lines.insert(random.randrange(len(lines) + 1), random.choice(lines))
    return b"\r\n".join(lines)


def _drop_line(random: Random, whole: bytes) -> bytes:
    lines = whole.split(b"\r\n")
    del lines[random.randrange(len(lines))]
    return b"\r\n".join(lines)


def _swap_lines(random: Random, whole: bytes) -> bytes:
    lines = whole.split(b"\r\n")
    one, other = random.randrange(len(lines)), random.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    return b"\r\n".join(lines)


def _move_line_end(random: Random, whole: bytes) -> bytes:
    """The same bytes, broken into lines at another place."""
    places = [at for at in range(len(whole)) if whole.startswith(b"\r\n", at)]
    if not places:
        return whole
    at = random.choice(places)
    rest = whole[:at] + whole[at + 2 :]
    to = min(max(at + random.choice((-2, -1, 1, 2)), 0), len(rest))
    return rest[:to] + b"\r\n" + rest[to:]


def _other_line_end(random: Random, whole: bytes) -> bytes:
    places = [at for at in range(len(whole)) if whole.startswith(b"\r\n", at)]
    if not places:
        return whole
    at = random.choice(places)
    return (
        whole[:at]
        + random.choice((b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n ", b" \r\n", b"", b"\r\n\r\n"))
        + whole[at + 2 :]
    )


_NEARLY = (
    _any_byte,
    _swap_case,
    _drop,
    _replace,
    _move_line_end,
    _other_line_end,
    _double_line,
    _drop_line,
    _swap_lines,
)
_MUTATIONS = (*_NEARLY, _truncate, _insert_hostile, _insert_hostile)
