"""What is particular to one of FastStream's brokers: the port that `rabbitmq` and `kafka` keep and nobody else uses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from faststream import StreamMessage

from saga.brokers.base import Capabilities, Channel, ChannelStatus, Delivery, OutMessage, PublishOutcome

Take = Callable[[StreamMessage[Any]], Awaitable[None]]


class Options(Protocol):
    """What is read of the options of either adapter."""

    @property
    def publish_seconds_max(self) -> float:
        """After this a publish without an answer is UNKNOWN."""
        ...


class Side(Protocol):
    """RabbitMQ or Kafka, as FastStream has it."""

    @property
    def options(self) -> Options:
        """Those of our own adapter."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What is guaranteed."""
        ...

    async def open(self) -> None:
        """Connect, unless FastStream has. Raises what the driver raises."""
        ...

    async def declare(self, channels: Sequence[Channel]) -> None:
        """Create the channels that are missing. Raises TopologyMismatch, BrokerUnavailable."""
        ...

    async def status(self, channel: str) -> ChannelStatus:
        """Ask for depth and consumers. Raises TopologyMismatch, BrokerUnavailable."""
        ...

    async def send(self, message: OutMessage) -> PublishOutcome:
        """Publish and wait for the answer. Whatever it raises means that none came."""
        ...

    def subscribe(self, channel: str, prefetch: int, take: Take) -> Any:
        """Return a subscriber of FastStream's, not started, that hands its messages to `take` and acks none."""
        ...

    def deliveries(self, channel: str, message: StreamMessage[Any], token: object) -> Sequence[Delivery]:
        """Return what came in one message of FastStream's: several records, where it gives them as a batch."""
        ...

    def lost(self, message: StreamMessage[Any]) -> bool:
        """Whether the message has gone back with its connection, so that settling it means nothing."""
        ...

    async def cease(self, subscriber: Any) -> None:
        """Let a subscriber take no more; what it has taken can still be acked."""
        ...

    async def unsubscribe(self, subscriber: Any) -> None:
        """End a subscriber; what it has not acked is the broker's again."""
        ...

    async def close(self) -> None:
        """Let go of what `open` has made beside FastStream's connection."""
        ...
