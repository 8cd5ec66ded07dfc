"""Publishing: a window of messages in flight, and exactly one outcome for each within its bound.

Confirms resolve the callers' futures directly from the reader: no task and no lock per message. The link's owner
calls `set_up` with each new link and `tick` twice a second.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

from saga.brokers.base import OutMessage, PublishOutcome
from saga.brokers.rabbitmq.channel import AmqpChannel, ChannelEvents
from saga.brokers.rabbitmq.link import Link
from saga.brokers.rabbitmq.options import RabbitMQOptions
from saga.clock import Clock, Ids

TICK_SECONDS = 0.5

Outcome = asyncio.Future[PublishOutcome]


class _Sent(NamedTuple):
    """A publish without an answer."""

    future: Outcome
    since: float
    size: int


class _Waiting(NamedTuple):
    """A publish that the connection could not take yet."""

    future: Outcome
    since: float
    message: OutMessage


class Publisher(ChannelEvents):
    """Publishes on one channel of one link at a time."""

    def __init__(self, *, clock: Clock, ids: Ids, options: RabbitMQOptions) -> None:
        self._clock = clock
        self._ids = ids
        self._options = options
        self._link: Link | None = None
        self._channel: AmqpChannel | None = None
        self._prefix = ""
        self._tag = 0
        self._sent: OrderedDict[int, _Sent] = OrderedDict()
        self._waiting: deque[_Waiting] = deque()
        self._bytes = 0
        self._progress = 0.0
        self._held = False
        self._closed = False

    @property
    def pending(self) -> int:
        """Publishes without an outcome."""
        return len(self._sent) + len(self._waiting)

    @property
    def held(self) -> bool:
        """Whether an alarm of the broker holds publishes back."""
        return self._held

    async def set_up(self, link: Link) -> None:
        """Take a new link: open a channel and send what waits. Errors: ChannelLost."""
        channel = await link.open_channel(self, confirms=True)
        if channel.lost is not None:
            # Lost between the broker's answer and this line: its `on_lost` came before it was ours and will not
            # come again. Taking it over would mix its tags with those of the next channel.
            raise channel.lost
        # RMQ-2: returns are matched by message id, so it is fresh for each attempt: prefix of this channel, then tag
        self._prefix = f"{self._ids.uuid7().hex}-"
        self._link, self._channel, self._tag, self._held = link, channel, 0, False
        self._progress = self._clock.monotonic()
        self._send_waiting()

    # --- publish

    def publish(self, messages: Sequence[OutMessage]) -> list[Outcome]:
        """See `Broker.publish`."""
        create_future = asyncio.get_running_loop().create_future
        now = self._clock.monotonic()
        futures: list[Outcome] = []
        accepted: list[_Waiting] = []
        room = self._options.pending_messages_max - self.pending
        for message in messages:
            future: Outcome = create_future()
            futures.append(future)
            size = len(message.body)
            if self._closed:
                future.set_result(PublishOutcome.UNKNOWN)
            elif (
                len(accepted) >= room
                or size > self._options.message_bytes_max
                or self._bytes + size > self._options.pending_bytes_max
            ):
                future.set_result(PublishOutcome.REFUSED)
            else:
                self._bytes += size
                accepted.append(_Waiting(future, now, message))
        if self._channel is None or self._held:
            self._waiting.extend(accepted)
        else:
            self._send(self._channel, accepted)
        return futures

    def _send(self, channel: AmqpChannel, publishes: Sequence[_Waiting]) -> None:
        """Write all as one piece. A message takes a tag only if it can be written: the broker counts along."""
        chunks: list[bytes] = []
        for future, since, message in publishes:
            try:
                chunk = channel.encode(message, self._prefix + str(self._tag + 1))
            except ValueError:  # a name above 255 bytes, or text that is not Unicode
                self._settle(_Sent(future, since, len(message.body)), PublishOutcome.REFUSED)
                continue
            self._tag += 1
            self._sent[self._tag] = _Sent(future, since, len(message.body))
            chunks.append(chunk)
        if chunks:
            channel.send(b"".join(chunks))

    def _send_waiting(self) -> None:
        if self._channel is not None and not self._held and self._waiting:
            waiting = list(self._waiting)
            self._waiting.clear()
            self._send(self._channel, waiting)

    def _settle(self, sent: _Sent, outcome: PublishOutcome) -> None:
        self._bytes -= sent.size
        if not sent.future.done():  # the caller may have cancelled it; the message is on its way all the same
            sent.future.set_result(outcome)

    # --- the broker's answers

    def on_confirmed(self, tag: int, multiple: bool, accepted: bool) -> None:
        outcome = PublishOutcome.CONFIRMED if accepted else PublishOutcome.REFUSED
        self._progress = self._clock.monotonic()
        if not multiple:
            sent = self._sent.pop(tag, None)
            if sent is not None:
                self._settle(sent, outcome)
            return
        while self._sent and next(iter(self._sent)) <= tag:
            self._settle(self._sent.popitem(last=False)[1], outcome)

    def on_returned(self, message_id: str) -> None:
        """The return comes before its confirm, which then finds nothing to settle (RMQ-1)."""
        prefix, _, tag = message_id.rpartition("-")
        if f"{prefix}-" == self._prefix:
            sent = self._sent.pop(int(tag), None)
            if sent is not None:
                self._settle(sent, PublishOutcome.UNROUTABLE)

    def on_lost(self, channel: AmqpChannel) -> None:
        """In flight on a lost channel is unknown (RMQ-12); what waits may still make it on the next one."""
        if channel is not self._channel:
            return
        self._channel = None
        while self._sent:
            self._settle(self._sent.popitem(last=False)[1], PublishOutcome.UNKNOWN)
        if self._link is not None:
            self._link.drop("publish channel lost")

    # --- time

    def tick(self, now: float, *, lagged: bool) -> None:
        """Give up what is past its bound, notice an alarm, and drop a link whose confirms are late."""
        expired = now - (self._options.publish_seconds_max - TICK_SECONDS)
        while self._waiting and self._waiting[0].since <= expired:
            future, since, message = self._waiting.popleft()
            self._settle(_Sent(future, since, len(message.body)), PublishOutcome.UNKNOWN)
        while self._sent and next(iter(self._sent.values())).since <= expired:
            self._settle(self._sent.popitem(last=False)[1], PublishOutcome.UNKNOWN)
        if self._link is None or self._channel is None:
            return
        self._held = self._link.blocked
        if lagged or self._held:
            # AIO-3: while our own loop stood still no confirm could be read; blocked, none is due (RMQ-11)
            self._progress = now
        self._send_waiting()
        self._drop_if_late(now)

    def _drop_if_late(self, now: float) -> None:
        """RMQ-8. Only if nothing at all was confirmed meanwhile: one slow queue is no reason to cut the others."""
        late = now - self._options.late_seconds
        if self._link is None or not self._sent or self._progress > late:
            return
        if next(iter(self._sent.values())).since <= late:
            self._link.drop(f"no confirm for {self._options.late_seconds:g} s")

    def close(self) -> None:
        """Whatever has no outcome is unknown now."""
        self._closed = True
        for future, since, message in self._waiting:
            self._settle(_Sent(future, since, len(message.body)), PublishOutcome.UNKNOWN)
        self._waiting.clear()
        while self._sent:
            self._settle(self._sent.popitem(last=False)[1], PublishOutcome.UNKNOWN)
