"""The links of an app to its database and broker: which leave this machine unprotected, and what that means.

In production mode such a link is refused before anything is connected; else it is warned of.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

from sqlalchemy.engine import URL

from saga import adapters, transport
from saga.errors import ConfigurationError, InsecureLink
from saga.storage.sqlalchemy.callers import DEFAULT_PORTS
from saga.storage.sqlalchemy.database import async_url

log: Final[logging.Logger] = logging.getLogger("saga.app")

SERVERS: Final = ("amqp", "amqps", "kafka")
_PORTS: Final = {"amqp": 5672, "amqps": 5671, "kafka": 9092}


class Link(NamedTuple):
    """One link: to what, where, and what its address says of it."""

    what: str
    places: tuple[str, ...]
    """`host:port` of each server that is not on this machine."""
    transport: transport.Transport


def of_database(url: str | URL, what: str = "database") -> Link | None:
    """Return the link of a database's address, None where it is a file. Raises ConfigurationError or MissingExtra."""
    parsed = async_url(url)
    if parsed.get_backend_name() == "sqlite":
        return None
    port = parsed.port or DEFAULT_PORTS[parsed.get_backend_name()]
    away = _away(_hosts(parsed), port)
    return Link(what, away, transport.of(parsed.query, what=what))


def of_broker(address: str) -> Link | None:
    """Return the link of a broker's address; None where it is in the process, or another package's. Raises as above."""
    scheme = adapters.scheme_of(address)
    if scheme in adapters.DATABASES:
        return of_database(adapters.split_schema(address)[0], what="broker")
    if scheme not in SERVERS:
        return None
    try:
        parts = urlsplit(address)
    except ValueError:
        return None  # its adapter says what is wrong with it, and shows no password
    away = _away(parts.netloc.rpartition("@")[2].split(","), _PORTS[scheme])
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    return Link("broker", away, transport.of(query, what="broker", tls=scheme == "amqps"))


def check(links: Iterable[Link | None], *, production: bool) -> None:
    """Warn of each link that leaves this machine unprotected. Raises InsecureLink in production mode."""
    for link in links:
        if link is None or not link.places or link.transport.verified:
            continue
        weak = "is encrypted for whoever answers" if link.transport.encrypted else "may be in plain text"
        found = f"The link to the {link.what} at {', '.join(link.places)} {weak}"
        if production:
            raise InsecureLink(
                f"{found}, which production mode refuses. Add sslmode=verify-full to the {link.what}'s address, and "
                "sslrootcert=/path/to/ca.pem where the authority is your own."
            )
        log.warning("%s; production mode would refuse it (sslmode=verify-full)", found)


def check_said(broker: str, origin: str, *, database: str | URL | None, production: bool) -> None:
    """Refuse, in production mode, a broker that nobody chose: the one in the process reaches no other process.

    An app on an SQLite file alone is one process, and means it. Raises ConfigurationError.
    """
    embedded = database is not None and async_url(database).get_backend_name() == "sqlite"
    if production and origin == "default" and not embedded:
        raise ConfigurationError(
            f"No broker is said, and {broker} reaches no other process, which production mode refuses. "
            "Set SAGA_BROKER; memory:// itself may be said, where one process is all there is."
        )


def _hosts(url: URL) -> Iterator[str]:
    """Yield each host that a driver may connect to, empty for the socket of this machine."""
    named = [url.query.get(name, ()) for name in ("host", "hostaddr")]
    told = [
        host
        for each in (url.host or "", *named)
        for part in ([each] if isinstance(each, str) else each)
        for host in part.split(",")
    ]
    if url.query.get("service"):
        yield "the service file's host"
    if not any(told) and url.get_backend_name() == "postgresql":
        told = os.environ.get("PGHOST", "").split(",")  # which its drivers ask then
    yield from told


def _away(servers: Iterable[str], port: int) -> tuple[str, ...]:
    """Return `host:port` of those that are not on this machine."""
    split = [_split(server, port) for server in servers]
    return tuple(f"{host}:{said}" for host, said in split if not transport.is_local(host))


def _split(server: str, port: int) -> tuple[str, str]:
    """Return host and port; an IPv6 address need not be in brackets where it has no port."""
    host, colon, said = server.rpartition(":")
    alone = not colon or server.endswith("]") or ":" in host.rpartition("]")[2]
    return (server, str(port)) if alone else (host, said)
