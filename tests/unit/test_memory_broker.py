"""G-01: what the in-process broker does beyond the contract: faults, bounds, waiting senders, capabilities off."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest

from saga.brokers.base import Channel, Delivery, OutMessage, PublishOutcome
from saga.brokers.memory import MEMORY, Faults, MemoryBroker, MemoryQueues
from saga.clock import SystemIds, TaskSpawner
from saga.errors import BrokerFull, ConfigurationError
from tests.contract.memory_harness import VirtualClock, turn_the_loop

pytestmark = [pytest.mark.feature("G-01"), pytest.mark.stack("sqlite")]


class FixedIds(SystemIds):
    """Draws that are given."""

    def __init__(self, *draws: float) -> None:
        self._draws = list(draws)

    def fraction(self) -> float:
        return self._draws.pop(0) if len(self._draws) > 1 else self._draws[0]


def messages(count: int) -> list[OutMessage]:
    return [OutMessage("work", b"%04d" % number, "text/plain", key="k") for number in range(count)]


async def make(
    faults: Faults | None = None, ids: SystemIds | None = None, capacity: int = 1000
) -> tuple[MemoryBroker, VirtualClock]:
    clock = VirtualClock()
    broker = MemoryBroker(
        clock=clock, ids=ids, spawner=TaskSpawner(), capacity=capacity, faults=faults or Faults()
    )
    await broker.start()
    await broker.declare([Channel("work", "work.parking")])
    return broker, clock


async def drained(broker: MemoryBroker) -> list[bytes]:
    consumer = await broker.consume("work", prefetch=1000)
    await turn_the_loop()
    await consumer.stop()
    batch: Sequence[Delivery] = await consumer.receive()
    consumer.ack(batch)
    await consumer.close()
    return [delivery.body for delivery in batch]


@pytest.mark.feature("G-01", acceptance=True)
async def test_a_hundred_thousand_messages_leave_memory_flat() -> None:
    broker, _ = await make(capacity=100_000)
    consumer = await broker.consume("work", prefetch=500)
    batch = [OutMessage("work", b"x" * 1024, "text/plain", key="k", headers={"id": "1"})] * 100
    seen = 0
    blocks: dict[int, int] = {}
    for round_ in range(1, 1001):
        futures = broker.publish(batch)
        assert {future.result() for future in futures} == {PublishOutcome.CONFIRMED}
        deliveries = await consumer.receive()
        consumer.ack(deliveries)
        seen += len(deliveries)
        del futures, deliveries
        if round_ in (100, 1000):
            blocks[round_] = sys.getallocatedblocks()
    assert seen == 100_000
    # a block is about an object: a hundredth of one left behind by each message would be 900 of them here
    assert blocks[1000] - blocks[100] < 200, "memory after 100,000 messages is that after 10,000"
    await broker.close()


async def test_a_full_queue_refuses_a_waiting_sender_gets_room_and_a_hasty_one_an_error() -> None:
    broker, _ = await make(capacity=2)
    assert [f.result() for f in broker.publish(messages(3))][-1] is PublishOutcome.REFUSED
    with pytest.raises(BrokerFull):
        broker.raise_if_full("work")
    waiting = asyncio.ensure_future(broker.room("work"))
    await turn_the_loop()
    assert not waiting.done(), "a sender that waits for room waits while there is none"
    consumer = await broker.consume("work", prefetch=1)
    (delivery,) = await consumer.receive()
    await turn_the_loop()
    assert not waiting.done(), "what is unacked takes room too"
    consumer.ack([delivery])
    await waiting
    broker.raise_if_full("work")
    await broker.close()


async def test_a_duplicate_is_delivered_twice() -> None:
    broker, _ = await make(Faults(duplicate=1.0))
    broker.publish(messages(2))
    assert await drained(broker) == [b"0000", b"0000", b"0001", b"0001"]
    assert broker.fired == {"duplicate": 2}
    await broker.close()


async def test_a_lost_message_is_confirmed_and_never_comes() -> None:
    """RMQ-18."""
    broker, _ = await make(Faults(lose_message=1.0))
    (future,) = broker.publish(messages(1))
    assert future.result() is PublishOutcome.CONFIRMED
    assert await drained(broker) == []
    assert broker.fired == {"lose_message": 1}
    await broker.close()


async def test_a_lost_confirm_is_unknown_after_the_bound_and_the_message_arrives() -> None:
    broker, clock = await make(Faults(lose_confirm=1.0))
    (future,) = broker.publish(messages(1))
    await turn_the_loop()
    assert not future.done()
    assert clock.wake_next(10.0)
    await turn_the_loop()
    assert future.result() is PublishOutcome.UNKNOWN
    assert clock.monotonic() == 10.0
    assert await drained(broker) == [b"0000"]
    await broker.close()


async def test_a_delayed_message_comes_later_than_its_followers() -> None:
    # draws: the first message is struck (0.1 < 0.5) and held for 0.9 of the longest delay, the second is not
    broker, clock = await make(Faults(delay=0.5, delay_seconds_max=10.0), FixedIds(0.1, 0.9, 0.7))
    broker.publish(messages(2))
    assert await drained(broker) == [b"0001"]
    assert clock.wake_next(10.0)
    await turn_the_loop()
    assert clock.monotonic() == 9.0
    assert await drained(broker) == [b"0000"]
    await broker.close()


async def test_shuffled_messages_come_in_another_order() -> None:
    broker, _ = await make(Faults(shuffle=1.0), FixedIds(0.0))
    broker.publish(messages(4))
    assert await drained(broker) == [b"0003", b"0002", b"0001", b"0000"]
    assert broker.fired == {"shuffle": 4}
    await broker.close()


@pytest.mark.feature("G-06")
async def test_without_order_per_key_there_is_no_order() -> None:
    """A capability that is switched off must not happen to work."""
    broker, _ = await make(ids=FixedIds(0.0))
    lesser = broker.without(ordered_per_key=False)
    lesser.publish(messages(4))
    assert await drained(broker) == [b"0003", b"0002", b"0001", b"0000"]


@pytest.mark.feature("G-06")
async def test_without_single_ack_only_the_finished_prefix_leaves_the_broker() -> None:
    """KAF-8: what was acked behind an unfinished delivery comes back with it."""
    broker, _ = await make()
    lesser = broker.without(single_ack=False)
    lesser.publish(messages(4))
    consumer = await lesser.consume("work", prefetch=10)
    deliveries = list(await consumer.receive())
    consumer.ack([deliveries[0], deliveries[2], deliveries[3]])
    await consumer.close()
    assert await drained(broker) == [b"0001", b"0002", b"0003"]


@pytest.mark.feature("G-06")
async def test_without_single_ack_prefetch_counts_what_is_unsettled() -> None:
    """An unfinished first delivery does not stop the flow."""
    broker, _ = await make()
    lesser = broker.without(single_ack=False)
    lesser.publish(messages(6))
    consumer = await lesser.consume("work", prefetch=3)
    first = list(await consumer.receive())
    consumer.ack(first[1:])
    assert len(await consumer.receive()) == 2


@pytest.mark.feature("G-06")
async def test_without_delivery_count_there_is_only_the_mark() -> None:
    broker, _ = await make()
    lesser = broker.without(delivery_count=False)
    lesser.publish(messages(1))
    consumer = await lesser.consume("work", prefetch=1)
    counts = []
    for _ in range(4):
        (delivery,) = await consumer.receive()
        counts.append(delivery.delivery_count)
        consumer.retry([delivery])
    assert counts == [1, 2, 2, 2]


async def test_two_brokers_share_queues_like_two_processes() -> None:
    queues = MemoryQueues()
    one, two = MemoryBroker(queues), MemoryBroker(queues, capabilities=replace(MEMORY, name="two"))
    await one.declare([Channel("work", "work.parking")])
    one.publish(messages(1))
    consumer = await two.consume("work", prefetch=1)
    (delivery,) = await consumer.receive()
    await two.close()
    assert delivery.body == b"0000"
    assert await drained(one) == [b"0000"], "given back by the one that closed"


@pytest.mark.parametrize(("capacity", "limit"), [(0, 1), (1, 0)])
def test_bounds_below_one_are_refused(capacity: int, limit: int) -> None:
    with pytest.raises(ConfigurationError):
        MemoryQueues(capacity=capacity, delivery_limit=limit)
