"""The contract's harness for Kafka: each broker object reaches the real server through a proxy of its own.

A lost connection costs a member of a group nothing: it keeps its partitions, and what it holds stays its own. What the
contract means by a loss is that they are taken away, so `cut` breaks the connections and also ends the memberships, as
a session that ran out does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError
from aiokafka.protocol.admin import DeleteTopicsRequest
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.protocol.metadata import MetadataRequest

from devservices import Kafka
from saga.brokers.base import Broker, Capabilities
from saga.brokers.kafka import KafkaBroker, KafkaOptions
from saga.brokers.kafka.consumer import KafkaConsumer
from saga.brokers.kafka.names import topic_of
from saga.clock import SystemIds
from saga.testing.contract.harness import ContractBroken, Harness
from tests.kafka_proxy import KafkaProxy

T = TypeVar("T")


class KafkaHarness(Harness):
    """`settle` is real time here, so behaviours call it only where nothing can be awaited."""

    publish_seconds_max = 3.0
    patience_seconds = 60.0
    settle_seconds = 0.25

    def __init__(self, server: Kafka) -> None:
        super().__init__()
        self._server = server
        self._prefix = f"contract-{SystemIds().uuid7().hex[:20]}"
        self._stack = AsyncExitStack()
        self._links: dict[Broker, KafkaProxy] = {}
        self._named: list[str] = []

    @property
    def capabilities(self) -> Capabilities:
        return KafkaBroker("kafka://nowhere:9092").capabilities

    async def connect(self, *, queue_length_max: int | None = None) -> Broker:
        link = await self._stack.enter_async_context(KafkaProxy(self._server.url))
        options = KafkaOptions(
            partitions=2,
            publish_seconds_max=self.publish_seconds_max,
            queue_length_max=queue_length_max,
            heartbeat_seconds=0.2,
            metadata_seconds=1.0,
            commit_seconds=0.02,
            drain_seconds_max=0.2,
            backoff_seconds_max=0.5,
        )
        broker = KafkaBroker(link.url, spawner=self.spawner, options=options)
        self._links[broker] = link
        await broker.start()
        return broker

    async def cut(self, broker: Broker) -> None:
        members = {each: each.assignments for each in self._consumers(broker)}
        self._links[broker].reset()
        await self.soon(self._take_away(members))

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
        await asyncio.to_thread(self._server.kill)
        await asyncio.to_thread(self._server.start)
        for broker in self._links:
            await self.cut(broker)  # a short outage takes nothing away: what is held is still its consumer's

    async def delete(self, channel: str) -> None:
        await self._delete([channel])
        async with _asking(self._server) as client:
            while not _is_gone(
                await client.send(client.get_random_node(), MetadataRequest([topic_of(channel)], False))
            ):
                await self.settle()
        await self.settle()  # the broker forgets the name first, and the log a moment later

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
        closing = [self.spawner.spawn(broker.close(), name="clean-up") for broker in self._links]
        if closing:
            await asyncio.wait(closing)
        await self.spawner.close()
        await self._stack.aclose()
        await self._delete(self._named)

    def _consumers(self, broker: Broker) -> list[KafkaConsumer]:
        """Return those that take part in their group."""
        assert isinstance(broker, KafkaBroker)
        return [each for each in broker._consumers if not each._stopping.is_set()]

    async def _take_away(self, members: Mapping[KafkaConsumer, int]) -> None:
        """End memberships at the broker until each consumer has partitions again, which are another assignment."""
        async with _asking(self._server) as client:
            while old := [each for each, before in members.items() if each.assignments == before]:
                for consumer in old:
                    with contextlib.suppress(KafkaError):  # the group's coordinator is not there yet
                        await _expel(client, consumer)
                await self.settle()

    async def _delete(self, channels: Sequence[str]) -> None:
        async with _asking(self._server) as client:
            topics = [topic_of(each) for each in channels]
            await client.send(client.get_random_node(), DeleteTopicsRequest(topics, 10_000))


class _asking:  # noqa: N801  reads like a function where it is used
    """A client of the driver's for one block, on the server itself."""

    def __init__(self, server: Kafka) -> None:
        self._client = AIOKafkaClient(bootstrap_servers=server.url.removeprefix("kafka://"))

    async def __aenter__(self) -> Any:
        await self._client.bootstrap()
        return self._client

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()


def _is_gone(answer: Any) -> bool:
    return all(error != 0 for error, *_ in answer.topics)


async def _expel(client: Any, consumer: KafkaConsumer) -> None:
    group = topic_of(consumer.channel)
    assert consumer._member is not None
    coordinator = consumer._member._consumer._coordinator
    if coordinator is not None and coordinator.member_id:
        node = await client.coordinator_lookup(0, group)
        await client.send(node, LeaveGroupRequest(group, coordinator.member_id))
