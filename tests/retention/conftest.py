"""A database with our tables on each stack, and the rows in it that a test wants."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.storage.sqlalchemy.database import Database
from tests.retention.rows import Rows
from tests.stacks import REPEATED


@pytest.fixture(params=["sqlite", "postgres-rabbitmq", *REPEATED])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def rows(url: str) -> AsyncIterator[Rows]:
    spawner = TaskSpawner()
    database = Database(url, clock=SystemClock(), ids=SystemIds(), spawner=spawner, pool_size=8)
    yield Rows(database)
    await database.dispose()
    await spawner.close()
