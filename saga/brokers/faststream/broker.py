"""`FastStreamBroker`: the broker port over a broker of FastStream's, and participants with its dependency injection.

    broker = RabbitBroker("amqp://...")
    sagas = FastStreamBroker(broker)
    accounts = sagas.participant("accounts", start_to_close=timedelta(seconds=30))
    app = App("postgresql://...", broker=sagas, participants=[accounts])
    service = FastStream(broker, lifespan=app.lifespan, on_shutdown=[app.stop])

The connection is FastStream's: it is opened here if it is not open yet, and never closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from saga.brokers.base import Capabilities, Channel, ChannelStatus, Consumer, OutMessage, PublishOutcome
from saga.brokers.faststream.consumer import FastStreamConsumer
from saga.brokers.faststream.handlers import InjectedParticipant
from saga.brokers.faststream.side import Side
from saga.clock import Spawner, TaskSpawner
from saga.definition.activity import UNSET, Limit, Participant
from saga.errors import BrokerUnavailable, ConfigurationError, SagaError
from saga.retry import FORWARD, RetryPolicy

if TYPE_CHECKING:
    from saga.brokers.kafka import KafkaOptions
    from saga.brokers.rabbitmq import RabbitMQOptions

T = TypeVar("T")
ANSWER_SECONDS_MAX: Final = 9.0
PENDING_MAX: Final = 10_000


class FastStreamBroker:
    """One process's connection to RabbitMQ or Kafka, shared with a FastStream service."""

    def __init__(
        self,
        broker: Any,
        *,
        options: RabbitMQOptions | KafkaOptions | None = None,
        spawner: Spawner | None = None,
    ) -> None:
        """`broker` is a `faststream.rabbit.RabbitBroker` or a `faststream.kafka.KafkaBroker`.

        `options` are those of our own adapter, of which what shapes queues and topics and bounds a publish counts here.
        Raises ConfigurationError for another one, and for a Kafka producer that confirms what may be lost.
        """
        self._broker = broker
        self._side = _side(broker, options)
        self._spawner = spawner or TaskSpawner()
        self._consumers: dict[FastStreamConsumer, None] = {}
        self._pending: set[asyncio.Future[PublishOutcome]] = set()

    def participant(
        self, name: str, *, start_to_close: Limit = UNSET, retry: RetryPolicy = FORWARD
    ) -> Participant:
        """Return a participant whose handlers are given what they ask of FastStream: `Depends`, `Context`, `Logger`.

        Else it is as `saga.Participant`.
        """
        return InjectedParticipant(name, self._broker, start_to_close=start_to_close, retry=retry)

    # --- the port

    @property
    def capabilities(self) -> Capabilities:
        return self._side.capabilities

    async def start(self) -> None:
        await self._asked(self._side.open())

    async def declare(self, channels: Sequence[Channel]) -> None:
        named = {channel.name: channel for channel in channels}
        for channel in channels:
            if channel.parking is not None:
                named.setdefault(channel.parking, Channel(channel.parking))
        await self._asked(self._side.declare(list(named.values())))

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        return [self._publish(message) for message in messages]

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        if not 1 <= prefetch <= 10_000:
            raise ConfigurationError("prefetch is 1 to 10,000")
        await self.status(channel)  # there is such a channel
        consumer = FastStreamConsumer(
            channel,
            self._side,
            prefetch=prefetch,
            spawner=self._spawner,
            forget=lambda gone: self._consumers.pop(gone, None),
        )
        self._consumers[consumer] = None
        if self._broker.running:
            await consumer.open()
        # else FastStream starts it with its own subscribers
        return consumer

    async def status(self, channel: str) -> ChannelStatus:
        return await self._asked(self._side.status(channel))

    async def close(self) -> None:
        for consumer in list(self._consumers):
            await consumer.close()
        for future in list(self._pending):
            _resolve(future, PublishOutcome.UNKNOWN)
        await self._side.close()

    async def _asked(self, question: Coroutine[Any, Any, T]) -> T:
        """Return the answer. Raises BrokerUnavailable within 10 s, never showing an address."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                return await question
        except SagaError:
            raise
        except Exception as error:  # FastStream passes on what each of its drivers raises
            raise BrokerUnavailable(f"FastStream's broker did not answer: {type(error).__name__}.") from None

    # --- publishing

    def _publish(self, message: OutMessage) -> asyncio.Future[PublishOutcome]:
        future: asyncio.Future[PublishOutcome] = asyncio.get_running_loop().create_future()
        if len(self._pending) >= PENDING_MAX or len(message.body) > self.capabilities.body_bytes_max:
            future.set_result(PublishOutcome.REFUSED)
            return future
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        self._spawner.spawn(self._send(message, future), name="saga-faststream-publish")
        return future

    async def _send(self, message: OutMessage, future: asyncio.Future[PublishOutcome]) -> None:
        try:
            async with asyncio.timeout(self._side.options.publish_seconds_max):
                outcome = await self._side.send(message)
        except Exception:  # whatever the driver says: it may or may not arrive
            outcome = PublishOutcome.UNKNOWN
        _resolve(future, outcome)


def _resolve(future: asyncio.Future[PublishOutcome], outcome: PublishOutcome) -> None:
    if not future.done():
        future.set_result(outcome)


def _side(broker: Any, options: Any) -> Side:
    """Return what is particular to the broker given; the drivers of the other one need not be installed."""
    module = type(broker).__module__
    if module.startswith("faststream.rabbit."):
        from saga.brokers.faststream.rabbitmq import RabbitMQSide

        return RabbitMQSide(broker, options)
    if module.startswith("faststream.kafka."):
        from saga.brokers.faststream.kafka import KafkaSide

        return KafkaSide(broker, options)
    raise ConfigurationError(
        f"{type(broker).__name__} is no broker for sagas: give faststream.rabbit.RabbitBroker or "
        "faststream.kafka.KafkaBroker."
    )
