"""Queues: what they are declared with, and questions about them, each on a throw-away channel.

A wrong declare closes its channel and fails everything in flight on it (RMQ-12); nothing else lives on these.
"""

from __future__ import annotations

import re
from typing import Any, Final

from pamqp import commands as spec

from saga.brokers.base import Channel, ChannelStatus, Finding, Severity
from saga.brokers.rabbitmq.channel import ChannelEvents, ChannelLost
from saga.brokers.rabbitmq.link import Link
from saga.brokers.rabbitmq.options import RabbitMQOptions
from saga.errors import BrokerUnavailable, TopologyMismatch

NOT_FOUND, ACCESS_REFUSED, PRECONDITION_FAILED, RESOURCE_LOCKED = 404, 403, 406, 405

# A parking queue gives nothing up by itself, however often an operator's tool looks at it. The number says so to
# every version: 3.x has no limit by default but knows no word for it, 4.x has 20 (RMQ-17).
_PARKING_DELIVERY_LIMIT = 1_000_000_000

_FIX: Final = "delete it if it is empty, or change the setting back"
_ARGUMENT: Final = re.compile(r"inequivalent arg '(?P<name>[^']*)'")
_CODES: Final = {
    "durable": "not-durable",
    "type": "queue-type",
    "x-queue-type": "queue-type",
    "x-dead-letter-exchange": "dead-letter-target",
    "x-dead-letter-routing-key": "dead-letter-target",
    "x-dead-letter-strategy": "dead-letter-strategy",
    "x-delivery-limit": "delivery-limit",
    "x-overflow": "overflow",
    "x-max-length": "queue-length",
}
"""Argument of a queue to what a finding about it is called."""

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
            raise TopologyMismatch(f"queue {channel.name}: {error.text}; {_FIX}") from None
        else:
            raise
    finally:
        await throw_away.close()


async def check(link: Link, channel: Channel, options: RabbitMQOptions) -> Finding | None:
    """Return what is not as `declare` makes it; of several things the first. Errors: ChannelLost, BrokerUnavailable."""
    name = channel.name
    try:
        await inspect(link, name)
    except TopologyMismatch as error:
        if "is not declared" not in error.text:
            return Finding("no-right", Severity.WARN, name, error.text, "grant the right to read it")
        return Finding(
            "missing", Severity.NOTE, name, f"queue {name} is not there", "the app's start makes it"
        )
    throw_away = await link.open_channel(ChannelEvents())
    try:
        wanted = spec.Queue.Declare(queue=name, durable=True, arguments=arguments(channel, options))
        await throw_away.call(wanted, seconds=_DECLARE_SECONDS_MAX)
    except ChannelLost as error:
        if error.reply_code == ACCESS_REFUSED:
            text = f"what queue {name} is like cannot be seen without the right to configure it"
            return Finding("unseen", Severity.NOTE, name, text, "check once as a user that has it")
        if error.reply_code not in (PRECONDITION_FAILED, RESOURCE_LOCKED):
            raise
        found = _ARGUMENT.search(error.text)
        code = _CODES.get(found["name"], "queue-argument") if found else "queue-argument"
        return Finding(code, Severity.REFUSE, name, f"queue {name}: {error.text}", _FIX)
    finally:
        await throw_away.close()
    return None


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
