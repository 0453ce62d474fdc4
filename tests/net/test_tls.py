"""TLS contexts from real certificates: a handshake that works, and a sentence for each that cannot."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefork.errors import TLSError
from prefork.net.tls import PEM, TLS, ServerContext, TLSFiles, tls_extension
from tests.harness.certificates import Certificate, make_certificate

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two certificates, their keys, and one key that is encrypted."""
    directory = tmp_path_factory.mktemp("pem")
    for name in ("one", "other"):
        make_certificate(directory, name, ["localhost"])
    openssl = ["openssl", "pkcs8", "-topk8", "-in", "one.key", "-out", "locked.key", "-passout", f"pass:{PASSWORD}"]
    subprocess.run(openssl, cwd=directory, check=True, capture_output=True)
    both = (directory / "one.key").read_bytes() + (directory / "one.crt").read_bytes()
    (directory / "both.pem").write_bytes(both)
    return directory


def server_context(certfile: str, keyfile: str | None = None, password: str | None = None) -> ssl.SSLContext:
    return TLS(TLSFiles.named([certfile], [keyfile] if keyfile else ()), password).context


def connect(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str | None = "localhost", session: Any = None
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends, the server's first, after a handshake in memory and a byte that brings the client its ticket."""
    upward, downward = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_end = server.wrap_bio(upward, downward, server_side=True)
    client_end = client.wrap_bio(downward, upward, server_hostname=name, session=session)
    ends = [client_end, server_end]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)
    server_end.write(b".")
    client_end.read(1)
    return server_end, client_end


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[str | None, str | None]:
    """Version and ALPN protocol that a client and a server agree on."""
    end = connect(server, client)[1]
    return end.version(), end.selected_alpn_protocol()


def client_context(certfile: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certfile))
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def test_context_serves_a_client_that_checks_the_certificate(pem: Path):
    """HTTP/1.1 is what ALPN must settle on: h2 is not spoken here."""
    context = server_context(str(pem / "one.crt"), str(pem / "one.key"))

    assert handshake(context, client_context(pem / "one.crt")) == ("TLSv1.3", "http/1.1")


def test_context_speaks_tls_1_2_and_nothing_older(pem: Path):
    """RFC 8996 deprecates what came before."""
    context = server_context(str(pem / "one.crt"), str(pem / "one.key"))
    client = client_context(pem / "one.crt")
    client.maximum_version = ssl.TLSVersion.TLSv1_2

    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert handshake(context, client) == ("TLSv1.2", "http/1.1")


def test_key_may_stand_in_the_certificate_file(pem: Path):
    """One file is how several tools deliver both, the key first."""
    context = server_context(str(pem / "both.pem"))

    assert handshake(context, client_context(pem / "one.crt"))[1] == "http/1.1"


def test_password_opens_the_key(pem: Path):
    """And is asked for nowhere else."""
    context = server_context(str(pem / "one.crt"), str(pem / "locked.key"), PASSWORD)

    assert handshake(context, client_context(pem / "one.crt"))[1] == "http/1.1"


def refusal(certfile: Path, keyfile: Path | None = None, password: str | None = None) -> str:
    with pytest.raises(TLSError) as caught:
        server_context(str(certfile), str(keyfile) if keyfile else None, password)
    return str(caught.value)


def test_encrypted_key_without_a_password_is_refused_and_nothing_is_asked(pem: Path):
    """OpenSSL would ask on the terminal, and a server in the background would hang."""
    assert refusal(pem / "one.crt", pem / "locked.key") == (
        f"the private key in {pem}/locked.key is encrypted and no password was given"
    )


@pytest.mark.parametrize("password", ["wrong", ""])
def test_wrong_password_is_refused(pem: Path, password: str):
    """The message must not repeat the password."""
    assert refusal(pem / "one.crt", pem / "locked.key", password) == (
        f"the private key in {pem}/locked.key is encrypted and the password does not open it"
    )


def test_missing_files_are_named(pem: Path):
    """Which of the two is the first question."""
    assert refusal(pem / "no.crt") == f"there is no file {pem}/no.crt to take the certificate from"
    assert refusal(pem / "one.crt", pem / "no.key") == f"there is no file {pem}/no.key to take the private key from"


