"""One AMQP channel over a link: calls with a bound, content put together, events handed on without a task.

aiormq's reader calls `put` for each frame of this channel. A channel is lost once and for good; everything that
waits on it learns so at once through `ChannelLost`, never through a cancellation (RMQ-9, RMQ-10).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pamqp.frame
from pamqp import commands as spec
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from saga.brokers.base import OutMessage
from saga.brokers.rabbitmq import frames

if TYPE_CHECKING:
    from saga.brokers.rabbitmq.link import Link

CALL_SECONDS_MAX = 5.0


class ChannelLost(Exception):
    """The channel or its connection has gone; `reply_code` is the broker's, 0 if the connection went."""

    def __init__(self, reply_code: int, text: str) -> None:
        super().__init__(f"{reply_code} {text}")
        self.reply_code = reply_code
        self.text = text


class ChannelEvents:
    """What a channel tells its owner, from the reader and therefore without waiting. Each does nothing here."""

    def on_delivered(self, method: spec.Basic.Deliver, header: ContentHeader, body: bytes) -> None:
        """A message for a consumer of this channel."""

    def on_cancelled(self) -> None:
        """The broker ended the consumer, for example because the queue was deleted."""

    def on_confirmed(self, tag: int, multiple: bool, accepted: bool) -> None:
        """The broker answered publishes."""

    def on_returned(self, message_id: str) -> None:
        """No queue takes this message; its confirm follows."""

    def on_lost(self, channel: AmqpChannel) -> None:
        """The channel has gone. Last event."""


def _goodbye() -> spec.Channel.Close:
    return spec.Channel.Close(200, "closed", 0, 0)


class AmqpChannel:
    """An open channel; made by `Link.open_channel`."""

    def __init__(self, link: Link, number: int, events: ChannelEvents) -> None:
        self.number = number
        self.lost: ChannelLost | None = None
        self._closing = False
        self._link = link
        self._events = events
        self._encoder = frames.PublishEncoder(number, link.frame_bytes_max)
        self._replies: deque[asyncio.Future[Any]] = deque()
        self._content_of: Any = None
        self._header: ContentHeader | None = None
        self._parts: list[bytes] = []
        self._missing = 0
        self._handlers: dict[type, Callable[[Any], None]] = {
            spec.Basic.Deliver: self._begin_content,
            spec.Basic.Return: self._begin_content,
            ContentHeader: self._on_header,
            ContentBody: self._on_body,
            spec.Basic.Ack: self._on_ack,
            spec.Basic.Nack: self._on_nack,
            spec.Basic.Cancel: self._on_cancel,
            spec.Channel.Close: self._on_close,
        }

    # --- what aiormq's reader calls: `channel.frames.put((weight, frame))`

    @property
    def frames(self) -> AmqpChannel:
        return self

    async def put(self, weighted: tuple[int, Any]) -> None:
        if self.lost is not None:
            # RMQ-13: nothing of a dead channel is handed on. Its close may be the answer that was late
            if isinstance(weighted[1], spec.Channel.CloseOk):
                self._link.buried(self)
            return
        handler = self._handlers.get(type(weighted[1]))
        if handler is not None:
            handler(weighted[1])
        elif self._replies and not (reply := self._replies.popleft()).done():
            reply.set_result(weighted[1])

    # --- calls

    async def call(self, method: Any, *, seconds: float = CALL_SECONDS_MAX) -> Any:
        """Send a method and return the broker's answer. Cancelling is safe: the late answer is thrown away.

        Errors: ChannelLost, also when there is no answer in time. Then this channel is given up: nobody knows what
        a later answer would belong to. The others live on, since a single queue can be slow (a declare, a consume
        on one that is being deleted); whether the broker still lives is for the probe to say (RMQ-8).
        """
        if self.lost is not None:
            raise self.lost
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies.append(reply)
        self._link.write(pamqp.frame.marshal(method, self.number))
        done, _ = await asyncio.wait({reply}, timeout=seconds)
        if not done:
            late = ChannelLost(0, f"no answer to {method.name} within {seconds:g} s")
            self._abandon(late)
            raise late
        answer = reply.result()
        if isinstance(answer, ChannelLost):
            raise answer
        return answer

    def _abandon(self, late: ChannelLost) -> None:
        """Give up a channel that does not answer. The broker must close it too, or it would go on to deliver here."""
        if not self._closing:
            self._closing = True
            self._link.write(pamqp.frame.marshal(_goodbye(), self.number))
        self._link.abandoned(self)
        self.lose(late)

    def encode(self, message: OutMessage, message_id: str) -> bytes:
        """Return the frames of one publish; raises ValueError if AMQP cannot carry it."""
        return self._encoder.encode(message, message_id)

    def send(self, data: bytes) -> None:
        """Write frames of this channel that have no answer; nothing happens once it is lost or being closed.

        After our Close the broker forgets the number, and a frame for it would cost the whole connection (504).
        """
        if self.lost is None and not self._closing:
            self._link.write(data)

    async def close(self) -> None:
        """Close in good order, bounded; the broker takes back what is unacked. Idempotent."""
        if self.lost is not None or self._closing:
            return
        self._closing = True
        try:
            await self.call(_goodbye())
        except ChannelLost:
            pass
        finally:
            self.lose(ChannelLost(0, "closed"))

    def lose(self, error: ChannelLost) -> None:
        """Mark as lost and tell everybody who waits. Idempotent."""
        if self.lost is not None:
            return
        self.lost = error
        self._link.forget(self)
        while self._replies:
            reply = self._replies.popleft()
            if not reply.done():
                reply.set_result(
                    error
                )  # a result, so that an abandoned call leaves no unread exception (AIO-6)
        self._events.on_lost(self)

    # --- frames

    def _begin_content(self, method: Any) -> None:
        self._content_of = method

    def _on_header(self, header: ContentHeader) -> None:
        self._header, self._missing = header, header.body_size
        self._parts.clear()
        if not self._missing:
            self._end_content(header, b"")

    def _on_body(self, body: ContentBody) -> None:
        self._parts.append(body.value)
        self._missing -= len(body.value)
        if self._missing <= 0 and self._header is not None:
            whole = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._end_content(self._header, whole)

    def _end_content(self, header: ContentHeader, body: bytes) -> None:
        method, self._content_of, self._header = self._content_of, None, None
        self._parts.clear()
        if type(method) is spec.Basic.Deliver:
            self._events.on_delivered(method, header, body)
        elif type(method) is spec.Basic.Return:
            self._events.on_returned(header.properties.message_id or "")

    def _on_ack(self, frame: spec.Basic.Ack) -> None:
        self._events.on_confirmed(frame.delivery_tag or 0, bool(frame.multiple), True)

    def _on_nack(self, frame: spec.Basic.Nack) -> None:
        self._events.on_confirmed(frame.delivery_tag or 0, bool(frame.multiple), False)

    def _on_cancel(self, frame: spec.Basic.Cancel) -> None:
        self._events.on_cancelled()

    def _on_close(self, frame: spec.Channel.Close) -> None:
        self._link.write(pamqp.frame.marshal(spec.Channel.CloseOk(), self.number))
        self.lose(ChannelLost(frame.reply_code or 0, frame.reply_text or ""))
