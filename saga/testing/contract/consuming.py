"""Receiving: what is there, at once, bounded by prefetch, shared between consumers.

Sharing message by message is what brokers with `single_ack` do; a log shares partitions, that is keys.
"""

from __future__ import annotations

import asyncio

from saga.brokers.base import Delivery, OutMessage
from saga.errors import ConfigurationError, SagaError, TopologyMismatch
from saga.testing.contract.harness import TEXT, Harness, bodies, expect, numbered
from saga.testing.contract.registry import behaviour


@behaviour()
async def receive_never_waits_to_fill_a_batch(h: Harness) -> None:
    """One message is a batch."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=100))
    for body in numbered(3):
        await h.send(broker, name, body)
        batch = await h.soon(consumer.receive())
        expect(bodies(batch) == [body], "the one message that is there")
        consumer.ack(batch)


@behaviour()
async def receive_hands_over_all_that_was_fetched(h: Harness) -> None:
    """A batch is everything that is there; whoever receives decides in batches (design.md §4)."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(20))
    consumer = await h.soon(broker.consume(name, prefetch=50))
    await h.settle()
    batch = await h.soon(consumer.receive())
    expect(bodies(batch) == numbered(20), f"20 were fetched, {len(batch)} handed over")


@behaviour()
async def a_waiting_receive_wakes_up(h: Harness) -> None:
    """Receive waits while there is nothing and returns when something comes."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=10))

    async def send_later() -> None:
        await h.settle()
        await h.send(broker, name, b"late")

    async def receive() -> list[Delivery]:
        batch, _ = await asyncio.gather(consumer.receive(), send_later())
        return list(batch)

    expect(bodies(await h.soon(receive())) == [b"late"], "woken")


@behaviour()
async def receive_returns_at_least_one(h: Harness) -> None:
    """An empty sequence means stopped, nothing else."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=3))
    await h.send(broker, name, *numbered(9))
    seen = 0
    while seen < 9:
        batch = await h.soon(consumer.receive())
        expect(len(batch) >= 1, "at least one")
        seen += len(batch)
        consumer.ack(batch)


@behaviour()
async def cancelling_receive_loses_nothing(h: Harness) -> None:
    """A cancelled receive has taken nothing, whenever the cancel comes."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=100))
    taken: list[Delivery] = []
    for turns, body in enumerate(numbered(10)):
        waiting = h.spawner.spawn(consumer.receive(), name="receive")
        await asyncio.wait({waiting}, timeout=0)
        published = broker.publish([OutMessage(name, body, TEXT)])
        for _ in range(
            turns
        ):  # a few turns of the loop later each time: on its way, in the buffer, in our hands
            await asyncio.wait({waiting}, timeout=0)
        waiting.cancel()
        await asyncio.wait({waiting})
        if not waiting.cancelled():
            taken += waiting.result()
        await h.outcomes(published)
    taken += await h.take(consumer, 10 - len(taken)) if len(taken) < 10 else []
    expect(bodies(taken) == numbered(10), "each exactly once")


@behaviour()
async def prefetch_bounds_what_is_unsettled(h: Harness) -> None:
    """However many wait, at most `prefetch` are out (RMQ-4)."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(10))
    consumer = await h.soon(broker.consume(name, prefetch=3))
    await h.take(consumer, 3)
    await h.expect_nothing(consumer)


@behaviour(needs="single_ack")
async def prefetch_counts_what_was_fetched_and_not_received(h: Harness) -> None:
    """The rest stays at the broker for others."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(10))
    await h.soon(broker.consume(name, prefetch=3))
    await h.settle()
    await h.left(broker, name, 7)


@behaviour()
async def settling_frees_prefetch(h: Harness) -> None:
    """Each ack lets another one in."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(4))
    consumer = await h.soon(broker.consume(name, prefetch=2))
    first = await h.take(consumer, 2)
    consumer.ack(first[:1])
    await h.take(consumer, 1)
    consumer.ack(first[1:])
    await h.take(consumer, 1)


@behaviour(needs="single_ack")
async def two_consumers_share_a_channel(h: Harness) -> None:
    """Each message goes to one of them, and both get some."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(broker)
    one = await h.soon(broker.consume(name, prefetch=5))
    two = await h.soon(other.consume(name, prefetch=5))
    await h.send(broker, name, *numbered(10))
    mine, others = await h.take(one, 5), await h.take(two, 5)
    expect(bodies([*mine, *others]) == numbered(10), "each exactly once")


@behaviour(needs="single_ack")
async def two_consumers_of_one_broker_share_a_channel(h: Harness) -> None:
    """The same within one process; an ack of one settles nothing of the other."""
    broker = await h.connect()
    name = await h.channel(broker)
    one = await h.soon(broker.consume(name, prefetch=3))
    two = await h.soon(broker.consume(name, prefetch=3))
    await h.send(broker, name, *numbered(6))
    mine, others = await h.take(one, 3), await h.take(two, 3)
    expect(bodies([*mine, *others]) == numbered(6), "each exactly once")
    one.ack(mine)
    await h.soon(one.close())
    await h.soon(two.close())
    expect(bodies(await h.left(broker, name, 3)) == bodies(others), "what the other held comes back")


@behaviour()
async def a_consumer_gets_only_its_channel(h: Harness) -> None:
    """Channels are separate."""
    broker = await h.connect()
    name, another = await h.channel(broker), await h.channel(broker)
    await h.send(broker, another, b"other")
    await h.send(broker, name, b"mine")
    expect(bodies(await h.left(broker, name, 1)) == [b"mine"], "its own")
    expect(bodies(await h.left(broker, another, 1)) == [b"other"], "the other one's")


@behaviour()
async def consuming_an_undeclared_channel_is_a_clear_error(h: Harness) -> None:
    """TopologyMismatch that names the channel, and nothing is created by the attempt."""
    broker = await h.connect()
    name = h.name("undeclared")
    try:
        await h.soon(broker.consume(name, prefetch=1))
    except SagaError as error:
        expect(isinstance(error, TopologyMismatch), f"TopologyMismatch, not {type(error).__name__}")
        expect(name in error.text, "the text names the channel")
    else:
        expect(False, "it was accepted")


@behaviour()
async def prefetch_out_of_range_is_refused(h: Harness) -> None:
    """Zero means without limit on some brokers and is never passed on (RMQ-4)."""
    broker = await h.connect()
    name = await h.channel(broker)
    for prefetch in (0, -1, 10_001):
        try:
            await h.soon(broker.consume(name, prefetch=prefetch))
        except ConfigurationError:
            continue
        expect(False, f"prefetch {prefetch} was accepted")
