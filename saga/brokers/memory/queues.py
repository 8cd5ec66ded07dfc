"""The broker's side of the in-process broker: queues that outlive any one connection to them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from saga.brokers.base import Channel
from saga.errors import ConfigurationError, TopologyMismatch


class Subscriber(Protocol):
    """What a queue hands its messages to."""

    def has_credit(self) -> bool:
        """Tell whether its prefetch leaves room for one more."""
        ...

    def take(self, stored: Stored) -> None:
        """Hold one more message."""
        ...


class Stored:
    """One message in a queue; `returns` counts how often a consumer gave it back."""

    __slots__ = ("body", "content_type", "headers", "returns")

    def __init__(self, body: bytes, content_type: str, headers: Mapping[str, str]) -> None:
        self.body: bytes = body
        self.content_type: str = content_type
        self.headers: Mapping[str, str] = headers
        self.returns: int = 0


class Queue:
    """One channel's messages and the subscriptions that share them in turn."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.parking: str | None = None
        self.declared = False
        self.ready: deque[Stored] = deque()
        self.held: int = 0
        self.subscribers: deque[Subscriber] = deque()
        self.room: asyncio.Event = asyncio.Event()

    def put(self, stored: Stored, place: int | None = None) -> None:
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
        self._queues: dict[str, Queue] = {}

    def named(self, name: str) -> Queue:
        """Return the declared queue of that name; raises TopologyMismatch if there is none."""
        queue = self._queues.get(name)
        if queue is None or not queue.declared:
            raise TopologyMismatch(
                f"channel {name} is not declared; declare it first (the app does so at start)"
            )
        return queue

    def find(self, name: str) -> Queue | None:
        queue = self._queues.get(name)
        return queue if queue is not None and queue.declared else None

    def declare(self, channel: Channel) -> None:
        queue = self._queues.setdefault(channel.name, Queue(channel.name))
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

    def is_full(self, queue: Queue) -> bool:
        return len(queue.ready) + queue.held >= self.capacity

    def give_back(self, queue: Queue, returned: Sequence[Stored]) -> None:
        """Put messages back to the front in their old order; past the delivery limit, park them (P14)."""
        again: list[Stored] = []
        for stored in returned:
            stored.returns += 1
            if stored.returns <= self.delivery_limit:
                again.append(stored)
            else:
                self._park(queue, stored)
        if queue.declared:
            queue.ready.extendleft(reversed(again))
        self.release(queue, len(returned))

    def release(self, queue: Queue, count: int) -> None:
        queue.held -= count
        if not self.is_full(queue):
            queue.room.set()
        queue.pump()

    def _park(self, queue: Queue, stored: Stored) -> None:
        parking = self.find(queue.parking) if queue.parking is not None else None
        if parking is None:
            return  # as RabbitMQ: without a place to park, the message is gone (RMQ-17)
        reason = {"x-first-death-reason": "delivery_limit", "x-first-death-queue": queue.name}
        parking.put(Stored(stored.body, stored.content_type, {**stored.headers, **reason}))
        parking.pump()
