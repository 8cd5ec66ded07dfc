"""A participant whose PostgreSQL loses answers, connections or itself: one effect, and an answer (P3, P22)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from saga import failpoints
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.definition.activity import Participant
from saga.storage.sqlalchemy.database import Database
from tests.participant.harness import (
    Gate,
    Receipt,
    Rig,
    Transfer,
    limited,
    make_command,
    make_tables,
    move,
    until,
)
from tests.plugins.features import Faults
from tests.proxy import Proxy, ProxyFactory

pytestmark = pytest.mark.stack("postgres-rabbitmq")


@pytest.fixture
async def link(url_on_postgres: str, proxy: ProxyFactory) -> Proxy:
    return await proxy(url_on_postgres)


@pytest.fixture
async def far(url_on_postgres: str, link: Proxy) -> AsyncIterator[tuple[Rig, Database]]:
    """A rig that looks at the database directly, and the same database through the proxy for its services."""
    spawner = TaskSpawner()
    near = Database(url_on_postgres, clock=SystemClock(), ids=SystemIds(), spawner=spawner)
    await near.run(make_tables)
    rig = Rig(near, spawner)
    database = Database(link.url, clock=SystemClock(), ids=SystemIds(), spawner=spawner)
    yield rig, database
    failpoints.disarm()
    link.heal()
    await rig.close()
    await near.dispose()
    await database.dispose()


def accounts(gate: Gate | None = None) -> Participant:
    participant = limited()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await move(session, transfer.account, -transfer.amount)
        if gate is not None:
            await gate()
        return Receipt(reference="x")

    @participant.activity(no_compensation="test", batch=10)
    async def withdraw_many(transfers: list[Transfer], session: AsyncSession) -> list[Receipt]:
        await move(session, "alice", -sum(each.amount for each in transfers))
        return [Receipt(reference="x") for _ in transfers]

    return participant


@pytest.mark.parametrize("activity", ["withdraw", "withdraw_many"])
async def test_p3_a_commit_whose_answer_is_cut_is_settled_by_a_look(
    far: tuple[Rig, Database], link: Proxy, activity: str, faults: Faults
) -> None:
    """P3, F6: committed, unknown to us, found in a new transaction; no handler runs twice."""
    faults.declare("cut at COMMIT")
    rig, database = far
    service = await rig.start(accounts(), database=database)
    await rig.ask(make_command(activity))
    for _ in range(3):
        before = service.counts["handler_calls"]
        fired = link.fired["cut"]
        link.cut_at_commit()
        (reply,) = await rig.ask(make_command(activity))
        faults.fired("cut at COMMIT", link.fired["cut"] - fired)
        assert reply.outcome == "done"
        assert service.counts["handler_calls"] == before + 1
    assert await rig.moves() == [-10] * 4


async def test_f4_a_backend_killed_under_a_handler_costs_a_repetition_in_place(
    far: tuple[Rig, Database],
) -> None:
    """F4, P3: nothing was committed, so the handler runs again and its reply is the first one given."""
    rig, database = far
    gate = Gate()
    await rig.start(accounts(gate), database=database)
    rig.send(make_command())
    await gate.reached()
    await rig.rows(
        text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            " AND datname = current_database() AND state = 'idle in transaction'"
        )
    )
    gate.open()
    (reply,) = await rig.receive()
    assert reply.outcome == "done"
    assert gate.arrived == 2
    assert await rig.moves() == [-10]


async def test_p22_while_the_database_cannot_be_asked_nothing_is_answered(
    far: tuple[Rig, Database], link: Proxy
) -> None:
    """P22, I6: the command stays held, unacked and unanswered, and goes on when the database is back."""
    rig, database = far
    service = await rig.start(accounts(), database=database)
    await rig.ask(make_command())
    await rig.settled()
    link.refuse()
    link.reset()
    rig.send(make_command())
    await until(lambda: service.counts["handler_calls"] >= 2)
    await asyncio.sleep(0.5)  # the negative space: nothing must be answered meanwhile
    assert rig.unacked() == 1
    assert not rig.replies
    link.heal()
    (reply,) = await rig.receive()
    assert reply.outcome in ("done", "failed")
    assert len(await rig.moves()) == (2 if reply.outcome == "done" else 1)
