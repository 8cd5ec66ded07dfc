"""Where the client's tests run: a fresh database, and on the servers' stack a RabbitMQ namespace of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from saga import failpoints
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy.database import Database
from tests.client import shop


@pytest.fixture(params=["sqlite", "postgres-rabbitmq"])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def place(stack: str, request: pytest.FixtureRequest) -> AsyncIterator[shop.Place]:
    servers = stack == "postgres-rabbitmq"
    url = str(request.getfixturevalue("postgres_url" if servers else "sqlite_url"))
    spawner = TaskSpawner()
    database = Database(url, clock=SystemClock(), ids=SystemIds(), spawner=spawner)
    await database.run(schema.upgrade)
    await database.run(lambda connection: shop.own.create_all(connection))
    await database.dispose()
    place = shop.Place(stack, url, str(request.getfixturevalue("rabbitmq_url")) if servers else None)
    yield place
    failpoints.disarm()
    shop.gates.clear()
    await place.engine.dispose()
    await spawner.close()
