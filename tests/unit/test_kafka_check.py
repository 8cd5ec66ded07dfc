"""G-05: what is found of a topic that is not as it should be, each by its code."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final, cast

import pytest

from saga.brokers.base import Channel, Severity
from saga.brokers.kafka.cluster import Cluster, Committed, Topic
from saga.brokers.kafka.options import KafkaOptions
from saga.brokers.kafka.topology import Topology
from saga.clock import SystemClock
from saga.errors import TopologyMismatch

pytestmark = [pytest.mark.feature("G-05"), pytest.mark.stack("pure")]

WORK: Final = Channel("work", "work.parked")
DAY: Final = 86_400_000
GOOD: Final = {
    "cleanup.policy": "delete",
    "retention.ms": str(14 * DAY),
    "max.message.bytes": "1200000",
    "min.insync.replicas": "2",
    "unclean.leader.election.enable": "false",
}


class Told:
    """A cluster that tells what a test says of its topics, and takes nothing."""

    def __init__(self) -> None:
        self.brokers = 3
        self.known: dict[str, Topic] = {"work": Topic(dict.fromkeys(range(8), 1), 3)}
        self.said: dict[str, dict[str, str]] = {"work": dict(GOOD)}
        self.notes = {"work": "parking=work.parked"}

    async def topics(self, names: Collection[str]) -> dict[str, Topic]:
        return {name: self.known[name] for name in names if name in self.known}

    async def settings(self, topics: Collection[str], names: Sequence[str]) -> dict[str, dict[str, str]]:
        return {topic: self.said[topic] for topic in topics if topic in self.said}

    async def committed(self, group: str, partitions: Collection[str]) -> Mapping[str, dict[int, Committed]]:
        return {topic: {0: Committed(0, self.notes[topic])} for topic in partitions if topic in self.notes}

    async def note(self, group: str, notes: Mapping[str, str]) -> None:
        raise AssertionError("a check writes nothing")

    async def create(self, topics: object) -> None:
        raise AssertionError("a check makes nothing")


def topology(told: Told, options: KafkaOptions | None = None) -> Topology:
    return Topology(cast(Cluster, told), options or KafkaOptions(), SystemClock())


async def test_nothing_is_found_of_a_topic_as_we_make_it() -> None:
    assert await topology(Told()).check([WORK]) == []


@pytest.mark.feature("G-05", acceptance=True)
@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("min.insync.replicas", "1", "min-insync"),
        ("retention.ms", str(13 * DAY), "retention"),
        ("cleanup.policy", "compact,delete", "compacted"),
        ("unclean.leader.election.enable", "true", "unclean-election"),
        ("max.message.bytes", "1000", "message-size"),
    ],
)
async def test_a_setting_that_loses_messages_is_found(name: str, value: str, code: str) -> None:
    told = Told()
    told.said["work"][name] = value
    (found,) = await topology(told).check([WORK])
    assert (found.code, found.severity, found.channel) == (code, Severity.REFUSE, "work")
    assert found.fix


@pytest.mark.feature("G-05", acceptance=True)
async def test_the_number_of_partitions_and_copies_is_found() -> None:
    told = Told()
    told.known["work"] = Topic({0: 1}, 1)
    codes = [found.code for found in await topology(told, KafkaOptions(replication_factor=3)).check([WORK])]
    assert codes == ["partitions", "copies", "one-copy"]


async def test_another_parking_is_found_and_is_a_mismatch_for_declare() -> None:
    told = Told()
    (found,) = await topology(told).check([Channel("work", "elsewhere")])
    assert found.code == "parking"
    with pytest.raises(TopologyMismatch, match="SG206") as caught:
        await topology(told).declare([Channel("work", "elsewhere")])
    assert "'work.parked', now with 'elsewhere'" in caught.value.text


@pytest.mark.parametrize("name", ["min.insync.replicas", "retention.ms"])
async def test_declare_lets_pass_what_only_production_refuses(name: str) -> None:
    told = Told()
    told.said["work"][name] = "1"
    await topology(told).declare([WORK])


async def test_a_topic_that_keeps_everything_keeps_enough() -> None:
    told = Told()
    told.said["work"]["retention.ms"] = "-1"
    assert await topology(told).check([WORK]) == []


async def test_a_parking_topic_that_forgets_is_warned_of() -> None:
    told = Told()
    told.notes["work"] = "parking="
    (found,) = await topology(told).check([Channel("work")])
    assert (found.code, found.severity) == ("retention", Severity.WARN)


async def test_a_topic_that_is_not_there_is_noted_and_what_it_would_be() -> None:
    told = Told()
    (found,) = await topology(told).check([Channel("new", None)])
    assert (found.code, found.severity) == ("missing", Severity.NOTE)

    told.brokers = 1
    codes = [found.code for found in await topology(told).check([Channel("new", None)])]
    assert codes == ["missing", "one-copy"]


async def test_a_topic_that_tells_nothing_is_noted() -> None:
    told = Told()
    del told.said["work"]
    (found,) = await topology(told).check([WORK])
    assert (found.code, found.severity) == ("unseen", Severity.NOTE)
