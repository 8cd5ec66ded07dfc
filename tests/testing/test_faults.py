"""Each thing that can go wrong at a step, by name: what it does, that it counts, and what the saga makes of it."""

from __future__ import annotations

from datetime import timedelta

import pytest

from saga import ConfigurationError
from saga.storage.sqlalchemy import tables as t
from saga.testing import ALWAYS, Environment, Faults
from tests.plugins.features import Faults as Counted
from tests.testing.bank import BACK, ORDER, STEPS, TOTAL, balances, money_transfer

pytestmark = [pytest.mark.feature("I-06"), pytest.mark.stack("sqlite")]

TRANSPARENT = [
    "lose_command",
    "lose_reply",
    "duplicate_command",
    "duplicate_reply",
    "delay_command",
    "delay_reply",
    "crash",
    "crash_coordinator",
    "fail",
]


@pytest.mark.parametrize("name", TRANSPARENT)
@pytest.mark.parametrize("step", STEPS)
async def test_what_a_saga_must_bear_changes_nothing(env: Environment, name: str, step: str) -> None:
    fault = getattr(env.faults, name)(step)
    ended = await env.run(money_transfer, ORDER)
    assert (ended.status, ended.done, fault.fired) == ("completed", STEPS, 1)
    assert await balances(env) == {"alice": 75, "bob": 75}


@pytest.mark.parametrize("name", TRANSPARENT)
async def test_what_an_undo_must_bear_changes_nothing(env: Environment, name: str) -> None:
    env.faults.refuse("deposit", reason="closed_account")
    fault = getattr(env.faults, name)("withdraw", undo=True)
    ended = await env.run(money_transfer, ORDER)
    assert (ended.status, ended.reason, ended.done) == ("compensated", "closed_account", BACK)
    assert fault.fired == 1
    assert await balances(env) == {"alice": 100, "bob": 50}


async def test_a_participant_that_dies_before_its_commit_does_its_work_once(env: Environment) -> None:
    crashed = env.faults.crash("withdraw", committed=False, times=2)
    ended = await env.run(money_transfer, ORDER)
    assert (ended.status, ended.done, crashed.fired) == ("completed", STEPS, 2)
    assert sum((await balances(env)).values()) == TOTAL


async def test_a_fault_strikes_as_often_as_it_says(env: Environment) -> None:
    failing = env.faults.fail("deposit", times=3)
    refused = env.faults.fail("notify", times=ALWAYS)
    ended = await env.run(money_transfer, ORDER)
    assert (ended.status, ended.incidents) == ("needs_attention", ("step_failed_after_pivot",))
    assert failing.fired == 3
    assert refused.fired >= 10


async def test_a_step_given_up_is_undone_in_doubt(env: Environment) -> None:
    env.faults.lose_reply("withdraw", times=ALWAYS)
    ended = await env.run(money_transfer, ORDER)
    assert (ended.status, ended.reason, ended.done) == ("compensated", "schedule_to_close", BACK)
    assert ended.took > timedelta(minutes=15)


async def test_a_refused_undo_needs_attention_and_heals_once_it_is_not_refused(env: Environment) -> None:
    env.faults.refuse("deposit")
    env.faults.refuse("withdraw", undo=True)
    handle = await env.client.start(money_transfer, ORDER)
    waiting = await env.ended(handle)
    assert (waiting.status, waiting.incidents) == ("needs_attention", ("compensation_failed",))
    healed = await env.ended(handle, through_attention=True)
    assert (healed.status, healed.incidents, healed.done) == ("compensated", (), BACK)


async def test_a_late_message_arrives_after_the_end_and_changes_nothing(
    env: Environment, faults: Counted
) -> None:
    """P6, P7: the late command finds its barrier row, the late reply is stale."""
    faults.declare("delay_command", "delay_reply")
    for number in range(3):
        env.faults.delay_command("withdraw")
        env.faults.delay_reply("deposit")
        order = ORDER.model_copy(update={"id": f"t-{number}", "amount": 1})
        ended = await env.run(money_transfer, order, id=order.id)
        assert (ended.status, ended.done) == ("completed", STEPS)
        faults.fired("delay_command", env.faults.ordered[-2].fired)
        faults.fired("delay_reply", env.faults.ordered[-1].fired)
    async with env.engine.connect() as connection:
        stale = (await connection.execute(t.stale_reply.select())).all()
    assert len(stale) >= 6
    assert await balances(env) == {"alice": 97, "bob": 53}


def test_a_step_that_no_saga_has_is_refused_with_what_comes_close() -> None:
    env = Environment(money_transfer)
    with pytest.raises(ConfigurationError) as refused:
        env.faults.refuse("deposid")
    assert "did you mean 'deposit'?" in refused.value.text
    with pytest.raises(ConfigurationError) as refused:
        env.faults.fail("notify", undo=True)
    assert "no compensation" in refused.value.text


def test_faults_ordered_before_there_is_an_environment_are_checked_by_it() -> None:
    faults = Faults()
    faults.crash("deposid")
    with pytest.raises(ConfigurationError) as refused:
        Environment(money_transfer, faults=faults)
    assert "crash(deposid)" in refused.value.text
