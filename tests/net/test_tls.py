"""TLS contexts from real certificates: a handshake that works, and a sentence for each that cannot."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefork.errors import TLSError
from prefork.net.tls import server_context

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two certificates, their keys, and one key that is encrypted."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl program is not installed, and makes the certificates")
    directory = tmp_path_factory.mktemp("pem")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=directory, check=True, capture_output=True)

    for name in ("one", "other"):
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", f"{name}.key", "-out", f"{name}.crt"),
        )
    openssl("pkcs8", "-topk8", "-in", "one.key", "-out", "locked.key", "-passout", f"pass:{PASSWORD}")
    both = (directory / "one.key").read_bytes() + (directory / "one.crt").read_bytes()
    (directory / "both.pem").write_bytes(both)
    return directory


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[str | None, str | None]:
    """Version and ALPN protocol that a client and a server agree on, over a real pair of sockets."""
    client_end, server_end = socket.socketpair()

    def serve() -> None:
        with server_end, server.wrap_socket(server_end, server_side=True) as stream:
            stream.recv(1)  # the client's farewell
            stream.unwrap().close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client_end, client.wrap_socket(client_end, server_hostname="localhost") as stream:
            agreed = stream.version(), stream.selected_alpn_protocol()
            stream.unwrap().close()
    finally:
        thread.join()
    return agreed


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
