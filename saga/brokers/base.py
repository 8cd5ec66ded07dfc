"""The broker port: what the library needs of a message broker, and how an adapter declares what it can do.

A broker moves opaque bodies between named channels, at least once. It knows nothing of sagas: packing several
commands into one body, parking, retry schedules and deduplication are done above it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol, runtime_checkable

EMPTY: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an adapter guarantees; the app fills a gap from the database or refuses at start (`MissingCapability`)."""

    name: str
    durable: bool
    """Accepted messages survive the end of this process and of the broker."""
    ordered_per_key: bool
    """Messages of one key on one channel are first delivered in the order in which they were published."""
    delay: bool
    """The broker can hold a message back by itself."""
    priority: bool
    """The broker can deliver some messages first."""
    single_ack: bool
    """One delivery can be acked while earlier ones of its channel are unfinished."""
    delivery_count: bool
    """`Delivery.delivery_count` is the broker's own count and survives a crash of the consumer."""
    packs_commands: bool
    """The broker charges per message, so several commands travel as one CloudEvents JSON batch."""
    body_bytes_max: int
    """Largest body, in bytes."""
    unacked_seconds_max: float | None
    """How long a delivery may stay unacked before the broker takes it back; None is without limit."""
    retention_seconds: float | None = None
    """How long it keeps a message that nobody has finished; None is for ever."""


class PublishOutcome(StrEnum):
    """What is known about one published message."""

    CONFIRMED = "confirmed"
    """Stored by the broker and routed to at least one queue."""
    UNROUTABLE = "unroutable"
    """The broker answered that no queue takes it."""
    REFUSED = "refused"
    """The broker answered that it does not take it (queue full, too large, no right)."""
    UNKNOWN = "unknown"
    """No answer: it may or may not arrive."""


@dataclass(frozen=True, slots=True)
class OutMessage:
    """One broker message to publish. `key` orders messages where the broker can; `headers` are text."""

    channel: str
    body: bytes
    content_type: str
    key: str = ""
    headers: Mapping[str, str] = field(default_factory=lambda: EMPTY)


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """One broker message received. Identity is the delivery, not the message: a redelivery is another object."""

    channel: str
    body: bytes
    content_type: str
    headers: Mapping[str, str]
    redelivered: bool
    """A hint: False may be a redelivery where `Capabilities.delivery_count` is not declared (a log keeps no marks)."""
    delivery_count: int
    """1 for the first delivery; counts redeliveries where `Capabilities.delivery_count`, else 1 or 2."""
    token: object = None
    """The adapter's own handle; nobody else reads it."""


@dataclass(frozen=True, slots=True)
class Channel:
    """A queue or topic by name. Work channels have a parking channel beside them."""

    name: str
    parking: str | None = None
    """Channel that takes what the broker itself gives up on (delivery limit); None for a parking channel."""


def with_parking(channels: Sequence[Channel]) -> Sequence[Channel]:
    """Return the channels and their parking channels: none stands without the one that takes its poison."""
    named = {channel.name: channel for channel in channels}
    for channel in channels:
        if channel.parking is not None:
            named.setdefault(channel.parking, Channel(channel.parking))
    return list(named.values())


@dataclass(frozen=True, slots=True)
class ChannelStatus:
    """What the broker says about a channel now."""

    messages: int
    """Messages that wait; those that a consumer holds unsettled may or may not be counted."""
    consumers: int


class Consumer(Protocol):
    """A subscription to one channel by one owner.

    At most `prefetch` deliveries are unsettled at any time. Each delivery is settled exactly once, by `ack` or
    `retry`; settling one whose connection has gone is harmless and does nothing (it is delivered again).
    """

    async def receive(self) -> Sequence[Delivery]:
        """Return the deliveries that are there: at least one, never waiting to fill a batch.

        Waits while there is none, also across a lost connection. After `stop` it returns what was already
        fetched and then an empty sequence, always. Cancelling is safe: nothing is lost.
        """
        ...

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Tell the broker that these are done for. Does not wait; a lost ack is a redelivery."""
        ...

    def retry(self, deliveries: Sequence[Delivery]) -> None:
        """Give these back to be delivered again soon, here or elsewhere, marked as redelivered."""
        ...

    async def stop(self) -> None:
        """Take no more from the broker; what was fetched may still be received and settled. Idempotent."""
        ...

    async def close(self) -> None:
        """Stop, and give back all that is unsettled. Idempotent, bounded to 10 s."""
        ...


class Broker(Protocol):
    """One connection to a broker, shared by everything in an app."""

    @property
    def capabilities(self) -> Capabilities:
        """What this adapter guarantees."""
        ...

    async def start(self) -> None:
        """Connect. Afterwards the adapter reconnects by itself.

        Raises BrokerUnavailable within 10 s, ConfigurationError for a log-in or a certificate that is not accepted.
        """
        ...

    async def declare(self, channels: Sequence[Channel]) -> None:
        """Create the channels that are missing and verify the others. Raises TopologyMismatch."""
        ...

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        """Send, pipelined; return one future per message, in the same order.

        Each future is resolved as soon as the outcome of its message is known, at the latest after 10 s
        (`UNKNOWN`); it never raises. Cancelling a future does not stop the send. Does not block: what the
        connection cannot take now waits inside the adapter, bounded, and is `UNKNOWN` or `REFUSED` beyond.
        """
        ...

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        """Subscribe to a declared channel; `prefetch` counts messages, 1 to 10,000.

        Raises TopologyMismatch if there is no such channel, BrokerUnavailable within 10 s, ConfigurationError for a
        prefetch out of range.
        """
        ...

    async def status(self, channel: str) -> ChannelStatus:
        """Ask the broker for depth and consumers of a channel.

        Raises TopologyMismatch if there is no such channel, BrokerUnavailable within 10 s.
        """
        ...

    async def close(self) -> None:
        """Close every consumer and the connection. Unresolved publishes become UNKNOWN. Idempotent, bounded to 10 s."""
        ...


class Severity(StrEnum):
    """What a finding means for a start."""

    NOTE = "note"
    """Nothing: it is as it may be, and people may like to know."""
    WARN = "warn"
    """It starts, and says so."""
    REFUSE = "refuse"
    """In production mode it does not start; else it says so."""


class Finding(NamedTuple):
    """One thing about a channel that is not as it should be."""

    code: str
    """A stable word, the same for whatever channel."""
    severity: Severity
    channel: str
    text: str
    fix: str
    """What an operator does about it."""


@runtime_checkable
class Checked(Protocol):
    """A broker whose channels can be looked at without changing them: beside the port, for adapters that can."""

    @property
    def lets_pass(self) -> bool:
        """Whether `declare` lets some of it pass, so that a start has to look as well."""
        ...

    async def check(self, channels: Sequence[Channel]) -> Sequence[Finding]:
        """Return what is not as `declare` would make it, by channel; also what `declare` lets pass. Makes nothing.

        To be called after `start`. Raises BrokerUnavailable within 10 s.
        """
        ...