def test_directory_instead_of_a_file_is_named(pem: Path):
    """The path of a volume rather than of the file in it."""
    assert refusal(pem) == f"the certificate in {pem} cannot be read: is a directory"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_unreadable_key_is_named(pem: Path, in_child: Callable[[Callable[[], Any]], Any], directory: Path):
    """Keys are kept from everybody, sometimes from the server too."""
    for name in ("one.crt", "one.key"):
        shutil.copy(pem / name, directory)
    os.chmod(directory / "one.crt", 0o644)
    os.chmod(directory / "one.key", 0o600)

    def unprivileged() -> str:
        os.setgroups([])
        os.setresuid(65534, 65534, 65534)
        return refusal(directory / "one.crt", directory / "one.key")

    assert in_child(unprivileged) == f"the private key in {directory}/one.key cannot be read: permission denied"


def test_certificate_file_without_a_certificate_is_named(pem: Path):
    """The two settings swapped."""
    assert refusal(pem / "one.key", pem / "one.crt").startswith(f"{pem}/one.key holds no certificate: ")


def test_key_file_without_a_key_is_named(pem: Path):
    """No keyfile set, and the certificate's file has none."""
    assert refusal(pem / "one.crt").startswith(f"{pem}/one.crt holds no private key: ")


def test_garbled_certificate_is_named(pem: Path, tmp_path: Path):
    """Cut short by a full disk or a bad paste."""
    lines = (pem / "one.crt").read_text().splitlines(keepends=True)
    broken = tmp_path / "broken.crt"
    broken.write_text("".join(lines[:3] + lines[-1:]))

    assert refusal(broken, pem / "one.key").startswith(f"{broken} holds a certificate that cannot be read: ")


def test_garbled_key_is_named(pem: Path, tmp_path: Path):
    """The certificate is good, so the key is what the sentence is about."""
    lines = (pem / "one.key").read_text().splitlines(keepends=True)
    broken = tmp_path / "broken.key"
    broken.write_text("".join(lines[:2] + lines[-1:]))

    assert f"cannot be used with the private key in {broken}" in refusal(pem / "one.crt", broken)


def test_key_of_another_certificate_is_refused(pem: Path):
    """One was renewed and the other was not."""
    assert refusal(pem / "one.crt", pem / "other.key") == (
        f"the private key in {pem}/other.key does not belong to the certificate in {pem}/one.crt"
    )


# ---- versions and ciphers ----


def anybody() -> ssl.SSLContext:
    """A client that trusts every server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_1_1_is_refused(pem: Path):
    """Also if the client's OpenSSL could still speak it."""
    client = anybody()
    client.set_ciphers("ALL:@SECLEVEL=0")
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1

    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL|PROTOCOL_VERSION|NO_PROTOCOLS"):
        connect(server_context(str(pem / "one.crt"), str(pem / "one.key")), client)


@pytest.mark.parametrize("ciphers", ["AES128-SHA", "AES256-GCM-SHA384", "ECDHE-ECDSA-AES128-SHA256"])
def test_ciphers_without_forward_secrecy_or_authentication_are_refused(pem: Path, ciphers: str):
    """Who steals the key later must not read what was recorded today."""
    client = anybody()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers(ciphers)

    with pytest.raises(ssl.SSLError, match="NO_SHARED_CIPHER"):
        connect(server_context(str(pem / "one.crt"), str(pem / "one.key")), client)


# ---- several certificates ----

HOSTS = {
    "first": ["example.org"],
    "exact": ["www.example.org", "example.net"],
    "wild": ["*.example.org", "*.Example.COM"],
}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Certificate]:
    directory = tmp_path_factory.mktemp("hosts")
    return {name: make_certificate(directory, name, names, subject=f"/CN={name}") for name, names in HOSTS.items()}


@pytest.fixture(scope="module")
def tls(hosts: dict[str, Certificate]) -> TLS:
    return TLS(files_of(*hosts.values()))


def files_of(*certificates: Certificate, **more: Any) -> TLSFiles:
    return TLSFiles.named([str(c.crt) for c in certificates], [str(c.key) for c in certificates], **more)


def der(certificate: Certificate) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.crt.read_text())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("example.org", "first"),
        ("www.example.org", "exact"),
        ("WWW.Example.ORG", "exact"),
        ("example.net", "exact"),
        ("api.example.org", "wild"),
        ("api.example.com", "wild"),
        ("a.b.example.org", "first"),  # a wildcard stands for one label
        ("example.com", "first"),
        ("unknown.test", "first"),
        ("org", "first"),
        (None, "first"),
    ],
)
def test_certificate_is_chosen_by_the_name_asked_for(
    tls: TLS, hosts: dict[str, Certificate], name: str | None, chosen: str, version: ssl.TLSVersion
):
    """The whole name, then a wildcard, then the first certificate."""
    client = anybody()
    client.set_alpn_protocols(["http/1.1"])
    client.maximum_version = version
    server_end, client_end = connect(tls.context, client, name)

    assert client_end.getpeercert(binary_form=True) == der(hosts[chosen])
    assert client_end.selected_alpn_protocol() == "http/1.1"
    assert tls_extension(server_end)["server_cert"] == ssl.DER_cert_to_PEM_cert(der(hosts[chosen]))


