"""Lost connections, dead processes, restarted brokers: all that is unsettled comes back, nothing is acked by chance."""

from __future__ import annotations

from collections.abc import Sequence

from saga.brokers.base import Delivery, OutMessage, PublishOutcome
from saga.errors import BrokerUnavailable
from saga.testing.contract.harness import TEXT, Harness, bodies, expect, numbered
from saga.testing.contract.registry import behaviour


@behaviour()
async def a_consumer_goes_on_after_a_lost_connection(h: Harness) -> None:
    """By itself, through the same object (RMQ-14)."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=10))
    for body in numbered(3):
        await h.cut(broker)
        await h.send(other, name, body)
        taken = await h.take_until(consumer, body)
        again = [delivery for delivery in taken if delivery.body != body]
        h.expect_marked(again)  # an ack that the loss took with it is a redelivery
        expect(len(taken) == len(again) + 1, "delivered once after the loss")
        consumer.ack(taken)
        await h.settle()


@behaviour()
async def every_consumer_comes_back(h: Harness) -> None:
    """Not only the first."""
    broker, other = await h.connect(), await h.connect()
    names = [await h.channel(broker) for _ in range(3)]
    consumers = [await h.soon(broker.consume(name, prefetch=10)) for name in names]
    await h.cut(broker)
    for name, consumer in zip(names, consumers, strict=True):
        await h.send(other, name, b"x")
        await h.take(consumer, 1)


@behaviour()
async def what_is_unacked_comes_back_after_a_lost_connection(h: Harness) -> None:
    """Marked, to the same consumer."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(3))
    consumer = await h.soon(broker.consume(name, prefetch=10))
    await h.take(consumer, 3)
    await h.cut(broker)
    again = await h.take(consumer, 3)
    expect(bodies(again) == numbered(3), "all of them")
    h.expect_marked(again)


@behaviour()
async def what_was_fetched_before_a_loss_is_handed_over_once(h: Harness) -> None:
    """Stale deliveries of the dead connection are thrown away, since acking them would do nothing (RMQ-13)."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(5))
    consumer = await h.soon(broker.consume(name, prefetch=10))
    await h.settle()
    await h.cut(broker)
    await h.settle()  # until the loss is known here; before that nobody can tell stale from good
    taken = await h.take(consumer, 5)
    expect(bodies(taken) == numbered(5), "each once")
    consumer.ack(taken)
    await h.settle()
    await h.soon(consumer.close())
    await h.left(other, name, 0)


@behaviour()
async def acking_after_a_lost_connection_is_harmless(h: Harness) -> None:
    """Nothing is raised, and the message comes back: a lost ack is a redelivery."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, b"x")
    consumer = await h.soon(broker.consume(name, prefetch=10))
    taken = await h.take(consumer, 1)
    await h.cut(broker)
    consumer.ack(taken)
    again = await h.take(consumer, 1)
    consumer.ack(taken)
    consumer.retry(taken)
    expect(bodies(again) == [b"x"], "it comes back")


@behaviour()
async def a_tag_of_a_dead_channel_acks_nothing_on_the_new_one(h: Harness) -> None:
    """Tags restart at 1 on each channel (P35)."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(3))
    consumer = await h.soon(broker.consume(name, prefetch=10))
    old = await h.take(consumer, 3)
    await h.cut(broker)
    await h.take(consumer, 3)
    consumer.ack(old)
    await h.settle()
    await h.soon(consumer.close())
    expect(bodies(await h.left(broker, name, 3)) == numbered(3), "none was acked")


@behaviour()
async def a_tag_of_a_dead_channel_gives_nothing_back_on_the_new_one(h: Harness) -> None:
    """The same for retry (P35)."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(3))
    consumer = await h.soon(broker.consume(name, prefetch=10))
    old = await h.take(consumer, 3)
    await h.cut(broker)
    await h.take(consumer, 3)
    consumer.retry(old)
    await h.expect_nothing(consumer)


@behaviour()
async def what_is_unacked_comes_back_after_the_death_of_the_process(h: Harness) -> None:
    """To whoever consumes then; a process that dies says nothing."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(other)
    await h.send(other, name, *numbered(4))
    consumer = await h.soon(broker.consume(name, prefetch=3))
    held = bodies(await h.take(consumer, 3))
    await h.die(broker)
    again = await h.left(other, name, 4)
    expect(bodies(again) == numbered(4), "all of them")
    h.expect_marked([delivery for delivery in again if delivery.body in held])


@behaviour()
async def what_was_acked_before_a_loss_stays_acked(h: Harness) -> None:
    """Once the ack has arrived."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(4))
    consumer = await h.soon(broker.consume(name, prefetch=10))
    taken = sorted(await h.take(consumer, 4), key=lambda delivery: delivery.body)
    consumer.ack(taken[:2])
    await h.settle()
    await h.cut(broker)
    expect(bodies(await h.take(consumer, 2)) == numbered(4)[2:], "the others")
    await h.expect_nothing(consumer)


@behaviour()
async def publishing_works_after_a_lost_connection(h: Harness) -> None:
    """By itself, through the same object."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.cut(broker)
    await h.settle()
    futures = broker.publish([OutMessage(name, body, TEXT) for body in numbered(3)])
    expect(await h.outcomes(futures) == [PublishOutcome.CONFIRMED] * 3, "confirmed on the new connection")
    await h.left(broker, name, 3)


@behaviour()
async def a_receive_that_waits_during_an_outage_goes_on_after_it(h: Harness) -> None:
    """Receive waits across a lost connection."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=10))
    waiting = h.spawner.spawn(consumer.receive(), name="receive")
    await h.settle()
    await h.part(broker)
    await h.send(other, name, b"x")
    await h.settle()
    expect(not waiting.done(), "it waits while there is no connection")
    await h.rejoin(broker)

    async def received() -> Sequence[Delivery]:
        return await waiting

    expect(bodies(await h.soon(received())) == [b"x"], "delivered after the outage")


@behaviour()
async def asking_for_status_during_an_outage_is_a_clear_error(h: Harness) -> None:
    """BrokerUnavailable, within the bound."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.part(broker)
    try:
        await h.soon(broker.status(name))
    except BrokerUnavailable:
        return
    expect(False, "it was answered without a broker")


@behaviour(needs="durable")
async def confirmed_messages_survive_a_restart_of_the_broker(h: Harness) -> None:
    """A crash of the server, not only of a process (RMQ-3)."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(10))
    await h.restart()
    expect(bodies(await h.left(broker, name, 10)) == numbered(10), "all of them")


@behaviour(needs="durable")
async def unacked_messages_survive_a_restart_of_the_broker(h: Harness) -> None:
    """And the consumer that held them gets them again."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(3))
    consumer = await h.soon(broker.consume(name, prefetch=10))
    await h.take(consumer, 3)
    await h.restart()
    expect(bodies(await h.take(consumer, 3)) == numbered(3), "all of them")


@behaviour(needs="durable")
async def channels_survive_a_restart_of_the_broker(h: Harness) -> None:
    """Publishing works afterwards without another declare."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.restart()
    await h.send(broker, name, b"x")
    await h.left(broker, name, 1)
