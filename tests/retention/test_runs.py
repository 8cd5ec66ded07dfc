"""F-11: which runs are purged, what goes with them, and what never does."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import delete, event, select, update

from saga.clock import SystemClock
from saga.retention.purge import preview, purge
from saga.storage.sqlalchemy import tables as t
from tests.retention.rows import DAY, NAMESPACE, OF_A_RUN, RETENTION, Kept, Rows, saga
from tests.stacks import TWIN

pytestmark = pytest.mark.feature("F-11")

clock = SystemClock()


@pytest.mark.parametrize("status", ["completed", "compensated"])
async def test_a_run_is_purged_with_all_that_is_its_own(rows: Rows, status: str) -> None:
    await rows.add_run(status=status)
    assert await purge([rows.runs()], clock=clock) == {"saga_instance": 1}
    assert [await rows.count(table) for table in OF_A_RUN] == [0] * len(OF_A_RUN)


async def test_a_younger_neighbour_keeps_everything(rows: Rows) -> None:
    await rows.add_run()
    young = await rows.add_run(closed=RETENTION - DAY)
    await purge([rows.runs()], clock=clock)
    assert await rows.left() == {young}
    assert [await rows.count(table) for table in OF_A_RUN] == [1] * len(OF_A_RUN)


async def test_the_age_counts_from_the_end_and_not_from_the_start(rows: Rows) -> None:
    run = await rows.add_run(closed=None)
    ended = {"status": "completed", "wakeup_at": None, "closed_at": clock.now() - DAY}
    await rows.run(lambda connection: connection.execute(update(t.instance).values(ended)))
    assert await purge([rows.runs()], clock=clock) == {"saga_instance": 0}
    assert await rows.left() == {run}


@pytest.mark.parametrize("status", ["running", "compensating", "needs_attention"])
async def test_what_is_open_is_never_purged(rows: Rows, status: str) -> None:
    await rows.add_run(closed=None, status=status)
    assert await purge([rows.runs()], clock=clock) == {"saga_instance": 0}


@pytest.mark.parametrize("status", ["terminated", "abandoned", "needs_attention"])
async def test_what_a_person_ended_or_must_see_to_is_never_purged(rows: Rows, status: str) -> None:
    """Its audit row alone names the effects that stand."""
    await rows.add_run(closed=4_000 * DAY, status=status)
    assert await purge([rows.runs()], clock=clock) == {"saga_instance": 0}


@pytest.mark.parametrize("delayed", [False, True])
async def test_a_run_with_an_unsent_message_is_never_purged(rows: Rows, delayed: bool) -> None:
    run = await rows.add_run(closed=4_000 * DAY)
    await rows.add_unsent(run, delayed=delayed)
    assert await purge([rows.runs()], clock=clock) == {"saga_instance": 0}
    assert await rows.count(t.outbox_delayed if delayed else t.outbox) == 1

    await rows.run(lambda connection: connection.execute(delete(t.outbox_delayed if delayed else t.outbox)))
    assert await purge([rows.runs()], clock=clock) == {"saga_instance": 1}


async def test_a_message_written_after_the_look_keeps_its_run(rows: Rows) -> None:
    """What the look found is asked for again under the lock of the run."""
    run = await rows.add_run()
    found = await rows.runs().find(None)
    await rows.add_unsent(run)
    assert await rows.runs().delete(found.keys) == 0
    assert await rows.left() == {run}


async def test_a_run_that_moved_after_the_look_is_not_purged(rows: Rows) -> None:
    """A late effect opens a compensated run again (P27)."""
    run = await rows.add_run(status="compensated")
    found = await rows.runs().find(None)
    await rows.run(lambda connection: connection.execute(update(t.instance).values(version=4)))
    assert await rows.runs().delete(found.keys) == 0
    assert await rows.left() == {run}


async def test_each_saga_has_an_age_of_its_own(rows: Rows) -> None:
    brief, long = saga("brief", retention=DAY), saga("long", retention=365 * DAY)
    for name in ("brief", "long", "purchase"):
        await rows.add_run(closed=2 * DAY, saga=name)
        await rows.add_run(closed=31 * DAY, saga=name)
    assert await purge([rows.runs(brief, long, saga())], clock=clock) == {"saga_instance": 3}
    query = select(t.instance.c.saga).order_by(t.instance.c.saga)
    names = await rows.run(lambda connection: connection.execute(query).scalars().all())
    assert list(names) == ["long", "long", "purchase"]


async def test_of_several_versions_the_longest_age_counts(rows: Rows) -> None:
    await rows.add_run(version=1)
    await rows.add_run(version=2)
    two = saga(version=2, retention=365 * DAY)
    assert await purge([rows.runs(saga(), two)], clock=clock) == {"saga_instance": 0}


async def test_a_version_that_nobody_declares_any_more_is_purged_with_the_others(rows: Rows) -> None:
    await rows.add_run(version=1)
    assert await purge([rows.runs(saga(version=2))], clock=clock) == {"saga_instance": 1}


async def test_sagas_of_others_in_the_namespace_are_theirs(rows: Rows) -> None:
    await rows.add_run(saga="somebody-elses", closed=4_000 * DAY)
    assert await purge([rows.runs()], clock=clock) == {"saga_instance": 0}


async def test_other_namespaces_are_not_touched(rows: Rows) -> None:
    await rows.add_run(namespace="other")
    assert await purge([rows.runs()], clock=clock) == {"saga_instance": 0}


async def test_a_preview_counts_and_deletes_nothing(rows: Rows) -> None:
    for _ in range(3):
        await rows.add_run()
    assert await preview([rows.runs()]) == {"saga_instance": 3}
    assert await rows.count(t.instance) == 3


async def test_a_pass_goes_through_pages_in_which_nothing_goes(rows: Rows) -> None:
    """Open runs, others' and those of a longer age stand in front of what is to go."""
    rows.store._page = 2
    for _ in range(5):
        await rows.add_run(closed=None)
    await rows.add_run(closed=31 * DAY)
    assert await preview([rows.runs()]) == {"saga_instance": 1}
    assert await purge([rows.runs()], clock=clock) == {"saga_instance": 1}


