"""Deliberately weak adapters: each differs from the passing in-process one by a single defect, named by its class.

They show that the contract notices. `test_weak_adapters.py` holds them to three rules: each behaviour fails on at
least one of them, each of them fails at least one behaviour, and none accounts for more than ten.
"""

# ruff: noqa: N801 - a nested `consumer_class` or `queues_class` is the value of that attribute of `Weak`

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from saga.brokers.base import (
    Channel,
    ChannelStatus,
    Consumer,
    Delivery,
    OutMessage,
    PublishOutcome,
)
from saga.brokers.memory import MemoryBroker, MemoryConsumer, MemoryQueues
from saga.errors import BrokerUnavailable, TopologyMismatch
from tests.contract.memory_harness import DurableMemoryHarness

Outcome = asyncio.Future[PublishOutcome]
CONFIRMED, UNKNOWN, UNROUTABLE = PublishOutcome.CONFIRMED, PublishOutcome.UNKNOWN, PublishOutcome.UNROUTABLE

WEAK: dict[str, type[DurableMemoryHarness]] = {}


class Weak(MemoryBroker):
    """A broker with a defect in itself, its consumers, or its queues; subclasses register themselves."""

    consumer_class: type[MemoryConsumer] = MemoryConsumer
    queues_class: type[MemoryQueues] = MemoryQueues
    harness_class: type[DurableMemoryHarness] = DurableMemoryHarness

    def __init_subclass__(cls) -> None:
        WEAK[cls.__name__] = type(
            f"{cls.__name__}Harness",
            (cls.harness_class,),
            {"broker_class": cls, "queues_class": cls.queues_class},
        )

    def _make_consumer(self, queue: Any, prefetch: int) -> MemoryConsumer:
        return self.consumer_class(self, queue, prefetch)


def resolved(outcome: PublishOutcome) -> Outcome:
    future: Outcome = asyncio.get_running_loop().create_future()
    future.set_result(outcome)
    return future


# --- publishing ---------------------------------------------------------------------------------------------------


class ConfirmsTheWholeBatch(Weak):
    """Reports a batch as confirmed when one message was returned."""

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        futures = super().publish(messages)
        if any(future.done() and future.result() is CONFIRMED for future in futures):
            return [resolved(CONFIRMED) if future.done() else future for future in futures]
        return futures


class SwapsOutcomes(Weak):
    """Matches returns by a name that several messages share (RMQ-2): an earlier routable one vouches for a later."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._seen: set[bytes] = set()

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        futures = list(super().publish(messages))
        for index, message in enumerate(messages):
            if not futures[index].done() or message.body != b"same":
                continue
            if futures[index].result() is CONFIRMED:
                self._seen.add(message.body)
            elif message.body in self._seen:
                futures[index] = resolved(CONFIRMED)
        return futures


class SharesOneFuture(Weak):
    """Gives every message of a batch the same future, the last one's."""

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        futures = super().publish(messages)
        return [futures[-1]] * len(futures) if futures else []


class ConfirmsBeforeStoring(Weak):
    """The confirm is out one turn of the loop before the message is safe."""

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        if not self._connected or self._closed:
            return super().publish(messages)
        futures: list[Outcome] = []
        for message in messages:
            queue = self.queues.find(message.channel)
            large = len(message.body) > self.capabilities.body_bytes_max
            if queue is None or large or self.queues.is_full(queue):
                futures += super().publish([message])
            else:
                futures.append(resolved(CONFIRMED))
                asyncio.get_running_loop().call_soon(self._store_late, message)
        return futures

    def _store_late(self, message: OutMessage) -> None:
        if self._connected:
            MemoryBroker.publish(self, [message])


class NeverRefuses(Weak):
    """Drops the oldest message when a queue is full."""

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        for message in messages:
            queue = self.queues.find(message.channel)
            if queue is not None and self.queues.is_full(queue) and queue.ready:
                queue.ready.popleft()
        return super().publish(messages)


