"""What an address of RabbitMQ says: where it is, who logs in, and over what kind of link."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from yarl import URL

from saga import transport
from saga.errors import ConfigurationError


@dataclass(frozen=True, slots=True, repr=False)
class Address:
    """An address, understood. Made by `read`."""

    url: URL
    """As the driver takes it, with the password."""
    context: ssl.SSLContext | None
    """What TLS is made with; None for plain text."""
    place: str
    """For people: host and port, never who logs in."""


def read(address: str) -> Address:
    """Return what an address says. Raises ConfigurationError, which never shows a password."""
    if not address.startswith(("amqp://", "amqps://")):
        raise ConfigurationError("a RabbitMQ URL starts with amqp:// or amqps://")
    try:
        url = URL(address)
    except ValueError:  # what it says may be half of a password
        raise ConfigurationError(
            "the port of the RabbitMQ URL is no number; is its password quoted?"
        ) from None
    link = transport.of(url.query, what="broker", tls=url.scheme == "amqps")
    bare = url.without_query_params(*transport.WORDS)
    password = link.password(url.password)
    if password != url.password:
        bare = bare.with_password(password)
    if link.encrypted:
        bare = bare.with_scheme("amqps")
    port = bare.explicit_port or (5671 if link.encrypted else 5672)
    return Address(bare, link.context(), f"{bare.host}:{port}")
