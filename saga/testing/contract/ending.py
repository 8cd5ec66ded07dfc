"""Stopping and closing: nothing is lost, nobody waits for ever, twice is as good as once (P17)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from saga.brokers.base import Delivery
from saga.errors import BrokerUnavailable
from saga.testing.contract.harness import Harness, bodies, expect, numbered
from saga.testing.contract.registry import behaviour


@behaviour()
async def stop_hands_over_what_was_fetched_and_then_nothing(h: Harness) -> None:
    """First the buffer, then an empty sequence, always."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=10))
    await h.send(broker, name, *numbered(5))
    await h.settle()
    await h.soon(consumer.stop())
    expect(bodies(await h.soon(consumer.receive())) == numbered(5), "what was fetched")
    for _ in range(3):
        expect(len(await h.soon(consumer.receive())) == 0, "then nothing")


@behaviour()
async def stop_wakes_a_waiting_receive(h: Harness) -> None:
    """It returns an empty sequence."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=10))

    async def stop_later() -> None:
        await h.settle()
        await consumer.stop()

    async def receive() -> Sequence[Delivery]:
        batch, _ = await asyncio.gather(consumer.receive(), stop_later())
        return batch

    expect(len(await h.soon(receive())) == 0, "woken with nothing")


@behaviour()
async def a_stopped_consumer_takes_no_more(h: Harness) -> None:
    """Later messages go to others."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=10))
    await h.soon(consumer.stop())
    await h.send(broker, name, *numbered(3))
    await h.left(broker, name, 3)
    expect(len(await h.soon(consumer.receive())) == 0, "nothing for the stopped one")


@behaviour(needs="single_ack")
async def a_stopped_consumer_still_settles(h: Harness) -> None:
    """What was fetched can be acked and retried after stop."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(2))
    consumer = await h.soon(broker.consume(name, prefetch=10))
    one, two = sorted(await h.take(consumer, 2), key=lambda delivery: delivery.body)
    await h.soon(consumer.stop())
    consumer.ack([one])
    consumer.retry([two])
    expect(bodies(await h.left(broker, name, 1)) == [two.body], "the retried one goes elsewhere")
    await h.soon(consumer.close())
    await h.left(broker, name, 0)


@behaviour()
async def a_stopped_consumer_stays_stopped_after_a_lost_connection(h: Harness) -> None:
    """Coming back is for those who want to."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=10))
    await h.soon(consumer.stop())
    await h.cut(broker)
    await h.settle()
    await h.send(other, name, b"x")
    await h.left(other, name, 1)


@behaviour()
async def stopping_twice_is_legal(h: Harness) -> None:
    """One after the other and both at once."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=10))

    async def both() -> None:
        await asyncio.gather(consumer.stop(), consumer.stop())

    await h.soon(both())
    await h.soon(consumer.stop())
    await h.soon(consumer.close())
    await h.soon(consumer.stop())


@behaviour()
async def closing_a_consumer_gives_back_what_is_unsettled(h: Harness) -> None:
    """Received or only fetched, it comes back marked."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(3))
    consumer = await h.soon(broker.consume(name, prefetch=10))
    await h.take(consumer, 3)
    await h.soon(consumer.close())
    again = await h.left(broker, name, 3)
    expect(bodies(again) == numbered(3), "all of them")
    h.expect_marked(again)


@behaviour()
async def closing_a_consumer_gives_back_what_was_never_received(h: Harness) -> None:
    """The buffer is unsettled too."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(3))
    consumer = await h.soon(broker.consume(name, prefetch=10))
    await h.settle()
    await h.soon(consumer.close())
    expect(bodies(await h.left(broker, name, 3)) == numbered(3), "all of them")
    expect(len(await h.soon(consumer.receive())) == 0, "and nothing here")


@behaviour()
async def settling_after_close_does_nothing(h: Harness) -> None:
    """It is the broker's again."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(2))
    consumer = await h.soon(broker.consume(name, prefetch=10))
    taken = await h.take(consumer, 2)
    await h.soon(consumer.close())
    consumer.ack(taken)
    consumer.retry(taken)
    await h.left(broker, name, 2)


@behaviour()
async def settling_while_a_consumer_is_being_closed_harms_nobody(h: Harness) -> None:
    """An ack that meets the close comes too late or in time; the broker's other consumers notice nothing."""
    broker = await h.connect()
    name, another = await h.channel(broker), await h.channel(broker)
    other = await h.soon(broker.consume(another, prefetch=10))
    await h.send(broker, another, b"held")
    (held,) = await h.take(other, 1)
    await h.send(broker, name, *numbered(100))
    consumer = await h.soon(broker.consume(name, prefetch=100))
    taken = await h.take(consumer, 100)
    closing = h.spawner.spawn(consumer.close(), name="close")
    # one in each turn of the loop: before, while and after the broker hears of the close
    for delivery in taken:
        await asyncio.wait({closing}, timeout=0)
        consumer.ack([delivery])
    await h.soon(consumer.close())
    await asyncio.wait({closing})
    await h.settle()
    await h.left(broker, name, (await h.soon(broker.status(name))).messages)
    other.ack([held])
    await h.settle()
    await h.soon(other.close())
    await h.left(broker, another, 0)


@behaviour()
async def closing_a_consumer_twice_is_legal(h: Harness) -> None:
    """And leaves the other consumers alone."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=1))
    other = await h.soon(broker.consume(name, prefetch=1))
    await h.soon(consumer.close())
    await h.soon(consumer.close())
    await h.send(broker, name, b"x")
    await h.take(other, 1)


@behaviour()
async def closing_a_consumer_whose_connection_is_away_is_legal(h: Harness) -> None:
    """Bounded, without an exception."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=1))
    await h.part(broker)
    await h.soon(consumer.close())
    expect(len(await h.soon(consumer.receive())) == 0, "and it is stopped")


@behaviour()
async def closing_a_broker_gives_back_what_its_consumers_hold(h: Harness) -> None:
    """Whoever closes the broker need not close each consumer."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(3))
    consumer = await h.soon(broker.consume(name, prefetch=2))
    await h.take(consumer, 2)
    await h.soon(broker.close())
    expect(bodies(await h.left(other, name, 3)) == numbered(3), "all of them")


@behaviour()
async def closing_a_broker_stops_its_consumers(h: Harness) -> None:
    """A waiting receive returns an empty sequence."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=2))

    async def close_later() -> None:
        await h.settle()
        await broker.close()

    async def receive() -> Sequence[Delivery]:
        batch, _ = await asyncio.gather(consumer.receive(), close_later())
        return batch

    expect(len(await h.soon(receive())) == 0, "woken with nothing")


@behaviour()
async def closing_a_broker_twice_is_legal(h: Harness) -> None:
    """And closing one leaves the other brokers alone."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(other)
    await h.soon(broker.close())
    await h.soon(broker.close())
    await h.send(other, name, b"x")
    await h.left(other, name, 1)


@behaviour()
async def a_closed_broker_refuses_to_consume(h: Harness) -> None:
    """With BrokerUnavailable."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.soon(broker.close())
    try:
        await h.soon(broker.consume(name, prefetch=1))
    except BrokerUnavailable:
        return
    expect(False, "it was accepted")