class StaysFull(Weak):
    """What was refused once is refused for ever."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._full: set[str] = set()

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        futures = list(super().publish(messages))
        for index, message in enumerate(messages):
            if message.channel in self._full:
                futures[index] = resolved(PublishOutcome.REFUSED)
            elif futures[index].done() and futures[index].result() is PublishOutcome.REFUSED:
                self._full.add(message.channel)
        return futures


class RaisesOnLargeBodies(Weak):
    """Raises instead of answering REFUSED."""

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        if any(len(message.body) > self.capabilities.body_bytes_max for message in messages):
            raise ValueError("too large")
        return super().publish(messages)


class KeepsAHundredInFlight(Weak):
    """Refuses beyond a hundred messages."""

    class queues_class(MemoryQueues):
        def __init__(self, *, capacity: int = 100, delivery_limit: int = 100) -> None:
            super().__init__(capacity=min(capacity, 100), delivery_limit=delivery_limit)


class CancelledFutureStopsTheSend(Weak):
    """Sends in the next turn, unless the caller has left by then."""

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        if not self._connected or self._closed:
            return super().publish(messages)
        loop = asyncio.get_running_loop()
        futures: list[Outcome] = [loop.create_future() for _ in messages]
        loop.call_soon(self._send_those_left, futures, messages)
        return futures

    def _send_those_left(self, futures: Sequence[Outcome], messages: Sequence[OutMessage]) -> None:
        for future, message in zip(futures, messages, strict=True):
            if not future.cancelled():
                future.set_result(MemoryBroker.publish(self, [message])[0].result())


class WaitsForEverWhileDisconnected(Weak):
    """A publish without a connection has no bound (RMQ-7)."""

    async def _expire(self, futures: Sequence[Outcome]) -> None:
        await asyncio.get_running_loop().create_future()


class GivesUpAtOnceWhileDisconnected(Weak):
    """Does not hold a publish until the connection is back."""

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        return super().publish(messages) if self._connected else [resolved(UNKNOWN) for _ in messages]


class SendsWhatHasExpired(Weak):
    """Tells UNKNOWN and sends all the same when the connection is back."""

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        if not self._connected:
            self._late = [*getattr(self, "_late", []), *messages]
        return super().publish(messages)

    async def _expire(self, futures: Sequence[Outcome]) -> None:
        await super()._expire(futures)
        self._resend = self._late

    def restore(self) -> None:
        super().restore()
        super().publish(getattr(self, "_resend", []))


class RaisesAfterClose(Weak):
    """Raises when a closed broker is asked to publish."""

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        self._refuse_if_closed()
        return super().publish(messages)


class CloseLeavesFuturesOpen(Weak):
    """Whoever awaits an outcome waits for ever once the broker is closed."""

    async def close(self) -> None:
        self._open.clear()
        await super().close()


class StopsPublishingAfterALoss(Weak):
    """Its publishing side never recovers."""

    def sever(self) -> None:
        self._dead = True
        super().sever()

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        if self._connected and getattr(self, "_dead", False):
            return [resolved(UNKNOWN) for _ in messages]
        return super().publish(messages)


class ReceivingWaitsForPublishing(Weak):
    """A message that nobody takes blocks receiving for a minute (P33)."""

    class consumer_class(MemoryConsumer):
        async def receive(self) -> Sequence[Delivery]:
            if getattr(self._broker, "_unsent", False):
                await self._broker._clock.sleep(60)
            return await super().receive()

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        futures = super().publish(messages)
        if any(future.done() and future.result() is UNROUTABLE for future in futures[-1:]):
            self._unsent = True
        return futures


# --- content ------------------------------------------------------------------------------------------------------


class Mangles(Weak):
    """Base of those that change what passes through."""

    def change(self, message: OutMessage) -> OutMessage:
        return message

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        return super().publish([self.change(message) for message in messages])


del WEAK["Mangles"]


class LosesHeaders(Mangles):
    """Headers do not arrive."""

    def change(self, message: OutMessage) -> OutMessage:
        return replace(message, headers={})


class MixesHeaders(Mangles):
    """A message carries the headers of the one before it too."""

    def change(self, message: OutMessage) -> OutMessage:
        self._last = {**getattr(self, "_last", {}), **message.headers}
        return replace(message, headers=self._last)


class LosesTheContentType(Mangles):
    """Everything is JSON."""

    def change(self, message: OutMessage) -> OutMessage:
        return replace(message, content_type="application/json")


class TreatsBodiesAsText(Mangles):
    """Bytes that are no UTF-8 are replaced."""

    def change(self, message: OutMessage) -> OutMessage:
        return replace(message, body=message.body.decode(errors="replace").encode())


class TruncatesLargeBodies(Mangles):
    """Only the first frame of a body arrives."""

    def change(self, message: OutMessage) -> OutMessage:
        small = len(message.body) <= 300_000
        return replace(message, body=message.body[:131_064]) if small else message


class StopsAtAFrameEnd(Mangles):
    """Takes a byte of the body for the end of a frame."""

    def change(self, message: OutMessage) -> OutMessage:
        return replace(message, body=message.body.rstrip(b"\xce"))


class SwallowsEmptyBodies(Weak):
    """Confirms a message without a body and does not deliver it."""

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        return [
            super(SwallowsEmptyBodies, self).publish([m])[0] if m.body else resolved(CONFIRMED)
            for m in messages
        ]


# --- order and sharing --------------------------------------------------------------------------------------------


class Reorders(Weak):
    """The latest message comes first."""

    def _store(self, message: OutMessage, touched: Any) -> PublishOutcome | None:
        outcome = super()._store(message, touched)
        queue = self.queues.find(message.channel)
        if outcome is CONFIRMED and queue is not None and len(queue.ready) > 1:
            queue.ready.rotate(1)
        return outcome


class DeliversToEverybody(Weak):
    """Each consumer of a channel gets a copy."""

    class consumer_class(MemoryConsumer):
        def take(self, stored: Any) -> None:
            super().take(stored)
            for other in self._queue.subscribers:
                if other is not self and isinstance(other, MemoryConsumer):
                    MemoryConsumer.take(other, stored)


class CrossesChannels(Weak):
    """A message also lands in other channels."""

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        for message in messages:
            for name in self.queues._queues:
                if name != message.channel and len(name) == len(message.channel):
                    super().publish([replace(message, channel=name)])
        return super().publish(messages)


# --- receiving ----------------------------------------------------------------------------------------------------


class FillsBatches(Weak):
    """Waits until a tenth of the prefetch is there."""

    class consumer_class(MemoryConsumer):
        async def receive(self) -> Sequence[Delivery]:
            while len(self._buffer) < self._prefetch // 10 and not self._stopped:
                self._there.clear()
                await self._there.wait()
            return await super().receive()


class HandsOverOneByOne(Weak):
    """Gives one delivery at a time, however many there are."""

    class consumer_class(MemoryConsumer):
        async def receive(self) -> Sequence[Delivery]:
            batch = await super().receive()
            self._buffer.extendleft(reversed(batch[1:]))
            return batch[:1]


class SometimesReturnsNothing(Weak):
    """Gives an empty batch after one that filled the prefetch."""

    class consumer_class(MemoryConsumer):
        async def receive(self) -> Sequence[Delivery]:
            if getattr(self, "_full", False):
                self._full = False
                return ()
            batch = await super().receive()
            self._full = len(batch) == self._prefetch
            return batch


class DoesNotWakeUp(Weak):
    """A receive that waits is not told of what comes."""

    class consumer_class(MemoryConsumer):
        async def receive(self) -> Sequence[Delivery]:
            if not self._buffer and not self._stopped:
                while not self._stopped:
                    self._there.clear()
                    await self._there.wait()
            return await super().receive()


class LosesWhatACancelledReceiveTook(Weak):
    """Takes the buffer and then waits once more."""

    class consumer_class(MemoryConsumer):
        async def receive(self) -> Sequence[Delivery]:
            batch = await super().receive()
            for _ in range(5):
                await asyncio.sleep(0)
            return batch


class IgnoresPrefetch(Weak):
    """Takes whatever is there."""

    class consumer_class(MemoryConsumer):
        def has_credit(self) -> bool:
            return True


class AcceptsAnyPrefetch(Weak):
    """Passes 0 on, which is without limit."""

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        return await super().consume(channel, prefetch=prefetch if 1 <= prefetch <= 10_000 else 10_000)


class ConsumingCreates(Weak):
    """Consuming an unknown channel creates it."""

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        if self.queues.find(channel) is None and not self._closed:
            await self.declare([Channel(channel)])
        return await super().consume(channel, prefetch=prefetch)


# --- settling -----------------------------------------------------------------------------------------------------


class AcksARange(Weak):
    """Acks everything up to the highest tag, unfinished ones included (P35)."""

    class consumer_class(MemoryConsumer):
        def ack(self, deliveries: Sequence[Delivery]) -> None:
            highest = max(self._own_tags(deliveries), default=0)
            covered = [tag for tag in self._unsettled if tag <= highest]
            for tag in covered:
                del self._unsettled[tag]
            self._broker.queues.release(self._queue, len(covered))


class AcksWhatItFetched(Weak):
    """Acks up to the last tag that it has seen, received or not (P35)."""

    class consumer_class(MemoryConsumer):
        def ack(self, deliveries: Sequence[Delivery]) -> None:
            if self._own_tags(deliveries) and self._buffer:
                deliveries = [*deliveries, *self._buffer]
            super().ack(deliveries)


class AcksWithATagOfADeadChannel(Weak):
    """A tag is a number, whatever channel it came from (P35)."""

    class consumer_class(MemoryConsumer):
        def _own_tags(self, deliveries: Any) -> list[int]:
            tags = (delivery.token[2] for delivery in deliveries)
            return list(dict.fromkeys(tag for tag in tags if tag in self._unsettled))


class AcksOnEveryConsumer(Weak):
    """The consumers of one process share their tags."""

    class consumer_class(MemoryConsumer):
        def ack(self, deliveries: Sequence[Delivery]) -> None:
            tags = self._own_tags(deliveries)
            super().ack(deliveries)
            for other in self._broker._consumers:
                same = [tag for tag in tags if other is not self and tag in other._unsettled]
                for tag in same:
                    del other._unsettled[tag]
                self._broker.queues.release(other._queue, len(same))


class AckingNothingAcksAll(Weak):
    """Tag 0 with `multiple` set means everything."""

    class consumer_class(MemoryConsumer):
        def ack(self, deliveries: Sequence[Delivery]) -> None:
            if not deliveries and self._unsettled:
                settled = len(self._unsettled)
                self._unsettled.clear()
                self._broker.queues.release(self._queue, settled)
            super().ack(deliveries)


class AckingTwiceRaises(Weak):
    """The second ack is an exception."""

    class consumer_class(MemoryConsumer):
        def ack(self, deliveries: Sequence[Delivery]) -> None:
            if len(self._own_tags(deliveries)) < len(deliveries) and not self._session and not self._stopped:
                raise KeyError("unknown delivery tag")
            super().ack(deliveries)


class RaisesOnDeadTags(Weak):
    """Settling what belongs to a lost connection is an exception."""

    class consumer_class(MemoryConsumer):
        def ack(self, deliveries: Sequence[Delivery]) -> None:
            if any(delivery.token[1] != self._session for delivery in deliveries):  # type: ignore[index]
                raise ConnectionError("channel closed")
            super().ack(deliveries)


class AcksAtCloseOnly(Weak):
    """Collects acks and sends them when the consumer is closed; a lost connection loses them all."""

    class consumer_class(MemoryConsumer):
        def ack(self, deliveries: Sequence[Delivery]) -> None:
            self._late = [*getattr(self, "_late", []), *deliveries]

        def has_credit(self) -> bool:
            return len(self._unsettled) - len(getattr(self, "_late", [])) < self._prefetch

        def drop(self) -> None:
            self._late = []
            super().drop()

        async def close(self) -> None:
            super().ack(getattr(self, "_late", []))
            await super().close()


class ForgetsAcksAtClose(Weak):
    """Acks of the last moment are lost when a consumer is closed in good order."""

    class consumer_class(MemoryConsumer):
        def ack(self, deliveries: Sequence[Delivery]) -> None:
            stored = [self._unsettled[tag] for tag in self._own_tags(deliveries)]
            self._acked = [*getattr(self, "_acked", []), *stored]
            super().ack(deliveries)

        async def close(self) -> None:
            again, self._acked = getattr(self, "_acked", [])[-2:], []
            await super().close()
            if len(again) == 2 and self._queue.declared:
                self._queue.held += len(again)
                self._broker.queues.give_back(self._queue, again)


class AcksByMessage(Weak):
    """Takes a redelivery for the delivery that was settled before."""

    class consumer_class(MemoryConsumer):
        def take(self, stored: Any) -> None:
            super().take(stored)
            self._known = {**getattr(self, "_known", {}), (self._session, self._tag): stored}

        def ack(self, deliveries: Sequence[Delivery]) -> None:
            wanted = [self._known[delivery.token[1:]] for delivery in deliveries]  # type: ignore[index]
            same = [tag for tag, stored in self._unsettled.items() if stored in wanted]
            for tag in same:
                del self._unsettled[tag]
            self._broker.queues.release(self._queue, len(same))


class SettlesAfterClose(Weak):
    """An ack after close still removes the message."""

    class consumer_class(MemoryConsumer):
        def take(self, stored: Any) -> None:
            super().take(stored)
            self._known = {**getattr(self, "_known", {}), (self._session, self._tag): stored}

        def ack(self, deliveries: Sequence[Delivery]) -> None:
            super().ack(deliveries)
            for delivery in deliveries:
                stored: Any = self._known.get(delivery.token[1:])  # type: ignore[index]
                if self._stopped and stored in self._queue.ready:
                    self._queue.ready.remove(stored)


class RetryDrops(Weak):
    """Rejects without requeue (RMQ-6)."""

    class consumer_class(MemoryConsumer):
        def retry(self, deliveries: Sequence[Delivery]) -> None:
            self.ack(deliveries)


class RetryGivesAllBack(Weak):
    """A retry gives back everything that is unsettled."""

    class consumer_class(MemoryConsumer):
        def retry(self, deliveries: Sequence[Delivery]) -> None:
            if deliveries:
                returned = list(self._unsettled.values())
                self._unsettled.clear()
                self._buffer.clear()
                self._broker.queues.give_back(self._queue, returned)


class Rewrites(MemoryConsumer):
    """Base of those that change what a delivery says."""

    def change(self, delivery: Delivery) -> Delivery:
        return delivery

    def take(self, stored: Any) -> None:
        super().take(stored)
        self._buffer[-1] = self.change(self._buffer[-1])


class ForgetsTheRedeliveredMark(Weak):
    """A redelivery looks like a first delivery."""

    class consumer_class(Rewrites):
        def change(self, delivery: Delivery) -> Delivery:
            return replace(delivery, redelivered=False)


class MarksEveryDelivery(Weak):
    """Every delivery looks like a redelivery."""

    class consumer_class(Rewrites):
        def change(self, delivery: Delivery) -> Delivery:
            return replace(delivery, redelivered=True)


class CountsToTwo(Weak):
    """Declares a delivery count and knows only the mark."""

    class consumer_class(Rewrites):
        def change(self, delivery: Delivery) -> Delivery:
            return replace(delivery, delivery_count=2 if delivery.redelivered else 1)


class CountsInTheProcess(Weak):
    """The count starts again with each consumer."""

    class consumer_class(Rewrites):
        def change(self, delivery: Delivery) -> Delivery:
            self._base = getattr(self, "_base", {})
            first = self._base.setdefault(delivery.body, delivery.delivery_count - int(delivery.redelivered))
            return replace(delivery, delivery_count=delivery.delivery_count - first + 1)


class DropsPoison(Weak):
    """At the delivery limit the message is gone (RMQ-17)."""

    class queues_class(MemoryQueues):
        def _park(self, queue: Any, stored: Any) -> None:
            pass


class ParksWithoutHeaders(Weak):
    """What is parked has lost its headers."""

    class queues_class(MemoryQueues):
        def _park(self, queue: Any, stored: Any) -> None:
            stored.headers = {}
            super()._park(queue, stored)


# --- stopping and closing -----------------------------------------------------------------------------------------


class StopForgetsTheBuffer(Weak):
    """What was fetched and not received is not handed over after stop."""

    class consumer_class(MemoryConsumer):
        async def stop(self) -> None:
            self._buffer.clear()
            await super().stop()


class StopDoesNotWake(Weak):
    """A waiting receive is not told that there will be nothing."""

    class consumer_class(MemoryConsumer):
        async def stop(self) -> None:
            self._stopped = True
            self.unsubscribe()


class StopKeepsFetching(Weak):
    """A stopped consumer still takes messages from the broker."""

    class consumer_class(MemoryConsumer):
        async def stop(self) -> None:
            self._stopped = True
            self._there.set()


class StoppedConsumersCannotSettle(Weak):
    """Ack and retry do nothing after stop."""

    class consumer_class(MemoryConsumer):
        def _own_tags(self, deliveries: Any) -> list[int]:
            return [] if self._stopped else super()._own_tags(deliveries)


class RevivesStoppedConsumers(Weak):
    """A stopped consumer subscribes again after a lost connection."""

    class consumer_class(MemoryConsumer):
        def subscribe(self) -> None:
            if self not in self._queue.subscribers:
                self._queue.subscribers.append(self)
                self._queue.pump()


class StoppingTwiceRaises(Weak):
    """The second stop is an exception."""

    class consumer_class(MemoryConsumer):
        async def stop(self) -> None:
            if self._stopped and not getattr(self, "_closing", False):
                raise RuntimeError("already stopped")
            await super().stop()

        async def close(self) -> None:
            self._closing = True
            await super().close()
            self._closing = False


class ClosingAConsumerTwiceRaises(Weak):
    """The second close is an exception."""

    class consumer_class(MemoryConsumer):
        async def close(self) -> None:
            if getattr(self, "_gone", False):
                raise RuntimeError("already closed")
            self._gone = True
            await super().close()


class AcksOnAClosingChannel(Weak):
    """An ack after the channel's close costs the whole connection."""

    class consumer_class(MemoryConsumer):
        async def close(self) -> None:
            self._closing = True
            for _ in range(10):
                await asyncio.sleep(0)
            await super().close()
            self._closing = False

        def ack(self, deliveries: Sequence[Delivery]) -> None:
            if getattr(self, "_closing", False) and self._own_tags(deliveries):
                self._broker.sever()
                self._broker.restore()
            super().ack(deliveries)


