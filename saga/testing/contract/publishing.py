"""Publishing: one outcome per message, true, in the same order, within its bound; never an exception."""

from __future__ import annotations

import asyncio
from typing import Any

from saga.brokers.base import OutMessage, PublishOutcome
from saga.testing.contract.harness import TEXT, Harness, bodies, expect, numbered
from saga.testing.contract.registry import behaviour

CONFIRMED, UNROUTABLE = PublishOutcome.CONFIRMED, PublishOutcome.UNROUTABLE
REFUSED, UNKNOWN = PublishOutcome.REFUSED, PublishOutcome.UNKNOWN


@behaviour()
async def each_message_has_its_own_future(h: Harness) -> None:
    """One future per message, in the order of the messages; none for none."""
    broker = await h.connect()
    name = await h.channel(broker)
    expect(len(broker.publish([])) == 0, "publishing nothing gives no futures")
    futures = broker.publish([OutMessage(name, body, TEXT) for body in numbered(5)])
    expect(len({id(future) for future in futures}) == 5, "five messages, five futures")
    expect(await h.outcomes(futures) == [CONFIRMED] * 5, "each is confirmed")


@behaviour()
async def an_unroutable_message_is_reported_and_its_neighbours_are_confirmed(h: Harness) -> None:
    """Outcomes are per message within one batch (RMQ-1)."""
    broker = await h.connect()
    name = await h.channel(broker)
    targets = [name, h.name("nowhere"), name]
    outcomes = await h.outcomes(broker.publish([OutMessage(target, b"x", TEXT) for target in targets]))
    expect(outcomes == [CONFIRMED, UNROUTABLE, CONFIRMED], f"got {outcomes}")
    await h.left(broker, name, 2)


@behaviour()
async def outcomes_are_in_the_order_of_the_messages(h: Harness) -> None:
    """Interleaved targets never swap their outcomes (RMQ-2)."""
    broker = await h.connect()
    name = await h.channel(broker)
    nowhere = h.name("nowhere")
    targets = [nowhere if number % 3 else name for number in range(30)]
    outcomes = await h.outcomes(broker.publish([OutMessage(target, b"same", TEXT) for target in targets]))
    expect(
        outcomes == [UNROUTABLE if target == nowhere else CONFIRMED for target in targets], f"got {outcomes}"
    )


@behaviour()
async def outcomes_of_concurrent_batches_do_not_mix(h: Harness) -> None:
    """Several publishes in flight at once each get their own outcomes (RMQ-2)."""
    broker = await h.connect()
    name = await h.channel(broker)
    nowhere = h.name("nowhere")
    good = [broker.publish([OutMessage(name, b"same", TEXT)]) for _ in range(10)]
    bad = [broker.publish([OutMessage(nowhere, b"same", TEXT)]) for _ in range(10)]
    for futures in good:
        expect(await h.outcomes(futures) == [CONFIRMED], "a routable message beside unroutable ones")
    for futures in bad:
        expect(await h.outcomes(futures) == [UNROUTABLE], "an unroutable message beside routable ones")


@behaviour()
async def a_thousand_publishes_in_flight_all_arrive_once(h: Harness) -> None:
    """Pipelining neither loses nor doubles."""
    broker = await h.connect()
    name = await h.channel(broker)
    sent = numbered(1000)
    futures = [
        broker.publish([OutMessage(name, body, TEXT) for body in sent[at : at + 50]])
        for at in range(0, 1000, 50)
    ]
    for batch in futures:
        expect(set(await h.outcomes(batch)) == {CONFIRMED}, "all confirmed")
    expect(bodies(await h.left(broker, name, 1000)) == sent, "each exactly once")


@behaviour()
async def a_full_queue_refuses(h: Harness) -> None:
    """A bounded queue answers REFUSED instead of waiting or dropping something else."""
    broker = await h.connect(queue_length_max=5)
    name = await h.channel(broker)
    outcomes: list[PublishOutcome] = []
    for body in numbered(50):
        outcomes += await h.outcomes(broker.publish([OutMessage(name, body, TEXT)]))
    expect(outcomes[:5] == [CONFIRMED] * 5, "there is room at first")
    expect(outcomes[-1] is REFUSED, f"the last ones are refused, got {outcomes[-1]}")
    expect(set(outcomes) == {CONFIRMED, REFUSED}, "nothing else is answered")


@behaviour()
async def a_full_queue_keeps_what_it_confirmed(h: Harness) -> None:
    """What was confirmed is there and what was refused is not."""
    broker = await h.connect(queue_length_max=5)
    name = await h.channel(broker)
    outcomes = [
        (await h.outcomes(broker.publish([OutMessage(name, body, TEXT)])))[0] for body in numbered(50)
    ]
    confirmed = [body for body, outcome in zip(numbered(50), outcomes, strict=True) if outcome is CONFIRMED]
    expect(bodies(await h.left(broker, name, len(confirmed))) == confirmed, "exactly the confirmed ones")


@behaviour()
async def a_full_queue_takes_again_once_there_is_room(h: Harness) -> None:
    """REFUSED is no lasting state."""
    broker = await h.connect(queue_length_max=5)
    name = await h.channel(broker)
    sent = 0
    while (await h.outcomes(broker.publish([OutMessage(name, b"x", TEXT)]))) == [CONFIRMED]:
        sent += 1
        expect(sent < 200, "a queue of 5 takes no 200")
    await h.left(broker, name, sent)
    await h.send(broker, name, b"again")
    await h.left(broker, name, 1)


