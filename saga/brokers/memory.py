"""The in-process broker: reference adapter of the port, default of the embedded mode and of the simulation.

`MemoryQueues` is the broker's side (what survives a lost connection), `MemoryBroker` one process's connection
to it. Several brokers may share one `MemoryQueues`. Nothing here waits for anything but the Clock, and every
random decision comes from Ids, so that a simulation owns both. Faults are off unless `Faults` says otherwise.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saga.brokers.base import (
    Capabilities,
    Channel,
    ChannelStatus,
    Consumer,
    Delivery,
    OutMessage,
    PublishOutcome,
)
from saga.clock import Clock, Ids, Spawner, SystemClock, SystemIds, TaskSpawner
from saga.errors import BrokerFull, BrokerUnavailable, ConfigurationError, TopologyMismatch

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


class _Stored:
    """One message in a queue; `returns` counts how often a consumer gave it back."""

    __slots__ = ("body", "content_type", "headers", "returns")

    def __init__(self, body: bytes, content_type: str, headers: Mapping[str, str]) -> None:
        self.body = body
        self.content_type = content_type
        self.headers = headers
        self.returns = 0


class _Queue:
    """One channel's messages and the subscriptions that share them in turn."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.parking: str | None = None
        self.declared = False
        self.ready: deque[_Stored] = deque()
        self.held = 0
        self.subscribers: deque[MemoryConsumer] = deque()
        self.room = asyncio.Event()

    def put(self, stored: _Stored, place: int | None = None) -> None:
        if place is None:
            self.ready.append(stored)
        else:
            self.ready.insert(place, stored)

    def pump(self) -> None:
        """Hand what is ready to the subscriptions with free prefetch, one each in turn."""
        while self.ready:
            for _ in range(len(self.subscribers)):
                subscriber = self.subscribers[0]
                self.subscribers.rotate(-1)
                if subscriber.has_credit():
                    break
            else:
                return
            self.held += 1
            subscriber.take(self.ready.popleft())


class MemoryQueues:
    """What the broker holds: channels by name, each bounded to `capacity` messages, unacked ones included."""

    def __init__(self, *, capacity: int = 100_000, delivery_limit: int = 100) -> None:
        if capacity < 1 or delivery_limit < 1:
            raise ConfigurationError("capacity and delivery_limit are at least 1")
        self.capacity = capacity
        self.delivery_limit = delivery_limit
        self._queues: dict[str, _Queue] = {}

    def named(self, name: str) -> _Queue:
        """Return the declared queue of that name; raises TopologyMismatch if there is none."""
        queue = self._queues.get(name)
        if queue is None or not queue.declared:
            raise TopologyMismatch(
                f"channel {name} is not declared; declare it first (the app does so at start)"
            )
        return queue

    def find(self, name: str) -> _Queue | None:
        queue = self._queues.get(name)
        return queue if queue is not None and queue.declared else None

    def declare(self, channel: Channel) -> None:
        queue = self._queues.setdefault(channel.name, _Queue(channel.name))
        if queue.declared and queue.parking != channel.parking:
            raise TopologyMismatch(
                f"channel {channel.name}: parking is {queue.parking!r}, declared with {channel.parking!r}"
            )
        queue.parking, queue.declared = channel.parking, True
        if channel.parking is not None and self.find(channel.parking) is None:
            self.declare(Channel(channel.parking))

    def delete(self, name: str) -> None:
        """Remove a channel with its messages, as an operator would; its consumers wait for a declare."""
        queue = self.named(name)
        queue.declared = False
        queue.ready.clear()

    def is_full(self, queue: _Queue) -> bool:
        return len(queue.ready) + queue.held >= self.capacity

    def give_back(self, queue: _Queue, returned: Sequence[_Stored]) -> None:
        """Put messages back to the front in their old order; past the delivery limit, park them (P14)."""
        again: list[_Stored] = []
        for stored in returned:
            stored.returns += 1
            if stored.returns <= self.delivery_limit:
                again.append(stored)
            else:
                self._park(queue, stored)
        if queue.declared:
            queue.ready.extendleft(reversed(again))
        self.release(queue, len(returned))

    def release(self, queue: _Queue, count: int) -> None:
        queue.held -= count
        if not self.is_full(queue):
            queue.room.set()
        queue.pump()

    def _park(self, queue: _Queue, stored: _Stored) -> None:
        parking = self.find(queue.parking) if queue.parking is not None else None
        if parking is None:
            return  # as RabbitMQ: without a place to park, the message is gone (RMQ-17)
        reason = {"x-first-death-reason": "delivery_limit", "x-first-death-queue": queue.name}
        parking.put(_Stored(stored.body, stored.content_type, {**stored.headers, **reason}))
        parking.pump()


