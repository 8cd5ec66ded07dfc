"""The settings of the Kafka adapter in one frozen object, each with the reason for its default."""

from __future__ import annotations

from dataclasses import dataclass

from saga.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class KafkaOptions:
    """Bounds and limits; the defaults fit a cluster in the same network."""

    partitions: int = 8
    """Partitions of a topic when it is made, and as it must then be: the partition follows from the key. No more
    consumers than this share the work of a channel."""
    replication_factor: int | None = None
    """Copies of each topic; None is 3, or as many as there are brokers. A topic with fewer than a number given here is
    a mismatch. One copy is what a cluster of one broker has: good for development, gone with its disk."""
    retention_seconds: float = 14 * 86400.0
    """What is older is deleted by the broker, finished or not; -1 keeps it for ever, as a parking topic does."""
    delivery_limit: int = 100
    """Times that this process hands a message out before it is parked. Counted in memory: a log keeps no count."""
    retry_seconds: float = 0.1
    """What was given back is handed out again after this; longer delays come from the database."""
    queue_length_max: int | None = None
    """Messages that may wait in a channel before it refuses; None is without limit, and saves asking for the lag. It is
    counted from the last look, so several publishers together may pass it by what they have in flight."""
    message_bytes_max: int = 1024 * 1024
    """Largest body. A pack of commands is bounded to 256 KiB above the port; one large command may be more."""
    overhead_bytes_max: int = 128 * 1024
    """What headers, key and framing of a record may take beside its body."""
    batch_bytes_max: int = 512 * 1024
    """What a partition's open batch takes before sends wait: with the driver's 16 KiB ten times less goes through
    (KAF-21)."""
    publish_seconds_max: float = 10.0
    """After this a publish without an answer is UNKNOWN, and the producer is replaced."""
    pending_messages_max: int = 50_000
    """Publishes that may wait for the cluster or an answer; beyond, publish is REFUSED."""
    pending_bytes_max: int = 128 * 1024 * 1024
    """The same in bytes of body."""
    late_seconds: float = 1.0
    """A publish without an answer for this long makes us ask whether its topic is still there."""
    request_seconds_max: float = 5.0
    """A request without an answer costs its connection after this; a consumer's later, since joins wait for others."""
    session_seconds: float = 6.0
    """A member of a group that is not heard of for this long has gone (KAF-18)."""
    heartbeat_seconds: float = 1.2
    """A fifth of the session; a rebalance is noticed so late."""
    metadata_seconds: float = 10.0
    """How old a client's picture of the cluster may be: a topic that was made again is seen after this."""
    commit_seconds: float = 0.1
    """Pause between two commits of a consumer. A commit has all that was finished meanwhile."""
    ahead_messages_max: int = 10_000
    """How far a partition is fetched beyond its first unfinished message: after a crash it all comes again."""
    drain_seconds_max: float = 1.0
    """When partitions are taken away, what is being worked on may end within this and is still committed."""
    silent_seconds: float = 15.0
    """A consumer that gets nothing for this long, while messages wait and it has free prefetch, is rebuilt."""
    backoff_seconds: float = 0.1
    """First upper bound of the jittered pause before a client is made again; doubles with every failure."""
    backoff_seconds_max: float = 2.0
    """Last upper bound. Small, because progress is due within 3 s of the cluster's return."""

    def __post_init__(self) -> None:
        if self.partitions < 1 or self.delivery_limit < 1 or self.pending_messages_max < 1:
            raise ConfigurationError("partitions, delivery_limit and pending_messages_max are at least 1")
        if self.replication_factor is not None and self.replication_factor < 1:
            raise ConfigurationError("replication_factor is at least 1")
        if not 1.0 <= self.publish_seconds_max <= 10.0:
            raise ConfigurationError("publish_seconds_max is 1 to 10")
        if self.batch_bytes_max < 262_144:
            raise ConfigurationError("batch_bytes_max is at least 262144")
        if self.heartbeat_seconds > self.session_seconds / 3:
            raise ConfigurationError("heartbeat_seconds is at most a third of session_seconds")

    @property
    def record_bytes_max(self) -> int:
        """Largest record, which is what topics and requests must take."""
        return self.message_bytes_max + self.overhead_bytes_max

    def pause(self, failures: int, fraction: float) -> float:
        """Return the seconds to wait after so many failures in a row; `fraction` from 0 to 1 is the jitter."""
        most = min(self.backoff_seconds * 2.0 ** min(failures - 1, 10), self.backoff_seconds_max)
        return most * (0.5 + fraction / 2)
