"""Topology: declared once, verified ever after, and what the broker says about it."""

from __future__ import annotations

from saga.brokers.base import Channel, OutMessage, PublishOutcome
from saga.errors import TopologyMismatch
from saga.testing.contract.harness import TEXT, Harness, bodies, expect, numbered
from saga.testing.contract.registry import behaviour


@behaviour()
async def declaring_again_changes_nothing(h: Harness) -> None:
    """Every process declares at its start; messages stay."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(2))
    for one in (broker, other):
        await h.soon(one.declare([Channel(name, f"{name}.parking"), Channel(f"{name}.parking")]))
    await h.left(broker, name, 2)


@behaviour()
async def declaring_with_other_arguments_is_a_mismatch(h: Harness) -> None:
    """TopologyMismatch that names the channel and what differs, and nothing is changed (RMQ-12)."""
    broker = await h.connect()
    name = await h.channel(broker)
    elsewhere = f"{name}.elsewhere"
    try:
        await h.soon(broker.declare([Channel(name, elsewhere), Channel(elsewhere)]))
    except TopologyMismatch as error:
        expect(name in error.text, "the text names the channel")
        expect(elsewhere in error.text, f"the text says what differs: {error.text}")
    else:
        expect(False, "it was accepted")
    await h.soon(broker.declare([Channel(name, f"{name}.parking")]))


@behaviour()
async def a_mismatch_leaves_the_broker_usable(h: Harness) -> None:
    """Neither publishes in flight nor consumers notice (RMQ-12)."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=10))
    futures = broker.publish([OutMessage(name, body, TEXT) for body in numbered(3)])
    try:
        await h.soon(broker.declare([Channel(name, None)]))
    except TopologyMismatch:
        pass
    else:
        expect(False, "it was accepted")
    expect(await h.outcomes(futures) == [PublishOutcome.CONFIRMED] * 3, "publishes in flight are confirmed")
    taken = await h.take(consumer, 3)
    expect(not any(delivery.redelivered for delivery in taken), "the consumer was not disturbed")


@behaviour()
async def a_work_channel_brings_its_parking_channel(h: Harness) -> None:
    """It never stands without one (RMQ-17)."""
    broker = await h.connect()
    name = h.name()
    await h.soon(broker.declare([Channel(name, f"{name}.parking")]))
    await h.send(broker, f"{name}.parking", b"parked by hand")
    await h.left(broker, f"{name}.parking", 1)


@behaviour()
async def status_tells_the_depth(h: Harness) -> None:
    """Messages that wait for a consumer."""
    broker = await h.connect()
    name = await h.channel(broker)
    expect((await h.soon(broker.status(name))).messages == 0, "empty at first")
    await h.send(broker, name, *numbered(7))
    await h.settle()
    expect((await h.soon(broker.status(name))).messages == 7, "seven wait")
    await h.left(broker, name, 7)
    await h.settle()
    expect((await h.soon(broker.status(name))).messages == 0, "and are gone")


@behaviour()
async def status_tells_the_consumers(h: Harness) -> None:
    """Of all processes."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(broker)
    expect((await h.soon(broker.status(name))).consumers == 0, "none at first")
    one = await h.soon(broker.consume(name, prefetch=1))
    await h.soon(other.consume(name, prefetch=1))
    expect((await h.soon(broker.status(name))).consumers == 2, "two")
    await h.soon(one.close())
    await h.settle()
    expect((await h.soon(broker.status(name))).consumers == 1, "one")


@behaviour()
async def status_of_an_undeclared_channel_is_a_clear_error(h: Harness) -> None:
    """TopologyMismatch, and the broker stays usable."""
    broker = await h.connect()
    name = await h.channel(broker)
    try:
        await h.soon(broker.status(h.name("undeclared")))
    except TopologyMismatch:
        pass
    else:
        expect(False, "it was answered")
    await h.send(broker, name, b"x")


@behaviour()
async def a_deleted_channel_is_unroutable_until_it_is_declared_again(h: Harness) -> None:
    """And its neighbours are confirmed all the while (F-05)."""
    broker = await h.connect()
    name, other = await h.channel(broker), await h.channel(broker)
    await h.delete(name)
    messages = [OutMessage(name, b"a", TEXT), OutMessage(other, b"b", TEXT)]
    outcomes = await h.outcomes(broker.publish(messages))
    expect(outcomes == [PublishOutcome.UNROUTABLE, PublishOutcome.CONFIRMED], f"got {outcomes}")
    await h.soon(broker.declare([Channel(name, f"{name}.parking")]))
    await h.send(broker, name, b"c")
    expect(bodies(await h.left(broker, name, 1)) == [b"c"], "works again")


@behaviour()
async def consumers_of_a_deleted_channel_come_back_when_it_is_declared_again(h: Harness) -> None:
    """Through the same object; the broker's cancellation of a consumer is not its end (RMQ-14)."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=10))
    await h.delete(name)
    await h.settle()
    await h.soon(broker.declare([Channel(name, f"{name}.parking")]))
    await h.send(broker, name, b"x")
    expect(bodies(await h.take(consumer, 1)) == [b"x"], "delivered")