def test_first_of_two_certificates_for_one_name_wins(hosts: dict[str, Certificate], tmp_path: Path):
    """So that the order of the settings is all one has to look at."""
    again = make_certificate(tmp_path, "again", ["www.example.org"])
    context = TLS(files_of(hosts["exact"], again)).context

    assert connect(context, anybody(), "www.example.org")[1].getpeercert(binary_form=True) == der(hosts["exact"])


def test_second_certificate_without_names_is_refused(hosts: dict[str, Certificate], tmp_path: Path):
    """It would never be served, and the reason would be hard to find."""
    nameless = make_certificate(tmp_path, "nameless")

    assert TLS(files_of(nameless)).context
    with pytest.raises(TLSError) as caught:
        TLS(files_of(hosts["first"], nameless))
    assert str(caught.value).startswith(f"{nameless.crt} names no host (subjectAltName), ")


# ---- renewal ----


@pytest.fixture
def placed(hosts: dict[str, Certificate], tmp_path: Path) -> Certificate:
    """A certificate that may be replaced; `first` to begin with."""
    placed = Certificate(tmp_path / "served.crt", tmp_path / "served.key")
    place(placed, hosts["first"])
    return placed


def place(target: Certificate, source: Certificate) -> None:
    """As tools do it that care: a new file, moved over the old one."""
    for file, new in ((target.crt, source.crt), (target.key, source.key)):
        shutil.copy(new, f"{file}.new")
        os.replace(f"{file}.new", file)


def shown(tls: TLS) -> bytes | None:
    return connect(tls.context, anybody())[1].getpeercert(binary_form=True)


def test_changed_files_are_served_once_they_have_settled(hosts: dict[str, Certificate], placed: Certificate):
    """The first look may fall between the certificate and its key."""
    tls = TLS(files_of(placed))
    assert tls.renew() is None
    place(placed, hosts["exact"])

    assert tls.renew() is None
    assert shown(tls) == der(hosts["first"])
    renewed = tls.renew()
    assert renewed is not None
    assert shown(tls) == der(hosts["exact"])
    assert tls.renew() is None


def test_another_process_adopts_what_was_renewed(hosts: dict[str, Certificate], placed: Certificate):
    """By a message, without a look at files that it may not read."""
    tls, other = TLS(files_of(placed)), TLS(files_of(placed))
    place(placed, hosts["exact"])
    tls.renew()
    renewed = tls.renew()
    assert renewed is not None
    placed.crt.unlink()
    placed.key.unlink()

    other.adopt(PEM.from_message(json.loads(json.dumps(renewed.to_message()))))

    assert shown(other) == der(hosts["exact"])


@pytest.mark.parametrize("damage", ["key of another", "cut short", "no file", "empty"])
def test_bad_certificate_never_replaces_a_good_one(hosts: dict[str, Certificate], placed: Certificate, damage: str):
    """It is told once, and the next good one is taken."""
    tls = TLS(files_of(placed))
    match damage:
        case "key of another":
            shutil.copy(hosts["exact"].crt, placed.crt)
        case "cut short":
            placed.crt.write_text(placed.crt.read_text()[:200])
        case "no file":
            placed.crt.unlink()
        case "empty":
            placed.key.write_text("")
    assert tls.renew() is None

    with pytest.raises(TLSError, match=str(placed.crt.parent)):
        tls.renew()
    assert tls.renew() is None
    assert shown(tls) == der(hosts["first"])
    place(placed, hosts["exact"])
    tls.renew()
    tls.renew()
    assert shown(tls) == der(hosts["exact"])


def test_file_that_was_only_touched_changes_nothing(placed: Certificate):
    """A backup or a chown is no renewal to tell of."""
    tls = TLS(files_of(placed))
    os.utime(placed.crt, (1, 1))

    assert [tls.renew() for _ in range(3)] == [None] * 3


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_session_is_resumed_across_a_renewal(
    hosts: dict[str, Certificate], placed: Certificate, version: ssl.TLSVersion
):
    """The keys of tickets outlive the certificate, and all workers have the same."""
    tls = TLS(files_of(placed))
    client = anybody()
    client.maximum_version = version
    session = connect(tls.context, client)[1].session
    place(placed, hosts["exact"])
    tls.renew()
    tls.renew()

    assert connect(tls.context, client, session=session)[1].session_reused


