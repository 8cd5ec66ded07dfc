"""What an address of Kafka says: where the brokers are, who logs in and how, and over what kind of link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from saga import transport
from saga.errors import ConfigurationError

SCHEME: Final = "kafka"
MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_SASL: Final = "sasl"
_PORT: Final = 9092


@dataclass(frozen=True, slots=True, repr=False)
class Address:
    """An address, understood. Made by `read`."""

    servers: tuple[str, ...]
    """`host:port` of each broker."""
    client: dict[str, Any]
    """What aiokafka's clients are told of the link."""


def read(address: str) -> Address:
    """Return what `kafka://user:password@host:port,host2:port?sasl=...` says.

    Whoever names a user logs in by SASL, SCRAM-SHA-512 unless it says otherwise. Raises ConfigurationError, which never
    shows a password.
    """
    try:
        parts = urlsplit(address)
    except ValueError:
        raise ConfigurationError("a Kafka address is of the form kafka://host:port,host2:port") from None
    if parts.scheme != SCHEME or not parts.netloc:
        raise ConfigurationError("a Kafka address is of the form kafka://host:port,host2:port")
    if parts.path.strip("/") or parts.fragment:
        raise ConfigurationError(
            "a Kafka address ends with its brokers and the parameters of the link; everything else is in KafkaOptions"
        )
    query = {name: values if len(values) > 1 else values[0] for name, values in parse_qs(parts.query).items()}
    if unknown := [name for name in query if name not in (*transport.WORDS, *transport.OTHERS, _SASL)]:
        raise ConfigurationError(
            f"a Kafka address knows no parameter {unknown[0]!r}, only {', '.join((*transport.WORDS, _SASL))}; "
            "everything else is in KafkaOptions"
        )
    link = transport.of(query, what="broker")
    who, _, brokers = parts.netloc.rpartition("@")
    user, _, given = who.partition(":")
    return Address(
        tuple(_server(each) for each in brokers.split(",")),
        _client(link, unquote(user), unquote(given), str(query.get(_SASL, "")).upper()),
    )


def _client(link: transport.Transport, user: str, given: str, mechanism: str) -> dict[str, Any]:
    password = link.password(given)
    if mechanism and mechanism not in MECHANISMS:
        raise ConfigurationError(f"sasl of a Kafka address is one of {', '.join(MECHANISMS)}")
    if not user and (mechanism or password):
        raise ConfigurationError(
            "a Kafka address that logs in by SASL names a user: kafka://user:password@host:port"
        )
    told: dict[str, Any] = {
        "security_protocol": ("SASL_" if user else "") + ("SSL" if link.encrypted else "PLAINTEXT"),
        "ssl_context": link.context(),
    }
    if user:
        told |= {
            "sasl_mechanism": mechanism or MECHANISMS[-1],
            "sasl_plain_username": user,
            "sasl_plain_password": password or "",
        }
    return told


def _server(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigurationError("each broker of a Kafka address is host:port")
    return f"{host}:{port}"
