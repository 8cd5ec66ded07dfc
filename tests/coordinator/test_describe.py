"""What people see of a run that stands still."""

from __future__ import annotations

import pytest

from saga.storage.sqlalchemy import tables as t
from tests.coordinator.harness import HELD, Order, Stack
from tests.coordinator.sagas import sequence

TWO = sequence(2)


@pytest.mark.parametrize("state", ['{"f":99}', '{"f":1}', "no JSON"])
async def test_a_run_whose_state_cannot_be_read_is_described_by_its_row_its_history_and_its_incident(
    stack: Stack, state: str
) -> None:
    """I3: an incident is visible, above all where the state is what is wrong."""
    participant = await stack.participant({"s1": [HELD]})
    node = await stack.node(TWO)
    handle = await node.client.start(TWO, Order(), id="x")
    await participant.wait_held(1)
    await stack.run(lambda connection: connection.execute(t.instance.update().values(state=state)).rowcount)
    stack.forget()
    participant.release()

    async def flagged() -> bool:
        return (await stack.statuses([handle])) == {"x": "needs_attention"}

    await stack.until(flagged, step=10)
    seen = await handle.describe()
    assert (seen.id, seen.status, seen.current_step, seen.plan) == ("x", "needs_attention", None, ())
    assert {kind for kind, _, _ in seen.incidents} == {"poison"}
    assert [line.event for line in seen.history] == ["SagaStarted"]
