"""What leaves the outbox, and how delayed rows come into it (P34, F-04)."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, insert, select, text

from saga.storage.base import part_of
from saga.storage.sqlalchemy import tables as t
from tests.outbox.harness import NAMESPACE, ManualClock, Outbox, ScriptedBroker, ids
from tests.stacks import TWIN

pytestmark = pytest.mark.feature("F-04")


async def test_deleters_that_overlap_never_deadlock_and_leave_nothing(outbox: Outbox) -> None:
    """P34: whatever order they were given the ids in."""
    before = await deadlocks(outbox)
    for _ in range(4):
        rows = await outbox.add(*(b"%d" % n for n in range(60)))
        numbers = [row.id for row in rows]
        await asyncio.gather(
            outbox.store.delete_confirmed(numbers),
            outbox.store.delete_confirmed(numbers[::-1]),
            outbox.store.delete_confirmed(numbers[::2]),
        )
        assert await outbox.left() == []
    assert await deadlocks(outbox) == before


async def deadlocks(outbox: Outbox) -> int:
    if outbox.database.dialect != "postgresql":
        return 0  # MySQL counts none, MariaDB those of the whole server
    query = text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    return int(await outbox.run(lambda connection: connection.execute(query).scalar_one()))


@pytest.mark.parametrize("stack", ["postgres-rabbitmq", "mariadb", *TWIN])  # SQLite has no row locks
async def test_a_row_that_another_is_deleting_is_his(outbox: Outbox) -> None:
    """P34: it is skipped, not waited for; if he rolls back, it is there for the next."""
    rows = await outbox.add(b"1", b"2", b"3")
    numbers = [row.id for row in rows]
    async with outbox.database.engine.connect() as connection:
        transaction = await connection.begin()
        await connection.execute(t.outbox.delete().where(t.outbox.c.id == numbers[1]))
        async with asyncio.timeout(2.0):  # a third of the lock timeout
            await outbox.store.delete_confirmed(numbers)
        await transaction.rollback()
    assert await outbox.left() == [b"2"]
    await outbox.store.delete_confirmed(numbers)
    assert await outbox.left() == []


async def test_deleting_nothing_and_what_is_gone_is_harmless(outbox: Outbox) -> None:
    (row,) = await outbox.add(b"1")
    await outbox.store.delete_confirmed([])
    await outbox.store.delete_confirmed([row.id + 5])
    assert await outbox.left() == [b"1"]


# --- delayed rows -----------------------------------------------------------------------------


async def delay(outbox: Outbox, body: bytes, by: timedelta) -> None:
    key = str(ids.uuid7())
    row = {
        "message_id": ids.uuid7(),
        "namespace": NAMESPACE,
        "part": part_of(key),
        "channel": "work",
        "ordering_key": key,
        "body": body,
        "due_at": datetime.now(UTC) + by,
    }
    await outbox.run(lambda connection: connection.execute(insert(t.outbox_delayed).values(**row)).rowcount)


async def test_a_delayed_row_is_sent_when_it_is_due_and_not_before(outbox: Outbox) -> None:
    broker, clock = ScriptedBroker(), ManualClock()
    node = outbox.node(broker, clock)
    await delay(outbox, b"due", timedelta(seconds=-1))
    await delay(outbox, b"not due", timedelta(hours=1))
    await node.sweep(woken=True)
    assert broker.sent == [b"due"]
    waiting = await outbox.rows(t.outbox_delayed)
    assert [row.body for row in waiting] == [b"not due"]
    assert await outbox.left() == []


async def test_the_hint_does_not_wait_for_delayed_rows(outbox: Outbox) -> None:
    """They have no id in the outbox until they are due."""
    node = outbox.node(ScriptedBroker(), ManualClock())
    await delay(outbox, b"later", timedelta(hours=1))
    (row,) = await outbox.add(b"now")
    await node.sweep()
    assert node.low == row.id


async def test_two_who_move_due_rows_at_once_move_each_once(outbox: Outbox) -> None:
    for n in range(20):
        await delay(outbox, b"%d" % n, timedelta(seconds=-1))
    moved = await asyncio.gather(*(outbox.store.move_due(15) for _ in range(2)))
    moved.append(await outbox.store.move_due(100))
    assert sum(moved) == 20
    left = await outbox.left()
    assert sorted(left) == sorted(b"%d" % n for n in range(20))
    query = select(func.count()).select_from(t.outbox_delayed)
    assert await outbox.run(lambda connection: connection.execute(query).scalar_one()) == 0
