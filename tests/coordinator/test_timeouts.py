"""Time: the two timeouts that exist, alone and at the same instant, and whose clock decides."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from saga.app import App
from saga.clock import TaskSpawner
from saga.coordinator.arrivals import Arrival, ReplyArrival, TimerArrival
from saga.definition.activity import Participant
from saga.definition.builder import Saga
from saga.errors import SagaCompensated
from saga.messages import decode_replies
from saga.retry import RetryPolicy
from saga.storage.sqlalchemy import tables as t
from tests.coordinator.harness import (
    COMMAND_LOST,
    HELD,
    PATIENCE,
    Node,
    Order,
    Receipt,
    Scripted,
    Stack,
    fail,
)
from tests.coordinator.sagas import MS, sequence

BUDGET = RetryPolicy(initial=MS, maximum=MS, attempts=2, schedule_to_close=timedelta(seconds=60))
MINUTE = sequence(2, retry=BUDGET)


@pytest.mark.feature("D-05")
async def test_start_to_close_alone_is_an_attempt_that_failed(stack: Stack) -> None:
    """D-05: the participant enforces it and answers `timeout`; the schedule decides, an undo finds nothing to undo."""
    runs: list[str] = []
    slow = Participant("slow", start_to_close=50 * MS)

    @slow.activity(retry=BUDGET)
    async def hang(order: Order) -> Receipt:
        runs.append("forward")
        await asyncio.Event().wait()
        return Receipt()

    @hang.compensation
    async def unhang(order: Order) -> None:
        runs.append("undo")

    saga = Saga("slow", Order).step(hang)
    app = App(
        stack.url,
        broker=stack.broker(TaskSpawner()),
        sagas=[saga],
        participants=[slow],
        namespace=stack.namespace,
    )
    async with app:
        with pytest.raises(SagaCompensated) as caught:
            await app.client.execute(saga, Order(), id="x", timeout=timedelta(seconds=20))
    assert caught.value.reason == "timeout"
    assert caught.value.undone == (), "each attempt was rolled back"
    assert runs == ["forward", "forward"]


@pytest.mark.feature("D-05")
async def test_schedule_to_close_alone_means_in_doubt(stack: Stack) -> None:
    """D-05, E-04, P5: no answer until the budget ended: the step is undone too, because it may have run."""
    participant = await stack.participant({"s2": [COMMAND_LOST]})
    node = await stack.node(MINUTE)
    handle = await node.client.start(MINUTE, Order(), id="x")
    await participant.wait_commands(2)
    await stack.pass_time(55)
    assert (await handle.describe()).status == "running"
    await stack.ended([handle], step=10)
    with pytest.raises(SagaCompensated) as caught:
        await handle.result(timeout=PATIENCE)
    assert (caught.value.reason, caught.value.step) == ("schedule_to_close", "s2")
    # in the order of their first arrival: time that jumps lets the relay send again what has just been sent
    undos = dict.fromkeys(each.step for each in participant.commands if each.direction == "compensate")
    assert list(undos) == ["s2", "s1"]
    assert caught.value.undone == ("s1",), "s2 had never run"


@pytest.mark.feature("D-05")
async def test_without_a_deadline_a_missing_answer_is_asked_for_on_and_on(stack: Stack) -> None:
    """D-05, P4: no start_to_close and no schedule_to_close: nothing is given up."""
    endless = sequence(1, retry=RetryPolicy(attempts=None, schedule_to_close=None), start_to_close=None)
    participant = await stack.participant({"s1": [COMMAND_LOST] * 5 + [HELD]})
    node = await stack.node(endless)
    handle = await node.client.start(endless, Order(), id="x")
    await stack.until(lambda: participant.held, step=60)
    assert {command.attempt for command in participant.commands} == {1}
    assert (await handle.describe()).status == "running"
    participant.release()
    assert await stack.ended([handle]) == {"x": "completed"}


async def at_the_deadline(stack: Stack, act: Any) -> tuple[Node, Scripted, Any, ReplyArrival, TimerArrival]:
    """Return a saga whose only sent step is answered, with the reply still on its way, at the end of its budget."""
    participant = await stack.participant({"s1": [act]})
    stack.clock.freeze()
    node = await stack.node(MINUTE)
    handle = await node.client.start(MINUTE, Order(), id="x")
    await participant.wait_held(1)
    await stack.pass_database_time(60)
    reply = decode_replies(participant.held.pop()[1])[0]
    arrival = ReplyArrival(handle.run_id, reply, lambda: None)
    return node, participant, handle, arrival, TimerArrival(handle.run_id)


@pytest.mark.feature("D-05", acceptance=True)
@pytest.mark.parametrize("first", ["deadline", "reply"])
@pytest.mark.parametrize("answer", ["done", "timeout"])
async def test_deadline_and_reply_in_the_same_instant_have_one_winner(
    stack: Stack, first: str, answer: str
) -> None:
    """D-05, T3, P5, P6: the first in the batch wins, the other changes nothing; `timeout` is start_to_close's answer.

    The batch of one coordinator and the race of two end alike: with exactly one decision.
    """
    act = HELD if answer == "done" else fail("timeout", held=True)
    node, participant, handle, reply, timer = await at_the_deadline(stack, act)
    both: list[Arrival] = [timer, reply] if first == "deadline" else [reply, timer]
    node.coordinator._arrivals.offer_all(both)
    states = await stack.ended([handle])

    done = answer == "done"
    assert states == {"x": "completed" if done and first == "reply" else "compensated"}
    assert not participant.doubled()
    effects = participant.effects("x")
    assert effects == (["s1", "s2"] if states["x"] == "completed" else ["s1", "undo s1"] if done else [])
    undos = [command for command in participant.commands if command.direction == "compensate"]
    assert len(undos) == (0 if states["x"] == "completed" else 1)
    stale = await stack.count(t.stale_reply)
    assert stale == (1 if first == "deadline" else 0)


@pytest.mark.feature("D-05")
async def test_deadline_and_reply_at_two_coordinators_have_one_winner(stack: Stack) -> None:
    """T3, P1: whoever commits first; the other decides again on what is there now."""
    node, participant, handle, reply, timer = await at_the_deadline(stack, HELD)
    other = await stack.node(MINUTE)
    node.coordinator._arrivals.offer(timer)
    other.coordinator._arrivals.offer(reply)
    states = await stack.ended([handle])
    effects = participant.effects("x")
    assert effects == (["s1", "s2"] if states["x"] == "completed" else ["s1", "undo s1"])
    lines = (await handle.describe()).history
    assert [line.event for line in lines].count("TimerFired") <= 1


@pytest.mark.feature("D-05")
async def test_a_deadline_travels_as_the_milliseconds_that_remain_in_database_time(stack: Stack) -> None:
    """P10: local clocks an hour ahead change no decision, and no instant is on the wire."""
    stack.clock.offset = 3600.0
    participant = await stack.participant({"s1": [COMMAND_LOST, HELD]})
    node = await stack.node(MINUTE)
    handle = await node.client.start(MINUTE, Order(), id="x")
    [first] = await participant.wait_commands(1)
    assert first.remainingms == 60_000
    await stack.pass_time(31)
    again = (await participant.wait_commands(2))[1]
    assert again.resend
    assert again.remainingms is not None
    assert 10_000 < again.remainingms <= 29_000
    participant.release()
    assert await stack.ended([handle]) == {"x": "completed"}
