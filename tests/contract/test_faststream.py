"""I-05: our port over FastStream's RabbitMQ broker keeps the contract, but for two behaviours that its driver lacks."""

from __future__ import annotations

import pytest

from devservices import RabbitMq
from saga.testing.contract import BEHAVIOURS, run
from tests.contract.faststream_harness import FastStreamHarness
from tests.stacks import EVERY_SERVER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.feature("I-05"),
    pytest.mark.stack("postgres-rabbitmq"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# aio-pika says at once of a publish over a connection that is away that it failed, so it is UNKNOWN: the participant
# publishes its replies again, after a pause
NOT_KEPT = {
    "publishing_works_after_a_lost_connection",
    "what_was_published_while_disconnected_goes_out_on_return",
}
# The part of it that is ours is small: a sixth of the behaviours at a time, and all of them where all is asked for.
KEPT = [name for name, each in BEHAVIOURS.items() if each.needs != "durable" and name not in NOT_KEPT]


@pytest.mark.parametrize("name", KEPT if EVERY_SERVER else KEPT[::6])
async def test_a_broker_of_faststream_keeps_the_contract(name: str, rabbitmq_server: RabbitMq) -> None:
    harness = FastStreamHarness(rabbitmq_server)
    if reason := BEHAVIOURS[name].reason_to_skip(harness.capabilities):
        pytest.skip(reason)
    await run(BEHAVIOURS[name], harness)


def test_what_is_not_kept_is_still_in_the_contract() -> None:
    assert set(BEHAVIOURS) >= NOT_KEPT
