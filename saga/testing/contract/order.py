"""Order: messages of one key on one channel are first delivered as they were published."""

from __future__ import annotations

from saga.brokers.base import OutMessage
from saga.testing.contract.harness import TEXT, Harness, expect, numbered
from saga.testing.contract.registry import behaviour


@behaviour(needs="ordered_per_key")
async def one_key_stays_in_order(h: Harness) -> None:
    """Within one batch."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, *numbered(100))
    expect([delivery.body for delivery in await h.left(broker, name, 100)] == numbered(100), "in order")


@behaviour(needs="ordered_per_key")
async def order_holds_across_batches_that_overlap(h: Harness) -> None:
    """The next batch may be published before the last is confirmed."""
    broker = await h.connect()
    name = await h.channel(broker)
    futures = [broker.publish([OutMessage(name, body, TEXT, key="k")]) for body in numbered(100)]
    for future in futures:
        await h.outcomes(future)
    expect([delivery.body for delivery in await h.left(broker, name, 100)] == numbered(100), "in order")


@behaviour(needs="ordered_per_key")
async def interleaved_keys_each_stay_in_order(h: Harness) -> None:
    """Each key for itself."""
    broker = await h.connect()
    name = await h.channel(broker)
    messages = [
        OutMessage(name, f"{key}{number:04d}".encode(), TEXT, key=key)
        for number in range(30)
        for key in "abc"
    ]
    await h.outcomes(broker.publish(messages))
    taken = await h.left(broker, name, 90)
    for key in (b"a", b"b", b"c"):
        of_key = [delivery.body for delivery in taken if delivery.body.startswith(key)]
        expect(of_key == sorted(of_key) and len(of_key) == 30, f"key {key!r} in order")


@behaviour(needs="ordered_per_key")
async def order_holds_while_prefetch_is_small(h: Harness) -> None:
    """What waits at the broker is not overtaken by what comes later."""
    broker = await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=2))
    await h.send(broker, name, *numbered(20))
    taken: list[bytes] = []
    while len(taken) < 20:
        batch = await h.soon(consumer.receive())
        expect(batch, "not stopped")
        taken += [delivery.body for delivery in batch]
        consumer.ack(batch)
        await h.send(broker, name, *numbered(1, f"z{len(taken):04d}"))
    expect(taken[:20] == numbered(20), "in order")
