"""Consuming: one channel per consumer, subscribed again whenever it is lost, cancelled or silent.

Tags restart at 1 on each channel, so a delivery's token is the channel object and the tag: what belongs to another
channel than the present one settles nothing (P35). Unsettled deliveries of a lost channel are the broker's again;
those still in our buffer are thrown away with it (RMQ-13).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from pamqp import commands as spec
from pamqp.header import ContentHeader

from saga.brokers.base import EMPTY, Delivery
from saga.brokers.rabbitmq import frames, topology
from saga.brokers.rabbitmq.channel import AmqpChannel, ChannelEvents, ChannelLost
from saga.brokers.rabbitmq.link import Keeper, Link
from saga.brokers.rabbitmq.options import RabbitMQOptions
from saga.clock import Clock, Ids, Spawner
from saga.errors import BrokerUnavailable, SagaError

log: Final[logging.Logger] = logging.getLogger("saga.rabbitmq")

_SUBSCRIBE_SECONDS_MAX = 9.0
_GOODBYE_SECONDS_MAX = 4.0


class RabbitMQConsumer(ChannelEvents):
    """A subscription that outlives its channels."""

    def __init__(
        self,
        queue: str,
        *,
        prefetch: int,
        keeper: Keeper,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        options: RabbitMQOptions,
        forget: Callable[[RabbitMQConsumer], None],
    ) -> None:
        self.queue = queue
        self._prefetch = prefetch
        self._keeper = keeper
        self._clock = clock
        self._ids = ids
        self._spawner = spawner
        self._options = options
        self._forget = forget
        self._channel: AmqpChannel | None = None
        self._consumer_tag = ""
        self._buffer: list[Delivery] = []
        self._unsettled: OrderedDict[int, None] = OrderedDict()
        self._there = asyncio.Event()
        self._gone = asyncio.Event()
        self._opened = asyncio.Event()
        self._refusal: SagaError | None = None
        self._last_delivery = 0.0
        self._stopping = False
        self._stopped = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.subscriptions: int = 0
        """How often it has subscribed: 1 in a quiet life."""

    # --- subscribing

    async def open(self) -> None:
        """Subscribe for the first time. Errors: TopologyMismatch, BrokerUnavailable within 10 s."""
        self._task = self._spawner.spawn(self._run(), name=f"saga-rabbitmq-consumer-{self.queue}")
        waiting = self._spawner.spawn(self._opened.wait(), name="saga-rabbitmq-first-subscription")
        try:
            await asyncio.wait({waiting}, timeout=_SUBSCRIBE_SECONDS_MAX)
            if self._refusal is not None:
                raise self._refusal
            if not self._opened.is_set():
                raise BrokerUnavailable(f"queue {self.queue}: no subscription in time")
        except BaseException:
            await self.close()
            raise
        finally:
            waiting.cancel()

    async def _run(self) -> None:
        """One life after the other, until `stop`. The keeper's links wake consumers in the order of their making."""
        failures = 0
        while not self._stopping and self._refusal is None:
            link = await self._keeper.wait_up(10.0)
            if link is None:
                continue
            try:
                await self._subscribe(link)
                failures = 0
                await self._live(link)
            except ChannelLost as error:
                failures += 1
                self._refuse_first(error)
                log.info("rabbitmq consumer of %s lost its channel (code %d)", self.queue, error.reply_code)
            if self._channel is not None:
                # Closing gives unsettled deliveries back. Their late acks meet another channel and do nothing.
                await self._channel.close()
            bound = self._options.backoff_seconds * 2.0 ** min(failures, 16)
            await self._clock.sleep(self._ids.fraction() * min(self._options.backoff_seconds_max, bound))

    def _refuse_first(self, error: ChannelLost) -> None:
        """A queue that is not there refuses the first subscription; later ones wait for it to be declared again."""
        if not self._opened.is_set() and error.reply_code:
            refusal = topology.translate(error, self.queue)
            if isinstance(refusal, SagaError):
                self._refusal = refusal
                self._opened.set()

    async def _subscribe(self, link: Link) -> None:
        self._gone.clear()
        channel = await link.open_channel(self)
        if channel.lost is not None:
            raise channel.lost  # lost between the broker's answer and this line; `on_lost` will not come again
        # Order: channel and tag are known before Consume is sent, so that deliveries and `stop` find them.
        self._channel, self._consumer_tag = channel, self._ids.uuid7().hex
        self._last_delivery = self._clock.monotonic()
        await channel.call(spec.Basic.Qos(prefetch_count=self._prefetch))  # RMQ-4: before every consume
        await channel.call(spec.Basic.Consume(queue=self.queue, consumer_tag=self._consumer_tag))
        self.subscriptions += 1
        self._opened.set()

    async def _live(self, link: Link) -> None:
        """Return when the channel has gone, was cancelled, or is silent although messages wait (RMQ-14)."""
        suspected = False
        gone = self._spawner.spawn(self._gone.wait(), name="saga-rabbitmq-consumer-gone")
        try:
            while True:
                quiet = self._clock.monotonic() - self._last_delivery
                if quiet < self._options.silent_seconds * 2 / 3 or self._is_full():
                    suspected = False
                elif await self._is_neglected(link):
                    if suspected:
                        log.warning("rabbitmq consumer of %s is silent: subscribing again", self.queue)
                        return
                    suspected = True
                else:
                    suspected = False
                await asyncio.wait({gone}, timeout=self._options.silent_seconds / 3)
                if gone.done():
                    return
        finally:
            gone.cancel()

    async def _is_neglected(self, link: Link) -> bool:
        try:
            status = await topology.inspect(link, self.queue)
        except SagaError:
            return False  # no queue, or no answer: other watches notice those
        return status.messages > 0 or status.consumers == 0

    def _is_full(self) -> bool:
        return len(self._unsettled) >= self._prefetch

    # --- what the channel tells

    def on_delivered(self, method: spec.Basic.Deliver, header: ContentHeader, body: bytes) -> None:
        tag = method.delivery_tag or 0
        properties = header.properties
        raw: Mapping[str, Any] = properties.headers or EMPTY
        returns = raw.get("x-delivery-count", 0)
        self._unsettled[tag] = None
        self._last_delivery = self._clock.monotonic()
        self._buffer.append(
            Delivery(
                channel=self.queue,
                body=body,
                content_type=properties.content_type or "",
                headers={name: value for name, value in raw.items() if isinstance(value, str)}
                if raw
                else EMPTY,
                redelivered=bool(method.redelivered),
                delivery_count=1 + (returns if isinstance(returns, int) else 0),
                token=(self._channel, tag),
            )
        )
        self._there.set()

    def on_cancelled(self) -> None:
        self._gone.set()

    def on_lost(self, channel: AmqpChannel) -> None:
        if channel is self._channel:
            self._channel = None
            self._unsettled.clear()
            self._buffer.clear()
        self._gone.set()

    # --- the port

    async def receive(self) -> Sequence[Delivery]:
        # The buffer is taken without an await after the wait, so a cancelled receive has taken nothing.
        while not self._buffer:
            if self._stopped.is_set():
                return ()
            self._there.clear()
            await self._there.wait()
        batch, self._buffer = self._buffer, []
        return batch

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        channel, tags = self._own_tags(deliveries)
        if channel is None or not tags:
            return
        # P35: a range covers everything below its end, so it ends before the first unfinished delivery.
        end = 0
        while self._unsettled and (first := next(iter(self._unsettled))) in tags:
            end = first
            tags.discard(first)
            del self._unsettled[first]
        chunks = [frames.ack(channel.number, end, multiple=True)] if end else []
        for tag in sorted(tags):
            del self._unsettled[tag]
            chunks.append(frames.ack(channel.number, tag, multiple=False))
        channel.send(b"".join(chunks))

    def retry(self, deliveries: Sequence[Delivery]) -> None:
        channel, tags = self._own_tags(deliveries)
        if channel is None or not tags:
            return
        for tag in tags:
            del self._unsettled[tag]
        channel.send(b"".join([frames.requeue(channel.number, tag) for tag in sorted(tags)]))

    def _own_tags(self, deliveries: Iterable[Delivery]) -> tuple[AmqpChannel | None, set[int]]:
        """Return the present channel and those tags of it that are still to be settled."""
        tags: set[int] = set()
        for delivery in deliveries:
            token: Any = delivery.token
            if token[0] is self._channel and token[1] in self._unsettled:
                tags.add(token[1])
        return self._channel, tags

    async def stop(self) -> None:
        if self._stopping:
            await self._stopped.wait()
            return
        self._stopping = True
        if self._task is not None:
            self._task.cancel()  # it subscribes no more; what it has sent is answered in order
        try:
            if self._channel is not None:
                # Deliveries that come before CancelOk were fetched: they are still received and settled.
                cancel = spec.Basic.Cancel(consumer_tag=self._consumer_tag)
                await self._channel.call(cancel, seconds=_GOODBYE_SECONDS_MAX)
        except ChannelLost:
            pass  # then there is nothing to cancel
        finally:
            self._stopped.set()
            self._there.set()

    async def close(self) -> None:
        await self.stop()
        if self._channel is not None:
            await self._channel.close()
        self._forget(self)

    def abandon(self) -> None:
        """Stop without a word to the broker: the whole connection is about to be closed."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
        self._stopped.set()
        self._there.set()
