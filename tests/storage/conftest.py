"""A database on each stack: an empty one by its address, and one with our tables in it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy.database import Database

Opener = Callable[..., Database]


@pytest.fixture(params=["sqlite", "postgres-rabbitmq"])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(stack: str, request: pytest.FixtureRequest) -> str:
    """The address of an empty database."""
    return str(request.getfixturevalue("sqlite_url" if stack == "sqlite" else "postgres_url"))


@pytest.fixture
async def opened() -> AsyncIterator[Opener]:
    """`opened(url, ...)` gives a Database that is closed after the test."""
    spawner, databases = TaskSpawner(), list[Database]()

    def open_(url: str, **options: object) -> Database:
        options = {"clock": SystemClock(), "ids": SystemIds(), "spawner": spawner, **options}
        databases.append(Database(url, **options))  # type: ignore[arg-type]
        return databases[-1]

    yield open_
    for database in databases:
        await database.dispose()
    await spawner.close()


@pytest.fixture
def empty(url: str, opened: Opener) -> Database:
    """A database without our tables."""
    return opened(url)


@pytest.fixture
async def database(empty: Database) -> Database:
    """A database with our tables."""
    await empty.run(schema.upgrade)
    return empty