class ClosingAConsumerNeedsTheBroker(Weak):
    """A consumer whose connection is away cannot be closed."""

    class consumer_class(MemoryConsumer):
        async def close(self) -> None:
            if not self._broker._connected and not self._broker._closed:
                raise BrokerUnavailable
            await super().close()


class DropsUnackedOnClose(Weak):
    """What was received and is unsettled when a consumer is closed is gone."""

    class consumer_class(MemoryConsumer):
        async def close(self) -> None:
            waiting = {delivery.token[2] for delivery in self._buffer}  # type: ignore[index]
            for tag in [tag for tag in self._unsettled if tag not in waiting]:
                del self._unsettled[tag]
                self._queue.held -= 1
            await super().close()


class DropsTheBufferOnClose(Weak):
    """What was fetched and never received is gone when the consumer is closed."""

    class consumer_class(MemoryConsumer):
        async def close(self) -> None:
            for delivery in self._buffer:
                self._unsettled.pop(delivery.token[2], None)  # type: ignore[index]
            await super().close()


class ClosingABrokerForgetsItsConsumers(Weak):
    """Only the connection is closed; consumers keep what they hold and wait on."""

    async def close(self) -> None:
        for consumer in self._consumers:
            consumer.unsubscribe()
        self._consumers.clear()
        await super().close()


