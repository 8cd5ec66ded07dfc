"""The naive form on Kafka, and what a message costs there when nothing is done with it.

As teams write it: a topic per service, keyed by the saga, one handler per partition, each send awaited, and the offset
committed after each message. `BareCoordinator` and `BareParticipant` are a question and its answer and nothing else:
the round trip that a step of a saga is measured by.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from benchmarks.naive import SERVICES, Data

PARTITIONS: Final = 8
"""As many as a topic of ours has."""
SERVICE: Final = "savings"


class PartitionedTopics:
    """`naive.Queues` on topics. Without `commits` nothing is remembered of what was consumed."""

    def __init__(self, url: str, prefix: str, *, commits: bool = True) -> None:
        self._servers = url.removeprefix("kafka://")
        self._prefix = prefix
        self._commits = commits
        self._consumers: list[Any] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        names = [f"{self._prefix}.{name}" for name in ("replies", *SERVICES.values())]
        client = AIOKafkaAdminClient(bootstrap_servers=self._servers)
        await client.start()
        try:
            await client.create_topics([NewTopic(each, PARTITIONS, 1) for each in names])
        finally:
            await client.close()
        self._producer: Any = AIOKafkaProducer(
            bootstrap_servers=self._servers, acks="all", enable_idempotence=True, max_batch_size=512 * 1024
        )
        await self._producer.start()

    async def publish(self, name: str, body: Data) -> None:
        """Return when the broker has it."""
        await self._producer.send_and_wait(
            f"{self._prefix}.{name}", json.dumps(body).encode(), key=body["saga"].encode()
        )

    async def consume(self, name: str, prefetch: int, work: Callable[[Data], Awaitable[None]]) -> None:
        """Work on one message of each partition at a time; its offset is committed when its work is done."""
        topic = f"{self._prefix}.{name}"
        consumer: Any = AIOKafkaConsumer(
            topic,
            bootstrap_servers=self._servers,
            group_id=topic,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        await consumer.start()
        self._consumers.append(consumer)
        waiting: dict[int, asyncio.Queue[Any]] = {each: asyncio.Queue(prefetch) for each in range(PARTITIONS)}
        self._spawn(self._fetch(consumer, waiting))
        for queue in waiting.values():
            self._spawn(self._handle(consumer, queue, work))

    def _spawn(self, work: Any) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _fetch(self, consumer: Any, waiting: dict[int, asyncio.Queue[Any]]) -> None:
        async for record in consumer:
            await waiting[record.partition].put(record)

    async def _handle(
        self, consumer: Any, queue: asyncio.Queue[Any], work: Callable[[Data], Awaitable[None]]
    ) -> None:
        while True:
            record = await queue.get()
            await work(json.loads(record.value))
            if self._commits:
                await consumer.commit({TopicPartition(record.topic, record.partition): record.offset + 1})

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for client in (*self._consumers, self._producer):
            with suppress(TimeoutError):
                await asyncio.wait_for(client.stop(), 10)


class BareCoordinator:
    """Asks and waits for the answer."""

    def __init__(self, url: str, prefix: str, *, in_flight: int) -> None:
        self._topics = PartitionedTopics(url, prefix, commits=False)
        self._in_flight = in_flight
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def start(self) -> None:
        await self._topics.start()
        await self._topics.consume("replies", self._in_flight, self._on_reply)

    async def _on_reply(self, reply: Data) -> None:
        self._waiting.pop(reply["saga"]).set_result(None)

    async def execute(self, transfer: Data) -> None:
        key = transfer["id"]
        answered = self._waiting[key] = asyncio.get_running_loop().create_future()
        await self._topics.publish(SERVICE, {"saga": key, "data": transfer})
        await answered

    async def stop(self) -> None:
        await self._topics.stop()


class BareParticipant:
    """Answers."""

    def __init__(self, url: str, prefix: str, *, in_flight: int) -> None:
        self._topics = PartitionedTopics(url, prefix, commits=False)
        self._in_flight = in_flight

    async def start(self) -> None:
        await self._topics.start()
        await self._topics.consume(SERVICE, self._in_flight, self._on_question)

    async def _on_question(self, question: Data) -> None:
        await self._topics.publish("replies", {"saga": question["saga"]})

    async def execute(self, transfer: Data) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        await self._topics.stop()
