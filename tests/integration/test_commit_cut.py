"""SQL-1 against a real PostgreSQL: a COMMIT whose answer is lost has an unknown outcome, and here it has happened."""

from __future__ import annotations

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from tests.proxy import ProxyFactory


async def rows(url: str) -> int:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        count: int = (await connection.execute(text("SELECT count(*) FROM moves"))).scalar_one()
    await engine.dispose()
    return count


@pytest.fixture
async def moves(postgres_url: str) -> str:
    engine = create_async_engine(postgres_url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE moves (id int PRIMARY KEY)"))
    await engine.dispose()
    return postgres_url


async def test_a_cut_at_commit_raises_in_the_client_and_the_row_is_there(
    moves: str, proxy: ProxyFactory
) -> None:
    """SQL-1, F6."""
    link = await proxy(moves)
    engine = create_async_engine(link.url)

    async def insert(connection: AsyncConnection) -> None:
        await connection.execute(text("INSERT INTO moves VALUES (1)"))

    async with engine.connect() as connection:
        await insert(connection)
        link.cut_at_commit()
        with pytest.raises((DBAPIError, InterfaceError, asyncpg.PostgresError, OSError)):
            await connection.commit()
        await connection.invalidate()
    await engine.dispose()
    assert link.fired["cut"] == 1
    assert await rows(moves) == 1


async def test_a_cut_at_a_prepared_commit_too(moves: str, proxy: ProxyFactory) -> None:
    """The extended protocol sends COMMIT first to be parsed: only the server's word tells that it ran."""
    link = await proxy(moves)
    connection = await asyncpg.connect(link.url.replace("+asyncpg", ""))
    await connection.execute("BEGIN")
    await connection.execute("INSERT INTO moves VALUES (1)")
    link.cut_at_commit()
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await connection.fetch("COMMIT")
    connection.terminate()
    assert link.fired["cut"] == 1
    assert await rows(moves) == 1


async def test_a_cut_before_the_commit_leaves_nothing(moves: str, proxy: ProxyFactory) -> None:
    link = await proxy(moves)
    connection = await asyncpg.connect(link.url.replace("+asyncpg", ""))
    await connection.execute("BEGIN")
    await connection.execute("INSERT INTO moves VALUES (1)")
    link.reset()
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await connection.execute("COMMIT")
    connection.terminate()
    assert await rows(moves) == 0
