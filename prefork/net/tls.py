"""A server's TLS: several certificates on one port, client certificates, renewal while it serves.

Nothing is written, nothing is asked on the terminal. OpenSSL's own errors name a line of
its source; here each becomes a sentence that names the file.

Renewal. The master, which never gives up its user, looks at the files now and then
(`TLS.renew`) and hands what they hold to its workers (`TLS.adopt`), because a worker that
has dropped its privileges may not read a key, nor even look into its directory. Only what
has been loaded without an error takes the place of what serves.

Connections are wrapped by the front context, which has no certificate: the name that the
client asks for chooses one. So the front stays when certificates change, and with it the
keys of the session tickets: clients resume across a renewal and, since the front was
made before the first fork, with any worker.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prefork.errors import TLSError, reason_of
from prefork.net.x509 import dns_names, subject

# What we speak inside TLS: RFC 7301, and the identifier IANA registered for it.
ALPN_PROTOCOLS = ("http/1.1",)

# For TLS 1.2: ephemeral keys and authenticated encryption only, as Mozilla's "intermediate" since
# version 5.7. All suites of TLS 1.3 are of that kind.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

# Seconds between looks at the files. One that has changed is loaded when the next look finds it
# unchanged, so that a certificate that is written before its key is not taken for a mistake.
RENEWAL_INTERVAL = 2.0

_CERTIFICATE_MARK = "-----BEGIN CERTIFICATE-----"
_CERTIFICATE_END = "-----END CERTIFICATE-----"
_KEY_MARK = "PRIVATE KEY-----"


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """Where the PEM is. The first certificate is the one for clients that ask for no name, or an unknown one."""

    certificates: tuple[tuple[str, str], ...]  # chain and key, which may be the same file
    client_ca: str | None = None
    is_client_cert_required: bool = True

    @classmethod
    def named(
        cls,
        certfiles: Sequence[str],
        keyfiles: Sequence[str] = (),
        client_ca: str | None = None,
        is_client_cert_required: bool = True,
    ) -> TLSFiles:
        """As settings name them: a key for each certificate, or no keys, and they stand in the certificates' files."""
        pairs = zip(certfiles, keyfiles or certfiles, strict=True)
        # A later change of the current directory must not change what is meant.
        absolute = tuple((os.path.abspath(certfile), os.path.abspath(keyfile)) for certfile, keyfile in pairs)
        return cls(absolute, client_ca and os.path.abspath(client_ca), is_client_cert_required)

    @property
    def paths(self) -> list[str]:
        return [path for pair in self.certificates for path in pair] + ([self.client_ca] if self.client_ca else [])


@dataclass(frozen=True, slots=True)
class PEM:
    """What the files hold."""

    certificates: tuple[tuple[str, str], ...]  # chain and key
    client_ca: str | None

    @classmethod
    def read(cls, files: TLSFiles) -> PEM:
        """Raises TLSError."""
        pairs = tuple(
            (_marked(certfile, _CERTIFICATE_MARK, "certificate"), _marked(keyfile, _KEY_MARK, "private key"))
            for certfile, keyfile in files.certificates
        )
        client_ca = files.client_ca and _marked(files.client_ca, _CERTIFICATE_MARK, "certificate")
        return cls(pairs, client_ca)

    def to_message(self) -> dict[str, Any]:
        """For a channel, which carries JSON."""
        return {"certificates": self.certificates, "client_ca": self.client_ca}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> PEM:
        return cls(tuple((chain, key) for chain, key in message["certificates"]), message["client_ca"])


class ServerContext(ssl.SSLContext):
    """A context that knows which certificate it shows."""

    certificate: str | None = None  # PEM, without its chain


