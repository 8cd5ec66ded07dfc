"""The contract's harness for RabbitMQ: each broker object reaches the real server through a proxy of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import aiormq

from devservices import RabbitMq
from saga.brokers.base import Broker, Capabilities
from saga.brokers.rabbitmq import RabbitMQBroker, RabbitMQOptions
from saga.clock import SystemIds
from saga.testing.contract.harness import ContractBroken, Harness
from tests.proxy import Proxy

T = TypeVar("T")


class RabbitMQHarness(Harness):
    """`settle` is real time here, so behaviours call it only where nothing can be awaited."""

    publish_seconds_max = 3.0
    delivery_limit = 5
    patience_seconds = 60.0
    settle_seconds = 0.25

    def __init__(self, server: RabbitMq) -> None:
        super().__init__()
        self._server = server
        self._prefix = f"contract-{SystemIds().uuid7().hex[:20]}"
        self._stack = AsyncExitStack()
        self._links: dict[Broker, Proxy] = {}
        self._named: list[str] = []

    @property
    def capabilities(self) -> Capabilities:
        return RabbitMQBroker("amqp://nowhere").capabilities

    async def connect(self, *, queue_length_max: int | None = None) -> Broker:
        link = await self._stack.enter_async_context(Proxy(self._server.url))
        options = RabbitMQOptions(
            publish_seconds_max=self.publish_seconds_max,
            delivery_limit=self.delivery_limit,
            queue_length_max=queue_length_max,
            backoff_seconds_max=0.5,
        )
        broker = RabbitMQBroker(link.url, spawner=self.spawner, options=options)
        self._links[broker] = link
        await broker.start()
        return broker

    async def cut(self, broker: Broker) -> None:
        while self._links[broker].open_connections < 2:
            await self.settle()  # still on its way back from the cut before
        self._links[broker].reset()

    async def part(self, broker: Broker) -> None:
        self._links[broker].refuse()
        self._links[broker].reset()
        await self.settle()  # until the broker object knows

    async def rejoin(self, broker: Broker) -> None:
        self._links[broker].heal()

    async def die(self, broker: Broker) -> None:
        self._links[broker].refuse()
        self._links[broker].reset()

    async def restart(self) -> None:
        self._server.kill()
        await asyncio.to_thread(self._server.start)

    async def delete(self, channel: str) -> None:
        await self._delete([channel])

    async def soon(self, what: Coroutine[Any, Any, T]) -> T:
        task = self.spawner.spawn(what, name="behaviour")
        done, _ = await asyncio.wait({task}, timeout=self.patience_seconds)
        if not done:
            task.cancel()
            raise ContractBroken("took too long")
        return task.result()

    async def settle(self) -> None:
        await asyncio.sleep(self.settle_seconds)

    def unique_prefix(self) -> str:
        return self._prefix

    def name(self, stem: str = "work") -> str:
        name = super().name(stem)
        self._named += [name, f"{name}.parking", f"{name}.elsewhere"]
        return name

    async def clean_up(self) -> None:
        for broker, link in self._links.items():
            link.refuse()  # no new connection may be half made when the proxy goes
            await broker.close()
        await self.spawner.close()
        await self._stack.aclose()
        await self._delete(self._named)

    async def _delete(self, queues: list[str]) -> None:
        connection = await aiormq.connect(self._server.url)
        channel = await connection.channel()
        for queue in queues:
            await channel.queue_delete(queue)
        await connection.close()
