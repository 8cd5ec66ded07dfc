"""Pinned quirks of Kafka and aiokafka (pitfalls.md §3).

One that fails means that a row, and perhaps the adapter that leans on it, must change.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import CommitFailedError
from aiokafka.protocol.admin import CreateTopicsRequest

from devservices import Kafka
from saga.brokers.kafka.address import read
from saga.brokers.kafka.clients import Clients
from saga.brokers.kafka.options import KafkaOptions
from saga.clock import SystemIds, TaskSpawner

pytestmark = [pytest.mark.feature("G-04"), pytest.mark.stack("postgres-kafka")]

LONG_SECONDS = 20.0


def servers(kafka: Kafka) -> str:
    return kafka.url.removeprefix("kafka://")


async def create(kafka: Kafka, topic: str) -> int:
    """Create a topic of one partition and return the error code."""
    client = AIOKafkaClient(bootstrap_servers=servers(kafka))
    await client.bootstrap()
    try:
        request = CreateTopicsRequest([(topic, 1, 1, [], [])], timeout=10_000, validate_only=False)
        answer = await client.send(client.get_random_node(), request)
        return int(answer.topic_errors[0][1])
    finally:
        await client.close()


async def new_topic(kafka: Kafka) -> str:
    name = f"quirk-{SystemIds().uuid7().hex[-12:]}"
    assert await create(kafka, name) == 0
    return name


@contextlib.asynccontextmanager
async def a_producer(kafka: Kafka, **settings: Any) -> AsyncIterator[Any]:
    producer = AIOKafkaProducer(bootstrap_servers=servers(kafka), **settings)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


@contextlib.asynccontextmanager
async def a_member(kafka: Kafka, topic: str, **settings: Any) -> AsyncIterator[Any]:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=servers(kafka),
        group_id=topic,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        heartbeat_interval_ms=200,
        **settings,
    )
    await consumer.start()
    consumer.subscribe([topic])
    try:
        yield consumer
    finally:
        await consumer.stop()


async def send(kafka: Kafka, topic: str, count: int) -> None:
    async with a_producer(kafka) as producer:
        for number in range(count):
            await producer.send_and_wait(topic, b"%d" % number)


async def take(consumer: Any, count: int) -> list[Any]:
    records: list[Any] = []
    async with asyncio.timeout(LONG_SECONDS):
        while len(records) < count:
            for found in (await consumer.getmany(timeout_ms=500)).values():
                records += found
    return records


async def test_quirk_creating_a_topic_that_exists_is_a_code_and_no_error(kafka_server: Kafka) -> None:
    """KAF-14: that is why `Topology` reads codes and passes over 36."""
    name = await new_topic(kafka_server)
    assert await create(kafka_server, name) == 36


async def test_quirk_sending_to_an_unknown_topic_waits_as_long_as_a_request_may(kafka_server: Kafka) -> None:
    """KAF-13: that is why it is known whether a topic exists before anything is sent to it."""
    async with a_producer(kafka_server, request_timeout_ms=1_500) as producer:
        sending = asyncio.create_task(producer.send("quirk-nowhere", b"x"))
        done, _ = await asyncio.wait({sending}, timeout=1.0)
        assert not done
        await asyncio.wait({sending}, timeout=LONG_SECONDS)
        assert type(sending.exception()).__name__ == "UnknownTopicOrPartitionError"


async def test_quirk_starting_a_subscribed_consumer_waits_for_its_partitions(kafka_server: Kafka) -> None:
    """KAF-13: that is why we subscribe after the start, and wait by our own bound."""
    name = await new_topic(kafka_server)
    consumer = AIOKafkaConsumer(name, bootstrap_servers=servers(kafka_server), group_id=name)
    await consumer.start()
    try:
        assert consumer.assignment() == {TopicPartition(name, 0)}
    finally:
        await consumer.stop()


async def test_quirk_a_commit_without_offsets_has_what_was_fetched(kafka_server: Kafka) -> None:
    """KAF-15: that is why every commit of ours names its offsets."""
    name = await new_topic(kafka_server)
    await send(kafka_server, name, 5)
    async with a_member(kafka_server, name) as consumer:
        await take(consumer, 5)
        await consumer.commit()
        assert await consumer.committed(TopicPartition(name, 0)) == 5


async def test_quirk_a_member_that_was_expelled_still_lists_its_partitions_and_cannot_commit(
    kafka_server: Kafka,
) -> None:
    """KAF-17: that is why ownership is what a commit proves, and the database decides."""
    from aiokafka.protocol.group import LeaveGroupRequest

    name = await new_topic(kafka_server)
    await send(kafka_server, name, 1)
    async with a_member(kafka_server, name) as consumer:
        await take(consumer, 1)
        partition = TopicPartition(name, 0)
        coordinator = consumer._coordinator
        coordinator._heartbeat_task.cancel()  # else it hears of it and joins again
        client = AIOKafkaClient(bootstrap_servers=servers(kafka_server))
        await client.bootstrap()
        await client.send(
            await client.coordinator_lookup(0, name), LeaveGroupRequest(name, coordinator.member_id)
        )
        await client.close()
        assert consumer.assignment() == {partition}
        with pytest.raises(CommitFailedError):
            await consumer.commit({partition: 1})


async def test_quirk_a_fetch_that_waits_during_a_rebalance_returns_what_belongs_to_the_next_assignment(
    kafka_server: Kafka,
) -> None:
    """Dropping it as old would lose it: the driver goes on behind it. So it belongs to the window it falls in."""
    name = await new_topic(kafka_server)
    await send(kafka_server, name, 1)
    async with a_member(kafka_server, name) as consumer:
        await take(consumer, 1)
        waiting = asyncio.create_task(consumer.getmany(timeout_ms=int(LONG_SECONDS * 1000)))
        await asyncio.wait({waiting}, timeout=0.1)
        consumer._coordinator.request_rejoin()  # nothing was committed, so it begins at the front again
        found = await asyncio.wait_for(waiting, LONG_SECONDS)
        assert [record.offset for records in found.values() for record in records] == [0]
        assert await consumer.position(TopicPartition(name, 0)) == 1


async def test_quirk_a_producer_with_pending_data_does_not_stop_while_the_broker_is_frozen(
    own_kafka: Kafka,
) -> None:
    """KAF-20: that is why `end_producer` has a bound, and abandons; its private names are those of this version."""
    name = await new_topic(own_kafka)
    spawner = TaskSpawner()
    clients = Clients(read(own_kafka.url), KafkaOptions(), spawner)
    producer = clients.producer()
    await producer.start()
    await producer.send_and_wait(name, b"before")
    own_kafka.pause()
    try:
        pending = await producer.send(name, b"x")
        stopping = asyncio.create_task(producer.stop())
        done, _ = await asyncio.wait({stopping}, timeout=1.0)
        assert not done
        await clients.end_producer(producer, 0.0)
        assert pending.done(), "abandoned means that its futures are resolved"
        assert pending.exception() is not None
        assert producer._sender.sender_task.done()
        await asyncio.wait({stopping}, timeout=LONG_SECONDS)
    finally:
        own_kafka.resume()
        await spawner.close()


async def test_quirk_a_consumer_that_is_abandoned_sends_no_heartbeat(kafka_server: Kafka) -> None:
    """KAF-5: a member that nobody polls would keep its partitions from the others; private names of this version."""
    name = await new_topic(kafka_server)
    spawner = TaskSpawner()
    clients = Clients(read(kafka_server.url), KafkaOptions(), spawner)
    consumer = clients.consumer(name)
    await consumer.start()
    consumer.subscribe([name])
    await asyncio.wait_for(consumer._subscription.wait_for_assignment(), LONG_SECONDS)
    await asyncio.wait({asyncio.create_task(asyncio.sleep(0.1))})
    coordinator = consumer._coordinator
    assert coordinator._heartbeat_task is not None
    await clients.end_consumer(consumer, 0.0)
    tasks = {coordinator._heartbeat_task, coordinator._coordination_task, consumer._fetcher._fetch_task}
    _, alive = await asyncio.wait(tasks, timeout=LONG_SECONDS)
    assert not alive
    await spawner.close()


async def test_quirk_headers_are_bytes_and_round_trip(kafka_server: Kafka) -> None:
    """KAF-24: that is why records encode them."""
    name = await new_topic(kafka_server)
    async with a_producer(kafka_server) as producer:
        with pytest.raises(TypeError):
            await producer.send(name, b"x", headers=[("a", "text")])
        await producer.send_and_wait(name, b"", key=b"", headers=[("a", b"1"), ("a", b""), ("b", b"\xff")])
    async with a_member(kafka_server, name) as consumer:
        (record,) = await take(consumer, 1)
    assert (record.value, record.key) == (b"", b"")
    assert list(record.headers) == [("a", b"1"), ("a", b""), ("b", b"\xff")]
