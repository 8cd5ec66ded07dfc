"""G-04, G-07: Kafka keeps the whole contract, less what is about single messages; a log has none of that."""

from __future__ import annotations

import pytest

from devservices import Kafka
from saga.brokers.kafka.broker import KafkaBroker
from saga.testing.contract import BEHAVIOURS, run
from tests.contract.kafka_harness import KafkaHarness
from tests.contract.test_brokers import DURABLE

DECLARED = KafkaBroker("kafka://nowhere:9092").capabilities
APPLY = [name for name, behaviour in BEHAVIOURS.items() if behaviour.reason_to_skip(DECLARED) is None]
"""Behaviours that do not need what a log declares not to have: acks of single messages, counts of deliveries."""


@pytest.mark.feature("G-07", acceptance=True)
@pytest.mark.feature("G-04")
@pytest.mark.stack("postgres-kafka")
@pytest.mark.parametrize("name", [name for name in APPLY if name not in DURABLE])
async def test_kafka_keeps_the_contract(name: str, kafka_server: Kafka) -> None:
    await run(BEHAVIOURS[name], KafkaHarness(kafka_server))


@pytest.mark.feature("G-07", acceptance=True)
@pytest.mark.feature("G-04")
@pytest.mark.stack("postgres-kafka")
@pytest.mark.slow
@pytest.mark.parametrize("name", DURABLE)
async def test_kafka_keeps_the_contract_when_it_is_killed(name: str, own_kafka: Kafka) -> None:
    await run(BEHAVIOURS[name], KafkaHarness(own_kafka))
