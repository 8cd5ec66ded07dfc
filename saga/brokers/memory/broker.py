"""`MemoryBroker`: one process's connection to a `MemoryQueues`, with faults that can be switched on."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from saga.brokers.base import (
    Capabilities,
    Channel,
    ChannelStatus,
    Consumer,
    OutMessage,
    PublishOutcome,
)
from saga.brokers.memory.consumer import MemoryConsumer
from saga.brokers.memory.queues import MemoryQueues, Queue, Stored
from saga.clock import Clock, Ids, Spawner, SystemClock, SystemIds, TaskSpawner
from saga.errors import BrokerFull, BrokerUnavailable, ConfigurationError

MEMORY = Capabilities(
    name="memory",
    durable=False,
    ordered_per_key=True,
    delay=False,
    priority=False,
    single_ack=True,
    delivery_count=True,
    packs_commands=False,
    body_bytes_max=16 * 1024 * 1024,
    unacked_seconds_max=None,
)


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, each as a probability per published message from 0 to 1."""

    duplicate: float = 0.0
    """Stored twice."""
    delay: float = 0.0
    """Held back for up to `delay_seconds_max`; breaks the order of its key."""
    delay_seconds_max: float = 1.0
    lose_confirm: float = 0.0
    """Stored, but the publisher never hears of it: UNKNOWN after the bound."""
    lose_message: float = 0.0
    """Confirmed, but not stored (RMQ-18)."""
    shuffle: float = 0.0
    """Stored at a random place of the queue."""


NO_FAULTS = Faults()


