"""A confirm is no delivery: commands without an answer are sent again, sparingly, and stale answers change nothing."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest

from saga.brokers.base import OutMessage
from saga.brokers.memory import MEMORY, MemoryQueues
from saga.coordinator.redrive import WINDOW_SECONDS, RedriveBudget
from saga.messages import pack
from saga.storage.sqlalchemy import tables as t
from saga.testing.processes import DURABLE
from tests.coordinator.harness import COMMAND_LOST, DONE, HELD, Order, Stack, Weather, fail, refuse
from tests.coordinator.sagas import sequence
from tests.plugins.features import Faults

THREE = sequence(3)
ONE = sequence(1, name="one")
DOWN = 100


@pytest.mark.feature("F-07", acceptance=True)
@pytest.mark.usefixtures("real_broker")
async def test_every_saga_ends_when_messages_are_lost_doubled_and_shuffled(
    stack: Stack, faults: Faults
) -> None:
    """F-07, P2, P4, I2, I3: 30 % of confirmed messages vanish, the rest comes twice and in any order."""
    faults.declare("lose", "twice", "shuffle")
    weather = [Weather(lose=0.3, twice=True, shuffle=True, seed=seed) for seed in (1, 2)]
    participant = await stack.participant({"fails: s3": [refuse()]}, weather=weather[0])
    node = await stack.node(THREE, weather=weather[1])
    ids = ["fails", *(f"x{number}" for number in range(9))]
    handles = [await node.client.start(THREE, Order(), id=saga_id) for saga_id in ids]
    states = await stack.ended(handles, step=15)

    for each in weather:
        for fault, count in each.fired.items():
            faults.fired(fault, count)
    assert states.pop("fails") == "compensated"
    assert set(states.values()) == {"completed"}
    assert participant.effects("fails") == ["s1", "s2", "undo s2", "undo s1"]
    assert all(participant.effects(saga_id) == ["s1", "s2", "s3"] for saga_id in states)
    assert not participant.doubled()
    by_command: dict[str, set[str]] = {}
    for command in participant.commands:
        by_command.setdefault(command.commandid, set()).add(repr(command.data))
    assert all(len(inputs) == 1 for inputs in by_command.values())


@pytest.mark.feature("F-07", acceptance=True)
async def test_a_reply_to_step_1_in_step_3_changes_no_byte(stack: Stack, faults: Faults) -> None:
    """F-07, P6: every kind of answer to what is not outstanding is stored as stale, and that is all."""
    faults.declare("stale reply")
    participant = await stack.participant({"s3": [HELD]})
    node = await stack.node(THREE)
    handle = await node.client.start(THREE, Order(), id="x")
    await participant.wait_held(1)
    first = participant.commands[0]
    before = [await stack.rows(table.select()) for table in (t.instance, t.history, t.value, t.outbox)]
    answers = [
        ("done", {"output": {"reference": "other"}, "undo": None}),
        ("refused", {"code": "no"}),
        ("failed", {"error": "E"}),
    ]
    for number, (outcome, data) in enumerate(answers, 1):
        body = participant.reply(first, outcome, data)
        participant.broker.publish([OutMessage(first.replyto, *pack([body]))])
        faults.fired("stale reply")

        async def noted(number: int = number) -> bool:
            return await stack.count(t.stale_reply) == number

        await stack.until(noted)
    after = [await stack.rows(table.select()) for table in (t.instance, t.history, t.value)]
    assert after == before[:3]
    participant.release()
    assert await stack.ended([handle]) == {"x": "completed"}


@pytest.mark.feature("F-07")
async def test_success_counts_from_any_attempt_and_failure_from_the_outstanding_one_only(
    stack: Stack,
) -> None:
    """P6: while attempt 2 runs, another failure of attempt 1 is stale, and a success of it counts."""
    participant = await stack.participant({"s1": [fail(), HELD]})
    node = await stack.node(ONE)
    handle = await node.client.start(ONE, Order(), id="x")
    await participant.wait_held(1)
    second = participant.commands[1]
    assert second.attempt == 2
    failed = participant.reply(second, "failed", {"error": "Oops", "retryable": True}, attempt=1)
    done = participant.reply(second, "done", {"output": {"reference": "r"}, "undo": None}, attempt=1)
    participant.broker.publish(
        [OutMessage(second.replyto, *pack([failed])), OutMessage(second.replyto, *pack([done]))]
    )
    assert await stack.ended([handle]) == {"x": "completed"}
    [stale] = await stack.rows(t.stale_reply.select())
    assert (stale.outcome, stale.attempt) == ("failed", 1)


@pytest.mark.feature("F-07", acceptance=True, scale=DOWN / 1000)
async def test_a_participant_that_is_down_is_probed_with_its_oldest_command_only(
    stack: Stack, faults: Faults
) -> None:
    """F-07, P4: ten minutes without an answer cost at most a tenth more messages, all of them for one saga."""
    faults.declare("command unanswered")
    node = await stack.node(ONE)
    handles = [await node.client.start(ONE, Order(), id=f"x{number}") for number in range(DOWN)]
    await stack.until(lambda: len(node.broker.commands()) == DOWN)
    for _ in range(10):
        await stack.pass_time(60)
        await settled(stack)
    commands = node.broker.commands()
    resent = [command for command in commands if command.resend]
    assert 3 <= len(resent) <= DOWN // 10
    assert {command.runid for command in resent} == {str(min(handle.run_id for handle in handles))}
    faults.fired("command unanswered", len(resent))

    participant = await stack.participant()
    states = await stack.ended(handles, step=5)
    assert set(states.values()) == {"completed"}
    assert len(participant.ledger) == DOWN
    assert not participant.doubled()


async def settled(stack: Stack) -> None:
    """Wait until nothing is due any more: every wake-up of the last jump was dealt with."""

    async def none_due() -> bool:
        return not await stack.nodes[0].store.read_due(1, [("one", 1)])

    await stack.until(none_due)


def test_resends_are_a_tenth_of_the_replies_of_the_last_30_seconds_and_at_least_one() -> None:
    """P4: per destination; a silent one is probed with its oldest command, whichever asks first."""
    budget, runs = RedriveBudget(), [UUID(int=number) for number in range(100)]
    budget.answered("busy", 50, 0.0)
    sent = 0
    for run in runs:
        if budget.may_resend("busy", run, 1.0):
            budget.resent("busy", 1.0)
            sent += 1
    assert sent == 5
    budget.answered("calm", 3, 0.0)
    assert budget.may_resend("calm", runs[7], 1.0)
    budget.resent("calm", 1.0)
    assert not budget.may_resend("calm", runs[8], 2.0)
    assert budget.may_resend("silent", runs[5], 1.0)
    assert not budget.may_resend("silent", runs[6], 1.0)
    assert budget.may_resend("silent", runs[4], 1.0), "an older one takes its place"
    assert not budget.may_resend("silent", runs[5], 1.0)


@pytest.mark.stack("pure")
def test_a_destination_that_falls_silent_again_is_probed_with_the_oldest_that_is_left() -> None:
    """P4: the one that was probed before has ended, and nobody older will ask in its place."""
    budget, first, second = RedriveBudget(), UUID(int=1), UUID(int=2)
    assert budget.may_resend("bank", first, 0.0)
    assert not budget.may_resend("bank", second, 0.5)
    budget.answered("bank", 1, 1.0)  # the first one ends with it
    assert budget.may_resend("bank", second, 1.0 + WINDOW_SECONDS + 0.9)


@pytest.mark.feature("F-07")
async def test_the_same_command_is_sent_again_after_the_redrive_interval_doubling(stack: Stack) -> None:
    """P4: same id, attempt and bytes; another message id and the mark; whatever the broker confirmed."""
    participant = await stack.participant({"s1": [COMMAND_LOST] * 3 + [DONE]})
    node = await stack.node(ONE)
    handle = await node.client.start(ONE, Order(), id="x")
    await participant.wait_commands(1)
    for wait, count in ((31, 2), (61, 3), (121, 4)):
        await stack.pass_time(wait - 4)
        assert len(participant.commands) == count - 1
        await stack.pass_time(4)
        await participant.wait_commands(count)
    assert await stack.ended([handle]) == {"x": "completed"}
    first, *again = participant.commands
    assert all(
        (each.commandid, each.attempt, each.data) == (first.commandid, 1, first.data) for each in again
    )
    assert [each.resend for each in participant.commands] == [False, True, True, True]
    assert len({each.id for each in participant.commands}) == 4


@pytest.mark.feature("G-06")
@pytest.mark.parametrize("durable", [False, True])
async def test_on_a_broker_that_forgets_every_outstanding_command_is_due_at_the_restart(
    stack: Stack, durable: bool
) -> None:
    """`durable=False`: the messages are gone with the process; no timer has to pass, no budget applies (P4)."""
    stack.capabilities = DURABLE if durable else MEMORY
    node = await stack.node(ONE, redrive=timedelta(hours=1))
    handles = [await node.client.start(ONE, Order(), id=f"x{number}") for number in range(5)]
    await stack.until(lambda: len(node.broker.commands()) == 5)
    await node.stop()
    stack.clock.freeze()
    stack.queues = MemoryQueues()
    participant = await stack.participant()
    again = await stack.node(ONE, redrive=timedelta(hours=1))
    if durable:
        assert again.broker.commands() == [], "a durable broker has kept them: nothing is due"
        return
    states = await stack.ended(handles)
    assert set(states.values()) == {"completed"}
    assert {command.resend for command in again.broker.commands()} == {True}
    assert not participant.doubled()