class ClosingABrokerTwiceRaises(Weak):
    """The second close is an exception."""

    async def close(self) -> None:
        if self._closed and not getattr(self, "_twice", False):
            self._twice = True
            raise RuntimeError("already closed")
        await super().close()


class ConsumesAfterClose(Weak):
    """A closed broker still accepts consumers."""

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        if self._closed:
            return MemoryConsumer(self, self.queues.named(channel), prefetch)
        return await super().consume(channel, prefetch=prefetch)


# --- losses -------------------------------------------------------------------------------------------------------


class StaysSilentAfterALoss(Weak):
    """Consumers do not come back (RMQ-14)."""

    def restore(self) -> None:
        consumers, self._consumers = self._consumers, {}
        super().restore()
        self._consumers = consumers


class RestoresOneConsumer(Weak):
    """Only the first consumer comes back."""

    def restore(self) -> None:
        consumers = self._consumers
        self._consumers = dict(list(consumers.items())[:1])
        super().restore()
        self._consumers = consumers


class HandsOutStaleDeliveries(Weak):
    """What was prefetched over a dead connection is still handed out (RMQ-13)."""

    class consumer_class(MemoryConsumer):
        def drop(self) -> None:
            stale = list(self._buffer)
            super().drop()
            if not self._stopped:
                self._buffer.extend(stale)


