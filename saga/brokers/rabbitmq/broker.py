"""`RabbitMQBroker`: two supervised connections, one to publish and one to consume, behind the broker port.

They are separate because an alarm of the broker stops every call on a connection that publishes (RMQ-11).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from saga.brokers.base import (
    Capabilities,
    Channel,
    ChannelStatus,
    Consumer,
    Finding,
    OutMessage,
    PublishOutcome,
    with_parking,
)
from saga.brokers.rabbitmq import topology
from saga.brokers.rabbitmq.address import Address, read
from saga.brokers.rabbitmq.channel import ChannelLost
from saga.brokers.rabbitmq.consumer import RabbitMQConsumer
from saga.brokers.rabbitmq.link import Keeper, Link
from saga.brokers.rabbitmq.options import RabbitMQOptions
from saga.brokers.rabbitmq.publisher import TICK_SECONDS, Publisher
from saga.clock import Clock, Ids, Spawner, SystemClock, SystemIds, TaskSpawner
from saga.errors import BrokerUnavailable, ConfigurationError

log: Final[logging.Logger] = logging.getLogger("saga.rabbitmq")

_START_SECONDS_MAX = 9.0
_ANSWER_SECONDS_MAX = 4.0


@dataclass(frozen=True, slots=True)
class ConnectionState:
    """How the connections are now; `blocked` is an alarm of the broker, whose reason is in the broker's log."""

    publish_up: bool
    consume_up: bool
    blocked: bool
    pending: int
    """Publishes without an outcome."""
    connects: int
    """Connections made so far, 2 in a quiet life."""


