"""L-05: production mode refuses links to other hosts that anybody may read or answer; else they are warned of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from saga import App, Participant, settings
from saga.cli import build
from saga.errors import ConfigurationError, InsecureLink, SagaError
from saga.links import of_broker, of_database
from tests.plugins.watch import CANARY

pytestmark = [pytest.mark.feature("L-05"), pytest.mark.stack("pure")]


class Order(BaseModel):
    id: str


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAGA_PRODUCTION", raising=False)
    monkeypatch.delenv("PGHOST", raising=False)


def serving(**given: Any) -> App:
    participant = Participant("accounts", start_to_close=None)

    @participant.activity
    async def reserve(order: Order) -> None: ...

    return App(participants=[participant], **given)


async def started(app: App) -> SagaError:
    with pytest.raises(SagaError) as caught:
        await app.start(coordinator=True, participants=True)
    return caught.value


@pytest.mark.parametrize(
    ("database", "place"),
    [
        (f"postgresql://me:{CANARY}@db/shop", "db:5432"),
        (f"postgresql+psycopg://me:{CANARY}@db/shop?sslmode=prefer", "db:5432"),
        (f"postgresql://me:{CANARY}@db:6543/shop?sslmode=require", "db:6543"),
        (f"postgresql://me:{CANARY}@/shop?host=localhost:1&host=db:2", "db:2"),
        (f"mysql://me:{CANARY}@10.0.0.9/shop?sslmode=disable", "10.0.0.9:3306"),
        (f"mariadb://me:{CANARY}@db/shop", "db:3306"),
    ],
)
async def test_a_database_elsewhere_needs_a_link_that_is_checked(database: str, place: str) -> None:
    error = await started(serving(database=database, broker="memory://", production=True))
    assert isinstance(error, InsecureLink)
    assert f"The link to the database at {place} " in error.text
    assert "sslmode=verify-full" in error.text
    assert CANARY not in error.text


@pytest.mark.parametrize(
    ("broker", "place"),
    [
        (f"amqp://me:{CANARY}@mq/", "mq:5672"),
        (f"amqps://me:{CANARY}@mq/?sslmode=require", "mq:5671"),
        (f"kafka://me:{CANARY}@one,localhost,two:9093", "one:9092, two:9093"),
        (f"postgresql://me:{CANARY}@db/queue?schema=q", "db:5432"),
    ],
)
async def test_a_broker_elsewhere_needs_a_link_that_is_checked(broker: str, place: str) -> None:
    error = await started(serving(broker=broker, production=True))
    assert isinstance(error, InsecureLink)
    assert f"The link to the broker at {place} " in error.text
    assert CANARY not in error.text


@pytest.mark.parametrize("broker", [f"amqp://me:{CANARY}@localhost/", "kafka://127.0.0.1:9094"])
def test_a_link_on_this_machine_may_be_plain(broker: str, caplog: pytest.LogCaptureFixture) -> None:
    serving(broker=broker, production=True).check_links()
    assert not caplog.records


@pytest.mark.parametrize(
    ("of", "address"),
    [
        (of_database, "postgresql:///shop?host=/run/postgresql"),
        (of_database, "postgresql://localhost/shop"),
        (of_database, "postgresql://[::1]/shop"),
        (of_broker, "kafka://[::1]:9094,[::1],127.0.0.1"),
        (of_broker, "amqp://[::1]/"),
    ],
)
def test_loopback_is_known_however_it_is_written(of: Callable[[str], Any], address: str) -> None:
    assert of(address).places == ()


def test_drivers_of_postgresql_ask_the_environment_for_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "db")
    link = of_database("postgresql:///shop")
    assert link is not None
    assert link.places == ("db:5432",)


@pytest.mark.parametrize("broker", [f"amqp://me:{CANARY}@[::1/", f"kafka://me:{CANARY}\u2100@one/"])
async def test_an_address_that_cannot_be_read_is_refused_and_not_shown(broker: str) -> None:
    error = await started(serving(broker=broker, production=True))
    assert isinstance(error, ConfigurationError)
    assert CANARY not in error.text


async def test_elsewhere_it_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    app = serving(broker="amqp://mq.invalid/", database="mysql://db.invalid/shop?sslmode=require")
    with caplog.at_level(logging.WARNING, "saga.app"):
        app.check_links()
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(";")[0] for line in told] == [
        "The link to the database at db.invalid:3306 is encrypted for whoever answers",
        "The link to the broker at mq.invalid:5672 may be in plain text",
    ]


async def test_a_checked_link_is_told_of_by_nobody(caplog: pytest.LogCaptureFixture) -> None:
    app = serving(broker="amqps://mq.invalid/", database="postgresql://db.invalid/shop?sslmode=verify-full")
    with caplog.at_level(logging.WARNING, "saga.app"):
        app.check_links()
    assert not caplog.records


async def test_a_broker_that_nobody_said_is_refused() -> None:
    error = await started(serving(production=True))
    assert isinstance(error, ConfigurationError)
    assert "Set SAGA_BROKER" in error.text


async def test_a_broker_in_the_process_may_be_said() -> None:
    app = serving(broker="memory://", production=True)
    await app.start(coordinator=False, participants=True)
    await app.stop()


async def test_a_file_needs_no_broker(sqlite_url: str) -> None:
    app = App(sqlite_url, production=True)
    app.check_links()


def test_the_environment_says_production_for_the_schema_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGA_PRODUCTION", "true")
    assert settings.load().production
    result = CliRunner().invoke(
        build(), ["db", "check", "--database", f"mysql://me:{CANARY}@db.invalid/shop"]
    )
    assert result.exit_code == 2
    assert "SG207" in result.output
    assert CANARY not in result.output
