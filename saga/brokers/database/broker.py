"""`DatabaseBroker`: one process's part in the queues of a database.

Consumers of this process are woken directly, those of others by the bell, at most every few milliseconds and after the
commit; a look every two seconds finds what nobody told of, and three times in a visibility also what ran out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import Final, TypeVar
from uuid import UUID

from saga.batcher import Batcher
from saga.brokers.base import (
    Capabilities,
    Channel,
    ChannelStatus,
    Consumer,
    OutMessage,
    PublishOutcome,
    with_parking,
)
from saga.brokers.database.consumer import DatabaseConsumer
from saga.brokers.database.options import DatabaseOptions
from saga.brokers.database.publisher import Publisher
from saga.clock import Clock, Ids, Spawner
from saga.errors import (
    BrokerUnavailable,
    ConfigurationError,
    SagaError,
    StorageBusy,
    StorageUnavailable,
    TopologyMismatch,
)
from saga.storage.queue import Bell, QueueStore

T = TypeVar("T")
DATABASE: Final = Capabilities(
    name="database",
    durable=True,
    ordered_per_key=True,
    delay=False,
    priority=False,
    single_ack=True,
    delivery_count=True,
    packs_commands=True,
    body_bytes_max=DatabaseOptions.message_bytes_max,
    unacked_seconds_max=None,
)
log: Final[logging.Logger] = logging.getLogger("saga.database-broker")

RINGS_MAX: Final = 10_000
CLOSE_SECONDS: Final = 1.0
LISTEN_SECONDS: Final = 1.0
"""A start waits so long for the bell, whose first ring says that it listens. Without one the poll does the work."""
ANY: Final = ""
"""Rung instead of a channel's name when anything may have changed."""


