"""Waiting for results: at once in the coordinator's process, by a shared poll elsewhere, over any restart."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from saga.errors import ResultTimeout, SagaCompensated
from tests.coordinator.harness import HELD, PATIENCE, Node, Order, Stack, refuse
from tests.coordinator.sagas import sequence
from tests.plugins.features import Faults

TWO = sequence(2)
WAITERS = 60


@pytest.mark.feature("C-10")
async def test_a_waiter_in_the_coordinators_process_wakes_at_once(stack: Stack) -> None:
    """C-10: with every local clock standing still, so no poll can have told it."""
    participant = await stack.participant({"s2": [HELD]})
    stack.clock.freeze()
    node = await stack.node(TWO)
    handle = await node.client.start(TWO, Order(), id="x")
    waiting = asyncio.create_task(handle.result(timeout=PATIENCE))
    await participant.wait_held(1)
    await stack.quiet()
    assert not waiting.done()
    participant.release()
    async with asyncio.timeout(60):
        await waiting


@pytest.mark.feature("C-10", acceptance=True, scale=WAITERS / 1000)
@pytest.mark.usefixtures("real_broker")
async def test_waiters_over_killed_coordinators_all_get_the_right_answer(
    stack: Stack, faults: Faults
) -> None:
    """C-10: three coordinators die meanwhile; two seconds after the last saga ended, everybody has been told."""
    faults.declare("coordinator killed")
    refused = {f"x{number}" for number in range(0, WAITERS, 4)}
    participant = await stack.participant({f"{saga_id}: s2": [refuse("full")] for saga_id in refused})
    starter = await stack.node(TWO, coordinator=False)
    handles = [await starter.client.start(TWO, Order(), id=f"x{number}") for number in range(WAITERS)]
    waiters = {handle.id: asyncio.create_task(handle.result(timeout=PATIENCE)) for handle in handles}
    for _ in range(3):
        node = await stack.node(TWO)
        kill_after_first(node)
        await stack.until(node.dead, step=3)
        faults.fired("coordinator killed")
    await stack.node(TWO)
    states = await stack.ended(handles, step=3)

    await stack.pass_time(2)
    async with asyncio.timeout(60):
        answers = dict(
            zip(waiters, await asyncio.gather(*waiters.values(), return_exceptions=True), strict=True)
        )
    for saga_id, answer in answers.items():
        if saga_id in refused:
            assert isinstance(answer, SagaCompensated)
            assert (answer.reason, answer.undone, answer.step) == ("full", ("s1",), "s2")
            assert states[saga_id] == "compensated"
        else:
            assert answer is None
            assert states[saga_id] == "completed"
    assert not participant.doubled()


def kill_after_first(node: Node) -> None:
    def after(_changes: object) -> None:
        node.kill()

    node.store.after = after


@pytest.mark.feature("C-10")
async def test_a_result_that_does_not_come_in_time_says_so_and_the_saga_goes_on(stack: Stack) -> None:
    """C-10: ResultTimeout leaves no waiter behind; a second wait gets the answer."""
    participant = await stack.participant({"s1": [HELD]})
    node = await stack.node(TWO)
    handle = await node.client.start(TWO, Order(), id="x")
    await participant.wait_held(1)
    with pytest.raises(ResultTimeout):
        await handle.result(timeout=timedelta(milliseconds=20))
    assert node.client._waiting == {}
    participant.release()
    await handle.result(timeout=timedelta(seconds=10))
    await handle.result(timeout=timedelta(seconds=10))
