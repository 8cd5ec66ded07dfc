"""Steps in doubt on database and broker, by their policy: inquired about, or a person asked (E-04)."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from saga import InDoubt, RetryPolicy, Saga
from saga.storage.base import Filter
from tests.coordinator.harness import REPLY_LOST, Node, Order, Stack, fail
from tests.coordinator.sagas import MS, sequence

pytestmark = pytest.mark.feature("E-04")

ASK = sequence(3, name="ask", in_doubt=InDoubt.ASK)
INQUIRE = sequence(3, name="inquire", in_doubt=InDoubt.INQUIRE)
SOON = timedelta(milliseconds=300)
HASTY = sequence(
    3,
    name="hasty",
    in_doubt=InDoubt.INQUIRE,
    retry=RetryPolicy(initial=MS, maximum=2 * MS, attempts=3, schedule_to_close=SOON),
    start_to_close=SOON,
)
LOST = {"s2": [fail(retryable=False)]}


async def asked(stack: Stack, node: Node, saga: Saga[Order, None]) -> Any:
    """Start a saga whose second step fails for good, and wait until a person is asked."""
    handle = await node.client.start(saga, Order(), id="x")
    await stack.until(partial(node.client.count, Filter(statuses=["needs_attention"])))
    return handle


@pytest.mark.parametrize(
    ("verb", "undone", "plan"),
    [
        ("retry", ["undo s1"], (("s2", "nothing_to_undo"), ("s1", "compensated"))),
        ("mark-done", ["undo s1"], (("s2", "compensated"), ("s1", "compensated"))),
        ("skip", ["undo s1"], (("s2", "skipped"), ("s1", "compensated"))),
    ],
)
async def test_a_step_in_doubt_waits_for_the_person_who_is_asked_about_it(
    stack: Stack, verb: str, undone: list[str], plan: tuple[tuple[str, str], ...]
) -> None:
    participant = await stack.participant(LOST)
    node = await stack.node(ASK)
    handle = await asked(stack, node, ASK)
    seen = await handle.describe()
    assert seen.waiting.asked
    assert (seen.waiting.retry_at, seen.waiting.attempt) == (None, 0)
    assert seen.incidents == (("in_doubt", "s2", "Oops"),)
    assert [step.state for step in seen.steps] == ["done", "unknown", "pending"]
    assert set(seen.verbs) == {"retry", "mark-done", "skip", "terminate", "abandon"}

    await node.client.order(verb, handle, reason="asked the supplier", actor="anna")

    assert await stack.ended([handle]) == {"x": "compensated"}
    seen = await handle.describe()
    assert (seen.plan, seen.incidents) == (plan, ())
    assert participant.effects("x") == ["s1", *undone]


async def test_a_step_that_was_inquired_about_and_had_not_run_is_not_undone(stack: Stack) -> None:
    participant = await stack.participant(LOST)
    node = await stack.node(INQUIRE)
    handle = await node.client.start(INQUIRE, Order(), id="x")
    assert await stack.ended([handle]) == {"x": "compensated"}
    assert (await handle.describe()).plan == (("s1", "compensated"),)
    assert participant.effects("x") == ["s1", "undo s1"]


async def test_a_step_that_was_inquired_about_and_had_run_is_undone(stack: Stack) -> None:
    """Its reply was lost, and its time ran out."""
    participant = await stack.participant({"s2": [REPLY_LOST]})
    node = await stack.node(HASTY)
    handle = await node.client.start(HASTY, Order(), id="x")
    assert await stack.ended([handle]) == {"x": "compensated"}
    assert (await handle.describe()).plan == (("s2", "compensated"), ("s1", "compensated"))
    assert participant.effects("x") == ["s1", "s2", "undo s2", "undo s1"]
