"""A participant's rig on each stack: the database is the stack's, the broker is the in-process one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from saga import failpoints
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.storage.sqlalchemy.database import Database
from tests.features_due import POSTGRES_RABBITMQ
from tests.participant.harness import Rig, make_tables
from tests.stacks import TWIN
from tests.upgraded import upgraded


@pytest.fixture(params=["sqlite", "postgres-rabbitmq", "mariadb", *TWIN])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def rig(url: str) -> AsyncIterator[Rig]:
    """Services on the stack's database."""
    spawner = TaskSpawner()
    database = Database(url, clock=SystemClock(), ids=SystemIds(), spawner=spawner, pool_size=8)
    await database.run(make_tables)
    rig = Rig(database, spawner)
    yield rig
    failpoints.disarm()
    await rig.close()
    await database.dispose()


@pytest.fixture
def url_on_postgres(request: pytest.FixtureRequest) -> Iterator[str]:
    with upgraded(POSTGRES_RABBITMQ, request) as url:
        yield url


@pytest.fixture
async def stateless() -> AsyncIterator[Rig]:
    """Services without a database."""
    rig = Rig(None, TaskSpawner())
    yield rig
    failpoints.disarm()
    await rig.close()