class DatabaseBroker:
    """The broker port over a `QueueStore`. `open` and `close` make the database ready and let go of it."""

    def __init__(
        self,
        store: QueueStore,
        bell: Bell,
        *,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        options: DatabaseOptions | None = None,
        open: Callable[[], Awaitable[None]] | None = None,
        close: Callable[[], Awaitable[None]] | None = None,
        move_due: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        """`move_due` puts the outbox's delayed rows whose time has come into the queue."""
        self._store = store
        self._bell = bell
        self._clock = clock
        self._ids = ids
        self._spawner = spawner
        self._options = options or DatabaseOptions()
        self._open = open
        self._close = close
        self._move_due = move_due
        self._publisher = Publisher(
            store, clock=clock, ids=ids, spawner=spawner, options=self._options, published=self.wake
        )
        self._rings: Batcher[str] = Batcher(
            self._tell, spawner=spawner, name="saga-database-ring", batch_max=RINGS_MAX, held_max=RINGS_MAX
        )
        self._consumers: dict[DatabaseConsumer, None] = {}
        self._look_now = asyncio.Event()
        self._renew_at = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        return replace(DATABASE, body_bytes_max=self._options.message_bytes_max)

    async def start(self) -> None:
        self._refuse_if_closed()
        if self._tasks:
            return
        if self._open is not None:
            await self._reached(self._open())
        listening = self._spawner.spawn(
            self._bell.listen(self._heard, self._lost), name="saga-database-listen"
        )
        heard = self._spawner.spawn(self._look_now.wait(), name="saga-database-first")
        await asyncio.wait({heard}, timeout=LISTEN_SECONDS)
        heard.cancel()
        looking = self._spawner.spawn(self._keep_looking(), name="saga-database-look")
        self._tasks = [listening, looking]

    async def declare(self, channels: Sequence[Channel]) -> None:
        self._refuse_if_closed()
        named = {channel.name: channel for channel in with_parking(channels)}
        for found in await self._reached(self._store.declare(list(named.values()))):
            raise TopologyMismatch(
                f"channel {found.name}: parking is {found.parking!r}, declared with {named[found.name].parking!r}"
            )

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        return self._publisher.publish(messages)

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        self._refuse_if_closed()
        if not 1 <= prefetch <= 10_000:
            raise ConfigurationError("prefetch is 1 to 10,000")
        consumer = DatabaseConsumer(
            channel,
            prefetch=prefetch,
            store=self._store,
            clock=self._clock,
            ids=self._ids,
            spawner=self._spawner,
            options=self._options,
            ring=lambda: self.wake([channel]),
            forget=lambda gone: self._consumers.pop(gone, None),
        )
        self._consumers[consumer] = None
        await consumer.open()
        # at once, because whoever takes the place of a process that was killed waits for what that one held
        self._renew_at = 0.0
        self._look_now.set()
        return consumer

    async def status(self, channel: str) -> ChannelStatus:
        self._refuse_if_closed()
        status = await self._reached(self._store.status(channel))
        if status is None:
            raise TopologyMismatch(f"channel {channel} is not declared")
        return status

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        closing = [
            self._spawner.spawn(consumer.close(), name="saga-database-goodbye")
            for consumer in self._consumers
        ]
        if closing:
            await asyncio.wait(closing)
        await self._publisher.close()
        # what they ask of the database at this moment is let finish, or its connection would be left behind
        self._look_now.set()
        if self._tasks:
            await asyncio.wait({self._tasks[-1]}, timeout=CLOSE_SECONDS)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
        rung = self._spawner.spawn(self._rings.join(), name="saga-database-rung")
        await asyncio.wait({rung}, timeout=CLOSE_SECONDS)
        rung.cancel()
        if self._close is not None:
            await self._close()

    # --- beyond the port: for whoever puts messages into the queue by a transaction of its own

    def wake(self, channels: Collection[str] = (ANY,)) -> None:
        """Rows of these channels, or of any, were committed: wake their consumers, here at once."""
        for channel in channels:
            self._heard(channel)
        if not self._closed:
            self._rings.offer_all(channels)

    # --- inside

    def _heard(self, channel: str) -> None:
        if channel == ANY:
            self._look_now.set()
            return
        for consumer in self._consumers:
            if consumer.channel == channel:
                consumer.wake()

    async def _tell(self, channels: Sequence[str]) -> None:
        try:
            await self._bell.ring(set(channels))
        except SagaError as error:
            log.info("others see what is new by themselves: %s", error.code)
        await self._clock.sleep(self._options.ring_seconds)

    def _lost(self) -> None:
        for consumer in self._consumers:
            consumer.lose()

    async def _keep_looking(self) -> None:
        failures = 0
        while not self._closed:
            if failures:
                await self._clock.sleep(self._options.pause(failures, self._ids.fraction()))
            else:
                await self._rest()
            try:
                await self._look()
                failures = 0
            # lint: allow broad-except because this loop is its own supervisor: without it every claim runs out
            except Exception as error:
                failures += 1
                log.warning("looking for messages waits: %s", type(error).__name__)
                self._lost()

    async def _rest(self) -> None:
        seconds = self._options.poll_seconds * (0.9 + 0.1 * self._ids.fraction())
        timer = self._spawner.spawn(self._clock.sleep(seconds), name="saga-database-poll")
        told = self._spawner.spawn(self._look_now.wait(), name="saga-database-told")
        try:
            await asyncio.wait({timer, told}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            told.cancel()
        self._look_now.clear()

    async def _look(self) -> None:
        if self._closed:
            return
        now = self._clock.monotonic()
        consumers = list(self._consumers)
        if not consumers:
            return
        renewed: dict[UUID, DatabaseConsumer] = {}
        if now >= self._renew_at:
            renewed = {consumer.token: consumer for consumer in consumers if consumer.subscribed}
        looked = await self._store.look(
            {consumer.channel for consumer in consumers}, list(renewed), self._options.visibility_seconds
        )
        if renewed:
            self._renew_at = now + self._options.visibility_seconds / 3
        for token, consumer in renewed.items():
            if token not in looked.alive and consumer.token == token:
                log.warning("what was held of %s ran out and comes again", consumer.channel)
                consumer.lose()
        for consumer in consumers:
            if consumer.channel in looked.waiting:
                consumer.wake(all_of=True)
        if looked.delayed_due and self._move_due is not None:
            await self._move_due()
            self.wake()

    async def _reached(self, work: Awaitable[T]) -> T:
        try:
            return await work
        except (StorageUnavailable, StorageBusy) as error:
            raise BrokerUnavailable(error.text) from None

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise BrokerUnavailable("this broker object is closed")