async def test_a_batch_is_a_transaction_of_its_own(rows: Rows) -> None:
    """The first is gone although the second fails."""
    rows.store._page = 2
    for _ in range(4):
        await rows.add_run()
    runs = rows.runs()
    deleted = 0

    class Failing:
        name = "saga_instance"
        find = runs.find

        async def delete(self, keys: list[object]) -> int:
            nonlocal deleted
            if deleted:
                raise OSError
            deleted = await runs.delete(keys)  # type: ignore[arg-type]
            return deleted

    with pytest.raises(OSError):
        await purge([Failing()], clock=clock)  # type: ignore[list-item]
    assert await rows.count(t.instance) == 2


@pytest.mark.parametrize("stack", ["postgres-rabbitmq", "mariadb", *TWIN])  # SQLite has no row locks
async def test_a_run_that_another_holds_is_left_out_and_not_waited_for(rows: Rows) -> None:
    held, free = await rows.add_run(), await rows.add_run()
    async with rows.database.engine.connect() as connection:
        transaction = await connection.begin()
        locked = select(t.instance.c.run_id).where(
            t.instance.c.namespace == NAMESPACE, t.instance.c.run_id == held
        )
        await connection.execute(locked.with_for_update())
        assert await purge([rows.runs()], clock=clock) == {"saga_instance": 1}
        await transaction.rollback()
    assert await rows.left() == {held} != {free}
    assert await purge([rows.runs()], clock=clock) == {"saga_instance": 1}


@pytest.mark.parametrize("stack", ["postgres-rabbitmq", "mariadb", *TWIN])
async def test_deleting_waits_for_no_run_that_stays(rows: Rows) -> None:
    """On a small table a plan of the server's own choice would scan, and meet the locks of those at work."""
    old = [await rows.add_run() for _ in range(30)]
    working = await rows.add_run(closed=DAY)
    async with rows.database.engine.connect() as connection:
        transaction = await connection.begin()
        for table in (t.instance, t.history, t.value, t.incident):
            c = table.c
            held = select(c.run_id).with_hint(table, "FORCE INDEX (PRIMARY)", "mysql")
            await connection.execute(
                held.where(c.namespace == NAMESPACE, c.run_id == working).with_for_update()
            )
        found = await rows.runs().find(None)
        async with asyncio.timeout(2.0):  # less than any wait for a lock
            assert await rows.runs().delete(found.keys) == len(old)
        await transaction.rollback()


