"""The way back: a stored plan that survives every crash, in reverse, with steps in doubt, up to the pivot."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial

import pytest

from saga.client import Handle
from saga.errors import PastPivot, SagaCompensated
from saga.retry import RetryPolicy
from saga.storage.base import Changes
from saga.storage.sqlalchemy import tables as t
from tests.coordinator.harness import (
    COMMAND_LOST,
    DONE,
    HELD,
    PATIENCE,
    REPLY_LOST,
    TWICE,
    Act,
    Node,
    Order,
    Stack,
    fail,
    refuse,
)
from tests.coordinator.sagas import MS, sequence
from tests.plugins.features import Faults
from tests.stacks import every_stack

THREE = sequence(3)
BACK = ["s1", "s2", "undo s2", "undo s1"]
# s3 refused: cause, plan and undo s2 are one commit; undo s2 answered; undo s1 answered
DECIDED, BETWEEN, LAST = 3, 4, 5


@pytest.mark.feature("E-01", acceptance=True)
async def test_the_plan_survives_a_crash_at_every_commit(stack: Stack, faults: Faults) -> None:
    """E-01, C5-C8, K1-K3: before and after each commit from the failure to the last undo."""
    faults.declare("crash before the commit", "crash after the commit")
    participant = await stack.participant({"s3": [refuse()]})
    for number in (DECIDED, BETWEEN, LAST):
        for window in ("before", "after"):
            saga_id = f"{window}-{number}"
            node = await stack.node(THREE)
            crash(node, window, number)
            handle = await node.client.start(THREE, Order(), id=saga_id)
            await stack.until(node.dead)
            faults.fired(f"crash {window} the commit")
            commits = number if window == "after" else number - 1

            other = await stack.node(THREE, coordinator=False)
            seen = await other.client.handle(THREE, handle.run_id).describe()
            assert len(seen.history) == 1 + commits, saga_id
            assert [step for step, _ in seen.plan] == (["s2", "s1"] if commits >= DECIDED else []), saga_id
            assert (seen.status == "running") == (commits < DECIDED), saga_id

            last = await stack.node(THREE)
            assert await stack.ended([handle], step=3) == {saga_id: "compensated"}
            assert participant.effects(saga_id) == BACK, saga_id
            await last.stop()


def crash(node: Node, window: str, number: int) -> None:
    """Kill a process around the commit of the transition with that number, the start being 0."""

    def at(changes: Changes) -> None:
        if any(row.version == 1 + number for row in changes.moved):
            node.kill()
            raise asyncio.CancelledError

    if window == "before":
        node.store.before = at
    else:
        node.store.after = at


@pytest.mark.feature("E-01")
async def test_once_compensating_a_late_success_never_reopens_the_way_forward(stack: Stack) -> None:
    """E-01, I5, P6: the reply that comes after the deadline is recorded, and the undo that runs is not disturbed."""
    minute = sequence(2, retry=RetryPolicy(initial=MS, maximum=MS, schedule_to_close=timedelta(seconds=60)))
    participant = await stack.participant({"s2": [Act(held=True)]})
    node = await stack.node(minute)
    handle = await node.client.start(minute, Order(), id="x")
    await participant.wait_held(1)
    await stack.ended([handle], step=10)
    before = await stack.rows(t.instance.select())
    late = len(participant.held)
    participant.release()

    async def noted() -> bool:
        return await stack.count(t.stale_reply) >= late

    await stack.until(noted)
    assert await stack.rows(t.instance.select()) == before
    assert participant.effects("x") == BACK


@pytest.mark.feature("E-02", acceptance=True)
async def test_undos_are_the_reverse_of_the_dones(stack: Stack, faults: Faults) -> None:
    """E-02, I4: 20 steps, failing at different places, every reply twice: none missing, none twice."""
    faults.declare("duplicate")
    twenty = sequence(20)
    places = (20, 13, 2, 1)
    script = {f"at-{place}: s{place}": [refuse()] for place in places}
    participant = await stack.participant({"*": [TWICE], "undo *": [TWICE], **script})
    node = await stack.node(twenty)
    handles = [await node.client.start(twenty, Order(), id=f"at-{place}") for place in places]
    states = await stack.ended(handles)
    assert set(states.values()) == {"compensated"}
    faults.fired("duplicate", participant.replies - len(participant.commands))
    for place in places:
        dones = [f"s{number}" for number in range(1, place)]
        assert participant.effects(f"at-{place}") == dones + [f"undo {step}" for step in reversed(dones)]


@every_stack
@pytest.mark.usefixtures("real_broker")
@pytest.mark.feature("E-04", acceptance=True)
async def test_each_effect_is_undone_once_when_the_reply_of_step_k_is_lost(
    stack: Stack, faults: Faults
) -> None:
    """E-04, P5, I1: for each k the reply never comes; the step in doubt is part of the plan and first in it."""
    faults.declare("reply lost")
    minute = sequence(4, retry=RetryPolicy(initial=MS, maximum=MS, schedule_to_close=timedelta(seconds=60)))
    script = {f"lost-{k}: s{k}": [REPLY_LOST] for k in range(1, 5)}
    participant = await stack.participant(script)
    node = await stack.node(minute)
    handles = [await node.client.start(minute, Order(), id=f"lost-{k}") for k in range(1, 5)]
    states = await stack.ended(handles, step=10)

    assert set(states.values()) == {"compensated"}
    for k in range(1, 5):
        forward = [f"s{number}" for number in range(1, k + 1)]
        assert participant.effects(f"lost-{k}") == forward + [f"undo {step}" for step in reversed(forward)]
        faults.fired("reply lost")
    assert not participant.doubled()
    balance = sum(1 if direction == "forward" else -1 for _, _, direction in participant.ledger)
    assert balance == 0


@pytest.mark.feature("E-04")
async def test_a_step_in_doubt_that_never_ran_has_nothing_to_undo(stack: Stack) -> None:
    """E-04, I4: the empty compensation is recorded as such."""
    minute = sequence(2, retry=RetryPolicy(initial=MS, maximum=MS, schedule_to_close=timedelta(seconds=60)))
    participant = await stack.participant({"s2": [COMMAND_LOST]})
    node = await stack.node(minute)
    handle = await node.client.start(minute, Order(), id="x")
    await stack.ended([handle], step=10)
    assert (await handle.describe()).plan == (("s2", "nothing_to_undo"), ("s1", "compensated"))
    assert participant.effects("x") == ["s1", "undo s1"]


HOUR = timedelta(hours=1)
CANCELLED = sequence(2, name="cancelled", start_to_close=HOUR)
LATE = sequence(2, name="late", start_to_close=HOUR, deadline=timedelta(minutes=1))
UNDOING, UNDONE = 2, 3
"""Commits after the start and the stop: the action's answer, with which the undo is sent; the undo's answer."""


@every_stack
@pytest.mark.usefixtures("real_broker")
@pytest.mark.feature("E-07", acceptance=True)
async def test_what_was_stopped_is_undone_once_and_never_while_its_action_runs(
    stack: Stack, faults: Faults
) -> None:
    """E-07: cancelled, or past its deadline, while the action runs; coordinators die at the commits of the way back."""
    faults.declare("killed")
    participant = await stack.participant({"s1": [HELD]})
    for window, number in (("before", UNDOING), ("after", UNDOING), ("before", UNDONE)):
        node = await stack.node(CANCELLED, LATE, redrive=HOUR)
        crash(node, window, number)
        handles = [
            await node.client.start(saga, Order(), id=f"{saga.name} {window} {number}")
            for saga in (CANCELLED, LATE)
        ]
        await participant.wait_held(2)
        await node.client.cancel(handles[0].run_id, actor="me", reason="asked for")
        await stack.pass_time(61)
        for handle in handles:
            await stack.until(partial(stopped, handle))
        assert not any(
            known.startswith("undo") for handle in handles for known in participant.effects(handle.id)
        )
        participant.release()
        await stack.until(node.dead)
        faults.fired("killed")

        following = await stack.node(CANCELLED, LATE, redrive=HOUR)
        assert set((await stack.ended(handles, step=3)).values()) == {"compensated"}
        for handle in handles:
            assert participant.effects(handle.id) == ["s1", "undo s1"]
        await following.stop()


async def stopped(handle: Handle[None]) -> bool:
    return len((await handle.describe()).history) == UNDOING


PIVOTED = sequence(
    5, pivot=3, retry=RetryPolicy(initial=MS, maximum=MS, attempts=2, schedule_to_close=timedelta(seconds=60))
)
TROUBLE = {
    "fails": [fail()] * 4 + [DONE],
    "loses": [REPLY_LOST] * 4 + [DONE],
    "refuses": [refuse()] * 2 + [DONE],
}


@every_stack
@pytest.mark.usefixtures("real_broker")
@pytest.mark.feature("E-05", acceptance=True)
async def test_never_both_ways_and_always_an_end_around_the_pivot(stack: Stack, faults: Faults) -> None:
    """E-05, I3, I5: each step before, at and after the pivot fails, refuses, or loses its replies."""
    faults.declare("failed", "reply lost", "refused")
    ids = {f"{how}-{k}": (how, k) for how in TROUBLE for k in range(1, 6)}
    script = {f"{saga_id}: s{k}": TROUBLE[how] for saga_id, (how, k) in ids.items()}
    participant = await stack.participant(script)
    node = await stack.node(PIVOTED)
    handles = [await node.client.start(PIVOTED, Order(), id=saga_id) for saga_id in ids]
    states = await stack.ended(handles, step=300 if stack.remote else 40)
    for how, name in (("fails", "failed"), ("loses", "reply lost"), ("refuses", "refused")):
        faults.fired(name, sum(1 for known in ids.values() if known[0] == how))

    assert not participant.doubled()
    everything = [f"s{number}" for number in range(1, 6)]
    for saga_id, (how, k) in ids.items():
        effects = participant.effects(saga_id)
        forward = [each for each in effects if not each.startswith("undo")]
        undone = [each.removeprefix("undo ") for each in effects if each.startswith("undo")]
        if states[saga_id] == "completed":
            assert (forward, undone) == (everything, []), saga_id
        else:
            assert undone == forward[::-1], saga_id
            assert "s3" not in forward, f"{saga_id}: the pivot ran, so there is no way back"
        back = k < 3 or (k == 3 and how in ("fails", "refuses"))
        assert states[saga_id] == ("compensated" if back else "completed"), saga_id
    n = t.incident.c
    opened = await stack.rows(t.incident.select().with_only_columns(n.kind, n.resolved_at))
    assert {row.kind for row in opened} >= {"pivot_unknown", "step_failed_after_pivot"}
    assert all(row.resolved_at is not None for row in opened), "what healed is closed"


@pytest.mark.feature("E-05")
async def test_cancel_past_the_pivot_is_refused_and_writes_nothing(stack: Stack) -> None:
    """E-05, P16: PastPivot; the saga goes on as if nobody had asked."""
    participant = await stack.participant({"s4": [Act(held=True)]})
    node = await stack.node(PIVOTED)
    handle = await node.client.start(PIVOTED, Order(), id="x")
    await participant.wait_held(1)
    with pytest.raises(PastPivot):
        await node.client.cancel(handle.run_id, actor="me", reason="why not")
    assert await stack.count(t.audit) == 0
    participant.release()
    assert await stack.ended([handle]) == {"x": "completed"}


@pytest.mark.feature("E-05")
async def test_a_pivot_that_is_given_up_is_fenced_before_there_is_a_plan(stack: Stack) -> None:
    """E-05, I5: it was answered as failed, but an older copy of its command had run: the fence finds that."""
    participant = await stack.participant({"s3": [REPLY_LOST, fail(retryable=False)]})
    node = await stack.node(PIVOTED)
    handle = await node.client.start(PIVOTED, Order(), id="x")
    command = (await participant.wait_commands(3))[2]
    body = participant.reply(command, "failed", {"error": "Oops", "retryable": False, "retry_after_ms": None})
    participant.held.append((command.replyto, body))
    participant.release()
    assert await stack.ended([handle]) == {"x": "completed"}
    assert [each.direction for each in participant.commands if each.step == "s3"] == ["forward", "fence"]
    assert participant.effects("x") == ["s1", "s2", "s3", "s4", "s5"]


@every_stack
@pytest.mark.usefixtures("real_broker")
@pytest.mark.feature("E-06", acceptance=True, scale=0.2)
async def test_an_undo_that_refuses_100_times_needs_attention_and_heals_by_itself(
    stack: Stack, faults: Faults
) -> None:
    """E-06, P15, P20: at once a state and an incident, never closed, slow retries without end.

    Where every message takes real time, 20 times.
    """
    times = 20 if stack.remote else 100
    faults.declare("undo refused")
    participant = await stack.participant({"s3": [refuse()], "undo s2": [refuse("locked")] * times + [DONE]})
    node = await stack.node(THREE)
    handle = await node.client.start(THREE, Order(), id="x")
    await participant.wait_commands(3 + times // 2)
    seen = await handle.describe()
    assert seen.status == "needs_attention"
    assert seen.incidents == (("compensation_failed", "s2", "locked"),)
    assert seen.plan == (("s2", "compensation_failed"), ("s1", "pending"))

    assert await stack.ended([handle]) == {"x": "compensated"}
    undos = [each for each in participant.commands if each.direction == "compensate" and each.step == "s2"]
    assert [each.attempt for each in undos] == list(range(1, times + 2))
    faults.fired("undo refused", len(undos) - 1)
    assert participant.effects("x") == BACK
    [incident] = await stack.rows(t.incident.select())
    assert incident.count == times
    assert incident.resolved_at is not None
    with pytest.raises(SagaCompensated) as caught:
        await handle.result(timeout=PATIENCE)
    assert caught.value.undone == ("s2", "s1")


@pytest.mark.feature("E-06")
async def test_an_undo_that_fails_needs_attention_from_its_tenth_attempt(stack: Stack) -> None:
    """E-06, P15: nine failures are the schedule's business, the tenth opens the incident."""
    participant = await stack.participant({"s3": [refuse()], "undo s2": [fail("Broken")] * 12 + [DONE]})
    node = await stack.node(THREE)
    handle = await node.client.start(THREE, Order(), id="x")
    assert await stack.ended([handle]) == {"x": "compensated"}
    failures = [line for line in (await handle.describe()).history if line.event == "CompensationFailed"]
    assert [line.detail["status"] for line in failures] == ["compensating"] * 9 + ["needs_attention"] * 3
    [incident] = await stack.rows(t.incident.select())
    assert (incident.kind, incident.error, incident.count) == ("compensation_failed", "Broken", 3)
    assert incident.resolved_at is not None
    assert participant.effects("x") == BACK