class RabbitMQBroker:
    """One process's connection to RabbitMQ 3.10 or newer."""

    def __init__(
        self,
        url: str,
        *,
        clock: Clock | None = None,
        ids: Ids | None = None,
        spawner: Spawner | None = None,
        options: RabbitMQOptions | None = None,
    ) -> None:
        address = read(url)
        self._clock = clock or SystemClock()
        self._ids = ids or SystemIds()
        self._spawner = spawner or TaskSpawner()
        self._options = options or RabbitMQOptions()
        self._publisher = Publisher(clock=self._clock, ids=self._ids, options=self._options)
        self._place = address.place
        self._publishing = self._make_keeper(address, "publish")
        self._consuming = self._make_keeper(address, "consume")
        self._consumers: dict[RabbitMQConsumer, None] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    def _make_keeper(self, address: Address, name: str) -> Keeper:
        return Keeper(
            address,
            name=name,
            options=self._options,
            clock=self._clock,
            ids=self._ids,
            spawner=self._spawner,
            set_up=self._publisher.set_up if name == "publish" else _nothing_to_set_up,
        )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            name="rabbitmq",
            durable=True,
            ordered_per_key=True,
            delay=False,
            priority=False,
            single_ack=True,
            delivery_count=True,
            packs_commands=True,
            body_bytes_max=self._options.message_bytes_max,
            unacked_seconds_max=self._options.unacked_seconds_max,
        )

    @property
    def state(self) -> ConnectionState:
        """How the connections are now, for health checks and back-pressure."""
        return ConnectionState(
            publish_up=self._publishing.link is not None,
            consume_up=self._consuming.link is not None,
            blocked=self._publisher.held,
            pending=self._publisher.pending,
            connects=self._publishing.connects + self._consuming.connects,
        )

    async def start(self) -> None:
        self._refuse_if_closed()
        if self._tasks:
            return
        self._tasks = [
            self._spawner.spawn(self._publishing.run(), name="saga-rabbitmq-publish"),
            self._spawner.spawn(self._consuming.run(), name="saga-rabbitmq-consume"),
            self._spawner.spawn(self._tick(), name="saga-rabbitmq-tick"),
        ]
        deadline = self._clock.monotonic() + _START_SECONDS_MAX
        for keeper in (self._publishing, self._consuming):
            left = max(0.0, deadline - self._clock.monotonic())
            if await keeper.wait_up(left, unless_refused=True) is None:
                await self._end_connections()
                if keeper.refused.is_set():
                    raise ConfigurationError(f"RabbitMQ at {self._place}: {keeper.last_error}.")
                raise self._unreachable(keeper)

    async def declare(self, channels: Sequence[Channel]) -> None:
        named = with_parking(channels)
        link = await self._need_link()
        try:
            await self._declare(link, named)
        except BrokerUnavailable:
            # A queue that is declared while a consumer subscribes to it can cost the whole connection (541, a crash
            # in the server). What was declared stays so, and over the next connection it goes on.
            await self._declare(await self._need_link(), named)

    @property
    def lets_pass(self) -> bool:
        return False

    async def check(self, channels: Sequence[Channel]) -> Sequence[Finding]:
        """Return what is not as `declare` makes it, the first thing of each queue. Raises BrokerUnavailable."""
        named = with_parking(channels)
        try:
            return await self._check(await self._need_link(), named)
        except BrokerUnavailable:  # for the same reason
            return await self._check(await self._need_link(), named)

    async def _check(self, link: Link, channels: Iterable[Channel]) -> Sequence[Finding]:
        found: list[Finding | None] = []
        for channel in channels:
            try:
                found.append(await topology.check(link, channel, self._options))
            except ChannelLost as error:
                raise topology.translate(error, channel.name) from None
        return [each for each in found if each is not None]

    async def _declare(self, link: Link, channels: Iterable[Channel]) -> None:
        for channel in channels:
            try:
                await topology.declare(link, channel, self._options)
            except ChannelLost as error:
                raise topology.translate(error, channel.name) from None

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        return self._publisher.publish(messages)

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        self._refuse_if_closed()
        if not 1 <= prefetch <= 10_000:
            raise ConfigurationError("prefetch is 1 to 10,000")
        consumer = RabbitMQConsumer(
            channel,
            prefetch=prefetch,
            keeper=self._consuming,
            clock=self._clock,
            ids=self._ids,
            spawner=self._spawner,
            options=self._options,
            forget=lambda gone: self._consumers.pop(gone, None),
        )
        self._consumers[consumer] = None
        await consumer.open()
        return consumer

    async def status(self, channel: str) -> ChannelStatus:
        link = await self._need_link()
        try:
            return await topology.inspect(link, channel)
        except ChannelLost as error:
            raise topology.translate(error, channel) from None

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for consumer in list(self._consumers):
            consumer.abandon()
        self._consumers.clear()
        await self._end_connections()
        self._publisher.close()

    # --- inside

    async def _end_connections(self) -> None:
        """Say goodbye on both connections at once, bounded to 3 s; the broker then takes back what is unacked."""
        goodbyes = [
            self._spawner.spawn(link.close(), name="saga-rabbitmq-goodbye")
            for link in (self._publishing.link, self._consuming.link)
            if link is not None
        ]
        if goodbyes:
            await asyncio.wait(goodbyes, timeout=_ANSWER_SECONDS_MAX)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        self._tasks = []

    async def _need_link(self) -> Link:
        self._refuse_if_closed()
        link = await self._consuming.wait_up(_ANSWER_SECONDS_MAX)
        if link is None:
            raise self._unreachable(self._consuming)
        return link

    def _unreachable(self, keeper: Keeper) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"RabbitMQ at {self._place} was not reached: {keeper.last_error or 'no answer'}."
        )

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise BrokerUnavailable("this broker object is closed")

    async def _tick(self) -> None:
        """Bounds and alarms, twice a second."""
        last = self._clock.monotonic()
        blocked = False
        while True:
            await self._clock.sleep(TICK_SECONDS)
            now = self._clock.monotonic()
            self._publisher.tick(now, lagged=now - last > TICK_SECONDS + 1.0)
            last = now
            if self._publisher.held != blocked:
                blocked = not blocked
                log.warning("rabbitmq %s publishing (alarm)", "has blocked" if blocked else "takes up again")
            if blocked and self._publishing.link is not None and self._consuming.link is None:
                # A blocked connection cannot be probed. Its twin can, and has gone: do not trust this one.
                self._publishing.link.drop("blocked while the other connection is gone")


async def _nothing_to_set_up(link: Link) -> None:
    """The consuming side has nothing in common: each consumer opens a channel of its own."""
