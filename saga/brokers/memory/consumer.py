"""A subscription to an in-process queue, with the unacked set, prefetch and the tokens that settle deliveries."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from saga.brokers.base import Delivery
from saga.brokers.memory.queues import Queue, Stored

if TYPE_CHECKING:
    from saga.brokers.memory.broker import MemoryBroker


class MemoryConsumer:
    """A subscription. `session` counts its connections: a token of an earlier one settles nothing (P35)."""

    def __init__(self, broker: MemoryBroker, queue: Queue, prefetch: int) -> None:
        self._broker = broker
        self._queue = queue
        self._prefetch = prefetch
        self._session = 0
        self._tag = 0
        self._buffer: deque[Delivery] = deque()
        self._unsettled: dict[int, Stored] = {}
        self._early: set[int] = set()
        self._stopped = False
        self._there = asyncio.Event()

    # --- the broker's side

    def has_credit(self) -> bool:
        return len(self._unsettled) - len(self._early) < self._prefetch

    def take(self, stored: Stored) -> None:
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
