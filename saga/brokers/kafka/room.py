"""How many more messages a channel takes, where its length is bounded: a log has no such bound of its own."""

from __future__ import annotations

from typing import Final

from saga.brokers.kafka.cluster import Cluster
from saga.clock import Clock

LOOK_SECONDS: Final = 0.1
"""A full channel is looked at again after this."""


class Room:
    """Counts up from the last look at the lag, and looks again only when that says full."""

    def __init__(self, cluster: Cluster, length_max: int, clock: Clock) -> None:
        self._cluster = cluster
        self._length_max = length_max
        self._clock = clock
        self._lengths: dict[str, int] = {}
        self._looked_at: dict[str, float] = {}

    async def take(self, topic: str) -> bool:
        """Take a place for one message; False if there is none. Errors: BrokerUnavailable."""
        length = self._lengths.get(topic, self._length_max)
        now = self._clock.monotonic()
        if length >= self._length_max and now - self._looked_at.get(topic, -LOOK_SECONDS) >= LOOK_SECONDS:
            self._looked_at[topic] = now
            found = (await self._cluster.topics([topic])).get(topic)
            length = 0 if found is None else await self._cluster.backlog(topic, topic, found)
        if length < self._length_max:
            self._lengths[topic] = length + 1
            return True
        self._lengths[topic] = length
        return False
