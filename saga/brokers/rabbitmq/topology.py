"""Queues: what they are declared with, and questions about them, each on a throw-away channel.

A wrong declare closes its channel and fails everything in flight on it (RMQ-12); nothing else lives on these.
"""

from __future__ import annotations

from typing import Any

from pamqp import commands as spec

from saga.brokers.base import Channel, ChannelStatus
from saga.brokers.rabbitmq.channel import ChannelEvents, ChannelLost
from saga.brokers.rabbitmq.link import Link
from saga.brokers.rabbitmq.options import RabbitMQOptions
from saga.errors import BrokerUnavailable, TopologyMismatch

NOT_FOUND, ACCESS_REFUSED, PRECONDITION_FAILED, RESOURCE_LOCKED = 404, 403, 406, 405

# A parking queue gives nothing up by itself, however often an operator's tool looks at it. The number says so to
# every version: 3.x has no limit by default but knows no word for it, 4.x has 20 (RMQ-17).
_PARKING_DELIVERY_LIMIT = 1_000_000_000

# A new quorum queue starts a Raft group; on a busy server that takes seconds.
_DECLARE_SECONDS_MAX = 9.0


def arguments(channel: Channel, options: RabbitMQOptions) -> dict[str, Any]:
    """Return the arguments of one queue; they are fixed once it exists."""
    fixed: dict[str, Any] = {"x-queue-type": "quorum"}  # RMQ-19, RMQ-20
    if options.queue_length_max is not None:
        fixed["x-max-length"] = options.queue_length_max
    # Refuse rather than drop the head when full; also what at-least-once dead-lettering asks for.
    fixed["x-overflow"] = "reject-publish"
    if channel.parking is None:
        return {**fixed, "x-delivery-limit": _PARKING_DELIVERY_LIMIT}
    return {
        **fixed,
        "x-delivery-limit": options.delivery_limit,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": channel.parking,
        "x-dead-letter-strategy": "at-least-once",
    }


async def declare(link: Link, channel: Channel, options: RabbitMQOptions) -> None:
    """Create a durable quorum queue, or see that it is as it should be. Errors: TopologyMismatch, ChannelLost."""
    throw_away = await link.open_channel(ChannelEvents())
    try:
        wanted = spec.Queue.Declare(queue=channel.name, durable=True, arguments=arguments(channel, options))
        await throw_away.call(wanted, seconds=_DECLARE_SECONDS_MAX)
    except ChannelLost as error:
        if error.reply_code == ACCESS_REFUSED:
            # without the right to configure (S17) existence is all that can be verified
            await inspect(link, channel.name)
        elif error.reply_code in (PRECONDITION_FAILED, RESOURCE_LOCKED):
            raise TopologyMismatch(
                f"queue {channel.name}: {error.text}; delete it if it is empty, or change the setting back"
            ) from None
        else:
            raise
    finally:
        await throw_away.close()


async def inspect(link: Link, name: str) -> ChannelStatus:
    """Return depth and consumers. Errors: TopologyMismatch if there is no such queue, ChannelLost."""
    throw_away = await link.open_channel(ChannelEvents())
    try:
        answer: spec.Queue.DeclareOk = await throw_away.call(spec.Queue.Declare(queue=name, passive=True))
        return ChannelStatus(messages=answer.message_count or 0, consumers=answer.consumer_count or 0)
    except ChannelLost as error:
        raise translate(error, name) from None
    finally:
        await throw_away.close()


def translate(error: ChannelLost, name: str) -> Exception:
    """Return what a caller of the port may see."""
    if error.reply_code == NOT_FOUND:
        return TopologyMismatch(f"queue {name} is not declared; declare it first (the app does so at start)")
    if error.reply_code == ACCESS_REFUSED:
        return TopologyMismatch(f"queue {name}: {error.text}")
    return BrokerUnavailable(f"queue {name}: {error.text}")
