"""One call tries everything that can go wrong at every step; a sound saga passes, and each planted mistake is named."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from examples.money_transfer.transfer import Transfer, accounts
from saga import PIVOT, ConfigurationError, Participant, RetryPolicy, Saga
from saga.testing import Ended, Environment, FaultKind, TrialsFailed, try_all
from tests.plugins.features import Faults as Counted
from tests.testing.bank import (
    ORDER,
    STEPS,
    Label,
    Parcel,
    conserved,
    metadata,
    money_transfer,
    open_accounts,
    reserve,
    ship,
    shipping,
)

pytestmark = [pytest.mark.feature("I-06"), pytest.mark.stack("sqlite")]

KINDS = {
    FaultKind.REFUSE: "refusal",
    FaultKind.FAIL: "failure",
    FaultKind.LOSE_COMMAND: "lost command",
    FaultKind.LOSE_REPLY: "lost reply",
    FaultKind.DUPLICATE_COMMAND: "duplicate command",
    FaultKind.DUPLICATE_REPLY: "duplicate reply",
    FaultKind.DELAY_COMMAND: "late command",
    FaultKind.DELAY_REPLY: "late reply",
    FaultKind.CRASH: "participant's crash",
    FaultKind.CRASH_UNCOMMITTED: "participant's crash before its commit",
    FaultKind.CRASH_COORDINATOR: "coordinator's crash",
}


async def test_a_sound_saga_bears_everything_at_every_step(faults: Counted) -> None:
    """I1, I2, I3, I5: closed, compensated where refused, undone in reverse, nothing twice, no money lost."""
    report = await try_all(money_transfer, ORDER, tables=metadata, prepare=open_accounts, check=conserved)
    print(report)
    assert not report.failed
    for kind, name in KINDS.items():
        struck = [case for case in report.cases if case.fault.startswith(f"{kind}(")]
        assert {step for step in STEPS if any(step in case.fault for case in struck)} == set(STEPS)
        assert any("undo withdraw" in case.fault for case in struck)
        faults.declare(name)
        faults.fired(name, sum(case.fired for case in struck))


async def test_the_table_names_each_fault_and_how_it_ended() -> None:
    report = await try_all(
        money_transfer, ORDER, tables=metadata, prepare=open_accounts, only="fail(undo withdraw, always)"
    )
    usual, case = report.cases
    assert (usual.fault, usual.status, usual.done) == ("none", "completed", STEPS)
    assert case.status == "needs_attention, then compensated"
    assert str(report).splitlines()[0].split() == ["fault", "fired", "ended", "took", "done"]
    assert "fail(undo withdraw, always)" in str(report)
    assert str(report).endswith("2 of 2 runs of money-transfer as they should be")


async def test_contracts_are_tried_with_stand_ins() -> None:
    report = await try_all(
        shipping, Parcel(), stand_ins={reserve: Label(code="r"), ship: Label(code="s")}, only="refuse(ship)"
    )
    assert report.cases[1].done == ("reserve", "pick", "undo pick", "undo reserve")


async def test_a_saga_that_its_input_makes_turn_back_is_tried_on_its_way_back() -> None:
    report = await try_all(
        money_transfer,
        ORDER.model_copy(update={"target": "nobody"}),
        tables=metadata,
        prepare=open_accounts,
        check=conserved,
        only="crash(undo withdraw)",
    )
    assert [case.done for case in report.cases] == [("withdraw", "undo withdraw")] * 2
    assert report.cases[1].fired == 1


async def test_a_saga_without_pivot_is_turned_back_behind_its_last_step() -> None:
    depot = Participant("depot", start_to_close=timedelta(seconds=5))

    @depot.activity
    async def load(parcel: Parcel) -> None: ...

    @load.compensation
    async def unload(parcel: Parcel) -> None: ...

    report = await try_all(Saga("loading", Parcel).step(load), Parcel(), only="lose_reply(undo load)")
    assert report.cases[1].done == ("load", "undo load")


async def test_a_case_that_there_is_not_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError) as refused:
        await try_all(money_transfer, ORDER, tables=metadata, prepare=open_accounts, only="lose(withdraw)")
    assert "lose_reply(withdraw)" in refused.value.text


# --- planted mistakes -------------------------------------------------------------------------


def bank(
    *, undo_moves: int = 1, moves: int = 1, moves_outside: list[int] | None = None
) -> Saga[Transfer, Any]:
    """A transfer whose undo gives back, and whose withdrawal takes, so many times the amount."""
    owner = Participant("bank", start_to_close=timedelta(seconds=5))

    async def move(session: AsyncSession, name: str, amount: int) -> None:
        found = accounts.c.id == name
        await session.execute(update(accounts).where(found).values(balance=accounts.c.balance + amount))

    @owner.activity
    async def withdraw(transfer: Transfer, session: AsyncSession) -> None:
        await move(session, transfer.source, -transfer.amount * moves)
        if moves_outside is not None:
            moves_outside.append(transfer.amount)

    @withdraw.compensation
    async def refund(transfer: Transfer, session: AsyncSession) -> None:
        await move(session, transfer.source, transfer.amount * undo_moves)

    @owner.activity(kind=PIVOT)
    async def deposit(transfer: Transfer, session: AsyncSession) -> None:
        await move(session, transfer.target, transfer.amount)

    return Saga("transfer", Transfer).step(withdraw).step(deposit)


async def failures(saga: Saga[Any, Any], check: Any = conserved, **options: Any) -> str:
    with pytest.raises(TrialsFailed) as failed:
        await try_all(saga, ORDER, tables=metadata, prepare=open_accounts, check=check, **options)
    return str(failed.value)


async def test_an_undo_that_undoes_too_little_is_found_by_the_users_check() -> None:
    told = await failures(bank(undo_moves=0), only="refuse(deposit)")
    assert "refuse(deposit): check: 125 instead of 150" in told
    assert "only='refuse(deposit)'" in told


async def test_a_saga_that_goes_wrong_without_any_fault_is_told_at_once() -> None:
    told = await failures(bank(moves=2))
    assert "none: check: 125 instead of 150" in told
    assert "0 of 1 runs" in told


async def test_an_effect_outside_the_transaction_is_found_by_the_crash_before_the_commit() -> None:
    outside: list[int] = []

    async def prepare(env: Environment) -> None:
        outside.clear()
        await open_accounts(env)

    async def once(env: Environment, ended: Ended[Any]) -> None:
        assert len(outside) <= 1, f"charged {len(outside)} times"

    async def tried(only: str) -> None:
        saga = bank(moves_outside=outside)
        await try_all(saga, ORDER, tables=metadata, prepare=prepare, check=once, only=only)

    await tried("crash(withdraw)")
    with pytest.raises(TrialsFailed) as failed:
        await tried("crash_uncommitted(withdraw)")
    assert "crash_uncommitted(withdraw): check: charged 2 times" in str(failed.value)


async def test_an_undo_that_never_succeeds_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saga.testing.driver.PATIENCE_SECONDS", 0.3)
    owner = Participant("bank", start_to_close=timedelta(seconds=5))

    @owner.activity
    async def withdraw(transfer: Transfer) -> None: ...

    @withdraw.compensation(retry=RetryPolicy(attempts=None, schedule_to_close=None, incident_at=2))
    async def refund(transfer: Transfer) -> None:
        raise RuntimeError

    @owner.activity(kind=PIVOT)
    async def deposit(transfer: Transfer) -> None: ...

    stuck = Saga("stuck", Transfer).step(withdraw).step(deposit)
    told = await failures(stuck, check=None, only="refuse(deposit)")
    assert "refuse(deposit): Waited" in told
    assert "is needs_attention" in told