class MemoryBroker:
    """One process's connection to a `MemoryQueues`; to one of its own unless given."""

    def __init__(
        self,
        queues: MemoryQueues | None = None,
        *,
        clock: Clock | None = None,
        ids: Ids | None = None,
        spawner: Spawner | None = None,
        capacity: int = 100_000,
        faults: Faults = NO_FAULTS,
        capabilities: Capabilities = MEMORY,
        publish_seconds_max: float = 10.0,
    ) -> None:
        self.queues: MemoryQueues = queues or MemoryQueues(capacity=capacity)
        self.faults = faults
        self.fired: Counter[str] = Counter()
        """How often each fault struck; a test asserts that its faults did."""
        self._clock = clock or SystemClock()
        self._ids = ids or SystemIds()
        self._spawner = spawner or TaskSpawner()
        self._capabilities = capabilities
        self._publish_seconds_max = publish_seconds_max
        self._consumers: dict[MemoryConsumer, None] = {}
        self._open: dict[asyncio.Future[PublishOutcome], OutMessage | None] = {}
        self._timers: dict[asyncio.Task[None], None] = {}
        self._connected = True
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def without(self, **switched_off: Any) -> MemoryBroker:
        """Return a broker on the same queues that declares, and behaves, without these (row G-06)."""
        return MemoryBroker(
            self.queues,
            clock=self._clock,
            ids=self._ids,
            spawner=self._spawner,
            faults=self.faults,
            capabilities=replace(self._capabilities, **switched_off),
            publish_seconds_max=self._publish_seconds_max,
        )

    # --- the port

    async def start(self) -> None:
        self._refuse_if_closed()

    async def declare(self, channels: Sequence[Channel]) -> None:
        self._refuse_if_closed()
        for channel in channels:
            self.queues.declare(channel)

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        create_future = asyncio.get_running_loop().create_future
        futures: list[asyncio.Future[PublishOutcome]] = []
        touched: dict[Queue, None] = {}
        late: dict[asyncio.Future[PublishOutcome], OutMessage | None] = {}
        for message in messages:
            future: asyncio.Future[PublishOutcome] = create_future()
            futures.append(future)
            if self._closed:
                future.set_result(PublishOutcome.UNKNOWN)
            elif not self._connected:
                late[future] = message
            elif (outcome := self._store(message, touched)) is not None:
                future.set_result(outcome)
            else:
                late[future] = None
        for queue in touched:
            queue.pump()
        if late:
            self._open.update(late)
            self._spawn(self._expire(list(late)), "saga-memory-publish-bound")
        return futures

    def _store(self, message: OutMessage, touched: dict[Queue, None]) -> PublishOutcome | None:
        """Put one message into its queue; None if its confirm is lost."""
        queue = self.queues.find(message.channel)
        if queue is None:
            return PublishOutcome.UNROUTABLE
        if len(message.body) > self._capabilities.body_bytes_max or self.queues.is_full(queue):
            queue.room.clear()
            return PublishOutcome.REFUSED
        stored = Stored(message.body, message.content_type, dict(message.headers))
        touched[queue] = None
        if self.faults == NO_FAULTS and self._capabilities.ordered_per_key:
            queue.put(stored)
            return PublishOutcome.CONFIRMED
        return self._store_badly(queue, stored)

    def _store_badly(self, queue: Queue, stored: Stored) -> PublishOutcome | None:
        if self._strikes("lose_message", self.faults.lose_message):
            return PublishOutcome.CONFIRMED
        copies = [stored]
        if self._strikes("duplicate", self.faults.duplicate):
            copies.append(Stored(stored.body, stored.content_type, stored.headers))
        for copy in copies:
            if self._strikes("delay", self.faults.delay):
                seconds = self._ids.fraction() * self.faults.delay_seconds_max
                self._spawn(self._put_later(queue, copy, seconds), "saga-memory-delay")
            elif not self._capabilities.ordered_per_key or self._strikes("shuffle", self.faults.shuffle):
                queue.put(copy, int(self._ids.fraction() * (len(queue.ready) + 1)))
            else:
                queue.put(copy)
        return None if self._strikes("lose_confirm", self.faults.lose_confirm) else PublishOutcome.CONFIRMED

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        self._refuse_if_closed()
        if not 1 <= prefetch <= 10_000:
            raise ConfigurationError("prefetch is 1 to 10,000")
        consumer = self._make_consumer(self.queues.named(channel), prefetch)
        self._consumers[consumer] = None
        if self._connected:
            consumer.subscribe()
        return consumer

    async def status(self, channel: str) -> ChannelStatus:
        self._refuse_if_closed()
        if not self._connected:
            raise BrokerUnavailable
        queue = self.queues.named(channel)
        return ChannelStatus(messages=len(queue.ready), consumers=len(queue.subscribers))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for consumer in list(self._consumers):
            await consumer.close()
        for timer in list(self._timers):
            timer.cancel()
        for future in self._open:
            if not future.done():
                future.set_result(PublishOutcome.UNKNOWN)
        self._open.clear()

    # --- beyond the port: for the embedded mode and for tests

    async def room(self, channel: str) -> None:
        """Wait until the channel takes a message: for a sender that would rather wait than be REFUSED."""
        queue = self.queues.named(channel)
        while self.queues.is_full(queue):
            queue.room.clear()
            await queue.room.wait()

    def raise_if_full(self, channel: str) -> None:
        """Raise BrokerFull if the channel takes no message now: for a sender that would rather fail early."""
        if self.queues.is_full(self.queues.named(channel)):
            raise BrokerFull(f"channel {channel} holds {self.queues.capacity} messages")

    def sever(self) -> None:
        """Lose the connection: unsettled deliveries go back, publishes wait for `restore` or their bound."""
        self._connected = False
        for consumer in self._consumers:
            consumer.unsubscribe()  # all of them first, or one would be handed what another gives back
        for consumer in self._consumers:
            consumer.drop()

    def restore(self) -> None:
        """Have the connection back: consumers subscribe again in their order, waiting publishes are sent."""
        self._connected = True
        for consumer in self._consumers:
            consumer.subscribe()
        waiting = [(future, message) for future, message in self._open.items() if message is not None]
        touched: dict[Queue, None] = {}
        for future, message in waiting:
            # a caller may have cancelled its future; the send goes on all the same (port)
            outcome = self._store(message, touched)
            self._open[future] = None
            if outcome is not None and not future.done():
                future.set_result(outcome)
        for queue in touched:
            queue.pump()

    def forget(self, consumer: MemoryConsumer) -> None:
        self._consumers.pop(consumer, None)

    # --- inside

    def _make_consumer(self, queue: Queue, prefetch: int) -> MemoryConsumer:
        return MemoryConsumer(self, queue, prefetch)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise BrokerUnavailable("this broker object is closed")

    def _strikes(self, name: str, probability: float) -> bool:
        if probability <= 0 or self._ids.fraction() >= probability:
            return False
        self.fired[name] += 1
        return True

    def _spawn(self, coroutine: Any, name: str) -> None:
        task: asyncio.Task[None] = self._spawner.spawn(coroutine, name=name)
        self._timers[task] = None
        task.add_done_callback(lambda done: self._timers.pop(done, None))

    async def _expire(self, futures: Sequence[asyncio.Future[PublishOutcome]]) -> None:
        await self._clock.sleep(self._publish_seconds_max)
        for future in futures:
            self._open.pop(future, None)
            if not future.done():
                future.set_result(PublishOutcome.UNKNOWN)

    async def _put_later(self, queue: Queue, stored: Stored, seconds: float) -> None:
        await self._clock.sleep(seconds)
        if queue.declared:
            queue.put(stored)
            queue.pump()
