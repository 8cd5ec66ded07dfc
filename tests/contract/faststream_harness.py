"""The contract's harness for a FastStream broker on RabbitMQ: one connection each, which is FastStream's."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from faststream.rabbit import RabbitBroker

from devservices import RabbitMq
from saga.brokers.base import Broker, Capabilities
from saga.brokers.faststream import FastStreamBroker
from saga.brokers.rabbitmq import RabbitMQOptions
from tests.contract.rabbitmq_harness import RabbitMQHarness
from tests.proxy import Proxy


class FastStreamHarness(RabbitMQHarness):
    """As that of our own adapter, whose queues these are, with more time to publish: each is a task of its own."""

    publish_seconds_max = 10.0

    def __init__(self, server: RabbitMq) -> None:
        super().__init__(server)
        self._theirs: list[Any] = []

    @property
    def capabilities(self) -> Capabilities:
        return FastStreamBroker(RabbitBroker("amqp://nowhere")).capabilities

    async def connect(self, *, queue_length_max: int | None = None) -> Broker:
        link = await self._stack.enter_async_context(Proxy(self._server.url))
        options = RabbitMQOptions(
            publish_seconds_max=self.publish_seconds_max,
            delivery_limit=self.delivery_limit,
            queue_length_max=queue_length_max,
        )
        theirs = RabbitBroker(link.url, logger=None, reconnect_interval=0.2)
        self._theirs.append(theirs)
        await theirs.start()
        broker = FastStreamBroker(theirs, options=options, spawner=self.spawner)
        self._links[broker] = link
        await broker.start()
        return broker

    async def cut(self, broker: Broker) -> None:
        while self._links[broker].open_connections < 1:
            await self.settle()  # still on its way back from the cut before
        self._links[broker].reset()

    async def clean_up(self) -> None:
        for broker in self._links:
            await broker.close()
        for theirs in self._theirs:
            with suppress(Exception):  # its connection may be cut for good
                await theirs.stop()
        await super().clean_up()
