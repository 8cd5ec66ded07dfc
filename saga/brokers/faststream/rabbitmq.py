"""RabbitMQ through FastStream: our queues, a channel of our own to publish with confirms, a subscriber per channel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from aio_pika import DeliveryMode, Message, RobustConnection
from aio_pika.abc import AbstractRobustChannel
from aio_pika.exceptions import (
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    DeliveryError,
)
from faststream import AckPolicy, Context, StreamMessage
from faststream.rabbit import Channel as Prefetch
from faststream.rabbit import RabbitBroker, RabbitQueue
from pamqp.commands import Basic

from saga.brokers.base import (
    Capabilities,
    Channel,
    ChannelStatus,
    Delivery,
    OutMessage,
    PublishOutcome,
)
from saga.brokers.faststream.side import Take
from saga.brokers.rabbitmq.broker import RabbitMQBroker
from saga.brokers.rabbitmq.options import RabbitMQOptions
from saga.brokers.rabbitmq.topology import arguments
from saga.errors import BrokerUnavailable, TopologyMismatch


class _Own(NamedTuple):
    """By what FastStream finds the queue and the channel of a subscription."""

    queue: RabbitQueue
    channel: Prefetch


class RabbitMQSide:
    """The side of a `faststream.rabbit.RabbitBroker`."""

    def __init__(self, broker: RabbitBroker, options: RabbitMQOptions | None = None) -> None:
        self._broker = broker
        self.options: RabbitMQOptions = options or RabbitMQOptions()
        ours = RabbitMQBroker("amqp://localhost/", options=self.options).capabilities
        # each publish is a task of its own
        self.capabilities: Capabilities = replace(ours, name="faststream-rabbitmq", ordered_per_key=False)
        self._connection: RobustConnection | None = None
        self._publishing: AbstractRobustChannel | None = None
        self._subscriptions = 0
        self._own: dict[Any, _Own] = {}

    async def open(self) -> None:
        self._connection = await self._broker.connect()
        # of our own, so that its confirms do not depend on how FastStream's are set
        self._publishing = await self._connection.channel(publisher_confirms=True)

    async def declare(self, channels: Sequence[Channel]) -> None:
        for channel in channels:
            async with self._asking(channel.name) as asked:
                await asked.declare_queue(
                    channel.name, durable=True, arguments=arguments(channel, self.options), robust=False
                )

    async def status(self, channel: str) -> ChannelStatus:
        async with self._asking(channel) as asked:
            queue = await asked.declare_queue(channel, passive=True, robust=False)
        found = queue.declaration_result
        return ChannelStatus(messages=found.message_count or 0, consumers=found.consumer_count or 0)

    @asynccontextmanager
    async def _asking(self, name: str) -> AsyncIterator[Any]:
        """Give a channel to be thrown away, because a wrong declare closes it (RMQ-12)."""
        if self._connection is None:
            raise BrokerUnavailable("FastStream's broker is not connected.")
        try:
            async with self._connection.channel() as channel:
                yield channel
        except ChannelNotFoundEntity:
            raise TopologyMismatch(
                f"queue {name} is not declared; declare it first (the app does so at start)"
            ) from None
        except ChannelPreconditionFailed as error:
            raise TopologyMismatch(
                f"queue {name}: {error}; delete it if it is empty, or change the setting back"
            ) from None

    async def send(self, message: OutMessage) -> PublishOutcome:
        if self._publishing is None:
            return PublishOutcome.UNKNOWN
        sent = Message(
            message.body,
            content_type=message.content_type,
            headers=dict(message.headers),
            delivery_mode=DeliveryMode.PERSISTENT,
        )
        await self._publishing.ready()  # over a connection that is coming back
        try:
            answer = await self._publishing.default_exchange.publish(sent, message.channel, mandatory=True)
        except DeliveryError:
            return PublishOutcome.REFUSED
        return PublishOutcome.CONFIRMED if isinstance(answer, Basic.Ack) else PublishOutcome.UNROUTABLE

    def subscribe(self, channel: str, prefetch: int, take: Take) -> Any:
        own = Prefetch(prefetch_count=prefetch)
        self._subscriptions += 1
        # FastStream keeps each queue, by its name and arguments, with the channel of whoever asked first; a passive
        # declare ignores arguments, so a number among them gives every subscription a channel of its own
        number: Any = {"x-saga-subscription": self._subscriptions}
        queue = RabbitQueue(channel, declare=False, arguments=number)
        subscriber = self._broker.subscriber(
            queue,
            channel=own,
            ack_policy=AckPolicy.MANUAL,
            decoder=_raw,
            no_reply=True,
            include_in_schema=False,
        )
        self._own[subscriber] = _Own(queue, own)

        async def saga_commands(body: Any, message: StreamMessage[Any] = Context()) -> None:
            await take(message)

        subscriber(saga_commands)
        return subscriber

    def deliveries(self, channel: str, message: StreamMessage[Any], token: object) -> Sequence[Delivery]:
        raw = message.raw_message
        returns = raw.headers.get("x-delivery-count", 0)
        return [
            Delivery(
                channel=channel,
                body=raw.body,
                content_type=raw.content_type or "",
                headers={name: value for name, value in raw.headers.items() if isinstance(value, str)},
                redelivered=bool(raw.redelivered),
                delivery_count=1 + (returns if isinstance(returns, int) else 0),
                token=token,
            )
        ]

    def lost(self, message: StreamMessage[Any]) -> bool:
        try:
            return bool(message.raw_message.channel.is_closed)
        except ChannelInvalidStateError:
            return True

    async def cease(self, subscriber: Any) -> None:
        # not by FastStream's stop, which first waits for what is under way, and drops unacked what comes meanwhile
        own = self._own[subscriber]
        channel = await self._channel(own)
        queue = await self._broker.config.declarer.declare_queue(own.queue, channel=own.channel)
        for tag in tuple((await channel.get_underlay_channel()).consumers):
            await queue.cancel(tag)

    async def unsubscribe(self, subscriber: Any) -> None:
        own = self._own.pop(subscriber)
        await subscriber.stop()
        # what it had prefetched goes back with its channel
        await (await self._channel(own)).close()

    async def _channel(self, own: _Own) -> Any:
        return await self._broker.config.channel_manager.get_channel(own.channel)

    async def close(self) -> None:
        publishing, self._publishing, self._connection = self._publishing, None, None
        if publishing is not None:
            await publishing.close()


async def _raw(message: StreamMessage[Any]) -> bytes:
    """Leave a body as it is: it is read strictly elsewhere."""
    return message.body