class LosesUnackedWithTheConnection(Weak):
    """Acks on receipt: what was out when the connection went is gone."""

    class consumer_class(MemoryConsumer):
        def drop(self) -> None:
            if not self._broker._connected:
                self._queue.held -= len(self._unsettled)
                self._unsettled.clear()
            super().drop()


class ForgetsTheMarkAfterALoss(Weak):
    """What comes back after a lost connection looks new."""

    class consumer_class(MemoryConsumer):
        def drop(self) -> None:
            for stored in self._unsettled.values():
                stored.returns -= 1
            super().drop()


class EndsWaitingReceivesOnALoss(Weak):
    """A receive that waits when the connection goes returns an empty batch."""

    class consumer_class(MemoryConsumer):
        async def receive(self) -> Sequence[Delivery]:
            while not self._buffer and not self._stopped:
                session = self._session
                self._there.clear()
                await self._there.wait()
                if session != self._session:
                    return ()
            return await super().receive()

        def drop(self) -> None:
            super().drop()
            self._there.set()


class AnswersStatusFromMemory(Weak):
    """Tells the depth without asking the broker."""

    async def status(self, channel: str) -> ChannelStatus:
        connected, self._connected = self._connected, True
        try:
            return await super().status(channel)
        finally:
            self._connected = connected


