"""I-05: our port over FastStream's RabbitMQ broker keeps the contract as our own adapter does."""

from __future__ import annotations

import pytest

from devservices import RabbitMq
from saga.testing.contract import BEHAVIOURS, run
from tests.contract.faststream_harness import FastStreamHarness

pytestmark = [
    pytest.mark.slow,
    pytest.mark.feature("I-05"),
    pytest.mark.stack("postgres-rabbitmq"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.parametrize("name", [name for name, each in BEHAVIOURS.items() if each.needs != "durable"])
async def test_a_broker_of_faststream_keeps_the_contract(name: str, rabbitmq_server: RabbitMq) -> None:
    harness = FastStreamHarness(rabbitmq_server)
    if reason := BEHAVIOURS[name].reason_to_skip(harness.capabilities):
        pytest.skip(reason)
    await run(BEHAVIOURS[name], harness)
