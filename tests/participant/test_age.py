"""P12, F-10: a command whose run began too long ago is refused and never run, so that its rows may be purged."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from saga.clock import SystemClock, SystemIds
from saga.definition.activity import Participant
from saga.messages import Command
from saga.retention.ages import MARGIN, Horizon
from saga.retention.purge import purge
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.purging import SqlRunRows
from saga.testing.clock import VirtualClock
from tests.features_due import DUE
from tests.participant.harness import (
    NAMESPACE,
    Receipt,
    Rig,
    Transfer,
    like,
    limited,
    make_command,
    move,
    undo_of,
)
from tests.retention.rows import DAY, run_id

AGE = 90 * DAY
Given = tuple[Command, bytes]


def accounts() -> Participant:
    participant = limited()

    @participant.activity
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await move(session, transfer.account, -transfer.amount)
        return Receipt(reference="x")

    @withdraw.compensation
    async def refund(transfer: Transfer, session: AsyncSession) -> None:
        await move(session, transfer.account, transfer.amount)

    return participant


def began(age: timedelta, **more: Any) -> Given:
    return make_command(run_id=str(run_id(age)), **more)


def other_way(given: Given, direction: str) -> Given:
    """The undo, fence or close of a command, young as it is."""
    undo = undo_of(given)
    if direction == "compensate":
        return undo
    return make_command(
        given[0].activity,
        direction=direction,
        run_id=given[0].runid,
        forwarditeration=0,
        forwardround=0,
        data=b"null",
    )


async def purge_all(rig: Rig, age: timedelta = AGE) -> None:
    assert rig.database is not None
    rows = SqlRunRows(rig.database, NAMESPACE, t.barrier, age + MARGIN)
    await purge([rows], clock=SystemClock())


@pytest.mark.feature("F-11")
@pytest.mark.parametrize("direction", ["forward", "compensate", "fence", "close"])
async def test_a_command_of_a_run_that_began_too_long_ago_is_refused_and_parked(
    rig: Rig, direction: str
) -> None:
    """Fences and undos too: what they ask about may be purged."""
    service = await rig.start(accounts(), horizon=Horizon(AGE, SystemClock()))
    old = began(AGE + DAY)
    command = old if direction == "forward" else other_way(old, direction)
    (reply,) = await rig.ask(command)
    assert (reply.outcome, reply.data["error"], reply.data["retryable"]) == ("failed", "too_old", False)
    await rig.settled()
    (row,) = await rig.parked()
    assert (row.reason, json.loads(row.body)["commandid"]) == ("too_old", command[0].commandid)
    assert service.counts["handler_calls"] == 0
    assert (await rig.decisions(), await rig.moves()) == ([], [])


@pytest.mark.parametrize("stack", DUE["F-11"])
@pytest.mark.feature("F-11", acceptance=True)
async def test_a_duplicate_released_after_the_purge_is_refused_as_too_old_and_changes_nothing(
    rig: Rig,
) -> None:
    """F34: the action, its purge, and then a copy of the action and its undo that were stuck somewhere."""
    clock = VirtualClock(ticking=True)
    await rig.start(accounts(), horizon=Horizon(AGE, clock))
    done = began(AGE - DAY)
    (reply,) = await rig.ask(done)
    assert reply.outcome == "done"
    clock.jump(3 * DAY.total_seconds())
    await purge_all(rig, AGE - 3 * DAY)
    assert await rig.decisions() == []

    replies = await rig.ask(like(done, resend=True), undo_of(done))
    assert [each.data["error"] for each in replies] == ["too_old"] * 2
    assert (await rig.moves(), await rig.balance(), await rig.decisions()) == ([-10], 90, [])


@pytest.mark.feature("F-11")
async def test_a_longer_age_does_not_take_what_is_purged_for_what_never_ran(rig: Rig) -> None:
    """Whoever raises the age to let an old undo through would be told that there is nothing to undo."""
    done = began(50 * DAY)
    await rig.start(accounts())
    await rig.ask(done)
    await purge_all(rig, 40 * DAY)
    assert await rig.decisions() == []

    assert rig.database is not None
    horizon = Horizon(AGE, SystemClock())
    horizon.purged_before = await SqlRunRows(rig.database, NAMESPACE, t.barrier, AGE).purged_before()
    await rig.services.pop().stop()
    await rig.start(accounts(), horizon=horizon)
    (undo,) = await rig.ask(undo_of(done))
    assert undo.data["error"] == "too_old"
    (young,) = await rig.ask(began(39 * DAY))
    assert young.outcome == "done"


@pytest.mark.feature("F-11")
@pytest.mark.parametrize(
    ("run", "refused"),
    [(run_id(AGE - DAY), False), (SystemIds().uuid7(), False), (run_id(AGE + DAY), True)],
    ids=["young", "new", "old"],
)
async def test_the_age_of_the_run_counts_and_not_that_of_the_command(
    rig: Rig, run: Any, refused: bool
) -> None:
    await rig.start(accounts(), horizon=Horizon(AGE, SystemClock()))
    (reply,) = await rig.ask(make_command(run_id=str(run)))
    assert reply.outcome == ("failed" if refused else "done")


@pytest.mark.feature("F-11")
async def test_a_run_whose_id_tells_no_time_is_never_too_old(rig: Rig) -> None:
    """And its rows are never purged."""
    await rig.start(accounts(), horizon=Horizon(timedelta(seconds=1), SystemClock()))
    (reply,) = await rig.ask(make_command())
    assert reply.outcome == "done"


@pytest.mark.feature("F-11")
async def test_one_command_of_a_pack_that_is_too_old_stops_no_other(rig: Rig) -> None:
    await rig.start(accounts(), horizon=Horizon(AGE, SystemClock()))
    replies = await rig.ask(began(DAY), began(AGE + DAY), began(2 * DAY), together=True)
    assert sorted(each.outcome for each in replies) == ["done", "done", "failed"]
    await rig.settled()
    assert [row.reason for row in await rig.parked()] == ["too_old"]