class TLS:
    """What a server's connections are wrapped with; `context` is asked for anew for each."""

    def __init__(self, files: TLSFiles, password: str | None = None) -> None:
        """Raises TLSError. *password* opens the keys that are encrypted."""
        self._files = files
        self._password = password
        self._served = self._seen = self._stamps()
        self._pem = PEM.read(files)
        self._chooser = self._choose_among(self._pem)
        self._front = self._make_front(self._pem)

    @property
    def context(self) -> ServerContext:
        """To wrap the next connection with."""
        # With a client CA every connection is to be checked anew, and TLS 1.2 resumes even without tickets, for
        # two hours, from the front's cache. Python cannot turn that off, but a new front has an empty one. So only
        # who connected before a session began can resume it, and that within the time for a handshake.
        if self._files.client_ca is not None and self._front.session_stats()["number"]:
            self._front = self._make_front(self._pem)
        return self._front

    def renew(self) -> PEM | None:
        """Serve what the files hold, if it has changed: then it is returned, for `adopt` in other processes.

        To be called every `RENEWAL_INTERVAL`. Raises TLSError, once for each change.
        """
        stamps = self._stamps()
        settled, self._seen = stamps == self._seen, stamps
        if stamps == self._served or not settled:
            return None
        self._served = stamps
        pem = PEM.read(self._files)
        if pem == self._pem:
            return None
        self.adopt(pem)
        return pem

    def adopt(self, pem: PEM) -> None:
        """Serve *pem* to new connections. Raises TLSError, and nothing has changed."""
        chooser = self._choose_among(pem)
        if self._files.client_ca is not None:
            # Whom it trusts is a matter of the front. No ticket is lost, see `_plain_context`.
            self._front = self._make_front(pem)
        self._chooser, self._pem = chooser, pem

    def _stamps(self) -> list[tuple[int, ...] | None]:
        return [_stamp(path) for path in self._files.paths]

    # ---- contexts ----

    def _make_front(self, pem: PEM) -> ServerContext:
        context = self._plain_context(pem)
        context.sni_callback = self._choose
        return context

    def _choose(self, connection: ssl.SSLObject, name: str | None, _front: ssl.SSLContext) -> None:
        """Called by each handshake, also if the client asked for no name."""
        connection.context = self._chooser(name)

    def _choose_among(self, pem: PEM) -> Callable[[str | None], ServerContext]:
        """A function from names to contexts."""
        by_name: dict[str, ServerContext] = {}
        contexts: list[ServerContext] = []
        for (chain, key), (certfile, keyfile) in zip(pem.certificates, self._files.certificates, strict=True):
            names = _names(chain, certfile)
            if contexts and not names:
                raise TLSError(
                    f"{certfile} names no host (subjectAltName), so no client would get it: only the first may lack names"
                )
            context = self._plain_context(pem)
            _load_chain(context, chain, key, certfile, keyfile, self._password)
            context.certificate = _first_certificate(chain)
            contexts.append(context)
            for name in names:
                by_name.setdefault(name, context)
        return lambda name: _find(by_name, name) or contexts[0]

    def _plain_context(self, pem: PEM) -> ServerContext:
        """One without a certificate. OpenSSL takes some of these from the front, some from the chosen one: all have all."""
        context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996
        context.set_ciphers(CIPHERS)
        # A client that renegotiates again and again makes us pay for each handshake (CVE-2011-1473).
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(list(ALPN_PROTOCOLS))
        if pem.client_ca is not None:
            _trust(context, pem.client_ca, str(self._files.client_ca))
            context.verify_mode = ssl.CERT_REQUIRED if self._files.is_client_cert_required else ssl.CERT_OPTIONAL
            # A ticket would let in a client whose certificate has expired or is no longer trusted; so would the
            # cache that TLS 1.2 uses without them, see `context`.
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        return context


def tls_extension(connection: ssl.SSLObject | ssl.SSLSocket) -> dict[str, Any]:
    """What ASGI's TLS extension tells of an established *connection*, in the types it asks for."""
    chain = _client_chain(connection)
    version = connection.version()
    cipher = connection.cipher()
    context = connection.context
    return {
        "server_cert": context.certificate if isinstance(context, ServerContext) else None,
        "client_cert_chain": tuple(ssl.DER_cert_to_PEM_cert(der) for der in chain),
        "client_cert_name": subject(chain[0]) if chain else None,
        "client_cert_error": None,  # a certificate that is not good ends the handshake
        "tls_version": _VERSION_NUMBERS.get(version or ""),
        "cipher_suite": _CIPHER_NUMBERS.get(cipher[0]) if cipher else None,
    }


# As in the handshake (RFC 8446, section 4.2.1).
_VERSION_NUMBERS = {"TLSv1.2": 0x0303, "TLSv1.3": 0x0304}


