"""Topics: what they are made with, what must be so when they exist, and where the poison of a channel goes.

A topic cannot say which channel takes its poison, so a group without members keeps it as a note beside a committed
offset, which goes when the topic goes. Kafka forgets such notes after a week in which nobody has declared the channel
(`offsets.retention.minutes`); the next declare writes it again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from saga.brokers.base import Channel, ChannelStatus
from saga.brokers.kafka.cluster import EXISTS_ALREADY, Cluster, NewTopic, Topic
from saga.brokers.kafka.names import NOTES_GROUP, topic_of
from saga.brokers.kafka.options import KafkaOptions
from saga.clock import Clock
from saga.errors import BrokerUnavailable, TopologyMismatch

log: Final[logging.Logger] = logging.getLogger("saga.kafka")

COPIES: Final = 3
"""As many copies as a cluster can lose one broker of and still confirm (KAF-12)."""
LISTED_SECONDS_MAX: Final = 5.0
_LOOK_SECONDS: Final = 0.05
_SIZE: Final = "max.message.bytes"
_PARKING: Final = "parking="


class Topology:
    """Makes and verifies topics, and answers for them."""

    def __init__(self, cluster: Cluster, options: KafkaOptions, clock: Clock) -> None:
        self._cluster = cluster
        self._options = options
        self._clock = clock

    async def declare(self, channels: Iterable[Channel]) -> None:
        """Make what is missing and verify the rest. Errors: TopologyMismatch, BrokerUnavailable."""
        named = {topic_of(channel.name): channel for channel in channels}
        found = await self._cluster.topics(list(named))
        missing = {topic: channel for topic, channel in named.items() if topic not in found}
        if missing:
            found = {**found, **await self._make(missing)}
        for topic, channel in named.items():
            self._verify(channel, found[topic])
        await self._verify_sizes(named)
        await self._verify_parking(named)

    async def parking(self, channel: str) -> str | None:
        """Return where the poison of a channel goes, None where nobody has said so."""
        topic = topic_of(channel)
        return _parking((await self._notes([topic])).get(topic, ""))

    async def need(self, channel: str) -> Topic:
        """Return the topic of a channel. Errors: TopologyMismatch if there is none, BrokerUnavailable."""
        name = topic_of(channel)
        found = (await self._cluster.topics([name])).get(name)
        if found is None:
            raise TopologyMismatch(
                f"topic {name} of channel {channel} is not declared; declare it first (the app does so at start)"
            )
        return found

    async def inspect(self, channel: str) -> ChannelStatus:
        """Return lag and members of the channel's group. Errors: TopologyMismatch, BrokerUnavailable."""
        topic, name = await self.need(channel), topic_of(channel)
        return ChannelStatus(
            messages=await self._cluster.backlog(name, name, topic),
            consumers=await self._cluster.members(name),
        )

    # --- making

    async def _make(self, channels: Mapping[str, Channel]) -> dict[str, Topic]:
        copies = self._options.replication_factor or min(COPIES, max(1, self._cluster.brokers))
        if copies == 1:
            log.warning(
                "topics are made with one copy: good for development, gone with the disk of their broker"
            )
        wanted = [
            NewTopic(topic, self._options.partitions, copies, self._settings(each, copies))
            for topic, each in channels.items()
        ]
        for topic, code, text in await self._cluster.create(wanted):
            if code != EXISTS_ALREADY:
                raise TopologyMismatch(
                    f"topic {topic} could not be made (code {code}): {text or 'no reason given'}"
                )
        return await self._listed(list(channels))

    def _settings(self, channel: Channel, copies: int) -> dict[str, str]:
        kept = -1 if channel.parking is None else max(int(self._options.retention_seconds * 1000), -1)
        settings = {
            "cleanup.policy": "delete",
            "retention.ms": str(kept),
            _SIZE: str(self._options.record_bytes_max),
        }
        if copies >= COPIES:
            settings["min.insync.replicas"] = "2"
        return settings

    async def _listed(self, topics: Sequence[str]) -> dict[str, Topic]:
        """Return new topics once the cluster lists them with leaders; before that a publish would find none."""
        deadline = self._clock.monotonic() + LISTED_SECONDS_MAX
        while self._clock.monotonic() < deadline:
            found = await self._cluster.topics(topics)
            if len(found) == len(topics) and all(min(each.leaders.values()) >= 0 for each in found.values()):
                return found
            await self._clock.sleep(_LOOK_SECONDS)
        raise BrokerUnavailable(f"Kafka has made {', '.join(topics)} and does not list them with leaders")

    # --- verifying

    def _verify(self, channel: Channel, topic: Topic) -> None:
        wanted = self._options
        name = f"channel {channel.name} (topic {topic_of(channel.name)})"
        if len(topic.leaders) != wanted.partitions:
            raise TopologyMismatch(
                f"{name} has {len(topic.leaders)} partitions, declared with {wanted.partitions}; set "
                "KafkaOptions.partitions to what it has, or delete it if it is empty: another number moves keys"
            )
        if wanted.replication_factor is not None and topic.copies < wanted.replication_factor:
            raise TopologyMismatch(
                f"{name} has {topic.copies} copies, declared with {wanted.replication_factor}; reassign its replicas"
            )

    async def _verify_sizes(self, channels: Mapping[str, Channel]) -> None:
        least = self._options.record_bytes_max
        for topic, told in (await self._cluster.settings(channels, _SIZE)).items():
            if told.isdecimal() and int(told) < least:
                raise TopologyMismatch(
                    f"channel {channels[topic].name} (topic {topic}) has {_SIZE}={told}, needed are {least}; "
                    "raise it there"
                )

    async def _verify_parking(self, channels: Mapping[str, Channel]) -> None:
        notes = await self._notes(channels)
        for topic, note in notes.items():
            channel = channels[topic]
            if note.startswith(_PARKING) and _parking(note) != channel.parking:
                raise TopologyMismatch(
                    f"channel {channel.name} (topic {topic}): parking is {_parking(note)!r}, "
                    f"declared with {channel.parking!r}"
                )
        wanted = {topic: f"{_PARKING}{channel.parking or ''}" for topic, channel in channels.items()}
        missing = {topic: note for topic, note in wanted.items() if notes.get(topic) != note}
        if missing:
            await self._cluster.note(NOTES_GROUP, missing)

    async def _notes(self, topics: Iterable[str]) -> dict[str, str]:
        """Return the notes that there are."""
        committed = await self._cluster.committed(NOTES_GROUP, {topic: [0] for topic in topics})
        return {topic: found[0].note for topic, found in committed.items() if 0 in found}


def _parking(note: str) -> str | None:
    return note.removeprefix(_PARKING) or None
