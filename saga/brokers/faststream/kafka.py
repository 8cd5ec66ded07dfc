"""Kafka through FastStream: its producer and its admin client, and for each channel a subscriber that takes batches.

A batch is committed when all that came in it is finished, and only then is the next one fetched: FastStream commits
where its consumer stands, which is right only while nothing before that is unfinished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka.admin import NewTopic
from faststream import AckPolicy, Context, StreamMessage
from faststream.kafka import KafkaBroker, Topic

from saga.brokers.base import (
    Capabilities,
    Channel,
    ChannelStatus,
    Delivery,
    OutMessage,
    PublishOutcome,
)
from saga.brokers.faststream.side import Take
from saga.brokers.kafka.broker import KAFKA
from saga.brokers.kafka.cluster import EXISTS_ALREADY
from saga.brokers.kafka.names import topic_of
from saga.brokers.kafka.options import KafkaOptions
from saga.brokers.kafka.records import CONTENT_TYPE, delivery_of
from saga.brokers.kafka.topology import COPIES, settings
from saga.errors import ConfigurationError, TopologyMismatch

POLL_MS: Final = 50
NO_POLL_LIMIT_MS: Final = 7 * 86400 * 1000
"""A batch takes as long as its longest command; that is no reason to leave the group."""


class KafkaSide:
    """The side of a `faststream.kafka.KafkaBroker`."""

    def __init__(self, broker: KafkaBroker, options: KafkaOptions | None = None) -> None:
        given = broker._connection_kwargs  # FastStream has no public word on it; a test pins the name
        if given.get("acks") not in ("all", -1) and not given.get("enable_idempotence"):
            raise ConfigurationError(
                "A reply must be kept by all copies before its command is acked: "
                "give KafkaBroker(..., enable_idempotence=True) or acks='all'."
            )
        self._broker = broker
        self.options: KafkaOptions = options or KafkaOptions()
        self.capabilities: Capabilities = replace(
            KAFKA,
            name="faststream-kafka",
            ordered_per_key=False,
            body_bytes_max=self.options.message_bytes_max,
        )
        self._subscribers: dict[str, Any] = {}

    async def open(self) -> None:
        await self._broker.connect()

    @property
    def _admin(self) -> Any:
        return self._broker.config.admin_client

    async def declare(self, channels: Sequence[Channel]) -> None:
        """What is there already is for the coordinator to verify."""
        named = {topic_of(channel.name): channel for channel in channels}
        found = set(await self._admin.list_topics())
        missing = {topic: channel for topic, channel in named.items() if topic not in found}
        if not missing:
            return
        copies = min(COPIES, len((await self._admin.describe_cluster())["brokers"]))
        answer = await self._admin.create_topics(
            [
                NewTopic(
                    topic,
                    self.options.partitions,
                    copies,
                    topic_configs=settings(channel, copies, self.options),
                )
                for topic, channel in missing.items()
            ]
        )
        for topic, code, text in answer.topic_errors:
            if code not in (0, EXISTS_ALREADY):
                raise TopologyMismatch(f"topic {topic} could not be made (code {code}): {text}")

    async def status(self, channel: str) -> ChannelStatus:
        topic = topic_of(channel)
        (told,) = await self._admin.describe_topics([topic])
        if told["error_code"]:
            raise TopologyMismatch(
                f"topic {topic} of channel {channel} is not declared; declare it first (the app does so at start)"
            )
        subscriber = self._subscribers.get(channel)
        consumer = None if subscriber is None else subscriber.consumer
        return ChannelStatus(
            messages=0 if consumer is None else await self._behind(topic, consumer),
            consumers=await self._members(topic),
        )

    async def _members(self, group: str) -> int:
        (told,) = await self._admin.describe_consumer_groups([group])
        return len(told.groups[0][5])

    async def _behind(self, topic: str, consumer: Any) -> int:
        """Return how much of the topic its group has not committed."""
        partitions = [TopicPartition(topic, each) for each in consumer.partitions_for_topic(topic) or ()]
        ends = await consumer.end_offsets(partitions)
        committed = await self._admin.list_consumer_group_offsets(topic, partitions=partitions)
        return sum(max(0, end - max(committed[each].offset, 0)) for each, end in ends.items())

    async def send(self, message: OutMessage) -> PublishOutcome:
        await self._broker.publish(
            message.body,
            topic_of(message.channel),
            key=message.key.encode(),
            headers={**message.headers, CONTENT_TYPE: message.content_type},
        )
        return PublishOutcome.CONFIRMED

    def subscribe(self, channel: str, prefetch: int, take: Take) -> Any:
        session_ms = int(self.options.session_seconds * 1000)
        topic = topic_of(channel)
        subscriber = self._broker.subscriber(
            Topic(topic, declare=False),
            batch=True,
            max_records=prefetch,
            batch_timeout_ms=POLL_MS,
            group_id=topic,
            auto_offset_reset="earliest",
            session_timeout_ms=session_ms,
            rebalance_timeout_ms=session_ms,
            heartbeat_interval_ms=int(self.options.heartbeat_seconds * 1000),
            max_poll_interval_ms=NO_POLL_LIMIT_MS,
            max_partition_fetch_bytes=self.options.record_bytes_max,
            ack_policy=AckPolicy.MANUAL,
            decoder=_raw,
            no_reply=True,
            include_in_schema=False,
        )

        async def saga_commands(bodies: Any, message: StreamMessage[Any] = Context()) -> None:
            await take(message)

        subscriber(saga_commands)
        self._subscribers[channel] = subscriber
        return subscriber

    def deliveries(self, channel: str, message: StreamMessage[Any], token: object) -> Sequence[Delivery]:
        return [delivery_of(channel, record, token) for record in message.raw_message]

    def lost(self, message: StreamMessage[Any]) -> bool:
        return False  # a log gives a message again to whoever has its partition, whether or not it is at work here

    async def cease(self, subscriber: Any) -> None:
        if (consumer := subscriber.consumer) is not None:
            consumer.pause(*consumer.assignment())

    async def unsubscribe(self, subscriber: Any) -> None:
        self._subscribers = {name: each for name, each in self._subscribers.items() if each is not subscriber}
        await subscriber.stop()

    async def close(self) -> None:
        """Its producer and admin client are FastStream's."""


async def _raw(message: StreamMessage[Any]) -> Sequence[bytes]:
    """Leave bodies as they are: they are read strictly elsewhere."""
    return [record.value for record in message.raw_message]
