"""P12: which rows of a participant go, and what of them is remembered."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from uuid import UUID

import pytest

from saga.clock import SystemClock
from saga.retention.purge import preview, purge
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.purging import SqlOldRows, SqlRunRows
from saga.uuids import made_at
from tests.retention.rows import DAY, NAMESPACE, Rows, another_uuid, run_id

pytestmark = pytest.mark.feature("F-11")

AGE = 91 * DAY
clock = SystemClock()


def barrier(rows: Rows) -> SqlRunRows:
    return SqlRunRows(rows.database, NAMESPACE, t.barrier, AGE)


async def test_decisions_go_when_their_run_began_long_ago(rows: Rows) -> None:
    """However young they are themselves: an undo may come late."""
    old, young = run_id(AGE + DAY), run_id(AGE - DAY)
    await rows.add_decisions(old, young)
    assert await preview([barrier(rows)]) == {"saga_barrier": 1}
    assert await purge([barrier(rows)], clock=clock) == {"saga_barrier": 1}
    assert await rows.decided() == {young}
    assert await rows.count(t.barrier) == 2


async def test_ids_that_tell_no_time_are_never_purged(rows: Rows) -> None:
    timeless = another_uuid()
    old = run_id(AGE + DAY)
    assert timeless < old
    await rows.add_decisions(timeless, old)
    assert await purge([barrier(rows)], clock=clock) == {"saga_barrier": 1}
    assert await rows.decided() == {timeless}


async def test_a_pass_goes_on_behind_a_page_of_ids_that_tell_no_time(rows: Rows) -> None:
    many = barrier(rows)
    many._page = 2
    old = run_id(AGE + DAY)
    await rows.add_decisions(*(another_uuid() for _ in range(5)), old, run_id(AGE + 2 * DAY))
    assert await purge([many], clock=clock) == {"saga_barrier": 2}
    assert old not in await rows.decided()


async def test_decisions_of_other_namespaces_stay(rows: Rows) -> None:
    await rows.add_decisions(run_id(AGE + DAY), namespace="other")
    assert await purge([barrier(rows)], clock=clock) == {"saga_barrier": 0}
    assert await rows.count(t.barrier) == 2


async def test_how_far_decisions_were_purged_is_remembered_and_never_goes_back(rows: Rows) -> None:
    purged = barrier(rows)
    assert await purged.purged_before() is None
    marks: list[datetime | None] = []
    for age in (AGE + 9 * DAY, AGE + 2 * DAY, AGE + 30 * DAY):
        run = run_id(age)
        await rows.add_decisions(run)
        await purge([purged], clock=clock)
        marks.append(await barrier(rows).purged_before())
        if age <= AGE + 9 * DAY:
            began = made_at(run)
            assert began is not None
            assert marks[-1] == began + timedelta(milliseconds=1)
    assert marks[2] == marks[1]


async def test_two_passes_at_once_purge_decisions_once_and_wait_for_nobody(rows: Rows) -> None:
    await rows.add_decisions(*(run_id(AGE + DAY) for _ in range(60)))
    passes = [barrier(rows), barrier(rows)]
    for each in passes:
        each._page = 7
    await asyncio.gather(*(purge([each], clock=clock) for each in passes))
    assert await rows.count(t.barrier) == 0


async def test_counts_of_lone_runs_go_with_age(rows: Rows) -> None:
    for name, age in (("old", AGE + DAY), ("young", AGE - DAY)):
        await rows.put(
            t.lone_run,
            {"namespace": NAMESPACE, "command_id": name, "runs": 1, "last_run_at": clock.now() - age},
        )
    purged = SqlOldRows(rows.database, NAMESPACE, t.lone_run.c.last_run_at, AGE)
    assert await purge([purged], clock=clock) == {"saga_lone_run": 1}
    assert await rows.count(t.lone_run) == 1


async def test_parked_messages_go_after_their_age_page_by_page(rows: Rows) -> None:
    """F-09: kept for 30 days."""
    for _ in range(5):
        await rows.add_parked(31 * DAY)
    await rows.add_parked(29 * DAY)
    await rows.add_parked(31 * DAY, namespace="other")
    purged = SqlOldRows(rows.database, NAMESPACE, t.parked.c.id, 30 * DAY)
    purged._page = 2
    assert await preview([purged]) == {"saga_parked": 5}
    assert await purge([purged], clock=clock) == {"saga_parked": 5}
    assert await rows.count(t.parked) == 2


async def test_rows_with_a_key_of_several_columns_go_page_by_page(rows: Rows) -> None:
    """As a table does that is added to the list: here the leases, by the instant at which they end."""
    at = clock.now() - 2 * DAY
    await rows.put(
        t.lease,
        *(
            {"namespace": NAMESPACE, "name": name, "epoch": 0, "expires_at": at}
            for name in ("a", "b", "c", "d", "e")
        ),
        {"namespace": "other", "name": "a", "epoch": 0, "expires_at": at},
        {"namespace": NAMESPACE, "name": "f", "epoch": 0, "expires_at": clock.now()},
    )
    purged = SqlOldRows(rows.database, NAMESPACE, t.lease.c.expires_at, DAY)
    purged._page = 2
    assert await preview([purged]) == {"saga_lease": 5}
    assert await purge([purged], clock=clock) == {"saga_lease": 5}
    assert await rows.count(t.lease) == 2


def test_an_id_tells_its_time_only_if_it_has_one() -> None:
    assert made_at(UUID(int=0)) is None
    assert made_at(another_uuid()) is None
    began = made_at(run_id(DAY))
    assert began is not None
    assert abs(clock.now() - began - DAY) < timedelta(minutes=5)
