"""An outbox on each stack's database."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy.database import Database
from tests.outbox.harness import Outbox


@pytest.fixture(params=["sqlite", "postgres-rabbitmq"])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def outbox(stack: str, request: pytest.FixtureRequest) -> AsyncIterator[Outbox]:
    url = str(request.getfixturevalue("sqlite_url" if stack == "sqlite" else "postgres_url"))
    spawner = TaskSpawner()
    database = Database(url, clock=SystemClock(), ids=SystemIds(), spawner=spawner, pool_size=12)
    await database.run(schema.upgrade)
    yield Outbox(database, spawner)
    await spawner.close()
    await database.dispose()
