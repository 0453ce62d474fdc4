"""Names and subjects of certificates, compared with what the openssl program says of them."""

from __future__ import annotations

import ssl
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.net.x509 import dns_names, subject
from tests.harness.certificates import Certificate, make_certificate


def der(certificate: Certificate) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.crt.read_text())


def test_dns_names_are_those_of_the_subject_alt_name(tmp_path: Path):
    """In lower case, and no common name among them."""
    names = ["example.org", "WWW.Example.org", "*.example.net"]

    assert dns_names(der(make_certificate(tmp_path, "a", names))) == [name.lower() for name in names]
    assert dns_names(der(make_certificate(tmp_path, "b"))) == []


def test_many_names_need_long_lengths(tmp_path: Path):
    """DER writes a length above 127 in several bytes."""
    names = [f"host-{number}.example.org" for number in range(300)]

    assert dns_names(der(make_certificate(tmp_path, "a", names))) == names


@pytest.mark.parametrize(
    ("given_subject", "written"),
    [
        ("/CN=Ann", "CN=Ann"),
        ("/C=AT/O=Example/OU=Lab/CN=Ann", "CN=Ann,OU=Lab,O=Example,C=AT"),
        ("/DC=org/DC=example/UID=ann", "UID=ann,DC=example,DC=org"),
        ("/O=Example/CN=Ann+UID=ann", "CN=Ann+UID=ann,O=Example"),
        (r'/CN=a,b\+c"d<e>f;g', r"CN=a\,b\+c\"d\<e\>f\;g"),
        ("/CN=#one ", r"CN=\#one\ "),
        ("/CN= one", r"CN=\ one"),
        ("/CN=Jos\u00e9", "CN=Jos\u00e9"),
        ("/ST=Tirol/L=Axams/street=Dorf 1", "STREET=Dorf 1,L=Axams,ST=Tirol"),
    ],
)
def test_subject_is_written_as_in_rfc_4514(tmp_path: Path, given_subject: str, written: str):
    """The last attribute comes first, and what separates is escaped."""
    assert subject(der(make_certificate(tmp_path, "a", subject=given_subject))) == written


def test_attribute_without_a_short_name_is_written_in_numbers(tmp_path: Path):
    """RFC 4514, section 2.4: the value then in hexadecimal."""
    certificate = make_certificate(tmp_path, "a", subject="/CN=Ann/emailAddress=a@b.c")

    assert subject(der(certificate)) == "1.2.840.113549.1.9.1=#160561" + b"@b.c".hex() + ",CN=Ann"


def test_subject_agrees_with_openssl(tmp_path: Path):
    """RFC 2253, which openssl writes, is 4514's predecessor; for these they are the same."""
    certificate = make_certificate(tmp_path, "a", subject="/C=DE/ST=Bayern/O=A, B & C/CN=x.example.org")
    command = ["openssl", "x509", "-in", str(certificate.crt), "-noout", "-subject", "-nameopt", "RFC2253"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert "subject=" + subject(der(certificate)) == said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return der(make_certificate(tmp_path_factory.mktemp("x509"), "a", ["example.org"]))


def test_certificate_cut_anywhere_is_a_value_error(whole: bytes):
    """And nothing else: its caller makes a sentence of it."""
    for end in range(len(whole)):
        with pytest.raises(ValueError):
            dns_names(whole[:end])
        with pytest.raises(ValueError):
            subject(whole[:end])


def test_every_byte_may_be_nought(whole: bytes):
    """A length of nought makes a value empty wherever one is expected."""
    for position in range(len(whole)):
        changed = whole[:position] + b"\0" + whole[position + 1 :]
        for read in (dns_names, subject):
            with suppress(ValueError):
                read(changed)


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_changed_byte_is_read_or_a_value_error(whole: bytes, position: int, byte: int):
    changed = bytearray(whole)
    changed[position % len(whole)] = byte
    for read in (dns_names, subject):
        with suppress(ValueError):
            read(bytes(changed))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_a_value_error(data: bytes):
    for read in (dns_names, subject):
        with suppress(ValueError):
            read(data)
