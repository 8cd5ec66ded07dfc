"""L-05: what an address says of its link, which is the same for every server; and where its password is."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from saga import transport
from saga.brokers.kafka import address as kafka
from saga.brokers.rabbitmq import address as rabbitmq
from saga.errors import ConfigurationError
from saga.links import of_broker
from saga.storage.sqlalchemy.database import async_url
from saga.storage.sqlalchemy.servers import Bounds, MySQLServer, PostgreSQLServer
from saga.transport import Mode
from tests.plugins.watch import CANARY
from tests.transport.certificates import Authorities

pytestmark = [pytest.mark.feature("L-05"), pytest.mark.stack("pure")]

BOUNDS: Final = Bounds(4.0, 5.0, 3.0, None)


def context(query: dict[str, str], *, tls: bool = False) -> ssl.SSLContext | None:
    return transport.of(query, what="database", tls=tls).context()


@pytest.mark.parametrize(
    ("query", "tls", "mode"),
    [
        ({}, False, None),
        ({"sslmode": "prefer"}, False, None),
        ({"sslmode": "disable"}, False, Mode.DISABLE),
        ({}, True, Mode.VERIFY_FULL),
        ({"sslmode": "require"}, True, Mode.REQUIRE),
        ({"sslrootcert": "ca.pem"}, False, Mode.VERIFY_FULL),
        ({"sslmode": "verify-ca", "sslrootcert": "ca.pem"}, False, Mode.VERIFY_CA),
    ],
)
def test_who_names_an_authority_or_means_tls_gets_the_host_checked(
    query: dict[str, str], tls: bool, mode: Mode | None
) -> None:
    assert transport.of(query, what="database", tls=tls).mode is mode


@pytest.mark.parametrize(
    ("mode", "checks_host", "verify"),
    [
        ("verify-full", True, ssl.CERT_REQUIRED),
        ("verify-ca", False, ssl.CERT_REQUIRED),
        ("require", False, ssl.CERT_NONE),
    ],
)
def test_a_mode_checks_what_it_says(
    mode: str, checks_host: bool, verify: ssl.VerifyMode, authorities: Authorities
) -> None:
    root = {} if mode == "require" else {"sslrootcert": str(authorities.root)}
    made = context({"sslmode": mode, **root})
    assert made is not None
    assert (made.check_hostname, made.verify_mode) == (checks_host, verify)


@pytest.mark.parametrize(
    ("query", "tls"),
    [
        ({"sslmode": "on"}, False),
        ({"sslmode": "disable"}, True),
        ({"sslmode": "require", "sslrootcert": "ca.pem"}, False),
        ({"sslmode": "verify-ca"}, False),
        ({"sslkey": "key.pem"}, True),
        ({"sslcert": "certificate.pem"}, False),
    ],
)
def test_what_would_check_less_than_it_looks_like_is_refused(query: dict[str, str], tls: bool) -> None:
    with pytest.raises(ConfigurationError, match="SG201"):
        transport.of(query, what="database", tls=tls)


@pytest.mark.parametrize(
    ("address", "ours"),
    [
        ("postgresql://db/shop?ssl=require", "sslmode"),
        ("mysql://db/shop?ssl_ca=ca.pem", "sslrootcert"),
        ("amqps://mq/?no_verify_ssl=1", "sslmode"),
        ("amqps://mq/?cafile=ca.pem", "sslrootcert"),
        ("kafka://one?cafile=ca.pem", "sslrootcert"),
    ],
)
def test_a_word_of_one_driver_is_told_to_be_another_here(address: str, ours: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        of_broker(address)
    assert f"here that is '{ours}'" in caught.value.text


@pytest.mark.parametrize("word", ["sslrootcert", "sslcert", "password_file"])
def test_a_file_that_cannot_be_used_is_named(word: str, tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    said = transport.of({"sslmode": "verify-full", word: str(path)}, what="broker")
    with pytest.raises(ConfigurationError) as caught:
        said.password(None) if word == "password_file" else said.context()
    assert f"{word} of the broker's address cannot be used: {path}: No such file" in caught.value.text


def test_a_file_without_certificates_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("no certificate\n")
    with pytest.raises(ConfigurationError, match="SG201") as caught:
        context({"sslrootcert": str(path)})
    assert str(path) in caught.value.text


# --- who logs in ----------------------------------------------------------------------------------


def _of_database(address: str) -> str | None:
    url = async_url(address)
    server = (PostgreSQLServer if url.get_backend_name() == "postgresql" else MySQLServer)(BOUNDS, None)
    return server.engine(url).url.password


def _of_kafka(address: str) -> str | None:
    told: dict[str, Any] = kafka.read(address).client
    return str(told["sasl_plain_password"])


PASSWORDS: Final[dict[str, Callable[[str], str | None]]] = {
    "postgresql://me@db/shop?": _of_database,
    "postgresql+psycopg://me@db/shop?": _of_database,
    "mysql://me@db/shop?": _of_database,
    "amqps://me@mq/?": lambda address: rabbitmq.read(address).url.password,
    "kafka://me@one,two?sslmode=verify-full&": _of_kafka,
}


@pytest.mark.parametrize("address", PASSWORDS)
def test_a_password_is_read_from_a_file(address: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{CANARY}@/#:?% \n")
    assert PASSWORDS[address](f"{address}password_file={file}") == f"{CANARY}@/#:?% "


def test_a_password_in_two_places_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(CANARY)
    with pytest.raises(ConfigurationError) as caught:
        rabbitmq.read(f"amqps://me:{CANARY}@mq/?password_file={file}")
    assert CANARY not in caught.value.text


def test_an_address_that_was_understood_shows_nothing_of_it(tmp_path: Path) -> None:
    for read in (rabbitmq.read(f"amqps://me:{CANARY}@mq/"), kafka.read(f"kafka://me:{CANARY}@one")):
        assert CANARY not in f"{read!r}{read}"


@pytest.mark.parametrize(
    ("host", "local"),
    [
        (None, True),
        ("localhost", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("/run/postgresql", True),
        ("db", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("0.0.0.0", False),
    ],
)
def test_loopback_and_sockets_stay_on_this_machine(host: str | None, local: bool) -> None:
    assert transport.is_local(host) == local


@pytest.mark.parametrize(
    ("address", "scheme", "place"),
    [
        ("amqp://mq/", "amqp", "mq:5672"),
        ("amqps://mq/", "amqps", "mq:5671"),
        ("amqp://mq/?sslmode=verify-full", "amqps", "mq:5671"),
        ("amqps://mq:99/?sslmode=verify-full", "amqps", "mq:99"),
    ],
)
def test_rabbitmq_means_tls_by_scheme_or_by_word(address: str, scheme: str, place: str) -> None:
    known = rabbitmq.read(address)
    assert (known.url.scheme, known.place) == (scheme, place)
    assert (known.context is not None and known.context.check_hostname) == (scheme == "amqps")
