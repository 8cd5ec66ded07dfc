"""Certificates for the tests of TLS: an authority of their own, what it signs, and what a stranger may show."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import trustme
from cryptography.hazmat.primitives import serialization

from devservices.base import Certificates

HOST: Final = "localhost"


@dataclass(frozen=True)
class Authorities:
    """Files of an authority that clients believe, and of one that they do not; and what they sign."""

    directory: Path
    ours: trustme.CA
    theirs: trustme.CA

    @property
    def root(self) -> Path:
        """The certificate that clients are told to believe."""
        return self.directory / "ours.pem"

    @property
    def other_root(self) -> Path:
        """Of an authority that has signed nothing here."""
        return self.directory / "theirs.pem"

    def issue(
        self,
        name: str,
        *,
        host: str = HOST,
        by: trustme.CA | None = None,
        expires: datetime | None = None,
        common_name: str | None = None,
    ) -> Certificates:
        """Return the files of a certificate, made once for a name."""
        certificate, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        if not certificate.exists():
            made = (by or self.ours).issue_cert(
                host, common_name=common_name, not_after=expires, key_type=trustme.KeyType.RSA
            )
            certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
            key.touch(mode=0o600)
            key.write_bytes(_pkcs8(made.private_key_pem.bytes()))
        return Certificates(self.root, certificate, key)

    def self_signed(self) -> Certificates:
        """Return the files of a certificate that nobody else has signed."""
        certificate, key = self.directory / "self.pem", self.directory / "self.key"
        self.theirs.cert_pem.write_to_path(str(certificate))
        self.theirs.private_key_pem.write_to_path(str(key))
        return Certificates(certificate, certificate, key)


@dataclass(frozen=True)
class Stranger:
    """A server that is not the one meant: which certificate it shows, where it is, and what is said of it."""

    host: str
    context: Callable[[Authorities], ssl.SSLContext]
    complaint: str
    """What Python says of it; libpq has words of its own."""


def _shows(certificates: Certificates) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.certificate, certificates.key)
    return context


STRANGERS: Final = {
    "another host": Stranger(
        HOST, lambda made: _shows(made.issue("elsewhere", host="elsewhere")), "Hostname mismatch"
    ),
    "another authority": Stranger(
        HOST, lambda made: _shows(made.issue("theirs-signed", by=made.theirs)), "issuer"
    ),
    "signed by itself": Stranger(HOST, lambda made: _shows(made.self_signed()), "self-signed"),
    "expired": Stranger(
        HOST,
        lambda made: _shows(made.issue("expired", expires=datetime.now(UTC) - timedelta(days=1))),
        "expired",
    ),
}


def _pkcs8(key: bytes) -> bytes:
    """Return a key in the one form that every server reads."""
    return serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
