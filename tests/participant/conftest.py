"""A participant's rig on each stack: the database is the stack's, the broker is the in-process one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from saga import failpoints
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.storage.sqlalchemy.database import Database
from tests.participant.harness import Rig, make_tables
from tests.stacks import TWIN

URLS = {
    "sqlite": "sqlite_url",
    "postgres-rabbitmq": "postgres_url",
    "mariadb": "mariadb_url",
    "mysql": "mysql_url",
}
"""Stack to the fixture that gives an empty database."""


@pytest.fixture(params=["sqlite", "postgres-rabbitmq", "mariadb", *TWIN])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def rig(stack: str, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """Services on the stack's database."""
    url = str(request.getfixturevalue(URLS[stack]))
    spawner = TaskSpawner()
    database = Database(url, clock=SystemClock(), ids=SystemIds(), spawner=spawner, pool_size=8)
    await database.run(make_tables)
    rig = Rig(database, spawner)
    yield rig
    failpoints.disarm()
    await rig.close()
    await database.dispose()


@pytest.fixture
async def stateless() -> AsyncIterator[Rig]:
    """Services without a database."""
    rig = Rig(None, TaskSpawner())
    yield rig
    failpoints.disarm()
    await rig.close()
