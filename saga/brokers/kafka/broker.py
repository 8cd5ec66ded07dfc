"""`KafkaBroker`: one process's producer, consumers and questions to a cluster, behind the broker port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from saga.brokers.base import (
    Capabilities,
    Channel,
    ChannelStatus,
    Consumer,
    Delivery,
    Finding,
    OutMessage,
    PublishOutcome,
    with_parking,
)
from saga.brokers.kafka.address import read
from saga.brokers.kafka.clients import Clients
from saga.brokers.kafka.cluster import Cluster
from saga.brokers.kafka.consumer import KafkaConsumer, Park
from saga.brokers.kafka.logs import damp
from saga.brokers.kafka.options import KafkaOptions
from saga.brokers.kafka.publisher import Publisher
from saga.brokers.kafka.topology import Topology
from saga.clock import Clock, Ids, Spawner, SystemClock, SystemIds, TaskSpawner
from saga.errors import BrokerUnavailable, ConfigurationError

log: Final[logging.Logger] = logging.getLogger("saga.kafka")

KAFKA: Final = Capabilities(
    name="kafka",
    durable=True,
    ordered_per_key=True,
    delay=False,
    priority=False,
    single_ack=False,
    delivery_count=False,
    packs_commands=True,
    body_bytes_max=KafkaOptions().message_bytes_max,
    unacked_seconds_max=None,
    retention_seconds=KafkaOptions().retention_seconds,
)
_START_SECONDS_MAX: Final = 9.0
_END_SECONDS_MAX: Final = 9.0


class KafkaBroker:
    """One process's connection to a Kafka cluster."""

    def __init__(
        self,
        address: str,
        *,
        clock: Clock | None = None,
        ids: Ids | None = None,
        spawner: Spawner | None = None,
        options: KafkaOptions | None = None,
    ) -> None:
        known = read(address)
        self._clock = clock or SystemClock()
        self._ids = ids or SystemIds()
        self._spawner = spawner or TaskSpawner()
        self._options = options or KafkaOptions()
        self._place = ",".join(known.servers)
        self._clients = Clients(known, self._options, self._spawner)
        self._cluster = Cluster(self._clients, self._place, clock=self._clock, spawner=self._spawner)
        self._topology = Topology(self._cluster, self._options, self._clock)
        self._publisher = Publisher(
            self._clients,
            self._cluster,
            clock=self._clock,
            ids=self._ids,
            spawner=self._spawner,
            options=self._options,
        )
        self._consumers: dict[KafkaConsumer, None] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        kept = self._options.retention_seconds
        return replace(
            KAFKA,
            body_bytes_max=self._options.message_bytes_max,
            retention_seconds=kept if kept >= 0 else None,
        )

    async def start(self) -> None:
        self._refuse_if_closed()
        if self._tasks:
            return
        damp(self._clock)
        deadline = self._clock.monotonic() + _START_SECONDS_MAX
        await self._reach(deadline)
        self._tasks = [
            self._spawner.spawn(self._publisher.run(), name="saga-kafka-producer"),
            self._spawner.spawn(self._publisher.watch(), name="saga-kafka-publishes"),
        ]
        up = self._spawner.spawn(self._publisher.up.wait(), name="saga-kafka-first-producer")
        await asyncio.wait({up}, timeout=max(0.0, deadline - self._clock.monotonic()))
        up.cancel()
        if not self._publisher.up.is_set():
            await self._end()
            raise BrokerUnavailable(f"Kafka at {self._place} gave no producer its id in time.")

    async def _reach(self, deadline: float) -> None:
        """Try until something answers: a cluster that is being started is worth waiting for."""
        failures = 0
        while True:
            try:
                await self._cluster.open()
                return
            except BrokerUnavailable:
                if not failures and (why := await self._clients.refusal()):
                    raise ConfigurationError(f"Kafka at {self._place}: {why}.") from None
                failures += 1
                pause = self._options.pause(failures, self._ids.fraction())
                if self._clock.monotonic() + pause > deadline - 4.0:
                    raise
                await self._clock.sleep(pause)

    async def declare(self, channels: Sequence[Channel]) -> None:
        self._refuse_if_closed()
        await self._topology.declare(with_parking(channels))

    @property
    def lets_pass(self) -> bool:
        return True

    async def check(self, channels: Sequence[Channel]) -> Sequence[Finding]:
        """Return what is not as it should be, also what `declare` lets pass. Raises BrokerUnavailable."""
        self._refuse_if_closed()
        return await self._topology.check(with_parking(channels))

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        return self._publisher.publish(messages)

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        self._refuse_if_closed()
        if not 1 <= prefetch <= 10_000:
            raise ConfigurationError("prefetch is 1 to 10,000")
        await self._topology.need(channel)
        consumer = KafkaConsumer(
            channel,
            prefetch=prefetch,
            clients=self._clients,
            cluster=self._cluster,
            clock=self._clock,
            ids=self._ids,
            spawner=self._spawner,
            options=self._options,
            park=self._parker(await self._topology.parking(channel)),
            forget=lambda gone: self._consumers.pop(gone, None),
        )
        self._consumers[consumer] = None
        await consumer.open()
        return consumer

    async def status(self, channel: str) -> ChannelStatus:
        self._refuse_if_closed()
        return await self._topology.inspect(channel)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        consumers = list(self._consumers)
        goodbyes = [self._spawner.spawn(each.close(), name="saga-kafka-goodbye") for each in consumers]
        ending = self._spawner.spawn(self._end(), name="saga-kafka-end")
        await asyncio.wait({*goodbyes, ending}, timeout=_END_SECONDS_MAX)
        for consumer in consumers:
            consumer.abandon()
        self._publisher.give_up()

    # --- inside

    async def _end(self) -> None:
        """End the producer and the client for questions."""
        self._publisher.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_SECONDS_MAX)
        self._tasks = []
        self._publisher.give_up()
        await self._cluster.close()

    def _parker(self, parking: str | None) -> Park | None:
        if parking is None:
            return None

        async def park(delivery: Delivery) -> bool:
            message = OutMessage(parking, delivery.body, delivery.content_type, headers=delivery.headers)
            (outcome,) = self._publisher.publish([message])
            return await outcome is PublishOutcome.CONFIRMED

        return park

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise BrokerUnavailable("this broker object is closed")
