"""MySQL's default log-in, `caching_sha2_password`, over TCP without TLS: the password is encrypted by the server's key.

The first log-in of a user is the long one; once the server has seen the password, it remembers its hash.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy import text

from devservices import MySql
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.errors import ConfigurationError
from saga.storage.sqlalchemy.database import Database

pytestmark = [pytest.mark.feature("G-08"), pytest.mark.stack("mysql")]


@pytest.fixture
def database(mysql_server: MySql) -> Iterator[str]:
    url = mysql_server.create_database()
    yield url
    mysql_server.drop_database(url)


@pytest.fixture
def address(database: str, mysql_server: MySql) -> Iterator[str]:
    """The address of a user whom the server has never seen, with the log-in that MySQL gives by default."""
    name, password = f"u{secrets.token_hex(6)}", secrets.token_hex(12)
    place = database.rpartition("/")[2]
    mysql_server.execute(
        f"CREATE USER '{name}'@'%' IDENTIFIED WITH caching_sha2_password BY '{password}'",
        f"GRANT ALL PRIVILEGES ON `{place}`.* TO '{name}'@'%'",
    )
    yield mysql_server.database_url(place, user=name, password=password)
    mysql_server.drop_user(name)


@pytest.fixture
async def spawner() -> AsyncIterator[TaskSpawner]:
    spawner = TaskSpawner()
    yield spawner
    await spawner.close()


def opened(url: str, spawner: TaskSpawner) -> Database:
    return Database(url, clock=SystemClock(), ids=SystemIds(), spawner=spawner)


async def test_asyncmy_logs_in_the_long_way_and_the_short_one(address: str, spawner: TaskSpawner) -> None:
    for _ in range(2):
        database = opened(address, spawner)
        assert await database.ping()
        await database.dispose()


async def test_pymysql_logs_in_the_long_way_and_the_short_one(address: str, spawner: TaskSpawner) -> None:
    database = opened(address, spawner)
    for _ in range(2):
        engine = database.serve_threads(1)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
        engine.dispose()
    await database.dispose()


async def test_a_wrong_password_is_refused_and_not_told(address: str, spawner: TaskSpawner) -> None:
    right = address.partition("@")[0].rpartition(":")[2]
    database = opened(address.replace(right, "canary-4711"), spawner)
    with pytest.raises(ConfigurationError) as refused:
        await database.ping()
    assert "canary-4711" not in str(refused.value)
    await database.dispose()
