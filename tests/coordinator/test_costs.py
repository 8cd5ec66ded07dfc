"""What a step costs, exactly: writing transactions, statements and messages, alone and as one batch of 64.

This is the test that fails when a step becomes dearer. Local clocks stand still, so no poll and no sweep takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest

from saga.client import Handle
from saga.definition.builder import Saga
from saga.definition.refs import make
from tests.coordinator.harness import HELD, Calls, Order, Receipt, Scripted, Stack
from tests.coordinator.sagas import QUICK, sequence, work

pytestmark = pytest.mark.feature("K-05", acceptance=True, scale=0.02)
STEPS = 5
BATCH = 64


class Cost(NamedTuple):
    """Of one batch, whatever its size."""

    commits: int
    statements: int


# Of a batch that sends the next step's command, with an input of the saga's own (plain) or made of outputs that are
# kept (reading), and of one that closes. PostgreSQL: one statement that checks versions and writes all. Instances and
# outputs are not loaded on servers, because the process wrote them last.
COSTS: dict[str, dict[str, Cost]] = {
    "postgres-rabbitmq": {"plain": Cost(1, 1), "reading": Cost(1, 1), "closing": Cost(1, 1)},
    "mariadb-rabbitmq": {"plain": Cost(1, 6), "reading": Cost(1, 6), "closing": Cost(1, 5)},
    "mysql": {"plain": Cost(1, 6), "reading": Cost(1, 6), "closing": Cost(1, 5)},
    "sqlite": {"plain": Cost(1, 8), "reading": Cost(1, 9), "closing": Cost(1, 6)},
}
NUMBERS = {"mariadb-rabbitmq": 2, "mysql": 2}
"""Statements that a batch of several commands has besides: the time of their rows, and a look at their numbers."""
MESSAGES_PER_STEP = 2


def reading(count: int) -> Saga[Order, None]:
    """Each step's input reads the first step's output."""
    owner = work()
    activity = owner.contract("do", Order, Receipt, compensated=True, retry=QUICK)
    saga = Saga("reading", Order).step(activity, name="s1")
    for number in range(2, count + 1):
        made = make(Order, account=activity.at("s1").out.reference, amount=saga.input.amount)
        saga = saga.step(activity, made, name=f"s{number}")
    return saga


SAGAS = {"plain": sequence(STEPS), "reading": reading(STEPS)}


def expected(stack: Stack, kind: str, *, several: bool = False) -> list[Cost]:
    """Return the costs of the batches of one run. The first output is in the very batch that reads it."""
    known = COSTS[stack.name]
    more = NUMBERS.get(stack.name, 0) if several else 0
    middle = [
        cost._replace(statements=cost.statements + more)
        for cost in [known["plain"]] + [known[kind]] * (STEPS - 2)
    ]
    return [*middle, known["closing"]]


def exact(batches: Sequence[object]) -> list[Cost]:
    return [Cost(batch.commits, len(batch.statements)) for batch in batches]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", SAGAS)
async def test_the_cost_of_a_step_with_one_saga_in_flight(
    stack: Stack, kind: str, calls: Calls | None
) -> None:
    """K-05: one writing transaction and two messages a step."""
    stack.clock.freeze()
    participant = await stack.participant()
    node = await stack.node(SAGAS[kind])
    handle = await node.client.start(SAGAS[kind], Order(), id="x")
    await stack.ended([handle])
    assert exact(node.store.batches) == expected(stack, kind)
    assert len(node.broker.sent) + participant.replies == MESSAGES_PER_STEP * STEPS
    if calls is not None:
        assert calls.like("WITH u AS MATERIALIZED%") == STEPS


@pytest.mark.parametrize("kind", SAGAS)
@pytest.mark.usefixtures("real_broker")
async def test_a_batch_of_64_replies_costs_what_one_costs(
    stack: Stack, kind: str, calls: Calls | None
) -> None:
    """K-05: the statements of a batch do not grow with its size; 64 steps share one commit."""
    stack.clock.freeze()
    participant = await stack.participant({"*": [HELD]})
    node = await stack.node(SAGAS[kind])
    handles: list[Handle[None]] = [
        await node.client.start(SAGAS[kind], Order(), id=f"x{number}") for number in range(BATCH)
    ]
    for _ in range(STEPS):
        await participant.wait_held(BATCH)
        participant.release(packed=True)
    await stack.ended(handles)
    assert [batch.size for batch in node.store.batches] == [BATCH] * STEPS
    assert exact(node.store.batches) == expected(stack, kind, several=True)
    assert len(node.broker.commands()) == len(participant.commands) == BATCH * STEPS, "no command twice"
    check_packing(stack, participant, len(node.broker.sent))
    if calls is not None:
        assert calls.like("WITH u AS MATERIALIZED%") == STEPS


def check_packing(stack: Stack, participant: Scripted, messages: int) -> None:
    """Where the broker charges per message, the commands of a batch travel as one; the starts came one by one."""
    batches = STEPS - 1
    assert messages == BATCH + batches * (1 if stack.rabbitmq_url else BATCH)
    assert participant.replies == BATCH * STEPS
