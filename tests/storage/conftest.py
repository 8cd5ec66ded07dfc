"""A database on each stack: an empty one by its address, and one with our tables in it.

A test that takes `stack` runs on every database, one that takes `server_url` (and what is made of it) on those that are
servers. A module with `DRIVERS` has its tests on PostgreSQL run on each of them, one with `STACKS` runs on
these alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from sqlalchemy import Connection, make_url

from devservices import MySqlServer, Postgres
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy.database import Database

Opener = Callable[..., Database]


ASYNCPG = "asyncpg"
EVERY_DRIVER = (ASYNCPG, "psycopg")
POSTGRES = "postgres-rabbitmq"
MYSQL = ("mariadb", "mysql")
URLS = {"sqlite": "sqlite_url", POSTGRES: "postgres_url", "mariadb": "mariadb_url", "mysql": "mysql_url"}
"""Stack to the fixture that gives an empty database."""
SERVERS = {POSTGRES: "postgres_server", "mariadb": "mariadb_server", "mysql": "mysql_server"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    drivers = getattr(metafunc.module, "DRIVERS", (ASYNCPG,))
    if "stack" in metafunc.fixturenames:
        both = [*((POSTGRES, driver) for driver in drivers), *((stack, "") for stack in MYSQL)]
        if "server_url" not in metafunc.fixturenames:
            both.insert(0, ("sqlite", ""))
        both = [each for each in both if each[0] in getattr(metafunc.module, "STACKS", URLS)]
        ids = ["-".join(filter(None, (stack, driver.replace(ASYNCPG, "")))) for stack, driver in both]
        metafunc.parametrize(("stack", "driver"), both, ids=ids)
    elif "postgres_url" in metafunc.fixturenames and len(drivers) > 1:
        metafunc.parametrize("driver", drivers)


def drop_index(index: str, table: str, connection: Connection) -> str:
    """Return the statement: an index of MySQL belongs to its table by name, too."""
    return f"DROP INDEX {index}" + (f" ON {table}" if connection.dialect.name == "mysql" else "")


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
    return str(request.getfixturevalue(URLS[stack]))


@pytest.fixture
def server(stack: str, request: pytest.FixtureRequest) -> Postgres | MySqlServer:
    """The server on which this test's database is."""
    server: Postgres | MySqlServer = request.getfixturevalue(SERVERS[stack])
    return server


@pytest.fixture
def server_url(url: str) -> str:
    """The address of an empty database of a server: nothing is run on SQLite."""
    return url


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
