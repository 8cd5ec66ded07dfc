"""What an address says of its link: who is believed, who logs in. The same words for each server.

    postgresql://shop@db/shop?sslmode=verify-full&sslrootcert=/etc/shop/ca.pem&password_file=/run/secrets/shop

The words are libpq's. Whoever says none of them gets what the driver does by itself, which checks nobody; a scheme that
means TLS (`amqps`) checks as much as `verify-full`.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from saga.errors import ConfigurationError


class Mode(StrEnum):
    """What is asked of the other side."""

    DISABLE = "disable"
    """Nothing; in plain text."""
    REQUIRE = "require"
    """To encrypt, whoever it is."""
    VERIFY_CA = "verify-ca"
    """A certificate of an authority that we believe, for whatever host."""
    VERIFY_FULL = "verify-full"
    """The same, for the host of the address."""


WORDS: Final = ("sslmode", "sslrootcert", "sslcert", "sslkey", "password_file")
LENIENT: Final = ("allow", "prefer")
"""libpq's words for what PostgreSQL's drivers do by themselves."""
OTHERS: Final = {
    "ssl": "sslmode",
    "no_verify_ssl": "sslmode",
    "ssl_verify_cert": "sslmode",
    "ssl_verify_identity": "sslmode",
    "ssl_check_hostname": "sslmode",
    "ssl_disabled": "sslmode",
    "cafile": "sslrootcert",
    "capath": "sslrootcert",
    "cadata": "sslrootcert",
    "ssl_ca": "sslrootcert",
    "ssl_capath": "sslrootcert",
    "certfile": "sslcert",
    "ssl_cert": "sslcert",
    "keyfile": "sslkey",
    "ssl_key": "sslkey",
}
"""Words of the drivers, each of which understands some, and what they are here."""
_DISAGREEMENTS: Final = ("VERSION", "CERTIFICATE", "HANDSHAKE", "UNKNOWN_CA")


@dataclass(frozen=True, slots=True)
class Transport:
    """The words of one address. Made by `of`."""

    what: str
    """Whose address it is, for errors."""
    mode: Mode | None
    """None where it says nothing."""
    root: str | None
    certificate: str | None
    key: str | None
    password_file: str | None

    @property
    def verified(self) -> bool:
        """Whether the other side is known to be the host of the address."""
        return self.mode is Mode.VERIFY_FULL

    @property
    def encrypted(self) -> bool:
        """Whether nobody on the way can read along."""
        return self.mode not in (None, Mode.DISABLE)

    def context(self) -> ssl.SSLContext | None:
        """Return what a driver needs for TLS; None for plain text, and where the address says nothing.

        Without `sslrootcert` the authorities of the system are believed. Raises ConfigurationError for a file that
        cannot be used.
        """
        if not self.encrypted:
            return None
        try:
            context = ssl.create_default_context(cafile=self.root)
        except OSError as error:
            raise self._unusable("sslrootcert", self.root, error) from None
        # Python 3.13 and later would refuse authorities that every other client of these servers accepts
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if self.mode is not Mode.VERIFY_FULL:
            context.check_hostname = False
        if self.mode is Mode.REQUIRE:
            context.verify_mode = ssl.CERT_NONE
        if self.certificate is not None:
            try:
                context.load_cert_chain(self.certificate, self.key, password=_no_password)
            except OSError as error:
                raise self._unusable("sslcert", self.certificate, error) from None
        return context

    def password(self, given: str | None) -> str | None:
        """Return the password: that of the address, or what its `password_file` holds but for the end of the line.

        Raises ConfigurationError.
        """
        if self.password_file is None:
            return given
        if given:
            raise ConfigurationError(
                f"The {self.what}'s address has a password and a password_file; say one."
            )
        try:
            return Path(self.password_file).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:
            raise self._unusable("password_file", self.password_file, error) from None

    def _unusable(self, word: str, path: str | None, error: Exception) -> ConfigurationError:
        why = getattr(error, "strerror", None) or type(error).__name__
        return ConfigurationError(f"{word} of the {self.what}'s address cannot be used: {path}: {why}.")


def of(query: Mapping[str, str | Sequence[str]], *, what: str, tls: bool = False) -> Transport:
    """Return what the parameters of an address say. `what` is it the address of; `tls`: the scheme means TLS.

    Raises ConfigurationError.
    """
    for name in query:
        if name in OTHERS:
            raise ConfigurationError(f"The {what}'s address says {name!r}; here that is {OTHERS[name]!r}.")
    said: dict[str, str] = {}
    for word in WORDS:
        value = query.get(word)
        if value is not None and not isinstance(value, str):
            raise ConfigurationError(f"The {what}'s address says {word} more than once.")
        if value:
            said[word] = value
    mode = _mode(said, what, tls)
    if "sslkey" in said and "sslcert" not in said:
        raise ConfigurationError(f"sslkey of the {what}'s address is the key of a sslcert; say both.")
    if mode in (None, Mode.DISABLE) and "sslcert" in said:
        raise ConfigurationError(f"sslcert of the {what}'s address needs TLS: say sslmode=verify-full, too.")
    root, certificate, key = (said.get(word) for word in ("sslrootcert", "sslcert", "sslkey"))
    return Transport(what, mode, root, certificate, key, said.get("password_file"))


def _mode(said: Mapping[str, str], what: str, tls: bool) -> Mode | None:
    root, told = "sslrootcert" in said, said.get("sslmode", "")
    if told in LENIENT and not tls and not root:
        return None
    if not told:
        return Mode.VERIFY_FULL if tls or root else None
    try:
        mode = Mode(told)
    except ValueError:
        raise ConfigurationError(f"sslmode of the {what}'s address is one of {', '.join(Mode)}.") from None
    if tls and mode is Mode.DISABLE:
        raise ConfigurationError(f"The {what}'s address means TLS, and its sslmode is disable.")
    if root and mode in (Mode.DISABLE, Mode.REQUIRE):
        raise ConfigurationError(
            f"sslmode={mode} of the {what}'s address looks at no authority; with sslrootcert say verify-full."
        )
    if mode is Mode.VERIFY_CA and not root:
        raise ConfigurationError(
            f"sslmode=verify-ca of the {what}'s address needs the authority: say sslrootcert."
        )
    return mode


def is_local(host: str | None) -> bool:
    """Whether what is sent to a host stays on this machine: no host, the path of a socket, or loopback."""
    if not host or host.startswith(("/", "@")) or host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def disagreement(error: BaseException | None) -> str:
    """Return why TLS is not agreed on, for people; empty if an error is about something else.

    Trying again gives the same. Looks through what drivers wrap around it.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"its certificate is not accepted ({(error.verify_message or str(error.reason)).rstrip('.')})"
            )
        if isinstance(error, ssl.SSLError) and any(word in (error.reason or "") for word in _DISAGREEMENTS):
            return f"TLS is not agreed on ({error.reason})"
        seen.append(error)
        inner = getattr(error, "original_exception", None) or getattr(error, "orig", None)
        error = inner or error.__cause__ or error.__context__
    return ""


def _no_password() -> str:
    raise PermissionError(0, "the key is encrypted, and nobody is asked for its password")
