"""G-01, G-03, G-07: every broker adapter keeps the whole contract; skips are by declared capability only."""

from __future__ import annotations

import pytest

from devservices import RabbitMq
from saga.testing.contract import BEHAVIOURS, run
from tests.contract.memory_harness import DurableMemoryHarness, MemoryHarness
from tests.contract.rabbitmq_harness import RabbitMQHarness


@pytest.mark.feature("G-07")
@pytest.mark.feature("G-01", acceptance=True)
@pytest.mark.stack("sqlite")
@pytest.mark.parametrize("name", BEHAVIOURS)
async def test_the_memory_broker_keeps_the_contract(name: str) -> None:
    harness = MemoryHarness()
    if reason := BEHAVIOURS[name].reason_to_skip(harness.capabilities):
        pytest.skip(reason)
    await run(BEHAVIOURS[name], harness)


@pytest.mark.feature("G-07")
@pytest.mark.parametrize(
    "name", [name for name, behaviour in BEHAVIOURS.items() if behaviour.needs == "durable"]
)
async def test_the_memory_broker_keeps_the_contract_when_its_queues_outlive_it(name: str) -> None:
    await run(BEHAVIOURS[name], DurableMemoryHarness())


@pytest.mark.feature("G-07")
def test_the_contract_has_at_least_forty_behaviours() -> None:
    assert len(BEHAVIOURS) >= 40


@pytest.mark.feature("G-07")
@pytest.mark.feature("G-03")
@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.parametrize("name", BEHAVIOURS)
async def test_rabbitmq_keeps_the_contract(name: str, rabbitmq_server: RabbitMq) -> None:
    harness = RabbitMQHarness(rabbitmq_server)
    if reason := BEHAVIOURS[name].reason_to_skip(harness.capabilities):
        pytest.skip(reason)
    await run(BEHAVIOURS[name], harness)
