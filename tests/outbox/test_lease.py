"""One relay per partition, by a lease whose epoch fences a stale owner (pitfalls 6.2)."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import event, text
from sqlalchemy.dialects import mysql

from saga.clock import SystemClock
from saga.storage.base import PARTS, Lease, part_of
from saga.storage.sqlalchemy import tables as t
from tests.outbox.harness import Outbox, ScriptedBroker, ids

pytestmark = pytest.mark.feature("F-04")

NAMES = ["outbox-1", "outbox-2"]
RUN_OUT = -1.0


async def test_a_live_lease_is_never_taken_and_renewing_it_keeps_its_epoch(outbox: Outbox) -> None:
    ours, theirs = ids.uuid7(), ids.uuid7()
    taken = await outbox.store.renew(NAMES, ours, 5.0)
    assert [lease.name for lease in taken] == NAMES
    assert await outbox.store.renew(NAMES, theirs, 5.0) == []
    assert await outbox.store.renew(NAMES, ours, 5.0) == taken


async def test_a_lease_that_ran_out_is_taken_over_and_its_epoch_rises(outbox: Outbox) -> None:
    ours, theirs = ids.uuid7(), ids.uuid7()
    taken = await outbox.store.renew(NAMES, ours, RUN_OUT)
    over = await outbox.store.renew(NAMES, theirs, 5.0)
    assert [lease.epoch for lease in over] == [lease.epoch + 1 for lease in taken]
    assert await outbox.store.renew(NAMES, ours, 5.0) == []


async def test_a_lease_given_back_is_free_at_once_and_never_has_the_same_epoch_again(outbox: Outbox) -> None:
    ours = ids.uuid7()
    (first,) = await outbox.store.renew(["outbox-1"], ours, 5.0)
    await outbox.store.release(ours)
    (second,) = await outbox.store.renew(["outbox-1"], ids.uuid7(), 5.0)
    assert second.epoch > first.epoch


async def test_two_who_want_the_same_leases_at_once_share_them(outbox: Outbox) -> None:
    names = [f"outbox-{part}" for part in range(PARTS)]
    for _ in range(5):
        one, two = ids.uuid7(), ids.uuid7()
        got = await asyncio.gather(*(outbox.store.renew(names, owner, 5.0) for owner in (one, two)))
        held = [lease.name for leases in got for lease in leases]
        assert sorted(held) == sorted(names)
        for owner in (one, two):
            await outbox.store.release(owner)


async def test_a_stale_owner_counts_nothing_blocks_nothing_and_opens_no_incident(outbox: Outbox) -> None:
    """The fence is in the transaction of what it guards: rows of a former owner's making do not appear."""
    ours, theirs = ids.uuid7(), ids.uuid7()
    (row,) = await outbox.add(b"1")
    name = f"outbox-{part_of(row.ordering_key)}"
    (stale,) = await outbox.store.renew([name], ours, RUN_OUT)
    (live,) = await outbox.store.renew([name], theirs, 5.0)
    wrong = [(stale, ours), (stale, theirs), (live, ours), (Lease(name, live.epoch + 1), theirs)]
    for lease, owner in wrong:
        assert not await outbox.store.block(lease, owner, row, "unroutable", 1.0)
    assert await outbox.rows(t.blocked_key) == []
    assert await outbox.rows(t.incident) == []
    assert await outbox.store.block(live, theirs, row, "unroutable", 1.0)
    assert len(await outbox.rows(t.blocked_key)) == 1


async def test_the_epoch_is_assigned_before_the_owner_it_looks_at(outbox: Outbox) -> None:
    """MDB-2: MariaDB assigns from left to right, so the other order would compare the new owner with himself."""
    statements: list[str] = []
    engine = outbox.database.engine.sync_engine

    @event.listens_for(engine, "before_execute")
    def note(_connection: object, clause: object, *_: object) -> None:
        if getattr(clause, "is_update", False):
            statements.append(str(clause.compile(dialect=mysql.dialect())))  # type: ignore[attr-defined]

    await outbox.store.renew(NAMES, ids.uuid7(), 5.0)
    (statement,) = statements
    assert 0 < statement.index("epoch=") < statement.index("owner=%s, expires_at=")


async def test_rows_of_a_killed_process_are_swept_within_its_lease_and_two_seconds(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G6. The lease is shortened here; it is waited for in full, because its owner never gives it back."""
    monkeypatch.setattr("saga.outbox.relay.LEASE_SECONDS", 1.0)
    clock = SystemClock()
    dead = outbox.node(ScriptedBroker())
    await dead.sweep()  # it holds every lease now, and is never heard of again
    names = [row.name for row in await outbox.rows(t.lease)]
    assert len(names) == PARTS
    since = clock.monotonic()
    await outbox.add(b"left behind")
    broker = ScriptedBroker()
    heir = outbox.node(broker)
    heir.relay.start()
    while not broker.sent:
        assert clock.monotonic() - since < 1.0 + 2.0
        await clock.sleep(0.02)
    await heir.relay.stop()
    assert broker.sent == [b"left behind"]
    owners = await outbox.run(lambda c: c.execute(text("SELECT DISTINCT owner FROM saga_lease")).all())
    assert [tuple(row) for row in owners] == [(None,)]
