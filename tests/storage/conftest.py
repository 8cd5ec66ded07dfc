"""A database on each stack: an empty one by its address, and one with our tables in it.

A module with `DRIVERS` has its tests on PostgreSQL run on each of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from sqlalchemy import make_url

from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy.database import Database

Opener = Callable[..., Database]


ASYNCPG = "asyncpg"
EVERY_DRIVER = (ASYNCPG, "psycopg")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    drivers = getattr(metafunc.module, "DRIVERS", (ASYNCPG,))
    if "stack" in metafunc.fixturenames:
        both = [("sqlite", ""), *(("postgres-rabbitmq", driver) for driver in drivers)]
        ids = ["-".join(filter(None, (stack, driver.replace(ASYNCPG, "")))) for stack, driver in both]
        metafunc.parametrize(("stack", "driver"), both, ids=ids)
    elif "postgres_url" in metafunc.fixturenames and len(drivers) > 1:
        metafunc.parametrize("driver", drivers)


@pytest.fixture
def driver() -> str:
    """The driver of addresses on PostgreSQL."""
    return ASYNCPG


@pytest.fixture
def postgres_url(postgres_url: str, driver: str) -> str:
    """The address of an empty database, with the driver of this test."""
    return make_url(postgres_url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)


@pytest.fixture
def url(stack: str, driver: str, request: pytest.FixtureRequest) -> str:
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
