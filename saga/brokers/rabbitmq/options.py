"""The settings of the RabbitMQ adapter in one frozen object, each with the reason for its default."""

from __future__ import annotations

from dataclasses import dataclass

from saga.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class RabbitMQOptions:
    """Bounds and limits; the defaults fit a broker in the same network."""

    delivery_limit: int = 100
    """Deliveries after which the broker parks a message by itself. Far above our own limit (P14): the broker also
    counts deliveries that were only prefetched by a process that crashed."""
    queue_length_max: int | None = None
    """Messages a queue takes before it refuses; None is without limit. Part of the topology."""
    unacked_seconds_max: float | None = 1800.0
    """The broker's consumer timeout (RMQ-16), as it is configured there; None if it is switched off there."""
    message_bytes_max: int = 1024 * 1024
    """Largest body. A pack of commands is bounded to 256 KiB above the port; one large command may be more."""
    publish_seconds_max: float = 10.0
    """After this a publish without an answer is UNKNOWN (RMQ-7)."""
    pending_messages_max: int = 50_000
    """Publishes that may wait for the connection or a confirm; beyond, publish is REFUSED."""
    pending_bytes_max: int = 128 * 1024 * 1024
    """The same in bytes of body."""
    heartbeat_seconds: int = 10
    """Sent to the broker. Heartbeats alone notice a frozen peer after 33 s (RMQ-8)."""
    late_seconds: float = 5.0
    """A confirm or probe later than this drops the connection (RMQ-8); also the pause between probes."""
    silent_seconds: float = 15.0
    """A consumer that gets nothing for this long, while messages wait and it has free prefetch, is rebuilt."""
    backoff_seconds: float = 0.1
    """First upper bound of the jittered pause before reconnecting; doubles with every failure."""
    backoff_seconds_max: float = 2.0
    """Last upper bound. Small, because progress is due within 3 s of the broker's return."""

    def __post_init__(self) -> None:
        if self.delivery_limit < 1 or self.pending_messages_max < 1 or self.heartbeat_seconds < 1:
            raise ConfigurationError(
                "delivery_limit, pending_messages_max and heartbeat_seconds are at least 1"
            )
        if not 1.0 <= self.publish_seconds_max <= 10.0:
            raise ConfigurationError("publish_seconds_max is 1 to 10")
