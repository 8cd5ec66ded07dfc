"""The fixture `stack`: a prepared database and a broker, per stack; `real_broker` asks for RabbitMQ where it stands."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiormq
import pytest

from devservices import MariaDb, Postgres
from saga import failpoints
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.database import Database
from tests.coordinator.harness import Stack
from tests.features_due import POSTGRES_RABBITMQ
from tests.plugins.canary import watch_of
from tests.stacks import REPEATED, in_file

PREPARED = "saga-coordinator-tests"
DATABASES = {"mariadb": "mariadb_database"}
TOLD = (t.incident, t.history, t.audit, t.stale_reply)
"""What is shown to people who may not see payloads."""


def prepare(url: str) -> None:
    """Make our tables, in a thread: a fixture may be asked for while a loop is running."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(asyncio.run, upgrade(url)).result()


async def upgrade(url: str) -> None:
    spawner = TaskSpawner()
    database = Database(url, clock=SystemClock(), ids=SystemIds(), spawner=spawner)
    await database.run(schema.upgrade)
    await database.dispose()
    await spawner.close()


@pytest.fixture(scope="session")
def prepared_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with our tables, made once."""
    path = tmp_path_factory.mktemp("prepared") / "saga.db"
    prepare(f"sqlite+aiosqlite:///{path}")
    return path


@pytest.fixture
def sqlite_file(tmp_path: Path, prepared_sqlite: Path) -> str:
    path = tmp_path / "saga.db"
    shutil.copy(prepared_sqlite, path)
    return f"sqlite+aiosqlite:///{path}"


@pytest.fixture
def postgres_database(request: pytest.FixtureRequest) -> Iterator[str]:
    """A PostgreSQL database with our tables, copied from one that was made once."""
    server: Postgres = request.getfixturevalue("postgres_server")
    url = server.create_database(template=server.template(PREPARED, prepare))
    yield url
    server.drop_database(url)


@pytest.fixture
def mariadb_database(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same on MariaDB."""
    server: MariaDb = request.getfixturevalue("mariadb_server")
    url = server.create_database(template=server.template(PREPARED, prepare))
    yield url
    server.drop_database(url)


@pytest.fixture(params=["sqlite", "postgres-rabbitmq", *(each for each in REPEATED if each in DATABASES)])
async def stack(request: pytest.FixtureRequest) -> AsyncIterator[Stack]:
    """What a test runs on. Where only SQL matters, `postgres-rabbitmq` is PostgreSQL with the in-process broker."""
    name = str(request.param)
    url = request.getfixturevalue(
        DATABASES.get(name, "sqlite_file" if in_file(name) else "postgres_database")
    )
    made = Stack(name, url, f"c{SystemIds().uuid7().hex[:20]}")
    yield made
    for table in TOLD:
        watch_of(request.config).check(table.name, await made.rows(table.select()))
    await made.close()
    failpoints.disarm()
    if made.rabbitmq_url is not None:
        await delete_queues(made)


@pytest.fixture
def real_broker(stack: Stack, request: pytest.FixtureRequest) -> None:
    """On the stack `postgres-rabbitmq` the broker is RabbitMQ, not one in the process."""
    if stack.name == POSTGRES_RABBITMQ:
        stack.rabbitmq_url = request.getfixturevalue("rabbitmq_url")


async def delete_queues(stack: Stack) -> None:
    assert stack.rabbitmq_url is not None
    connection = await aiormq.connect(stack.rabbitmq_url)
    channel = await connection.channel()
    for queue in stack.channels():
        await channel.queue_delete(queue)
    await connection.close()
