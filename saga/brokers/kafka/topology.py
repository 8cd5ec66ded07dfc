"""Topics: what they are made with, what must be so when they exist, and where the poison of a channel goes.

A topic cannot say which channel takes its poison, so a group without members keeps it as a note beside a committed
offset, which goes when the topic goes. Kafka forgets such notes after a week in which nobody has declared the channel
(`offsets.retention.minutes`); the next declare writes it again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from saga.brokers.base import Channel, ChannelStatus, Finding, Severity
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
_IN_STEP: Final = "min.insync.replicas"
_KEPT: Final = "retention.ms"
_CLEANUP: Final = "cleanup.policy"
_UNCLEAN: Final = "unclean.leader.election.enable"
_LOOKED_AT: Final = (_SIZE, _IN_STEP, _KEPT, _CLEANUP, _UNCLEAN)
_PARKING: Final = "parking="
MISMATCHES: Final = ("partitions", "copies", "message-size", "parking")
"""Findings with which nothing would work as it was declared: no mode starts with them."""

_ONE_COPY: Final = (
    "has one copy, which goes with the disk of its broker",
    "run three brokers, and reassign its replicas to all of them",
)


def settings(channel: Channel, copies: int, options: KafkaOptions) -> dict[str, str]:
    """Return what a topic is made with beside its partitions and copies."""
    made = {
        _CLEANUP: "delete",
        _KEPT: str(kept(channel, options)),
        _SIZE: str(options.record_bytes_max),
    }
    if copies >= COPIES:
        made[_IN_STEP] = "2"
    return made


def kept(channel: Channel, options: KafkaOptions) -> int:
    """Return for how many milliseconds a channel's messages are kept; -1 is for ever."""
    return -1 if channel.parking is None else max(int(options.retention_seconds * 1000), -1)


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
        notes = await self._notes(named)
        told = await self._cluster.settings(named, _LOOKED_AT)
        for topic, channel in named.items():
            for each in self._findings(channel, found[topic], told.get(topic, {}), notes.get(topic, "")):
                if each.code in MISMATCHES:
                    raise TopologyMismatch(f"{each.text}; {each.fix}")
        await self._note_parking(named, notes)

    async def check(self, channels: Iterable[Channel]) -> list[Finding]:
        """Return what is not as it should be, and make nothing. Errors: BrokerUnavailable."""
        named = {topic_of(channel.name): channel for channel in channels}
        found = await self._cluster.topics(list(named))
        notes = await self._notes(found) if found else {}
        told = await self._cluster.settings(found, _LOOKED_AT) if found else {}
        findings: list[Finding] = []
        for topic, channel in named.items():
            if topic not in found:
                findings += self._of_missing(channel)
                continue
            findings += self._findings(channel, found[topic], told.get(topic, {}), notes.get(topic, ""))
            if topic not in told:
                text = f"{_named(channel)} does not tell its settings"
                fix = "grant DESCRIBE_CONFIGS on it, or check once as a user that has it"
                findings.append(Finding("unseen", Severity.NOTE, channel.name, text, fix))
        return findings

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
        copies = self._copies()
        if copies == 1:
            log.warning(
                "topics are made with one copy: good for development, gone with the disk of their broker"
            )
        wanted = [
            NewTopic(topic, self._options.partitions, copies, settings(each, copies, self._options))
            for topic, each in channels.items()
        ]
        for topic, code, text in await self._cluster.create(wanted):
            if code != EXISTS_ALREADY:
                raise TopologyMismatch(
                    f"topic {topic} could not be made (code {code}): {text or 'no reason given'}"
                )
        return await self._listed(list(channels))

    def _copies(self) -> int:
        """Return how many copies a topic is made with."""
        return self._options.replication_factor or min(COPIES, max(1, self._cluster.brokers))

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

    def _findings(
        self, channel: Channel, topic: Topic, told: Mapping[str, str], note: str
    ) -> Iterator[Finding]:
        """Yield what is not as it should be of a topic that is there; what it does not tell is not judged."""
        wanted, name = self._options, _named(channel)

        def finding(code: str, text: str, fix: str, severity: Severity = Severity.REFUSE) -> Finding:
            return Finding(code, severity, channel.name, f"{name} {text}", fix)

        if len(topic.leaders) != wanted.partitions:
            yield finding(
                "partitions",
                f"has {len(topic.leaders)} partitions, declared with {wanted.partitions}",
                "set KafkaOptions.partitions to what it has, or delete it if it is empty: another number moves keys",
            )
        if wanted.replication_factor is not None and topic.copies < wanted.replication_factor:
            yield finding(
                "copies",
                f"has {topic.copies} copies, declared with {wanted.replication_factor}",
                "reassign its replicas",
            )
        if (size := told.get(_SIZE, "")).isdecimal() and int(size) < wanted.record_bytes_max:
            yield finding(
                "message-size", f"has {_SIZE}={size}, needed are {wanted.record_bytes_max}", "raise it there"
            )
        if note.startswith(_PARKING) and _parking(note) != channel.parking:
            yield finding(
                "parking",
                f"was declared with the parking {_parking(note)!r}, now with {channel.parking!r}",
                "release one name for it",
            )
        if topic.copies == 1:
            yield finding("one-copy", *_ONE_COPY)
        elif (least := told.get(_IN_STEP, "")).isdecimal() and int(least) < 2:
            yield finding(
                "min-insync",
                f"confirms what one broker has: {_IN_STEP}={least}",
                f"set {_IN_STEP}=2 on it, with three copies",
            )
        if told.get(_UNCLEAN) == "true":
            yield finding(
                "unclean-election",
                "may take back what it confirmed, when a copy that was behind becomes the leader",
                f"set {_UNCLEAN}=false on it",
            )
        if "compact" in told.get(_CLEANUP, ""):
            yield finding(
                "compacted", "keeps the last message of each key only", f"set {_CLEANUP}=delete on it"
            )
        keeps, wish = told.get(_KEPT, "-1"), kept(channel, self._options)
        if keeps.isdecimal() and (wish < 0 or int(keeps) < wish):
            yield finding(
                "retention",
                f"loses what is older than {int(keeps) / 86_400_000:.3g} days, finished or not",
                f"set {_KEPT}={wish} on it, or a shorter KafkaOptions.retention_seconds",
                Severity.REFUSE if channel.parking is not None else Severity.WARN,
            )

    def _of_missing(self, channel: Channel) -> Iterator[Finding]:
        """Yield what is to be said of a topic that start would make."""
        name = _named(channel)
        yield Finding(
            "missing", Severity.NOTE, channel.name, f"{name} is not there", "the app's start makes it"
        )
        if self._copies() == 1:
            text, fix = _ONE_COPY
            yield Finding("one-copy", Severity.REFUSE, channel.name, f"{name} {text}", fix)

    async def _note_parking(self, channels: Mapping[str, Channel], notes: Mapping[str, str]) -> None:
        wanted = {topic: f"{_PARKING}{channel.parking or ''}" for topic, channel in channels.items()}
        missing = {topic: note for topic, note in wanted.items() if notes.get(topic) != note}
        if missing:
            await self._cluster.note(NOTES_GROUP, missing)

    async def _notes(self, topics: Iterable[str]) -> dict[str, str]:
        """Return the notes that there are."""
        committed = await self._cluster.committed(NOTES_GROUP, {topic: [0] for topic in topics})
        return {topic: found[0].note for topic, found in committed.items() if 0 in found}


def _named(channel: Channel) -> str:
    return f"channel {channel.name} (topic {topic_of(channel.name)})"


def _parking(note: str) -> str | None:
    return note.removeprefix(_PARKING) or None
