"""Whom to believe about the client, and that a client cannot speak in a proxy's name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.errors import ConfigError
from prefork.net.forwarded import (
    FORWARDED,
    LONGEST_REMEMBERED,
    MOST_HOPS,
    MOST_REMEMBERED,
    NOTHING,
    X_FORWARDED,
    Forwarded,
    Forwarding,
    Trusted,
)
from prefork.net.proxy import LOCAL, NOT_TOLD, ProxyHeader

TRUSTED = Trusted.parse("127.0.0.1, 10.0.0.0/8, ::1, 2001:db8::/32, unix")
X = Forwarding(TRUSTED, X_FORWARDED)
STANDARD = Forwarding(TRUSTED, [FORWARDED])


def x(**fields: str) -> Forwarded:
    """What X-Forwarded-* say: for_="..." is X-Forwarded-For."""
    return X.resolve(
        [(f"x-forwarded-{name.rstrip('_')}".encode(), value.encode("latin-1")) for name, value in fields.items()]
    )


def standard(*values: str) -> Forwarded:
    return STANDARD.resolve([(b"forwarded", value.encode("latin-1")) for value in values])


# ---- whom ----


@pytest.mark.parametrize(
    ("host", "is_trusted"),
    {
        "127.0.0.1": True,
        "127.0.0.2": False,
        "10.255.0.1": True,
        "11.0.0.1": False,
        "::1": True,
        "0:0:0:0:0:0:0:1": True,
        "::ffff:10.0.0.1": True,
        "::ffff:11.0.0.1": False,
        "2001:db8::7": True,
        "2001:db9::7": False,
        "2001:db8::7%eth0": True,
        None: True,
        "": False,
        "unix": False,
        "localhost": False,
        "010.0.0.1": False,
    }.items(),
)
def test_trusted_are_those_of_the_networks(host, is_trusted):
    assert (host in TRUSTED) is is_trusted


@pytest.mark.parametrize(
    ("words", "host"),
    [("*", "8.8.8.8"), ("*", "::1"), ("*", None), ("unix", None), ("::ffff:10.0.0.0/104", "10.1.1.1")],
)
def test_words_and_mapped_networks(words, host):
    assert host in Trusted.parse(words)


@pytest.mark.parametrize("words", ["", " , ", "127.0.0.1"])
def test_unix_peers_are_not_trusted_unless_named(words):
    assert None not in Trusted.parse(words)


@pytest.mark.parametrize("words", ["localhost", "10.0.0.1/8", "10.0.0.0/33", "1.2.3", "fe80::/129", "Unix"])
def test_what_is_no_network_is_an_error_that_names_it(words):
    """A network with host bits set is most likely a slip: was one address meant, or all of them?"""
    with pytest.raises(ConfigError, match=repr(words)):
        Trusted.parse(f"127.0.0.1, {words}")


@pytest.mark.parametrize("names", [["x-forwarded-by"], ["forwarded", "x-forwarded-for"]])
def test_names_are_checked(names):
    with pytest.raises(ConfigError):
        Forwarding(TRUSTED, names)


@pytest.mark.parametrize(
    ("client", "proxied", "is_trusted"),
    [
        (("10.0.0.1", 5), None, True),
        (("192.0.2.1", 5), None, False),
        (None, None, True),
        (("10.0.0.1", 5), LOCAL, True),
        (("10.0.0.1", 5), NOT_TOLD, False),
        (None, NOT_TOLD, False),
        (("10.0.0.9", 5), ProxyHeader(("10.0.0.9", 5), None), True),
        (("192.0.2.1", 5), ProxyHeader(("192.0.2.1", 5), None), False),
    ],
)
def test_peer_behind_the_proxy_protocol_is_the_one_it_tells(client, proxied, is_trusted):
    """A client whose address the proxy does not know is nobody, also where the proxy itself is trusted."""
    assert X.trusts(client, proxied) is is_trusted


def test_nobody_is_trusted_if_no_field_is_obeyed():
    assert not Forwarding(TRUSTED, []).trusts(("127.0.0.1", 1))


# ---- X-Forwarded-* ----


@pytest.mark.parametrize(
    ("value", "client"),
    {
        "192.0.2.1": ("192.0.2.1", 0),
        "192.0.2.1:4711": ("192.0.2.1", 4711),
        "2001:db9::1": ("2001:db9::1", 0),
        "[2001:db9::1]": ("2001:db9::1", 0),
        "[2001:db9::1]:80": ("2001:db9::1", 80),
        "::ffff:192.0.2.1": ("192.0.2.1", 0),
        "6.6.6.6, 192.0.2.1": ("192.0.2.1", 0),
        "6.6.6.6, 192.0.2.1, 10.0.0.1, 10.0.0.2": ("192.0.2.1", 0),
        "6.6.6.6,192.0.2.1,10.0.0.1": ("192.0.2.1", 0),
        "10.0.0.3, 10.0.0.2": ("10.0.0.3", 0),
        "10.0.0.2": ("10.0.0.2", 0),
        "6.6.6.6, unknown, 10.0.0.1": ("10.0.0.1", 0),
        "6.6.6.6, , 10.0.0.1": ("10.0.0.1", 0),
        "6.6.6.6, 10.0.0.2:99999, 10.0.0.1": ("10.0.0.1", 0),
        "6.6.6.6, 010.0.0.2, 10.0.0.1": ("10.0.0.1", 0),
        "6.6.6.6, <script>": None,
        "6.6.6.6, _hidden": None,
        "6.6.6.6, fe80::1%eth0": None,
        "6.6.6.6,": None,
        "unknown": None,
        "": None,
        "\xb2.0.0.1": None,
    }.items(),
)
def test_first_untrusted_address_from_the_right_is_the_client(value, client):
    assert x(for_=value).client == client


def test_lines_of_one_field_are_one_list():
    """A client that sends a line of its own is left of the line that its proxy adds."""
    lines = [(b"x-forwarded-for", b"6.6.6.6"), (b"accept", b"*/*"), (b"x-forwarded-for", b"192.0.2.1, 10.0.0.1")]
    assert X.resolve(lines).client == ("192.0.2.1", 0)


def test_walk_is_bounded():
    assert x(for_=", ".join(f"10.0.0.{n % 200}" for n in range(5000))).client == (
        f"10.0.0.{(5000 - MOST_HOPS) % 200}",
        0,
    )


@pytest.mark.parametrize(
    ("proto", "hops", "scheme"),
    [
        ("https", "192.0.2.1", "https"),
        ("HTTPS", "192.0.2.1", "https"),
        ("wss", "192.0.2.1", "https"),
        ("ftp", "192.0.2.1", None),
        ("javascript:", "192.0.2.1", None),
        ("", "192.0.2.1", None),
        ("https", "6.6.6.6, 192.0.2.1, 10.0.0.1", "https"),
        ("http, https, http", "6.6.6.6, 192.0.2.1, 10.0.0.1", "https"),
        ("https, http", "6.6.6.6, 192.0.2.1, 10.0.0.1", "http"),
        ("https, ftp", "192.0.2.1", None),
    ],
)
def test_scheme_is_that_of_the_clients_hop(proto, hops, scheme):
    """A list that did not grow along with the addresses says only what the nearest proxy saw."""
    assert x(for_=hops, proto=proto).scheme == scheme


def test_only_named_fields_are_obeyed():
    """What a proxy does not set, it passes on from the client."""
    headers = [
        (b"x-forwarded-for", b"192.0.2.1"),
        (b"x-forwarded-proto", b"https"),
        (b"forwarded", b"for=6.6.6.6"),
    ]
    assert Forwarding(TRUSTED, ["x-forwarded-for"]).resolve(headers) == Forwarded(("192.0.2.1", 0))
    assert Forwarding(TRUSTED, []).resolve(headers) is NOTHING


# ---- Forwarded ----


@pytest.mark.parametrize(
    ("value", "told"),
    {
        "for=192.0.2.1": Forwarded(("192.0.2.1", 0)),
        "For=192.0.2.1;Proto=HTTPS;Host=example.org": Forwarded(("192.0.2.1", 0), "https"),
        'for="192.0.2.1:80"': Forwarded(("192.0.2.1", 80)),
        'for="[2001:db9::1]:4711";by=10.0.0.1': Forwarded(("2001:db9::1", 4711)),
        'for="[2001:db9::1]:_hidden"': Forwarded(("2001:db9::1", 0)),
        "for=6.6.6.6, for=192.0.2.1;proto=https, for=10.0.0.1;proto=http": Forwarded(("192.0.2.1", 0), "https"),
        "for=6.6.6.6;proto=https, for=unknown;proto=http, for=10.0.0.1": Forwarded(("10.0.0.1", 0), "http"),
        "for=6.6.6.6, for=_hidden": NOTHING,
        "for=6.6.6.6, proto=https": Forwarded(None, "https"),
        'for="2001:db9::1"': NOTHING,
        "for=192.0.2.1;for=6.6.6.6": NOTHING,
        "for=192.0.2.1;": NOTHING,
        "for=192.0.2.1; proto=https": NOTHING,
        "for = 192.0.2.1": NOTHING,
        'for="192.0.2.1': NOTHING,
        'for="192.0.2\\.1"': NOTHING,
        "192.0.2.1": NOTHING,
        "": NOTHING,
        'for=6.6.6.6;by=", for=192.0.2.1': Forwarded(("192.0.2.1", 0)),
        'for="6.6.6.6, for="[2001:db9::1]"': Forwarded(("2001:db9::1", 0)),
        'for=6.6.6.6;by="x, for=10.0.0.1': Forwarded(("10.0.0.1", 0)),
        'for=6.6.6.6;host="a,b", for=10.0.0.1': Forwarded(("6.6.6.6", 0)),
    }.items(),
)
def test_forwarded_is_read_from_the_right(value, told):
    assert standard(value) == told


clients = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str).filter(lambda host: host not in TRUSTED)
junk = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=60)


@given(clients, junk, st.integers(0, 3))
def test_nothing_a_client_sends_changes_what_proxies_append(client, sent, hops):
    """The point of it all: its own fields, whatever they hold, stand to the left."""
    plain = ", ".join([client, *("10.0.0.1" for _ in range(hops))])
    assert X.resolve([(b"x-forwarded-for", f"{sent}, {plain}".encode("latin-1"))]) == x(for_=plain)

    node = f'"[{client}]"' if ":" in client else client
    elements = ", ".join([f"for={node};proto=https", *("for=10.0.0.1;proto=http" for _ in range(hops))])
    assert standard(f"{sent}, {elements}") == standard(sent, elements) == standard(elements)
    assert standard(elements).scheme == "https"


@given(
    st.lists(
        st.tuples(st.sampled_from([name.encode() for name in (FORWARDED, *X_FORWARDED)]), st.binary(max_size=60)),
        max_size=5,
    )
)
def test_any_values_are_read_without_an_error(headers):
    for forwarding in (X, STANDARD):
        told = forwarding.resolve(headers)
        assert told.scheme in (None, "http", "https")
        assert told == Forwarding(TRUSTED, X_FORWARDED if forwarding is X else [FORWARDED]).resolve(headers)


# ---- applied ----


def test_what_is_not_told_stays_the_connections_own():
    own = ("10.0.0.1", 4), "http"
    assert X.apply(*own, []) == own
    assert X.apply(*own, [(b"x-forwarded-for", b"unknown"), (b"x-forwarded-proto", b"gopher")]) == own
    assert X.apply(*own, [(b"x-forwarded-for", b"192.0.2.1")]) == (("192.0.2.1", 0), "http")
    assert X.apply(*own, [(b"x-forwarded-proto", b"https")]) == (own[0], "https")


def test_memory_of_answers_is_bounded():
    forwarding = Forwarding(TRUSTED)
    for number in range(MOST_REMEMBERED * 2):
        forwarding.resolve([(b"x-forwarded-for", b"192.0.2.%d" % number)])
    assert len(forwarding._remembered) <= MOST_REMEMBERED
    forwarding = Forwarding(TRUSTED)
    forwarding.resolve([(b"x-forwarded-for", b"x" * (LONGEST_REMEMBERED + 1))])
    assert not forwarding._remembered
