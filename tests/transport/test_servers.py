"""L-05: real servers over TLS, each with a saga to its end; who may not log in is told so at start.

The servers take nobody's plain text: a connection that forgot its TLS would be refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Final

import pytest
from pydantic import BaseModel
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from devservices import (
    Certificates,
    LocalKafka,
    LocalMariaDb,
    LocalMySql,
    LocalMySqlServer,
    LocalPostgres,
    LocalRabbitMq,
    Service,
)
from devservices.kafka import PASSWORD as KAFKA_PASSWORD
from devservices.kafka import USER as KAFKA_USER
from saga import App, Participant, Saga
from saga.brokers.rabbitmq import RabbitMQOptions
from saga.brokers.rabbitmq.address import read
from saga.brokers.rabbitmq.link import ConnectionLost, connect
from saga.cli import build
from saga.clock import TaskSpawner
from saga.errors import ConfigurationError, TopologyMismatch
from tests.plugins.watch import CANARY
from tests.transport.certificates import HOST, Authorities

pytestmark = [pytest.mark.feature("L-05"), pytest.mark.stack("pure"), pytest.mark.slow]

SECONDS_MAX: Final = timedelta(seconds=60)
CERTIFIED: Final = "certified"
"""Who logs in by a certificate."""
Require = Callable[[str, Callable[[], Service]], Any]


class Transfer(BaseModel):
    amount: int


def transferring(database: str, broker: str, production: bool = True) -> tuple[App, Saga[Transfer, None]]:
    """Return an app whose saga writes through the loop and through threads."""
    accounts = Participant("accounts", start_to_close=timedelta(seconds=30))

    @accounts.activity
    async def withdraw(transfer: Transfer, session: AsyncSession) -> None:
        await session.execute(text("SELECT 1"))

    @withdraw.compensation
    async def refund(transfer: Transfer, session: AsyncSession) -> None: ...

    @accounts.activity
    def deposit(transfer: Transfer, session: Session) -> None:
        session.execute(text("SELECT 1"))

    @deposit.compensation
    def take_back(transfer: Transfer, session: Session) -> None: ...

    saga: Saga[Transfer, Any] = Saga("money-transfer", Transfer).step(withdraw).step(deposit)
    return App(database, broker=broker, sagas=[saga], participants=[accounts], production=production), saga


async def transfer(database: str, broker: str, production: bool = True) -> None:
    app, saga = transferring(database, broker, production)
    async with app:
        await app.client.execute(saga, Transfer(amount=1), id="t-1", timeout=SECONDS_MAX)


async def refused(database: str, broker: str) -> str:
    app, _ = transferring(database, broker)
    async with asyncio.timeout(SECONDS_MAX.total_seconds()):
        with pytest.raises(ConfigurationError) as caught:
            await app.start(coordinator=True, participants=True)
    assert CANARY not in caught.value.text
    return caught.value.text


def secured(address: str, authorities: Authorities, **changes: Any) -> str:
    """Return an address on the host of the certificate, with its authority."""
    words = {"sslrootcert": str(authorities.root)}
    url = make_url(address).set(host=HOST, **changes).update_query_dict(words)
    return url.render_as_string(hide_password=False)


def upgrade(address: str) -> None:
    result = CliRunner().invoke(build(), ["db", "upgrade", "--database", address])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def certificates(authorities: Authorities) -> Certificates:
    return authorities.issue("server")


@pytest.fixture(scope="module")
def client(authorities: Authorities) -> Certificates:
    return authorities.issue("client", host=CERTIFIED, common_name=CERTIFIED)


# --- PostgreSQL -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres(require: Require, certificates: Certificates) -> Iterator[LocalPostgres]:
    with require("PostgreSQL with TLS", lambda: LocalPostgres(certificates)) as server:
        server.create_role("shop", CANARY)
        server.create_role(CERTIFIED)
        yield server


@pytest.fixture(params=["postgresql", "postgresql+psycopg"])
def shop(request: pytest.FixtureRequest, postgres: LocalPostgres, authorities: Authorities) -> Iterator[str]:
    address = postgres.create_database(owner="shop")
    yield secured(address, authorities, drivername=request.param, username="shop", password=CANARY)
    postgres.drop_database(address)


async def test_postgresql_over_tls(shop: str) -> None:
    """The bell that listens, the schema's upgrade and handlers in threads have the same link."""
    await asyncio.to_thread(upgrade, shop)
    await transfer(shop, "database://")


async def test_postgresql_refuses_plain_text(shop: str) -> None:
    """What the test above rests on."""
    plain = make_url(shop).set(query={"sslmode": "disable"})
    assert "refuses the log-in" in await refused(plain.render_as_string(hide_password=False), "memory://")


async def test_a_wrong_password_of_postgresql_is_told_at_start(shop: str) -> None:
    wrong = make_url(shop).set(password="wrong").render_as_string(hide_password=False)
    assert "refuses the log-in" in await refused(wrong, "memory://")


@pytest.mark.parametrize("driver", ["postgresql", "postgresql+psycopg"])
async def test_postgresql_takes_a_certificate_for_a_password(
    driver: str, postgres: LocalPostgres, authorities: Authorities, client: Certificates
) -> None:
    made = postgres.create_database(owner=CERTIFIED)
    bare = secured(made, authorities, drivername=driver, username=CERTIFIED, password="")
    address = make_url(bare).update_query_dict(
        {"sslcert": str(client.certificate), "sslkey": str(client.key)}
    )
    await asyncio.to_thread(upgrade, str(address))
    await transfer(str(address), "database://")
    assert "refuses the log-in" in await refused(bare, "memory://")
    postgres.drop_database(made)


