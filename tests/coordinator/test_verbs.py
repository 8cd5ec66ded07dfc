"""Operators' verbs on database and broker: one audit row in the commit, what is in flight closed, lists, batches."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest

from saga import RetryPolicy, Saga, failpoints
from saga.brokers.base import OutMessage
from saga.errors import ReasonRequired, SagaAbandoned, SagaTerminated, SeveralFound, VerbNotAllowed
from saga.messages import CONTENT_TYPE, replies_channel
from saga.storage.base import Filter
from saga.storage.sqlalchemy import tables as t
from tests.coordinator.harness import DONE, HELD, PATIENCE, Node, Order, Stack, refuse
from tests.coordinator.sagas import sequence
from tests.plugins.features import Faults
from tests.stacks import every_stack

THREE = sequence(3)
OTHER = sequence(3, name="other")
HOURLY = RetryPolicy(
    initial=timedelta(hours=1), maximum=timedelta(hours=1), attempts=None, schedule_to_close=None
)
PATIENT = sequence(3, name="patient", undo_retry=HOURLY)
"""Its undos are tried again after up to an hour, so that nothing heals before it is told to."""
STUCK = {"s3": [refuse()], "undo s2": [refuse("locked")]}


async def stand_still(stack: Stack, node: Node, *ids: str, saga: Saga[Order, None] = THREE) -> list[Any]:
    """Start sagas whose undo of s2 is refused, and wait until they need attention."""
    handles = [await node.client.start(saga, Order(), id=id) for id in ids]
    for id in ids:
        await stack.until(partial(node.client.count, Filter(id=id, statuses=["needs_attention"])))
    return handles


@pytest.mark.feature("E-06")
@pytest.mark.parametrize(
    ("verb", "ends", "plan"),
    [
        ("mark-done", "compensated", (("s2", "compensated"), ("s1", "compensated"))),
        ("skip", "compensated", (("s2", "skipped"), ("s1", "compensated"))),
        ("abandon", "abandoned", (("s2", "compensation_failed"), ("s1", "pending"))),
    ],
)
async def test_a_failed_compensation_is_settled_by_hand_with_one_audit_row(
    stack: Stack, verb: str, ends: str, plan: tuple[tuple[str, str], ...]
) -> None:
    participant = await stack.participant(STUCK)
    node = await stack.node(THREE)
    [handle] = await stand_still(stack, node, "x")
    moved = await node.client.order(verb, handle, reason="ticket 4711", actor="anna")
    assert (moved.before, moved.sends) == ("needs_attention", "s2 close")
    assert await stack.ended([handle]) == {"x": ends}
    await stack.until(lambda: settled(node, handle))
    seen = await handle.describe()
    assert (seen.plan, seen.settlement, seen.incidents) == (plan, "settled", ())
    assert [step for step in participant.effects("x") if step == "undo s2"] == []
    [row] = await stack.rows(t.audit.select())
    assert (row.verb, row.actor, row.reason) == (verb, "anna", "ticket 4711")
    assert (row.status_before, row.status_after) == ("needs_attention", moved.after)


async def settled(node: Node, handle: Any) -> bool:
    return (await node.client.describe_run(handle)).settlement == "settled"


@pytest.mark.feature("E-06")
async def test_retry_now_heals_a_failed_compensation(stack: Stack) -> None:
    participant = await stack.participant({"s3": [refuse()], "undo s2": [refuse("locked"), DONE]})
    node = await stack.node(PATIENT)
    [handle] = await stand_still(stack, node, "x", saga=PATIENT)
    moved = await node.client.retry(handle, reason="the bank is back")
    assert moved.sends == "s2 compensate"
    assert await stack.ended([handle]) == {"x": "compensated"}
    assert participant.effects("x") == ["s1", "s2", "undo s2", "undo s1"]
    assert await stack.count(t.audit) == 1


@pytest.mark.feature("E-06")
async def test_an_undo_on_its_way_when_it_was_marked_done_moves_nothing(stack: Stack, faults: Faults) -> None:
    """P26: its answer is held back and it was undone by hand: that is told, and the late answer is stale."""
    faults.declare("undo had run")
    participant = await stack.participant({"s3": [refuse()], "undo s2": [refuse("locked"), HELD]})
    node = await stack.node(THREE)
    [handle] = await stand_still(stack, node, "x")
    await participant.wait_held(1)  # it did run, and nobody knows yet
    faults.fired("undo had run")
    await node.client.mark_done(handle, evidence="bank statement 17")
    assert await stack.ended([handle]) == {"x": "compensated"}
    participant.release()
    seen = await handle.describe()
    assert seen.settlement == "had run already"
    assert seen.incidents == (("had_run", "s2", "had_run"),)
    assert not participant.doubled()


@every_stack
@pytest.mark.usefixtures("real_broker")
@pytest.mark.feature("C-11", acceptance=True)
async def test_terminate_stops_without_undo_and_keeps_what_stands(stack: Stack) -> None:
    participant = await stack.participant({"s2": [HELD]})
    node = await stack.node(THREE)
    handle = await node.client.start(THREE, Order(), id="x")
    await participant.wait_held(1)
    with pytest.raises(VerbNotAllowed):
        await node.client.terminate(handle, reason="no")
    assert await stack.count(t.audit) == 0
    await node.client.terminate(handle, reason="wrong customer", force=True)
    with pytest.raises(SagaTerminated):
        await handle.result(timeout=PATIENCE)
    participant.release()
    await stack.until(lambda: told(node, handle))
    seen = await handle.describe()
    assert (seen.settlement, seen.waiting) == ("had run already", None)
    assert participant.effects("x") == ["s1", "s2"]
    [row] = await stack.rows(t.audit.select())
    assert row.detail == '{"standing":[["s1",false],["s2",true]]}'
    [line] = [line for line in seen.history if line.event == "TerminateRequested"]
    assert line.detail["standing"] == ["s1", "s2"]


async def told(node: Node, handle: Any) -> bool:
    return (await node.client.describe_run(handle)).settlement == "had run already"


@pytest.mark.feature("C-11")
async def test_an_instance_stays_closed_at_the_time_it_was_closed(stack: Stack) -> None:
    """What was in flight is confirmed later, and that moves neither status nor the time of the end."""
    await stack.participant({"s2": [HELD]})
    node = await stack.node(THREE)
    [handle] = [await node.client.start(THREE, Order(), id="x")]
    await node.client.terminate(handle, reason="test", force=True)
    closed_at: datetime | None = (await handle.describe()).closed_at
    await stack.until(lambda: settlement(node, handle))
    seen = await handle.describe()
    assert (seen.status, seen.closed_at) == ("terminated", closed_at)


async def settlement(node: Node, handle: Any) -> bool:
    return (await node.client.describe_run(handle)).settlement != "not yet confirmed"


@every_stack
@pytest.mark.usefixtures("real_broker")
@pytest.mark.feature("C-11", acceptance=True)
async def test_an_abandoned_saga_says_so_to_who_waits(stack: Stack) -> None:
    await stack.participant(STUCK)
    node = await stack.node(THREE)
    [handle] = await stand_still(stack, node, "x")
    await node.client.abandon(handle, reason="written off")
    with pytest.raises(SagaAbandoned):
        await handle.result(timeout=PATIENCE)


@pytest.mark.feature("C-11")
async def test_what_needs_a_reason_says_so_before_anything_is_written(stack: Stack) -> None:
    await stack.participant(STUCK)
    node = await stack.node(THREE)
    [handle] = await stand_still(stack, node, "x")
    for reason in ("", "  ", "x" * 1_001, "a\0b"):
        with pytest.raises(ReasonRequired):
            await node.client.skip(handle, reason=reason)
    assert await stack.count(t.audit) == 0


@pytest.mark.feature("C-11")
async def test_a_verb_whose_answer_was_lost_is_done_once(stack: Stack) -> None:
    """P31: the second run finds its own first one, though the state allows the verb no more."""
    await stack.participant(STUCK)
    node = await stack.node(THREE)
    [handle] = await stand_still(stack, node, "x")
    failpoints.arm("C7:raise")
    moved = await node.client.skip(handle, reason="test")
    failpoints.disarm()
    assert moved.after == "compensating"
    assert await stack.ended([handle]) == {"x": "compensated"}
    assert await stack.count(t.audit) == 1


# --- many -------------------------------------------------------------------------------------


@every_stack
@pytest.mark.usefixtures("real_broker")
@pytest.mark.feature("H-03", acceptance=True, scale=0.02)
async def test_what_one_cause_broke_is_one_group_and_retried_together(stack: Stack, faults: Faults) -> None:
    """One bad release, 200 sagas: one fingerprint; of the retried some recover and the others recur."""
    faults.declare("broken")
    count, bad = 20, 5
    participant = await stack.participant(STUCK)
    node = await stack.node(PATIENT)
    ids = [f"a{number}" for number in range(count - bad)] + [f"b{number}" for number in range(bad)]
    handles = await stand_still(stack, node, *ids, saga=PATIENT)
    faults.fired("broken", count)
    still = {f"b{number}: undo s2": [refuse("locked")] for number in range(bad)}
    participant.script = {"s3": [refuse()], **still}
    [group] = await node.client.incidents()
    assert (group.instances, group.kind, group.step, group.error) == (
        count,
        "compensation_failed",
        "s2",
        "locked",
    )

    where = Filter(fingerprint=group.fingerprint)
    planned = await node.client.preview("retry", where)
    assert {each.outcome for each in planned} == {"possible"}
    assert len(planned) == count
    assert await stack.count(t.audit) == 0, "a preview writes nothing"

    done = [each async for each in node.client.order_all("retry", where, reason="fixed in 2.4.1")]
    assert [each.outcome for each in done] == ["done"] * count
    assert await stack.count(t.audit) == count
    await stack.until(lambda: recovered(node, count - bad))
    [again] = await node.client.incidents()
    assert (again.fingerprint, again.instances) == (group.fingerprint, bad), "recovered and recurred add up"
    assert len(handles) == count


async def recovered(node: Node, count: int) -> bool:
    return await node.client.count(Filter(statuses=["compensated"])) == count


@pytest.mark.feature("H-03")
async def test_of_many_each_has_its_own_outcome(stack: Stack) -> None:
    await stack.participant(STUCK)
    node = await stack.node(THREE)
    [stuck] = await stand_still(stack, node, "x-1")
    await node.client.abandon(stuck, reason="test")
    await stand_still(stack, node, "x-2")
    done = [each async for each in node.client.order_all("skip", Filter(id_prefix="x-"), reason="test")]
    assert [(each.id, each.outcome) for each in done] == [("x-1", "not_allowed"), ("x-2", "done")]
    assert done[0].error is not None
    assert "abandoned" in done[0].error.text


# --- lists ------------------------------------------------------------------------------------


@every_stack
@pytest.mark.usefixtures("real_broker")
@pytest.mark.feature("C-12", acceptance=True)
async def test_a_list_has_what_was_committed_by_every_filter(stack: Stack) -> None:
    """Read your own write: one database, so what is committed is seen at once."""
    participant = await stack.participant({"s2": [HELD], "x-3: s1": [refuse()]})
    node = await stack.node(THREE, OTHER)
    for id in ("x-1", "X-1", "y_1", "x-3"):
        await node.client.start(THREE, Order(), id=id)
    await node.client.start(OTHER, Order(), id="x-1")
    await participant.wait_held(4)
    client = node.client

    async def ids(where: Filter) -> list[str]:
        return sorted(each.id for each in (await client.list(where)).instances)

    assert await ids(Filter()) == ["X-1", "x-1", "x-1", "x-3", "y_1"]
    assert await ids(Filter(saga="other")) == ["x-1"]
    assert await ids(Filter(id_prefix="x-")) == ["x-1", "x-1", "x-3"], "compared as bytes"
    assert await ids(Filter(id_prefix="y_")) == ["y_1"], "no pattern"
    assert await ids(Filter(id_prefix="%")) == []
    assert await ids(Filter(statuses=["running"])) == ["X-1", "x-1", "x-1", "y_1"]
    assert await ids(Filter(statuses=["compensated", "completed"])) == ["x-3"]
    assert await ids(Filter(steps=client.at_step("s2"))) == ["X-1", "x-1", "x-1", "y_1"]
    assert await ids(Filter(steps=client.at_step("s2", "other"))) == ["x-1"]
    assert await ids(Filter(steps=client.at_step("nowhere"))) == []
    assert await ids(Filter(fingerprint="0" * 16)) == []
    assert await client.count(Filter(saga="sequence")) == 4
    [found] = (await client.list(Filter(id="y_1"))).instances
    assert (found.status, found.step) == ("running", "s2")
    assert (await client.look_up("y_1")).run_id == found.run_id
    assert (await client.look_up(str(found.run_id))).id == "y_1"
    with pytest.raises(SeveralFound):
        await client.look_up("x-1")
    assert (await client.look_up("x-1", saga="other")).saga == "other"


@pytest.mark.feature("C-12")
async def test_pages_hold_every_instance_once_newest_first(stack: Stack) -> None:
    await stack.participant({"s1": [HELD]})
    node = await stack.node(THREE)
    handles = [await node.client.start(THREE, Order(), id=f"x-{number}") for number in range(7)]
    seen: list[Any] = []
    below = None
    while True:
        page = await node.client.list(below=below, limit=3)
        seen += page.instances
        below = page.next
        if below is None:
            break
    assert [each.run_id for each in seen] == [handle.run_id for handle in reversed(handles)]


# --- dead letters -----------------------------------------------------------------------------


@every_stack
@pytest.mark.usefixtures("real_broker")
@pytest.mark.feature("F-09", acceptance=True)
async def test_a_dead_letter_is_edited_sent_again_and_forgotten(stack: Stack, faults: Faults) -> None:
    """Four replies came as rubbish: each is parked, mended, sent again, and finishes its saga."""
    faults.declare("rubbish")
    participant = await stack.participant({"s1": [HELD]})
    node = await stack.node(THREE)
    handles = [await node.client.start(THREE, Order(), id=f"x-{number}") for number in range(4)]
    await participant.wait_held(4)
    held, participant.held = participant.held, []
    for channel, body in held:
        participant.broker.publish([OutMessage(channel, body[: len(body) // 2], CONTENT_TYPE)])
        faults.fired("rubbish")
    await stack.until(lambda: parked(node, 4))
    letters = await node.client.dead_letters(channel=held[0][0])
    assert {letter.fingerprint for letter in letters} == {letters[0].fingerprint}, "one cause, one group"
    mended = {body[: len(body) // 2]: body for _, body in held}
    for letter in letters:
        row = await node.client.dead_letter(letter.id)
        assert await node.client.redrive(letter.id, body=mended[row.body]) == "confirmed"
    assert set((await stack.ended(handles)).values()) == {"completed"}
    assert await node.client.dead_letters() == []


@pytest.mark.feature("F-09")
async def test_what_is_still_bad_is_parked_again(stack: Stack) -> None:
    participant = await stack.participant({})
    node = await stack.node(THREE)
    channel = replies_channel(stack.namespace)
    participant.broker.publish([OutMessage(channel, b"no JSON", CONTENT_TYPE)])
    await stack.until(lambda: parked(node, 1))
    [bad] = await node.client.dead_letters()
    outcomes = [outcome async for _, outcome in node.client.redrive_all(fingerprint=bad.fingerprint)]
    assert outcomes == ["confirmed"]
    await stack.until(lambda: parked(node, 1))
    [again] = await node.client.dead_letters()
    assert again.id != bad.id


async def parked(node: Node, count: int) -> bool:
    return len(await node.client.dead_letters()) == count
