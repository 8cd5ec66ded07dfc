"""L-05: no link is made to a server that shows the wrong certificate, and the start says which and why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import Connection

from saga import App, Participant
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.errors import ConfigurationError
from saga.storage.sqlalchemy.database import Database
from tests.transport import strangers
from tests.transport.certificates import HOST, STRANGERS, Authorities, Stranger

pytestmark = [pytest.mark.feature("L-05", acceptance=True), pytest.mark.stack("pure")]

SECONDS_MAX: Final = 60.0
DATABASES: Final = {
    "postgresql": strangers.postgresql,
    "postgresql+psycopg": strangers.postgresql,
    "mysql": strangers.mysql,
    "mariadb": strangers.mysql,
}
BROKERS: Final = ("amqps", "amqp", "kafka")


def address(scheme: str, port: int, root: Path) -> str:
    name = "" if scheme == "kafka" else "/shop"
    return f"{scheme}://me:canary-4f1d9c@{HOST}:{port}{name}?sslrootcert={root}"


@pytest.fixture
async def spawner() -> AsyncIterator[TaskSpawner]:
    made = TaskSpawner()
    yield made
    await made.close()


def ask(connection: Connection) -> None:
    connection.exec_driver_sql("SELECT 1")


@pytest.mark.parametrize("scheme", DATABASES)
async def test_a_database_that_shows_the_wrong_certificate_is_not_talked_to(
    scheme: str, stranger: Stranger, authorities: Authorities, spawner: TaskSpawner
) -> None:
    async with strangers.listening(stranger.context(authorities), DATABASES[scheme]) as port:
        database = Database(
            address(scheme, port, authorities.root), clock=SystemClock(), ids=SystemIds(), spawner=spawner
        )
        async with asyncio.timeout(SECONDS_MAX):
            with pytest.raises(ConfigurationError) as caught:
                await database.run(ask)
        await database.dispose()

    told = caught.value.text
    assert f"{HOST}:{port}/shop" in told
    assert "certificate" in told
    if "psycopg" not in scheme:
        assert stranger.complaint in told


@pytest.mark.parametrize("scheme", DATABASES)
async def test_without_an_authority_of_its_own_the_systems_are_believed(
    scheme: str, authorities: Authorities, spawner: TaskSpawner
) -> None:
    shown = STRANGERS["another authority"].context(authorities)
    async with strangers.listening(shown, DATABASES[scheme]) as port:
        url = f"{scheme}://me:canary-4f1d9c@{HOST}:{port}/shop?sslmode=verify-full"
        database = Database(url, clock=SystemClock(), ids=SystemIds(), spawner=spawner)
        async with asyncio.timeout(SECONDS_MAX):
            with pytest.raises(ConfigurationError, match="SG201") as caught:
                await database.run(ask)
        await database.dispose()
    assert "certificate is not accepted" in caught.value.text


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
async def test_threads_do_not_talk_to_it_either(
    scheme: str, stranger: Stranger, authorities: Authorities, spawner: TaskSpawner
) -> None:
    async with strangers.listening(stranger.context(authorities), DATABASES[scheme]) as port:
        database = Database(
            address(scheme, port, authorities.root), clock=SystemClock(), ids=SystemIds(), spawner=spawner
        )
        engine = database.serve_threads(1)
        async with asyncio.timeout(SECONDS_MAX):
            with pytest.raises(Exception, match=r"certificate"):
                await asyncio.to_thread(engine.connect)
        await database.dispose()


@pytest.mark.parametrize("scheme", BROKERS)
async def test_a_broker_that_shows_the_wrong_certificate_is_not_talked_to(
    scheme: str, stranger: Stranger, authorities: Authorities
) -> None:
    async with strangers.listening(stranger.context(authorities)) as port:
        app = App(broker=address(scheme, port, authorities.root), participants=[Participant("accounts")])
        async with asyncio.timeout(SECONDS_MAX):
            with pytest.raises(ConfigurationError) as caught:
                await app.start(coordinator=False, participants=True)

    told = caught.value.text
    assert f"{HOST}:{port}" in told
    assert "certificate is not accepted" in told
    assert stranger.complaint in told
