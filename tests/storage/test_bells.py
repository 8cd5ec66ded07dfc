"""A process hears what another one rings, on each driver; a listener that is cut off says so and listens again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy import text

from saga.storage.sqlalchemy import bells, psycopglink
from saga.storage.sqlalchemy.bells import NotifyBell
from saga.storage.sqlalchemy.database import Database
from tests.storage.conftest import EVERY_DRIVER, Opener

DRIVERS = EVERY_DRIVER
pytestmark = pytest.mark.stack("postgres-rabbitmq")

ANSWER_SECONDS = 1.0
"""In place of the bound of every wait for an answer, for the test that waits longer than it."""


class Ear:
    """A bell that listens, and what it has heard; the empty name is that it began to listen."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.bell = NotifyBell(database)
        self.heard = asyncio.Queue[str]()
        self.lost = asyncio.Event()

    def listen(self) -> Coroutine[Any, Any, None]:
        return self.bell.listen(self.heard.put_nowait, self.lost.set)

    async def next(self) -> str:
        async with asyncio.timeout(60):
            return await self.heard.get()


@pytest.fixture
async def ear(postgres_url: str, opened: Opener) -> AsyncIterator[Ear]:
    ear = Ear(opened(postgres_url))
    task = asyncio.create_task(ear.listen())
    assert await ear.next() == ""
    yield ear
    task.cancel()
    await asyncio.wait({task})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for an answer as long as he does elsewhere."""
    usual: Callable[..., dict[str, Any]] = psycopglink.arguments
    monkeypatch.setattr(bells, "LISTEN_SECONDS", ANSWER_SECONDS / 2)
    monkeypatch.setattr(
        psycopglink,
        "arguments",
        lambda settings, **seconds: usual(settings, **seconds | {"answer_seconds": ANSWER_SECONDS}),
    )


async def test_a_process_hears_what_another_one_rings_and_not_what_it_rings_itself(
    ear: Ear, postgres_url: str, opened: Opener
) -> None:
    await ear.bell.ring(["mine"])
    await NotifyBell(opened(postgres_url)).ring(["b", "a"])
    assert [await ear.next(), await ear.next()] == ["a", "b"]
    assert ear.heard.empty()


async def test_the_lock_that_shows_that_a_process_lives_is_held_while_it_listens(ear: Ear) -> None:
    lock = ear.bell.presence()
    assert lock is not None
    held = text(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
        " AND (classid::bigint << 32) | objid::bigint = CAST(:lock AS bigint)"
    )
    assert await ear.database.run(lambda connection: connection.execute(held, {"lock": lock}).scalar()) == 1


async def test_a_listener_that_is_cut_off_says_so_and_listens_again(
    ear: Ear, postgres_url: str, opened: Opener
) -> None:
    """What was rung meanwhile is not known, so it looks for itself: that is the empty name."""
    kill = text(
        "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    other = opened(postgres_url)
    assert await other.run(lambda connection: connection.execute(kill).scalars().all()) == [True]
    async with asyncio.timeout(60):
        await ear.lost.wait()
    assert await ear.next() == ""
    await NotifyBell(other).ring(["a"])
    assert await ear.next() == "a"


@pytest.mark.usefixtures("impatient")
async def test_a_long_silence_is_no_dead_link(postgres_url: str, opened: Opener) -> None:
    """SQL-6: the bound of every wait for an answer is none for what nobody has asked for."""
    ear = Ear(opened(postgres_url))
    task = asyncio.create_task(ear.listen())
    assert await ear.next() == ""
    await asyncio.wait({task}, timeout=2.5 * ANSWER_SECONDS)
    assert not ear.lost.is_set()
    await NotifyBell(opened(postgres_url)).ring(["a"])
    assert await ear.next() == "a"
    task.cancel()
    await asyncio.wait({task})


async def test_a_rung_name_may_hold_anything(ear: Ear, postgres_url: str, opened: Opener) -> None:
    await NotifyBell(opened(postgres_url)).ring(["100% 'x' :y $1 \u00fc"])
    assert await ear.next() == "100% 'x' :y $1 \u00fc"