class TransientHarness(DurableMemoryHarness):
    """A crash of the server loses the messages."""

    def server_crashed(self) -> None:
        for queue in self.queues._queues.values():
            queue.ready.clear()


class StoresTransiently(Weak):
    """Declares durable and is not (RMQ-3)."""

    harness_class = TransientHarness


class ForgetfulHarness(DurableMemoryHarness):
    """A crash of the server loses the channels that are empty."""

    def server_crashed(self) -> None:
        for queue in self.queues._queues.values():
            queue.declared = bool(queue.ready)


class ForgetsChannels(Weak):
    """Channels are not durable."""

    harness_class = ForgetfulHarness


# --- topology -----------------------------------------------------------------------------------------------------


class RefusesToDeclareAgain(Weak):
    """A channel that is there is an error."""

    async def declare(self, channels: Sequence[Channel]) -> None:
        for channel in channels:
            if self.queues.find(channel.name) is not None and channel.parking is not None:
                raise TopologyMismatch(f"{channel.name} exists, parking {channel.parking}")
        await super().declare(channels)


class DeclaresOver(Weak):
    """Other arguments replace the old ones without a word."""

    async def declare(self, channels: Sequence[Channel]) -> None:
        for channel in channels:
            queue = self.queues.find(channel.name)
            if queue is not None:
                queue.parking = channel.parking
        await super().declare(channels)