# ---- client certificates ----


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Certificate]:
    """An authority, Ann whom it knows, and Eve whom it does not."""
    directory = tmp_path_factory.mktemp("people")
    authority = make_certificate(directory, "authority", subject="/CN=Authority")
    return {
        "authority": authority,
        "ann": make_certificate(directory, "ann", subject="/C=AT/O=Example, Inc./CN=Ann", issuer=authority),
        "eve": make_certificate(directory, "eve", subject="/CN=Ann"),
    }


def person(people: dict[str, Certificate], name: str | None) -> ssl.SSLContext:
    client = anybody()
    if name:
        client.load_cert_chain(people[name].crt, people[name].key)
    return client


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("is_required", "name", "is_let_in"),
    [
        (True, "ann", True),
        (True, None, False),
        (True, "eve", False),
        (False, "ann", True),
        (False, None, True),
        (False, "eve", False),
    ],
)
def test_client_certificates(
    pem: Path,
    people: dict[str, Certificate],
    is_required: bool,
    name: str | None,
    is_let_in: bool,
    version: ssl.TLSVersion,
):
    """Optional forgives only the one that is not there."""
    own = Certificate(pem / "one.crt", pem / "one.key")
    files = files_of(own, client_ca=str(people["authority"].crt), is_client_cert_required=is_required)
    client = person(people, name)
    client.maximum_version = version

    if not is_let_in:
        with pytest.raises(ssl.SSLError):
            connect(TLS(files).context, client)
        return
    server_end, client_end = connect(TLS(files).context, client)
    told = tls_extension(server_end)
    assert told["client_cert_name"] == ("CN=Ann,O=Example\\, Inc.,C=AT" if name else None)
    assert told["client_cert_chain"] == ((ssl.DER_cert_to_PEM_cert(der(people[name])),) if name else ())
    assert told["client_cert_error"] is None
    assert not client_end.session.has_ticket, "a ticket would outlive the trust in the certificate"


def test_session_of_a_client_with_a_certificate_is_not_resumed(pem: Path, people: dict[str, Certificate]):
    """Without tickets, TLS 1.2 would resume from the context's cache."""
    own = Certificate(pem / "one.crt", pem / "one.key")
    tls = TLS(files_of(own, client_ca=str(people["authority"].crt)))
    client = person(people, "ann")
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    first = connect(tls.context, client)  # to be kept: an end that goes without a good-bye takes its session with it

    server_end, client_end = connect(tls.context, client, session=first[1].session)

    assert not client_end.session_reused
    assert tls_extension(server_end)["client_cert_name"] == "CN=Ann,O=Example\\, Inc.,C=AT"


def test_context_is_made_anew_only_for_sessions_that_could_be_resumed(pem: Path, people: dict[str, Certificate]):
    """Those of TLS 1.3 are not kept, and to make a context costs a third of a handshake."""
    own = Certificate(pem / "one.crt", pem / "one.key")
    tls = TLS(files_of(own, client_ca=str(people["authority"].crt)))
    context = tls.context
    connect(context, person(people, "ann"))

    assert tls.context is context


def test_renewed_authority_is_the_one_that_counts(pem: Path, people: dict[str, Certificate], tmp_path: Path):
    """Whoever is no longer trusted is not let in again."""
    trusted = tmp_path / "trusted.crt"
    shutil.copy(people["authority"].crt, trusted)
    own = Certificate(pem / "one.crt", pem / "one.key")
    tls = TLS(files_of(own, client_ca=str(trusted)))
    connect(tls.context, person(people, "ann"))
    shutil.copy(people["eve"].crt, trusted)
    tls.renew()
    tls.renew()

    connect(tls.context, person(people, "eve"))
    with pytest.raises(ssl.SSLError):
        connect(tls.context, person(people, "ann"))


def test_extension_tells_version_and_cipher_in_numbers(pem: Path):
    """As they stand in the handshake, which is what ASGI asks for."""
    context = server_context(str(pem / "one.crt"), str(pem / "one.key"))
    client = anybody()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
    told = tls_extension(connect(context, client)[0])

    assert (told["tls_version"], told["cipher_suite"]) == (0x0303, 0xC02B)
    told = tls_extension(connect(context, anybody())[0])
    assert told["tls_version"] == 0x0304
    assert told["cipher_suite"] in (0x1301, 0x1302, 0x1303)
    assert isinstance(context, ServerContext)
