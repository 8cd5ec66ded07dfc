"""P19 in a user's tests: everything is rolled back, nothing goes out, and what was started can be looked at inside."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from saga import App
from saga.storage.sqlalchemy import tables as t
from saga.testing import Environment, Started, started
from tests.testing.bank import ORDER, money_transfer
from tests.upgraded import upgrade

pytestmark = [pytest.mark.feature("I-06"), pytest.mark.feature("C-02")]


@pytest.fixture
async def rolled_back(env: Environment) -> AsyncIterator[AsyncSession]:
    """A session whose every commit is only a savepoint's release: the outer transaction is rolled back."""
    async with env.engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        await outer.rollback()


@pytest.mark.stack("sqlite")
async def test_what_was_started_is_told_and_nothing_runs(env: Environment, rolled_back: AsyncSession) -> None:
    handle = await env.client.start(money_transfer, ORDER, id="t-1", session=rolled_back)
    await rolled_back.commit()
    [found] = await env.started(rolled_back)
    assert found == Started("money-transfer", "t-1", ORDER.model_dump(), handle.run_id)
    assert await env.still_open() == [], "nobody else sees it"


@pytest.mark.stack("sqlite")
async def test_a_savepoint_that_was_rolled_back_has_started_nothing(
    env: Environment, rolled_back: AsyncSession
) -> None:
    async with rolled_back.begin_nested() as inner:
        await env.client.start(money_transfer, ORDER, id="t-1", session=rolled_back)
        await inner.rollback()
    await env.client.start(money_transfer, ORDER, id="t-2", session=rolled_back)
    assert [each.id for each in await env.started(rolled_back)] == ["t-2"]


@pytest.mark.stack("sqlite")
async def test_what_was_committed_before_is_not_told(env: Environment) -> None:
    await env.run(money_transfer, ORDER, id="before")
    async with env.session() as session:
        assert await env.started(session) == []
        await env.client.start(money_transfer, ORDER, id="now", session=session)
        assert [each.id for each in await env.started(session)] == ["now"]
        await session.rollback()
        assert await env.started(session) == []


@pytest.mark.stack("sqlite")
async def test_nothing_goes_out_after_the_rollback(env: Environment) -> None:
    async with env.engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            await env.client.start(money_transfer, ORDER, id="t-1", session=session)
            await session.commit()
        await outer.rollback()
    await env.advance(timedelta(hours=1))
    async with env.engine.connect() as reader:
        for table in (t.instance, t.outbox, t.history, t.barrier):
            assert (await reader.execute(table.select())).all() == []


@pytest.mark.stack("sqlite")
async def test_a_started_saga_runs_once_the_transaction_is_committed(env: Environment) -> None:
    async with env.session() as session, session.begin():
        handle = await env.client.start(money_transfer, ORDER, id="t-1", session=session)
    assert (await env.ended(handle)).status == "completed"


@pytest.mark.stack("postgres-rabbitmq")
async def test_on_a_server_the_client_of_an_app_is_enough(postgres_url: str) -> None:
    """The rollback fixture of a service's own tests: its database, a client, no coordinator, no broker to reach."""
    upgrade(postgres_url)
    engine = create_async_engine(postgres_url)
    app = App(postgres_url, sagas=[money_transfer])
    async with app.as_client() as client, engine.connect() as connection:
        outer = await connection.begin()
        for number in range(2):  # each request of the code under test has a session of its own
            async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
                await client.start(money_transfer, ORDER, id=f"t-{number}", session=session)
                await session.commit()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            assert [(each.saga, each.id) for each in await started(session)] == [
                ("money-transfer", "t-0"),
                ("money-transfer", "t-1"),
            ]
        await outer.rollback()
        async with AsyncSession(engine) as session:
            assert await started(session) == []
    await engine.dispose()
