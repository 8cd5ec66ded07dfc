"""Sequences of steps: what a step costs, and what it carries."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, Field

from saga.definition.builder import Saga
from saga.definition.refs import make
from saga.messages import Command
from saga.storage.sqlalchemy import tables as t
from tests.coordinator.harness import COMMAND_LOST, DONE, PATIENCE, Calls, Order, Receipt, Stack, fail
from tests.coordinator.sagas import QUICK, sequence, work
from tests.plugins.watch import CANARY

STEPS = 300


@pytest.mark.feature("A-01", acceptance=True)
async def test_a_late_step_costs_what_step_3_costs(stack: Stack, calls: Calls | None) -> None:
    """A-01: at most one commit per reply; the same statements and rows however long the saga is."""
    participant = await stack.participant()
    node = await stack.node(sequence(STEPS))
    handle = await node.client.start(sequence(STEPS), Order(), id="long")
    await handle.result(timeout=PATIENCE)

    assert participant.effects("long") == [f"s{number}" for number in range(1, STEPS + 1)]
    batches = [batch for batch in node.store.batches if batch.changes.moved]
    assert len(node.store.batches) <= participant.replies == STEPS
    third, last_but_one = batches[2], batches[STEPS - 2]  # the last one closes the saga and sends no command
    assert last_but_one.statements == third.statements
    assert last_but_one.rows == third.rows
    assert last_but_one.commits == third.commits
    grown = len(last_but_one.changes.moved[0].state) - len(third.changes.moved[0].state)
    assert grown <= 16, "the snapshot holds numbers of steps, not steps"
    if calls is not None:
        assert calls.like("WITH u AS MATERIALIZED%") == STEPS, "the server counts the same"
    counts = {table.name: await stack.count(table) for table in (t.history, t.value)}
    assert counts == {"saga_history": STEPS + 1, "saga_value": STEPS}


class Packed(BaseModel):
    account: str
    reference: str
    token: UUID = Field(default_factory=uuid4)
    """Drawn anew whenever the model is made: only bytes that are kept stay the same."""


def two_packs() -> Saga[Order, None]:
    owner = work()
    pick = owner.contract("pick", Order, Receipt, compensated=True, retry=QUICK)
    packing = owner.contract("pack", Packed, Receipt, compensated=True, retry=QUICK)
    saga = Saga("packing", Order).step(pick)
    for name in ("left", "right"):
        saga = saga.step(
            packing, make(Packed, account=saga.input.account, reference=pick.out.reference), name=name
        )
    return saga


def of(commands: list[Command], step: str, direction: str = "forward") -> list[Command]:
    return [each for each in commands if each.step == step and each.direction == direction]


@pytest.mark.feature("A-02", acceptance=True)
async def test_an_input_is_serialised_once_and_every_resend_retry_and_undo_carries_its_bytes(
    stack: Stack,
) -> None:
    """A-02, P32, P4: the model draws a token; resend, retry and undo carry the one drawn at the first sending.

    The other halves of the row, wrong references and loop passes, are checks of the definition and of later issues.
    """
    script = {"left": [COMMAND_LOST, fail(), DONE], "right": [fail(retryable=False)]}
    participant = await stack.participant(script)
    saga = two_packs()
    node = await stack.node(saga)
    handle = await node.client.start(saga, Order(account="x"), id="p")
    await participant.wait_commands(2)
    await stack.pass_time(31)  # once: another jump before the answer is in would be another resend
    await participant.wait_commands(3)
    states = await stack.ended([handle])

    assert states == {"p": "compensated"}
    left = of(participant.commands, "left")
    assert [(each.attempt, each.resend) for each in left] == [(1, False), (1, True), (2, False)]
    assert left[0].data == left[1].data == left[2].data
    assert len({each.commandid for each in left}) == 1
    assert len({each.id for each in left}) == 3, "each sending has a message id of its own (P2)"
    [undo] = of(participant.commands, "left", "compensate")
    assert undo.data["input"] == left[0].data
    right = of(participant.commands, "right")
    assert right[0].data["token"] != left[0].data["token"], "two steps with one activity are two inputs"
    assert left[0].data["reference"] == "pick-1"
    raw = [message.body for message in node.broker.sent if b'"step":"left"' in message.body]
    inputs = {body.partition(b'"data":')[2] for body in raw if b'"direction":"forward"' in body}
    assert len(inputs) == 1, "the very same bytes"


@pytest.mark.feature("A-02")
async def test_values_are_kept_as_they_were_when_the_step_ran(stack: Stack) -> None:
    """A-02: the output that a later step and the undo see is the one of the attempt that succeeded."""
    participant = await stack.participant({"right": [fail(retryable=False)]})
    saga = two_packs()
    node = await stack.node(saga)
    handle = await node.client.start(saga, Order(), id="p")
    await stack.ended([handle])
    [undo] = of(participant.commands, "left", "compensate")
    assert undo.data["output"] == {"reference": "left-1", "note": CANARY}
    assert undo.data["undo"] is None
