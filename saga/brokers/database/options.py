"""The settings of the database broker in one frozen object, each with the reason for its default."""

from __future__ import annotations

from dataclasses import dataclass

from saga.errors import ConfigurationError


@dataclass(frozen=True)
class DatabaseOptions:
    """Bounds and limits; nobody has to change them."""

    visibility_seconds: float = 30.0
    """What a process holds is given to others when it has not renewed for this long; it renews three times as often."""
    poll_seconds: float = 2.0
    """Longest time that a message lies unseen if nobody was told of it. Every look is one statement, so this also
    bounds what an idle process asks of the database."""
    ring_seconds: float = 0.005
    """Others are told of new messages at most this often: at once, and then of all that came meanwhile."""
    retry_seconds: float = 0.1
    """What a consumer gave back is due again after this."""
    delivery_limit: int = 100
    """Deliveries after which a message is parked. Far above our own limit (P14): a delivery also counts if the process
    that had claimed it crashed before it looked at it."""
    queue_length_max: int | None = None
    """Messages that may wait in a channel before it refuses; None is without limit, and saves the counting."""
    message_bytes_max: int = 1024 * 1024
    """Largest body. A pack of commands is bounded to 256 KiB above the port; one large command may be more."""
    publish_seconds_max: float = 10.0
    """After this a publish without an answer is UNKNOWN."""
    pending_messages_max: int = 50_000
    """Publishes that may wait for their commit; beyond, publish is REFUSED."""
    pending_bytes_max: int = 128 * 1024 * 1024
    """The same in bytes of body."""
    backoff_seconds: float = 0.1
    """First upper bound of the jittered pause after a failure; doubles with every failure."""
    backoff_seconds_max: float = 2.0
    """Last upper bound. Small, because progress is due within 3 s of the database's return."""

    def __post_init__(self) -> None:
        if self.delivery_limit < 1 or self.pending_messages_max < 1:
            raise ConfigurationError("delivery_limit and pending_messages_max are at least 1")
        if not 1.0 <= self.publish_seconds_max <= 10.0:
            raise ConfigurationError("publish_seconds_max is 1 to 10")
        if self.poll_seconds <= 0 or self.visibility_seconds < 3 * self.poll_seconds:
            raise ConfigurationError("visibility_seconds is at least three times poll_seconds")

    def pause(self, failures: int, fraction: float) -> float:
        """Return the seconds to wait after so many failures in a row; `fraction` from 0 to 1 is the jitter."""
        most = min(self.backoff_seconds * 2.0 ** min(failures - 1, 10), self.backoff_seconds_max)
        return most * (0.5 + fraction / 2)
