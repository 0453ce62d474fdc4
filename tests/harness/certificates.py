"""Certificates for tests, made by the openssl program: self-signed, or signed by one made before."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Certificate:
    """Two files."""

    crt: Path
    key: Path


def make_certificate(
    directory: Path,
    name: str,
    names: Sequence[str] = (),
    *,
    subject: str = "/CN=localhost",
    issuer: Certificate | None = None,
) -> Certificate:
    """{name}.crt and {name}.key in *directory*, for the DNS *names*. Skips the test where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl program is not installed, and makes the certificates")
    made = Certificate(directory / f"{name}.crt", directory / f"{name}.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-utf8", "-subj", subject, "-keyout", str(made.key), "-out", str(made.crt)]
    if names:
        command += ["-addext", "subjectAltName=" + ",".join(f"DNS:{host}" for host in names)]
    if issuer is not None:
        command += ["-CA", str(issuer.crt), "-CAkey", str(issuer.key), "-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(command, check=True, capture_output=True)
    return made
