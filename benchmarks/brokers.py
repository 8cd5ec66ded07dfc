"""The brokers of the stacks: where each is, and how the channels of a system are removed from it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Final

import aio_pika
from aiokafka.admin import AIOKafkaAdminClient

from benchmarks import naive
from devservices import Service, start_kafka, start_rabbitmq
from saga.messages import commands_channel, parking_channel, replies_channel

_ANSWER_SECONDS_MAX: Final = 10.0


class Broker(ABC):
    """A server that carries messages."""

    name: ClassVar[str]
    package: ClassVar[str]
    """The driver, whose version is of interest."""

    def __init__(self, server: Service) -> None:
        self.server = server

    @abstractmethod
    async def remove(self, name: str) -> None:
        """Remove the channels of a system, whichever it is."""


class RabbitMq(Broker):
    """Quorum queues."""

    name = "rabbitmq"
    package = "aio-pika"

    async def remove(self, name: str) -> None:
        connection = await aio_pika.connect(self.server.url, timeout=_ANSWER_SECONDS_MAX)
        async with connection, connection.channel() as channel:
            for queue in _channels(name):
                await channel.queue_delete(queue)


class Kafka(Broker):
    """Topics of eight partitions."""

    name = "kafka"
    package = "aiokafka"

    async def remove(self, name: str) -> None:
        client = AIOKafkaAdminClient(bootstrap_servers=self.server.url.removeprefix("kafka://"))
        await client.start()
        try:
            async with asyncio.timeout(_ANSWER_SECONDS_MAX):
                await client.delete_topics(_channels(name))
        finally:
            await client.close()


def _channels(name: str) -> Sequence[str]:
    services = set(naive.SERVICES.values())
    ours = [replies_channel(name), *(commands_channel(name, service) for service in services)]
    theirs = [f"{name}.{queue}" for queue in ("replies", *services)]
    return [*ours, *map(parking_channel, ours), *theirs]


def start_broker(name: str) -> Broker:
    """Start a broker, or take the one given in the environment. Raises Unavailable."""
    starts: dict[str, tuple[type[Broker], Callable[[], Service]]] = {
        "rabbitmq": (RabbitMq, start_rabbitmq),
        "kafka": (Kafka, start_kafka),
    }
    kind, start = starts[name]
    return kind(start())
