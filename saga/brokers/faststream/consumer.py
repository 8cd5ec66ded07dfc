"""Consuming: FastStream's handler of a channel waits, with its message unacked, until what came in it is settled.

So FastStream's scope of a message (middlewares, logs, traces, its graceful stop) is the whole of a command's way, from
receipt to the confirmed reply, and nothing but the ack decides whether it comes again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from typing import Any, Final

from faststream import StreamMessage

from saga.brokers.base import Delivery
from saga.brokers.faststream.side import Side
from saga.clock import Spawner

log: Final[logging.Logger] = logging.getLogger("saga.faststream")

STOP_SECONDS_MAX: Final = 1.0
CLOSE_SECONDS_MAX: Final = 8.0


class End(Enum):
    """What becomes of a message of FastStream's."""

    ACK = "ack"
    NACK = "nack"
    LEFT = "left"
    """Neither: the end of the subscription gives it back."""


class Held:
    """A message that is not acked yet: its deliveries, each settled once, and how it ends."""

    def __init__(self, message: StreamMessage[Any]) -> None:
        self.message: StreamMessage[Any] = message
        self.end: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self.unsettled: set[Delivery] = set()
        self._again = False

    def settle(self, delivery: Delivery, *, again: bool) -> None:
        """One more of its deliveries is done for, or wanted again, and with it the message."""
        if delivery in self.unsettled and not self.end.done():
            self.unsettled.discard(delivery)
            self._again = self._again or again
            if not self.unsettled:
                self.end.set_result(End.NACK if self._again else End.ACK)

    def leave(self) -> None:
        """Nobody will settle it here."""
        if not self.end.done():
            self.end.set_result(End.LEFT)


class FastStreamConsumer:
    """A subscription to one channel."""

    def __init__(
        self,
        channel: str,
        side: Side,
        *,
        prefetch: int,
        spawner: Spawner,
        forget: Callable[[FastStreamConsumer], None],
    ) -> None:
        self.channel = channel
        self._side = side
        self._spawner = spawner
        self._forget = forget
        self._buffer: list[Delivery] = []
        self._held: dict[Held, None] = {}
        self._there = asyncio.Event()
        self._stopped = False
        self._closed = False
        self._subscriber: Any = side.subscribe(channel, prefetch, self._take)

    async def open(self) -> None:
        """Begin to consume."""
        await self._subscriber.start()

    async def _take(self, message: StreamMessage[Any]) -> None:
        """What FastStream calls for each message."""
        held = Held(message)
        deliveries = self._side.deliveries(self.channel, message, held)
        held.unsettled.update(deliveries)
        self._held[held] = None
        if not self._stopped:
            self._buffer += deliveries
            self._there.set()
        elif self._closed:
            held.leave()
        try:
            await _finish(message, await held.end)
        finally:
            held.leave()
            del self._held[held]

    # --- the port

    async def receive(self) -> Sequence[Delivery]:
        while True:
            # taken without an await after the wait, so a cancelled receive has taken nothing
            fetched, self._buffer = self._buffer, []
            if batch := [delivery for delivery in fetched if not self._is_lost(delivery)]:
                return batch
            if self._stopped:
                return ()
            self._there.clear()
            await self._there.wait()

    def _is_lost(self, delivery: Delivery) -> bool:
        """RMQ-13: what was fetched from a channel that has gone comes again from another."""
        held = delivery.token
        assert isinstance(held, Held)
        if lost := self._side.lost(held.message):
            held.leave()
        return lost

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        self._settle(deliveries, again=False)

    def retry(self, deliveries: Sequence[Delivery]) -> None:
        self._settle(deliveries, again=True)

    def _settle(self, deliveries: Sequence[Delivery], *, again: bool) -> None:
        for delivery in deliveries:
            if isinstance(delivery.token, Held):
                delivery.token.settle(delivery, again=again)

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._there.set()
        # bounded: the app has its own time for what is under way
        ceasing = self._spawner.spawn(self._quietly(self._side.cease), name="saga-faststream-stop")
        await asyncio.wait({ceasing}, timeout=STOP_SECONDS_MAX)

    async def close(self) -> None:
        await self.stop()
        self._closed = True
        self._buffer.clear()
        for held in list(self._held):
            held.leave()
        await self._quietly(self._side.unsubscribe)
        self._forget(self)

    async def _quietly(self, end: Callable[[Any], Awaitable[None]]) -> None:
        """End it. What a driver says of a connection that has gone is no news: that has given everything back."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await end(self._subscriber)
        except Exception as error:
            log.info("the subscription to %s ended with %s", self.channel, type(error).__name__)


async def _finish(message: StreamMessage[Any], end: End) -> None:
    """Tell the broker. What cannot be told comes again, and is answered from the barrier."""
    try:
        if end is End.ACK:
            await message.ack()
        elif end is End.NACK:
            await message.nack()
    except Exception as error:  # a driver's, about a connection or a membership that has gone
        log.info("an ack came too late: %s", type(error).__name__)
