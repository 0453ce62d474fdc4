"""A server's TLS context from files. Nothing is written, nothing is asked on the terminal.

OpenSSL's own errors name a line of its source; here each becomes a sentence that names the file.
"""

from __future__ import annotations

import ssl

from prefork.errors import TLSError, reason_of

# What we speak inside TLS: RFC 7301, and the identifier IANA registered for it.
ALPN_PROTOCOLS = ("http/1.1",)

_CERTIFICATE_MARK = "-----BEGIN CERTIFICATE-----"
_KEY_MARK = "PRIVATE KEY-----"


def server_context(certfile: str, keyfile: str | None = None, password: str | None = None) -> ssl.SSLContext:
    """A context that proves who we are with *certfile* (PEM, the chain behind the certificate).

    The key is in *keyfile*, or in *certfile* if that is None; *password* opens it if it is
    encrypted. TLS 1.2 is the oldest version spoken (RFC 8996). Raises TLSError.
    """
    keyfile = keyfile or certfile
    _check_certificate(certfile)
    _check_mark(keyfile, _KEY_MARK, "private key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client that renegotiates again and again makes us pay for each handshake (CVE-2011-1473).
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(list(ALPN_PROTOCOLS))
    _load_chain(context, certfile, keyfile, password)
    return context


def _check_certificate(certfile: str) -> None:
    pem = _check_mark(certfile, _CERTIFICATE_MARK, "certificate")
    start = pem.index(_CERTIFICATE_MARK)
    try:
        # Only parsed: this context is thrown away.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=pem[start:])
    except ssl.SSLError as exc:
        raise TLSError(f"{certfile} holds a certificate that cannot be read: {_reason(exc)}") from exc


def _check_mark(path: str, mark: str, what: str) -> str:
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


def _load_chain(context: ssl.SSLContext, certfile: str, keyfile: str, password: str | None) -> None:
    was_asked = False

    # Without a callback OpenSSL would ask on the terminal, and a server would hang there.
    def answer() -> str:
        nonlocal was_asked
        was_asked = True
        return password or ""

    try:
        context.load_cert_chain(certfile, keyfile, password=answer)
    except ssl.SSLError as exc:
        if was_asked:
            why = "no password was given" if password is None else "the password does not open it"
            raise TLSError(f"the private key in {keyfile} is encrypted and {why}") from exc
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise TLSError(f"the private key in {keyfile} does not belong to the certificate in {certfile}") from exc
        raise TLSError(f"{certfile} cannot be used with the private key in {keyfile}: {_reason(exc)}") from exc


def _reason(exc: ssl.SSLError) -> str:
    return exc.reason.lower().replace("_", " ") if exc.reason else str(exc)