class AMismatchClosesTheChannel(Weak):
    """A refused declare takes the consumers with it (RMQ-12)."""

    async def declare(self, channels: Sequence[Channel]) -> None:
        try:
            await super().declare(channels)
        except TopologyMismatch:
            self.sever()
            self.restore()
            raise


class DeclaresWithoutParking(Weak):
    """A work channel comes without the channel that takes its poison."""

    class queues_class(MemoryQueues):
        def declare(self, channel: Channel) -> None:
            known = set(self._queues)
            super().declare(channel)
            if channel.parking is not None and channel.parking not in known:
                del self._queues[channel.parking]


class CountsNoDepth(Weak):
    """Depth is always 0."""

    async def status(self, channel: str) -> ChannelStatus:
        return replace(await super().status(channel), messages=0)


class CountsOwnConsumersOnly(Weak):
    """Consumers of other processes are not counted."""

    async def status(self, channel: str) -> ChannelStatus:
        own = sum(consumer._queue.name == channel for consumer in self._consumers)
        return replace(await super().status(channel), consumers=own)


class TellsTheStatusOfAnything(Weak):
    """An unknown channel is an empty one."""

    async def status(self, channel: str) -> ChannelStatus:
        try:
            return await super().status(channel)
        except TopologyMismatch:
            return ChannelStatus(messages=0, consumers=0)


class SwallowsWhatIsUnroutable(Weak):
    """A deleted channel's messages are confirmed and gone (RMQ-1)."""

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        futures = list(super().publish(messages))
        for index, message in enumerate(messages):
            known = message.channel in self.queues._queues
            if known and futures[index].done() and futures[index].result() is UNROUTABLE:
                futures[index] = resolved(CONFIRMED)
        return futures


class ForgetsConsumersOfADeletedChannel(Weak):
    """The broker's cancellation of a consumer is its end (RMQ-14)."""

    class queues_class(MemoryQueues):
        def delete(self, name: str) -> None:
            self.named(name).subscribers.clear()
            super().delete(name)
