"""An outbox on each stack's database."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.storage.sqlalchemy.database import Database
from tests.outbox.harness import Outbox
from tests.stacks import REPEATED


@pytest.fixture(params=["sqlite", "postgres-rabbitmq", *REPEATED])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def outbox(url: str) -> AsyncIterator[Outbox]:
    spawner = TaskSpawner()
    database = Database(url, clock=SystemClock(), ids=SystemIds(), spawner=spawner, pool_size=12)
    yield Outbox(database, spawner)
    await spawner.close()
    await database.dispose()