@behaviour()
async def a_body_above_the_declared_limit_is_refused(h: Harness) -> None:
    """Nothing is raised, nothing is closed, neighbours pass."""
    broker = await h.connect()
    name = await h.channel(broker)
    large = b"x" * (h.capabilities.body_bytes_max + 1)
    outcomes = await h.outcomes(
        broker.publish([OutMessage(name, body, TEXT) for body in (b"a", large, b"b")])
    )
    expect(outcomes == [CONFIRMED, REFUSED, CONFIRMED], f"got {outcomes}")
    expect(bodies(await h.left(broker, name, 2)) == [b"a", b"b"], "the neighbours arrive")


@behaviour()
async def cancelling_a_future_does_not_stop_the_send(h: Harness) -> None:
    """The caller may leave; the message goes out and its neighbours get their outcome."""
    broker = await h.connect()
    name = await h.channel(broker)
    futures = broker.publish([OutMessage(name, body, TEXT) for body in numbered(3)])
    futures[1].cancel()
    expect(
        await h.outcomes([futures[0], futures[2]]) == [CONFIRMED, CONFIRMED], "the neighbours are confirmed"
    )
    await h.send(broker, name, b"n")
    expect(bodies(await h.left(broker, name, 4)) == [*numbered(3), b"n"], "all of them arrive")


@behaviour()
async def an_outcome_can_be_awaited_by_a_cancelled_waiter_and_later_again(h: Harness) -> None:
    """Waiting for an outcome through `asyncio.wait` and leaving harms nobody."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.part(broker)
    futures = broker.publish([OutMessage(name, b"x", TEXT)])
    done, _ = await asyncio.wait(futures, timeout=0)
    expect(not done, "nothing is known while the connection is away")
    await h.rejoin(broker)
    expect(await h.outcomes(futures) == [CONFIRMED], "the same future tells the outcome later")


@behaviour()
async def confirmed_means_stored(h: Harness) -> None:
    """A confirmed message survives the death of its publisher in the same instant."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(other)

    async def publish_and_die() -> set[PublishOutcome]:
        futures = broker.publish([OutMessage(name, body, TEXT) for body in numbered(10)])
        outcomes = {await future for future in futures}
        await h.die(broker)
        return outcomes

    expect(await h.soon(publish_and_die()) == {CONFIRMED}, "all confirmed")
    expect(bodies(await h.left(other, name, 10)) == numbered(10), "all stored")


@behaviour()
async def publishing_while_disconnected_is_unknown_within_the_bound(h: Harness) -> None:
    """No publish waits for ever and none raises (RMQ-7, RMQ-9)."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.part(broker)
    futures = broker.publish([OutMessage(name, b"x", TEXT) for _ in range(3)])
    expect(await h.outcomes(futures) == [UNKNOWN] * 3, "unknown, because nobody answered")


@behaviour()
async def what_was_published_while_disconnected_goes_out_on_return(h: Harness) -> None:
    """Within the bound the adapter holds it, once."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.part(broker)
    futures = broker.publish([OutMessage(name, body, TEXT) for body in numbered(3)])
    await h.rejoin(broker)
    expect(await h.outcomes(futures) == [CONFIRMED] * 3, "sent after the return")
    expect([delivery.body for delivery in await h.left(broker, name, 3)] == numbered(3), "once, in order")


@behaviour()
async def what_expired_while_disconnected_is_not_sent_later(h: Harness) -> None:
    """UNKNOWN frees the adapter from the message; a late copy would be one more duplicate for nothing."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.part(broker)
    expect(await h.outcomes(broker.publish([OutMessage(name, b"old", TEXT)])) == [UNKNOWN], "expired")
    await h.rejoin(broker)
    for number in range(20):  # reconnecting may take longer than the bound of one publish
        if await h.outcomes(broker.publish([OutMessage(name, b"new", TEXT)])) == [CONFIRMED]:
            break
        expect(number < 19, "publishing works again after the return")
    expect(bodies(await h.left(broker, name, 1)) == [b"new"], "the expired ones stay away")


@behaviour()
async def publishing_after_close_is_unknown(h: Harness) -> None:
    """Never an exception: a batch that is just being handed over must not blow up in a shutdown (P17)."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.soon(broker.close())
    expect(await h.outcomes(broker.publish([OutMessage(name, b"x", TEXT)])) == [UNKNOWN], "unknown")


@behaviour()
async def closing_resolves_what_has_no_outcome(h: Harness) -> None:
    """Whoever awaits an outcome is not left behind by `close`."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.part(broker)
    futures = broker.publish([OutMessage(name, b"x", TEXT) for _ in range(3)])
    await h.soon(broker.close())
    expect(all(future.done() for future in futures), "resolved when close returns")
    expect([future.result() for future in futures] == [UNKNOWN] * 3, "as unknown")


@behaviour()
async def receiving_goes_on_while_publishes_have_no_answer(h: Harness) -> None:
    """Receiving never waits for publishing (P33)."""
    broker, other = await h.connect(), await h.connect()
    name = await h.channel(broker)
    consumer = await h.soon(broker.consume(name, prefetch=10))
    futures: list[Any] = []
    for _ in range(20):
        futures += broker.publish([OutMessage(h.name("nowhere"), b"x", TEXT)])
    await h.send(other, name, b"in")
    expect(bodies(await h.take(consumer, 1)) == [b"in"], "delivered all the same")
    expect(set(await h.outcomes(futures)) == {UNROUTABLE}, "and the outcomes come too")