async def test_two_passes_at_once_delete_everything_once(rows: Rows) -> None:
    """Without the lease they are harmless too: who runs `saga db purge` need not ask."""
    for _ in range(40):
        await rows.add_run()
    rows.store._page = 10
    other = Rows(rows.database)
    other.store._page = 7
    one, two = await asyncio.gather(purge([rows.runs()], clock=clock), purge([other.runs()], clock=clock))
    assert one["saga_instance"] + two["saga_instance"] == 40
    assert [await rows.count(table) for table in OF_A_RUN] == [0] * len(OF_A_RUN)


async def test_the_statements_of_a_batch_do_not_grow_with_it(rows: Rows) -> None:
    counts = []
    for size in (1, 30):
        for _ in range(size):
            await rows.add_run()
        found = await rows.runs().find(None)
        statements: list[str] = []
        engine = rows.database.engine.sync_engine

        def note(_c: object, _u: object, statement: str, *_: object) -> None:
            statements.append(statement)  # noqa: B023 - taken down again below

        event.listen(engine, "before_cursor_execute", note)
        assert await rows.runs().delete(found.keys) == size
        event.remove(engine, "before_cursor_execute", note)
        counts.append(len(statements))
    assert counts[0] == counts[1]


async def test_pages_are_small_where_all_other_writers_wait(rows: Rows) -> None:
    """P36."""
    assert rows.store._page == (100 if rows.database.dialect == "sqlite" else 1_000)


async def test_an_archived_run_is_kept_with_history_values_and_state(rows: Rows) -> None:
    archive = Kept()
    run = await rows.add_run()
    await purge([rows.runs(archive=archive)], clock=clock)
    (kept,) = archive.runs
    seen = kept.as_json()
    assert seen["instance"]["run_id"] == str(run)
    assert seen["instance"]["status"] == "completed"
    assert [line["event"] for line in seen["instance"]["history"]] == ["SagaStarted"]
    assert [step["name"] for step in seen["instance"]["steps"]] == ["withdraw"]
    assert [each[0] for each in seen["instance"]["incidents"]] == ["unroutable"]
    assert [line["verb"] for line in seen["audit"]] == ["retry"]
    assert [(each["kind"], each["data"]) for each in seen["payloads"]] == [
        ("input", {"account": "a", "amount": 1, "note": "n"}),
        ("result", None),
        ("output", {"reference": "r"}),
    ]
    assert seen["state"]["s"] == "completed"


async def test_a_version_that_is_not_declared_is_archived_without_steps(rows: Rows) -> None:
    archive = Kept()
    await rows.add_run(version=1)
    await purge([rows.runs(saga(version=2), archive=archive)], clock=clock)
    (kept,) = archive.runs
    assert (kept.instance.version, kept.instance.steps) == (1, ())
    assert kept.state["d"] == 1


async def test_what_cannot_be_archived_stays(rows: Rows) -> None:
    archive = Kept()
    archive.fails = True
    run = await rows.add_run()
    with pytest.raises(OSError, match="no space"):
        await purge([rows.runs(archive=archive)], clock=clock)
    assert await rows.left() == {run}

    archive.fails = False
    await purge([rows.runs(archive=archive)], clock=clock)
    assert (archive.ids, await rows.left()) == ([run], set())


async def test_only_what_is_archived_is_deleted(rows: Rows) -> None:
    """A run that moved between the look and the archive is neither."""
    archive = Kept()
    moved, stood = await rows.add_run(), await rows.add_run()
    runs = rows.runs(archive=archive)
    found = await runs.find(None)
    await rows.run(
        lambda connection: connection.execute(
            update(t.instance).where(t.instance.c.run_id == moved).values(version=9)
        )
    )
    assert await runs.delete(found.keys) == 1
    assert (archive.ids, await rows.left()) == ([stood], {moved})
