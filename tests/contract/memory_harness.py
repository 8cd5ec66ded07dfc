"""The contract's harness for the in-process broker: on a virtual clock, so that no wait takes time."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from saga.brokers.base import Broker, Capabilities
from saga.brokers.memory import MEMORY, MemoryBroker, MemoryQueues
from saga.clock import SystemIds
from saga.testing.contract.harness import ContractBroken, Harness

T = TypeVar("T")
_TURNS = 15
_IDLE_ROUNDS = 3


class VirtualClock:
    """Time that stands still until somebody advances it."""

    def __init__(self) -> None:
        self.time = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def monotonic(self) -> float:
        return self.time

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.time, UTC)

    async def sleep(self, seconds: float) -> None:
        self._count += 1
        waking: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.time + seconds, self._count, waking))
        await waking

    def wake_next(self, until: float) -> bool:
        """Jump to the next sleeper's time, if that is not past `until`."""
        while self._sleepers and self._sleepers[0][0] <= until:
            self.time, _, waking = heapq.heappop(self._sleepers)
            if not waking.done():
                waking.set_result(None)
                return True
        return False


async def turn_the_loop() -> None:
    """Let everything that can run without time run."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


class MemoryHarness(Harness):
    """A subclass names another broker class to test that one."""

    broker_class: type[MemoryBroker] = MemoryBroker
    queues_class: type[MemoryQueues] = MemoryQueues
    declared: Capabilities = MEMORY
    publish_seconds_max = 10.0
    delivery_limit = 5
    patience_seconds = 20.0

    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock()
        self.queues = self.queues_class(delivery_limit=self.delivery_limit)
        self._brokers: list[MemoryBroker] = []

    @property
    def capabilities(self) -> Capabilities:
        return self.declared

    async def connect(self, *, queue_length_max: int | None = None) -> Broker:
        queues = self.queues if queue_length_max is None else self.queues_class(capacity=queue_length_max)
        broker = self.broker_class(
            queues,
            clock=self.clock,
            ids=SystemIds(),
            spawner=self.spawner,
            capabilities=self.declared,
            publish_seconds_max=self.publish_seconds_max,
        )
        self._brokers.append(broker)
        await broker.start()
        return broker

    async def cut(self, broker: Broker) -> None:
        assert isinstance(broker, MemoryBroker)
        broker.sever()
        broker.restore()

    async def part(self, broker: Broker) -> None:
        assert isinstance(broker, MemoryBroker)
        broker.sever()

    async def rejoin(self, broker: Broker) -> None:
        assert isinstance(broker, MemoryBroker)
        broker.restore()

    async def die(self, broker: Broker) -> None:
        assert isinstance(broker, MemoryBroker)
        broker.sever()

    async def restart(self) -> None:
        for broker in self._brokers:
            broker.sever()
        self.server_crashed()
        for broker in self._brokers:
            broker.restore()

    def server_crashed(self) -> None:
        """A crash loses nothing here; a weak adapter says otherwise."""

    async def delete(self, channel: str) -> None:
        self.queues.delete(channel)

    async def soon(self, what: Coroutine[Any, Any, T]) -> T:
        task = self.spawner.spawn(what, name="behaviour")
        until = self.clock.time + self.patience_seconds
        idle = 0
        while not task.done():
            await turn_the_loop()
            # time moves only when nothing else can; a behaviour may itself be turning the loop inside `what`
            idle = 0 if idle > _IDLE_ROUNDS and self.clock.wake_next(until) else idle + 1
            if idle > 2 * _IDLE_ROUNDS and not task.done():
                task.cancel()
                raise ContractBroken("took too long")
        return task.result()

    async def settle(self) -> None:
        await turn_the_loop()

    def unique_prefix(self) -> str:
        return "contract"

    async def clean_up(self) -> None:
        await self.spawner.close()
        for broker in self._brokers:
            await broker.close()


class DurableMemoryHarness(MemoryHarness):
    """The queues stand for a server of their own, which outlives its crash."""

    declared = replace(MEMORY, name="durable memory", durable=True)
