"""Connections to a broker that do not quite do what they should: the base for those that lose, repeat and hold back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from saga.brokers.base import (
    Broker,
    Capabilities,
    Channel,
    ChannelStatus,
    Consumer,
    OutMessage,
    PublishOutcome,
)
from saga.messages import Command, Reply, decode_commands, decode_replies


class PassingOn:
    """A broker that does what the one behind it does."""

    def __init__(self, broker: Broker) -> None:
        self.broker: Broker = broker

    @property
    def capabilities(self) -> Capabilities:
        return self.broker.capabilities

    async def start(self) -> None:
        await self.broker.start()

    async def declare(self, channels: Sequence[Channel]) -> None:
        await self.broker.declare(channels)

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        return self.broker.publish(messages)

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        return await self.broker.consume(channel, prefetch=prefetch)

    async def status(self, channel: str) -> ChannelStatus:
        return await self.broker.status(channel)

    async def close(self) -> None:
        await self.broker.close()


def lost() -> asyncio.Future[PublishOutcome]:
    """Return what the publisher of a message hears if it is confirmed and never delivered (RMQ-18)."""
    outcome: asyncio.Future[PublishOutcome] = asyncio.get_running_loop().create_future()
    outcome.set_result(PublishOutcome.CONFIRMED)
    return outcome


def carried(message: OutMessage) -> Sequence[Command] | Sequence[Reply]:
    """Return the commands or replies in a message of ours."""
    return (
        decode_replies(message.body)
        if message.channel.endswith(".replies")
        else decode_commands(message.body)
    )