# --- MariaDB and MySQL ----------------------------------------------------------------------------


def shop_of(server: LocalMySqlServer, authorities: Authorities) -> str:
    server.execute(
        "DROP USER IF EXISTS 'shop'@'%'",
        f"CREATE USER 'shop'@'%' IDENTIFIED BY '{CANARY}' REQUIRE SSL",
        "GRANT ALL PRIVILEGES ON *.* TO 'shop'@'%'",
    )
    return secured(server.create_database(), authorities, username="shop", password=CANARY)


KINDS: Final[Mapping[str, type[LocalMySqlServer]]] = {"MariaDB": LocalMariaDb, "MySQL": LocalMySql}


@pytest.mark.parametrize("kind", KINDS)
async def test_mysql_and_mariadb_over_tls(
    kind: str, require: Require, certificates: Certificates, authorities: Authorities
) -> None:
    provide = KINDS[kind]
    with require(f"{kind} with TLS", lambda: provide(certificates)) as server:
        address = await asyncio.to_thread(shop_of, server, authorities)
        await asyncio.to_thread(upgrade, address)
        await transfer(address, "database://")

        wrong = make_url(address).set(password="wrong").render_as_string(hide_password=False)
        assert "refuses the log-in" in await refused(wrong, "memory://")
        plain = make_url(address).set(query={"sslmode": "disable"})
        assert "refuses the log-in" in await refused(plain.render_as_string(hide_password=False), "memory://")


# --- RabbitMQ -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rabbitmq(require: Require, certificates: Certificates) -> Iterator[LocalRabbitMq]:
    with require("RabbitMQ with TLS", lambda: LocalRabbitMq(certificates)) as server:
        for user, password in (("shop", CANARY), (CERTIFIED, CANARY)):
            server.rabbitmqctl("add_user", user, password)
            server.rabbitmqctl("set_permissions", user, ".*", ".*", ".*")
        yield server


async def test_rabbitmq_over_tls(rabbitmq: LocalRabbitMq, authorities: Authorities, sqlite_url: str) -> None:
    words = f"sslrootcert={authorities.root}"
    await transfer(sqlite_url, f"amqps://shop:{CANARY}@{HOST}:{rabbitmq.tls_port}/?{words}")


async def test_rabbitmq_takes_a_certificate_for_a_password(
    rabbitmq: LocalRabbitMq, authorities: Authorities, client: Certificates, sqlite_url: str
) -> None:
    words = f"sslrootcert={authorities.root}&sslcert={client.certificate}&sslkey={client.key}&auth=external"
    await transfer(sqlite_url, f"amqps://{HOST}:{rabbitmq.tls_port}/?{words}")


async def test_a_log_in_that_rabbitmq_refuses_is_told_at_start(
    rabbitmq: LocalRabbitMq, authorities: Authorities, sqlite_url: str
) -> None:
    words = f"sslrootcert={authorities.root}"
    place = f"{HOST}:{rabbitmq.tls_port}"
    told = await refused(sqlite_url, f"amqps://shop:wrong@{place}/?{words}")
    assert told == f"RabbitMQ at {place}: it refuses the log-in: user or password is wrong."
    plain = rabbitmq.url.rpartition(":")[2].rstrip("/")
    told = await refused(sqlite_url, f"amqps://shop:{CANARY}@{HOST}:{plain}/?{words}")
    assert "TLS is not agreed on" in told


async def test_a_virtual_host_that_is_not_there_is_guessed_at(
    rabbitmq: LocalRabbitMq, authorities: Authorities
) -> None:
    spawner = TaskSpawner()
    words = f"sslrootcert={authorities.root}"
    address = read(f"amqps://shop:{CANARY}@{HOST}:{rabbitmq.tls_port}/nowhere?{words}")
    with pytest.raises(ConnectionLost, match="a virtual host that is not there"):
        await connect(address, name="test", options=RabbitMQOptions(), spawner=spawner)
    await spawner.close()


# --- Kafka ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kafka(require: Require, certificates: Certificates) -> Iterator[LocalKafka]:
    with require("Kafka with TLS", lambda: LocalKafka(certificates)) as server:
        yield server


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_kafka_over_tls_with_a_log_in(
    mechanism: str, kafka: LocalKafka, authorities: Authorities, sqlite_url: str
) -> None:
    words = f"sslrootcert={authorities.root}&sasl={mechanism}"
    place = f"{HOST}:{kafka.sasl_port}"
    address = f"kafka://{KAFKA_USER}:{KAFKA_PASSWORD}@{place}?{words}"
    await transfer(sqlite_url, address, production=False)
    assert "refuses the log-in" in await refused(sqlite_url, f"kafka://{KAFKA_USER}:wrong@{place}?{words}")


async def test_kafka_over_tls(kafka: LocalKafka, authorities: Authorities, sqlite_url: str) -> None:
    address = f"kafka://{HOST}:{kafka.tls_port}?sslrootcert={authorities.root}"
    await transfer(sqlite_url, address, production=False)


@pytest.mark.feature("G-05")
async def test_production_mode_does_not_start_on_a_cluster_of_one_broker(
    kafka: LocalKafka, sqlite_url: str
) -> None:
    app, _ = transferring(sqlite_url, kafka.url)
    with pytest.raises(TopologyMismatch, match="SG206") as caught:
        await app.start(coordinator=True, participants=True)
    assert "[one-copy]" in caught.value.text