class MemoryConsumer:
    """A subscription. `session` counts its connections: a token of an earlier one settles nothing (P35)."""

    def __init__(self, broker: MemoryBroker, queue: _Queue, prefetch: int) -> None:
        self._broker = broker
        self._queue = queue
        self._prefetch = prefetch
        self._session = 0
        self._tag = 0
        self._buffer: deque[Delivery] = deque()
        self._unsettled: dict[int, _Stored] = {}
        self._early: set[int] = set()
        self._stopped = False
        self._there = asyncio.Event()

    # --- the broker's side

    def has_credit(self) -> bool:
        return len(self._unsettled) - len(self._early) < self._prefetch

    def take(self, stored: _Stored) -> None:
        self._tag += 1
        self._unsettled[self._tag] = stored
        counted = self._broker.capabilities.delivery_count
        self._buffer.append(
            Delivery(
                channel=self._queue.name,
                body=stored.body,
                content_type=stored.content_type,
                headers=stored.headers,
                redelivered=stored.returns > 0,
                delivery_count=1 + (stored.returns if counted else min(stored.returns, 1)),
                token=(self, self._session, self._tag),
            )
        )
        self._there.set()

    def subscribe(self) -> None:
        if not self._stopped and self not in self._queue.subscribers:
            self._queue.subscribers.append(self)
            self._queue.pump()

    def unsubscribe(self) -> None:
        if self in self._queue.subscribers:
            self._queue.subscribers.remove(self)

    def drop(self) -> None:
        """The connection is gone: all that is unsettled goes back, what is buffered is stale (RMQ-13)."""
        self.unsubscribe()
        self._session += 1
        self._tag = 0  # as on a real broker: the same number names another delivery on the next session (P35)
        self._buffer.clear()
        self._early.clear()
        returned = list(self._unsettled.values())
        self._unsettled.clear()
        if not self._stopped:
            self._there.clear()
        self._broker.queues.give_back(self._queue, returned)

    # --- the port

    async def receive(self) -> Sequence[Delivery]:
        # The buffer is taken without an await after the wait, so a cancelled receive has taken nothing.
        while not self._buffer:
            if self._stopped:
                return ()
            self._there.clear()
            await self._there.wait()
        batch = tuple(self._buffer)
        self._buffer.clear()
        return batch

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        settled = 0
        for tag in self._own_tags(deliveries):
            if self._broker.capabilities.single_ack:
                del self._unsettled[tag]
                settled += 1
            else:
                self._early.add(tag)
        settled += self._commit_prefix()
        self._broker.queues.release(self._queue, settled)

    def _commit_prefix(self) -> int:
        """Without single_ack only the contiguous finished prefix leaves the broker, as on a log (KAF-8)."""
        committed = 0
        while self._early and (first := next(iter(self._unsettled))) in self._early:
            self._early.remove(first)
            del self._unsettled[first]
            committed += 1
        return committed

    def retry(self, deliveries: Sequence[Delivery]) -> None:
        returned = [self._unsettled.pop(tag) for tag in self._own_tags(deliveries)]
        self._broker.queues.give_back(self._queue, returned)
        self._broker.queues.release(self._queue, self._commit_prefix())

    def _own_tags(self, deliveries: Iterable[Delivery]) -> list[int]:
        """Return the tags that are still to be settled on this session, each once."""
        tags: dict[int, None] = {}
        for delivery in deliveries:
            token: Any = delivery.token
            owner, session, tag = token
            if (
                owner is self
                and session == self._session
                and tag in self._unsettled
                and tag not in self._early
            ):
                tags[tag] = None
        return list(tags)

    async def stop(self) -> None:
        self._stopped = True
        self.unsubscribe()
        self._there.set()

    async def close(self) -> None:
        await self.stop()
        self.drop()
        self._broker.forget(self)


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
        self.queues = queues or MemoryQueues(capacity=capacity)
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
        touched: dict[_Queue, None] = {}
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

    def _store(self, message: OutMessage, touched: dict[_Queue, None]) -> PublishOutcome | None:
        """Put one message into its queue; None if its confirm is lost."""
        queue = self.queues.find(message.channel)
        if queue is None:
            return PublishOutcome.UNROUTABLE
        if len(message.body) > self._capabilities.body_bytes_max or self.queues.is_full(queue):
            queue.room.clear()
            return PublishOutcome.REFUSED
        stored = _Stored(message.body, message.content_type, dict(message.headers))
        touched[queue] = None
        if self.faults == NO_FAULTS and self._capabilities.ordered_per_key:
            queue.put(stored)
            return PublishOutcome.CONFIRMED
        return self._store_badly(queue, stored)

    def _store_badly(self, queue: _Queue, stored: _Stored) -> PublishOutcome | None:
        if self._strikes("lose_message", self.faults.lose_message):
            return PublishOutcome.CONFIRMED
        copies = [stored]
        if self._strikes("duplicate", self.faults.duplicate):
            copies.append(_Stored(stored.body, stored.content_type, stored.headers))
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
        touched: dict[_Queue, None] = {}
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

    def _make_consumer(self, queue: _Queue, prefetch: int) -> MemoryConsumer:
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

    async def _put_later(self, queue: _Queue, stored: _Stored, seconds: float) -> None:
        await self._clock.sleep(seconds)
        if queue.declared:
            queue.put(stored)
            queue.pump()
