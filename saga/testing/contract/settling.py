"""Settling: each delivery once; ack is for good, retry and loss bring it back, marked and counted."""

from __future__ import annotations

from saga.testing.contract.harness import Harness, bodies, expect, numbered
from saga.testing.contract.registry import behaviour


@behaviour()
async def a_first_delivery_is_not_marked(h: Harness) -> None:
    """redelivered is False and the count is 1."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, b"x")
    (delivery,) = await h.left(broker, name, 1)
    expect(not delivery.redelivered, "not marked")
    expect(delivery.delivery_count == 1, f"count is {delivery.delivery_count}")


@behaviour()
async def what_is_acked_does_not_come_back(h: Harness) -> None:
    """Neither to the same consumer nor to the next."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(5))
    consumer = await h.soon(broker.consume(name, prefetch=5))
    consumer.ack(await h.take(consumer, 5))
    await h.settle()
    await h.soon(consumer.close())
    await h.left(broker, name, 0)


@behaviour(needs="single_ack")
async def ack_out_of_order_acks_only_those(h: Harness) -> None:
    """Acking the last leaves the earlier ones unfinished."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(5))
    consumer = await h.soon(broker.consume(name, prefetch=5))
    taken = await h.take(consumer, 5)
    consumer.ack([delivery for delivery in taken if delivery.body in (b"m0001", b"m0004")])
    await h.settle()
    await h.soon(consumer.close())
    expect(bodies(await h.left(broker, name, 3)) == [b"m0000", b"m0002", b"m0003"], "exactly the unfinished")


@behaviour(needs="single_ack")
async def an_ack_range_never_spans_an_unfinished_delivery(h: Harness) -> None:
    """Acked in one call, but with a hole: the hole stays (P35)."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(20))
    consumer = await h.soon(broker.consume(name, prefetch=20))
    taken = await h.take(consumer, 20)
    consumer.ack([delivery for delivery in taken if delivery.body not in (b"m0007", b"m0013")])
    await h.settle()
    await h.soon(consumer.close())
    expect(bodies(await h.left(broker, name, 2)) == [b"m0007", b"m0013"], "the holes come back")


@behaviour(needs="single_ack")
async def an_ack_range_stops_before_what_was_fetched_and_not_received(h: Harness) -> None:
    """What lies in the adapter's buffer is unfinished too (P35)."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=10))
    await h.send(broker, name, b"first")
    taken = await h.take(consumer, 1)
    await h.send(broker, name, b"second")
    await h.settle()
    consumer.ack(taken)
    await h.settle()
    await h.soon(consumer.close())
    expect(bodies(await h.left(broker, name, 1)) == [b"second"], "never received, so never acked")


@behaviour()
async def acking_twice_is_harmless(h: Harness) -> None:
    """In one call or in two, and the channel lives on."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, b"x")
    consumer = await h.soon(broker.consume(name, prefetch=2))
    taken = await h.take(consumer, 1)
    consumer.ack([*taken, *taken])
    consumer.ack(taken)
    await h.settle()
    await h.send(broker, name, b"y")
    (delivery,) = await h.take(consumer, 1)
    expect(delivery.body == b"y" and not delivery.redelivered, "the channel was not closed by it")


@behaviour()
async def acking_nothing_acks_nothing(h: Harness) -> None:
    """An empty call is no range."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(2))
    consumer = await h.soon(broker.consume(name, prefetch=2))
    await h.take(consumer, 2)
    consumer.ack([])
    consumer.retry([])
    await h.settle()
    await h.soon(consumer.close())
    await h.left(broker, name, 2)


@behaviour()
async def a_retried_delivery_comes_back_marked(h: Harness) -> None:
    """Soon, with redelivered set, as another delivery."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, b"x", headers={"id": "1"})
    consumer = await h.soon(broker.consume(name, prefetch=1))
    (first,) = await h.take(consumer, 1)
    consumer.retry([first])
    (second,) = await h.take(consumer, 1)
    expect(
        second is not first and second.body == b"x" and second.headers.get("id") == "1", "the same message"
    )
    expect(second.redelivered and second.delivery_count == 2, "marked and counted")


@behaviour(needs="single_ack")
async def retry_gives_back_only_those(h: Harness) -> None:
    """The others stay with this consumer."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(4))
    consumer = await h.soon(broker.consume(name, prefetch=10))
    taken = await h.take(consumer, 4)
    consumer.retry([delivery for delivery in taken if delivery.body in (b"m0001", b"m0002")])
    again = await h.take(consumer, 2)
    expect(bodies(again) == [b"m0001", b"m0002"], "exactly those")
    await h.expect_nothing(consumer)


@behaviour()
async def a_delivery_is_settled_once(h: Harness) -> None:
    """Retry after ack does nothing; ack after retry does not ack the redelivery."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(2))
    consumer = await h.soon(broker.consume(name, prefetch=5))
    one, two = sorted(await h.take(consumer, 2), key=lambda delivery: delivery.body)
    consumer.ack([one])
    consumer.retry([one])
    consumer.retry([two])
    consumer.ack([two])
    await h.settle()
    await h.soon(consumer.close())
    expect(bodies(await h.left(broker, name, 1)) == [two.body], "the retried one, and only that")


@behaviour(needs="delivery_count")
async def the_delivery_count_rises(h: Harness) -> None:
    """1, 2, 3, 4, by the broker's own count."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, b"x")
    consumer = await h.soon(broker.consume(name, prefetch=1))
    counts: list[int] = []
    for _ in range(4):
        (delivery,) = await h.take(consumer, 1)
        counts.append(delivery.delivery_count)
        consumer.retry([delivery])
    expect(counts == [1, 2, 3, 4], f"got {counts}")


@behaviour(needs="delivery_count")
async def the_delivery_count_survives_the_consumer(h: Harness) -> None:
    """It is not kept in the consumer's process."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, b"x")
    for _ in range(2):
        consumer = await h.soon(broker.consume(name, prefetch=1))
        await h.take(consumer, 1)
        await h.soon(consumer.close())
    (delivery,) = await h.left(other, name, 1)
    expect(delivery.delivery_count == 3, f"the third delivery says {delivery.delivery_count}")


@behaviour(needs="delivery_count")
async def a_poison_message_ends_in_parking(h: Harness) -> None:
    """Past the delivery limit the broker parks it by itself, whole; the channel goes on (P14, RMQ-17)."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, b"poison", headers={"id": "7"})
    consumer = await h.soon(broker.consume(name, prefetch=1))
    for _ in range(h.delivery_limit + 1):
        consumer.retry(await h.take(consumer, 1))
    (parked,) = await h.left(broker, f"{name}.parking", 1)
    expect(parked.body == b"poison" and parked.content_type == "text/plain", "body and content type")
    expect(parked.headers.get("id") == "7", "with its headers")
    await h.send(broker, name, b"next")
    expect(bodies(await h.take(consumer, 1)) == [b"next"], "the channel goes on")
