"""Addresses: every form there is, what is refused and how, and the way back to text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.errors import AddressError
from prefork.net.address import Address, FdAddress, TCPAddress, UnixAddress, parse_address

FORMS = [
    ("127.0.0.1:8000", TCPAddress("127.0.0.1", 8000)),
    (":8000", TCPAddress("0.0.0.0", 8000)),
    ("8000", TCPAddress("127.0.0.1", 8000)),
    ("[::1]:8000", TCPAddress("::1", 8000)),
    ("[::]:0", TCPAddress("::", 0)),
    ("[fe80::1%eth0]:80", TCPAddress("fe80::1%eth0", 80)),
    ("localhost:8000", TCPAddress("localhost", 8000)),
    ("my_service.internal.:65535", TCPAddress("my_service.internal.", 65535)),
    ("tcp://127.0.0.1:8000", TCPAddress("127.0.0.1", 8000)),
    ("tcp://[::1]:8000", TCPAddress("::1", 8000)),
    ("tcp://:8000", TCPAddress("0.0.0.0", 8000)),
    ("unix:/run/app.sock", UnixAddress("/run/app.sock")),
    ("unix:app.sock", UnixAddress("app.sock")),
    ("unix:/run/with space:and colon", UnixAddress("/run/with space:and colon")),
    ("unix:@abstract", UnixAddress("@abstract")),
    ("fd://3", FdAddress(3)),
    ("fd://0", FdAddress(0)),
]

REFUSED = [
    ("", "it has no port"),
    ("localhost", "it has no port"),
    ("localhost:", "'' is not a port"),
    ("localhost:http", "'http' is not a port"),
    ("localhost:-1", "'-1' is not a port"),
    ("localhost:+1", "'+1' is not a port"),
    ("localhost: 1", "' 1' is not a port"),
    ("localhost:8_0", "'8_0' is not a port"),
    ("localhost:\u0661", "is not a port"),
    ("localhost:80\n", "is not a port"),
    ("localhost:65536", "port 65536 is out of range: 0 to 65535 are allowed"),
    ("70000", "port 70000 is out of range"),
    ("localhost:" + "9" * 5000, "is not a port"),
    ("256.0.0.1:80", "'256.0.0.1' is not an IPv4 address"),
    ("1.2.3:80", "'1.2.3' is not an IPv4 address"),
    ("::1:8000", "an IPv6 address goes into brackets"),
    ("[127.0.0.1]:80", "only an IPv6 address goes into brackets"),
    ("[]:80", "only an IPv6 address goes into brackets"),
    ("[:::]:80", "':::' is not an IPv6 address"),
    ("[::1]", "an IPv6 address goes into brackets"),
    ("*:80", "'*' is neither an IP address nor a host name"),
    ("a b:80", "'a b' is neither"),
    ("-a:80", "'-a' is neither"),
    ("http://localhost:80", "http:// is not known here"),
    ("tcp://unix:/run/app.sock", "'/run/app.sock' is not a port"),
    ("unix:", "a unix address needs a path"),
    ("unix:@", "a unix address needs a path"),
    ("unix:/a\0b", "cannot hold a NUL"),
    ("fd://", "'' is not a descriptor"),
    ("fd://x", "'x' is not a descriptor"),
    ("fd://-1", "'-1' is not a descriptor"),
    ("fd://4294967296", "descriptor 4294967296 is out of range"),
]


@pytest.mark.parametrize(("text", "address"), FORMS)
def test_address_is_understood_in_every_documented_form(text: str, address: Address):
    """The table of the module's docstring, row by row."""
    assert parse_address(text) == address


@pytest.mark.parametrize(("text", "why"), REFUSED)
def test_refused_address_is_named_with_the_reason(text: str, why: str):
    """Whoever mistyped a setting has nothing but this sentence."""
    with pytest.raises(AddressError) as caught:
        parse_address(text)

    assert str(caught.value).startswith(f"{text!r} is not an address to bind: ")
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("unix:/run/app.sock", "unix:/run/app.sock"),
        ("fd://3", "fd://3"),
    ],
)
def test_url_is_what_a_person_would_type(text: str, url: str):
    """It is printed at the start, and terminals make it a link."""
    assert parse_address(text).url("http") == url


@given(st.text())
def test_any_text_is_an_address_that_prints_back_or_an_address_error(text: str):
    """Settings come from files and environments: nothing may raise anything else."""
    try:
        address = parse_address(text)
    except AddressError:
        return
    assert parse_address(str(address)) == address


names = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z])", fullmatch=True)
hosts = names | st.ip_addresses().map(str)
ports = st.integers(0, 65535)
paths = st.text(st.characters(exclude_characters="\0"), min_size=2)
addresses = (
    st.builds(TCPAddress, hosts, ports) | st.builds(UnixAddress, paths) | st.builds(FdAddress, st.integers(0, 9999))
)


@given(addresses)
def test_address_prints_back_exactly(address: Address):
    """A re-executed server is told its addresses as text."""
    assert parse_address(str(address)) == address


@given(st.builds(TCPAddress, hosts, ports))
def test_tcp_scheme_changes_nothing(address: TCPAddress):
    """It is there for those who like to be explicit."""
    assert parse_address(f"tcp://{address}") == address