def _cipher_numbers() -> dict[str, int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers(CIPHERS)
    # OpenSSL's numbers are IANA's 16 bits below its own.
    return {str(cipher["name"]): int(str(cipher["id"])) & 0xFFFF for cipher in context.get_ciphers()}


_CIPHER_NUMBERS = _cipher_numbers()


def _client_chain(connection: ssl.SSLObject | ssl.SSLSocket) -> list[bytes]:
    """The client's certificates in DER as it sent them, its own first."""
    own = connection.getpeercert(binary_form=True)
    if own is None:
        return []
    if hasattr(connection, "get_unverified_chain"):  # since 3.13
        return list(connection.get_unverified_chain()) or [own]
    ask = getattr(getattr(connection, "_sslobj", None), "get_unverified_chain", None)
    chain = (ask() if ask else None) or []
    # A resumed session remembers only the first.
    return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in chain] or [own]


# ---- names ----


def _names(chain: str, certfile: str) -> list[str]:
    try:
        return dns_names(ssl.PEM_cert_to_DER_cert(_first_certificate(chain)))
    except ValueError as exc:
        raise TLSError(f"{certfile} holds a certificate that cannot be read: {exc}") from exc


def _find(by_name: dict[str, ServerContext], name: str | None) -> ServerContext | None:
    """By the whole name, then by a wildcard for its first label (RFC 9525, section 6.3)."""
    if name is None:
        return None
    name = name.lower().rstrip(".")
    return by_name.get(name) or by_name.get("*." + name.partition(".")[2])


def _first_certificate(chain: str) -> str:
    begin = chain.index(_CERTIFICATE_MARK)
    end = chain.find(_CERTIFICATE_END, begin)
    return chain[begin:] if end < 0 else chain[begin : end + len(_CERTIFICATE_END)] + "\n"


# ---- files ----


def _stamp(path: str) -> tuple[int, ...] | None:
    """What changes when a file is written or another put in its place; links are followed."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _marked(path: str, mark: str, what: str) -> str:
    text = _read(path, what)
    if mark not in text:
        raise TLSError(f"{path} holds no {what}: a PEM file with a line like {mark} is needed")
    return text


def _read(path: str, what: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError as exc:
        raise TLSError(f"there is no file {path} to take the {what} from") from exc
    except OSError as exc:
        raise TLSError(f"the {what} in {path} cannot be read: {reason_of(exc)}") from exc


@contextmanager
def _as_file(text: str) -> Iterator[str]:
    """A path under which *text* can be read meanwhile: OpenSSL takes a key from files only."""
    with _open_memory() as file:
        file.write(text.encode())
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}" if isinstance(file.name, int) else file.name


def _open_memory() -> Any:
    if hasattr(os, "memfd_create") and os.path.exists("/proc/self/fd"):
        return open(os.memfd_create("prefork-tls", os.MFD_CLOEXEC), "wb")
    return tempfile.NamedTemporaryFile()  # only its owner may read it


# ---- OpenSSL ----


def _trust(context: ssl.SSLContext, pem: str, path: str) -> None:
    try:
        context.load_verify_locations(cadata=pem[pem.index(_CERTIFICATE_MARK) :])
    except ssl.SSLError as exc:
        raise TLSError(f"{path} holds a certificate that cannot be read: {_reason(exc)}") from exc


def _load_chain(
    context: ssl.SSLContext, chain: str, key: str, certfile: str, keyfile: str, password: str | None
) -> None:
    _trust(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), chain, certfile)  # only parsed: this context is thrown away
    was_asked = False

    # Without a callback OpenSSL would ask on the terminal, and a server would hang there.
    def answer() -> str:
        nonlocal was_asked
        was_asked = True
        return password or ""

    try:
        with _as_file(chain) as chain_path, _as_file(key) as key_path:
            context.load_cert_chain(chain_path, key_path, password=answer)
    except ssl.SSLError as exc:
        if was_asked:
            why = "no password was given" if password is None else "the password does not open it"
            raise TLSError(f"the private key in {keyfile} is encrypted and {why}") from exc
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise TLSError(f"the private key in {keyfile} does not belong to the certificate in {certfile}") from exc
        raise TLSError(f"{certfile} cannot be used with the private key in {keyfile}: {_reason(exc)}") from exc


def _reason(exc: ssl.SSLError) -> str:
    return exc.reason.lower().replace("_", " ") if exc.reason else str(exc)
