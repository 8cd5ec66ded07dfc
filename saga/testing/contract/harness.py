"""What the contract needs of an adapter's surroundings: other processes, lost connections, restarts, and patience."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from saga.brokers.base import (
    EMPTY,
    Broker,
    Capabilities,
    Channel,
    Consumer,
    Delivery,
    OutMessage,
    PublishOutcome,
)
from saga.clock import TaskSpawner

T = TypeVar("T")
TEXT = "text/plain"


class ContractBroken(AssertionError):
    """The adapter does not do what the port says."""


def expect(condition: object, text: str) -> None:
    """Raise ContractBroken unless the condition holds."""
    if not condition:
        raise ContractBroken(text)


class Harness(ABC):
    """One adapter with its broker, used for one behaviour. Subclass it for an adapter of your own."""

    publish_seconds_max: float = 10.0
    """Bound of `publish` as the brokers made here are configured; 10 or less."""
    delivery_limit: int = 100
    """Deliveries after which the broker parks a message by itself, as configured here; 100 or less."""

    def __init__(self) -> None:
        self.spawner: TaskSpawner = TaskSpawner()
        self._names = 0

    # --- what an adapter provides

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What the brokers made here declare."""

    @abstractmethod
    async def connect(self, *, queue_length_max: int | None = None) -> Broker:
        """Return a new started broker, as another process would have; its queues bounded if asked for."""

    @abstractmethod
    async def cut(self, broker: Broker) -> None:
        """Lose this broker's connections once. They may come back by themselves at once."""

    @abstractmethod
    async def part(self, broker: Broker) -> None:
        """Lose this broker's connections and keep them away until `rejoin`."""

    @abstractmethod
    async def rejoin(self, broker: Broker) -> None:
        """Let a parted broker connect again."""

    @abstractmethod
    async def die(self, broker: Broker) -> None:
        """End this broker's process without a word: its connections go and never come back."""

    @abstractmethod
    async def restart(self) -> None:
        """Crash the broker's server and start it again. Only called where `durable` is declared."""

    @abstractmethod
    async def delete(self, channel: str) -> None:
        """Remove a channel at the broker, as an operator could."""

    @abstractmethod
    async def soon(self, what: Coroutine[Any, Any, T]) -> T:
        """Await within the adapter's patience; raises ContractBroken when it takes longer."""

    @abstractmethod
    async def settle(self) -> None:
        """Wait until whatever is on its way has arrived."""

    @abstractmethod
    async def clean_up(self) -> None:
        """Close every broker made and remove every channel."""

    # --- words of the behaviours

    def name(self, stem: str = "work") -> str:
        """Return a channel name that nobody else uses."""
        self._names += 1
        return f"{self.unique_prefix()}.{stem}-{self._names}"

    @abstractmethod
    def unique_prefix(self) -> str:
        """Return a prefix of channel names for this harness."""

    async def channel(self, broker: Broker) -> str:
        """Declare a new work channel with its parking channel and return its name."""
        name = self.name()
        await self.soon(broker.declare([Channel(name, f"{name}.parking"), Channel(f"{name}.parking")]))
        return name

    async def outcomes(self, futures: Sequence[asyncio.Future[PublishOutcome]]) -> list[PublishOutcome]:
        """Await every outcome."""

        async def all_of() -> list[PublishOutcome]:
            return [await future for future in futures]

        return await self.soon(all_of())

    async def send(
        self, broker: Broker, channel: str, *bodies: bytes, headers: Mapping[str, str] = EMPTY, key: str = "k"
    ) -> None:
        """Publish and see each message confirmed."""
        messages = [OutMessage(channel, body, TEXT, key=key, headers=headers) for body in bodies]
        outcomes = await self.outcomes(broker.publish(messages))
        expect(
            outcomes == [PublishOutcome.CONFIRMED] * len(bodies),
            f"expected all confirmed, got {set(outcomes)}",
        )

    async def take(self, consumer: Consumer, count: int) -> list[Delivery]:
        """Receive until `count` deliveries are there."""
        taken: list[Delivery] = []

        async def receive() -> None:
            while len(taken) < count:
                batch = await consumer.receive()
                expect(batch, f"receive returned an empty sequence after {len(taken)} of {count} deliveries")
                taken.extend(batch)

        try:
            await self.soon(receive())
        except ContractBroken as error:
            raise ContractBroken(f"{error} ({len(taken)} of {count} deliveries)") from None
        expect(len(taken) == count, f"expected {count} deliveries, got {len(taken)}")
        return taken

    async def take_until(self, consumer: Consumer, body: bytes) -> list[Delivery]:
        """Receive until this body is there; return it with all that came before and beside it."""
        taken: list[Delivery] = []

        async def receive() -> None:
            while all(delivery.body != body for delivery in taken):
                batch = await consumer.receive()
                expect(batch, f"receive returned an empty sequence before {body!r}")
                taken.extend(batch)

        await self.soon(receive())
        return taken

    def expect_marked(self, deliveries: Sequence[Delivery]) -> None:
        """See that all are marked as redelivered, where the broker keeps account of deliveries; a log does not."""
        if self.capabilities.delivery_count:
            expect(all(delivery.redelivered for delivery in deliveries), "marked as redelivered")

    async def expect_nothing(self, consumer: Consumer) -> None:
        """See that nothing is delivered. Stops the consumer."""
        await self.settle()
        await self.soon(consumer.stop())
        batch = await self.soon(consumer.receive())
        expect(not batch, f"unexpected deliveries: {len(batch)}")

    async def left(self, broker: Broker, channel: str, count: int) -> list[Delivery]:
        """Take what is left in a channel through a new consumer: exactly `count`; acks and closes."""
        consumer = await self.soon(broker.consume(channel, prefetch=count + 10))
        taken = await self.take(consumer, count) if count else []
        consumer.ack(taken)
        await self.expect_nothing(consumer)
        await self.soon(consumer.close())
        return taken


def bodies(deliveries: Sequence[Delivery]) -> list[bytes]:
    """Return the bodies, sorted: most rules are not about order."""
    return sorted(delivery.body for delivery in deliveries)


def numbered(count: int, stem: str = "m") -> list[bytes]:
    """Return distinct bodies whose sorted order is their order."""
    return [f"{stem}{number:04d}".encode() for number in range(count)]
