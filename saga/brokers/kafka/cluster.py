"""Questions to the cluster: its topics, their ends, who is in a group and what a group has committed.

One client, made when it is needed and thrown away when it fails, so that the next question begins afresh. Each question
is bounded; what goes wrong is BrokerUnavailable. Nothing here creates a topic by asking for it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.admin import CreateTopicsRequest, DescribeConfigsRequest, DescribeGroupsRequest
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest

from saga.brokers.kafka.clients import FAILURES, Clients, bounded
from saga.clock import Clock, Spawner
from saga.errors import BrokerUnavailable

T = TypeVar("T")

ANSWER_SECONDS_MAX: Final = 4.0
EXISTS_ALREADY: Final = 36
_UNKNOWN_TOPIC: Final = 3
_MOVED: Final = (14, 15, 16)  # the group's coordinator is loading, away, or another one
_AGAIN_SECONDS: Final = 0.1
_LATEST, _EARLIEST = -1, -2
_TOPIC_RESOURCE: Final = 2


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as the cluster tells it: its partitions' leaders, and of how many copies there are at least."""

    leaders: Mapping[int, int]
    copies: int


class Committed(NamedTuple):
    """What a group has committed for a partition, with the note beside it."""

    offset: int
    note: str


class NewTopic(NamedTuple):
    """A topic to be made."""

    name: str
    partitions: int
    copies: int
    settings: Mapping[str, str]


class Cluster:
    """Asks. `place` is what people are told where it is."""

    def __init__(self, clients: Clients, place: str, *, clock: Clock, spawner: Spawner) -> None:
        self._clients = clients
        self._clock = clock
        self._place = place
        self._spawner = spawner
        self._client: Any = None
        self._opening = asyncio.Lock()
        self.brokers: int = 0
        """How many brokers there were when last asked."""

    async def open(self) -> None:
        """Reach the cluster. Errors: BrokerUnavailable."""
        await self.topics([])

    async def close(self) -> None:
        """Close the client; bounded."""
        client, self._client = self._client, None
        if client is not None:
            await self._clients.end_client(client)

    async def topics(self, names: Collection[str]) -> dict[str, Topic]:
        """Return those of the topics that exist."""
        return await self._ask(lambda client: self._topics(client, names))

    async def create(self, topics: Sequence[NewTopic]) -> list[tuple[str, int, str]]:
        """Make topics; return name, error code and text of each that was not, also because it is there (KAF-14)."""
        wanted: list[Any] = [
            (each.name, each.partitions, each.copies, [], list(each.settings.items())) for each in topics
        ]
        request = CreateTopicsRequest(wanted, timeout=int(ANSWER_SECONDS_MAX * 1000), validate_only=False)

        async def made(client: Any) -> list[tuple[str, int, str]]:
            answer = await client.send(client.get_random_node(), request)
            return [(name, code, text or "") for name, code, text in answer.topic_errors if code]

        return await self._ask(made)

    async def settings(self, topics: Iterable[str], names: Sequence[str]) -> dict[str, dict[str, str]]:
        """Return these settings of each topic that tells them."""
        request = DescribeConfigsRequest([(_TOPIC_RESOURCE, topic, list(names)) for topic in topics], False)

        async def told(client: Any) -> dict[str, dict[str, str]]:
            answer = await client.send(client.get_random_node(), request)
            entries = [(topic, entries) for code, _, _, topic, entries in answer.resources if not code]
            return {topic: {each[0]: each[1] for each in found} for topic, found in entries}

        return await self._ask(told)

    async def committed(
        self, group: str, partitions: Mapping[str, Iterable[int]]
    ) -> dict[str, dict[int, Committed]]:
        """Return what a group has committed, topic by topic; what it never committed is left out."""
        request = OffsetFetchRequest(group, [(topic, list(each)) for topic, each in partitions.items()])

        async def told(client: Any) -> dict[str, dict[int, Committed]]:
            answer = await self._of_coordinator(client, group, request, lambda each: each.error_code)
            return {
                topic: {number: Committed(offset, note) for number, offset, note, _ in each if offset >= 0}
                for topic, each in answer.topics
            }

        return await self._ask(told)

    async def note(self, group: str, notes: Mapping[str, str]) -> None:
        """Commit a note at offset 0 of the first partition of each topic, for a group that has no members."""
        topics = [(topic, [(0, 0, note)]) for topic, note in notes.items()]
        request = OffsetCommitRequest(group, -1, "", -1, topics)

        async def noted(client: Any) -> None:
            await self._of_coordinator(client, group, request, _first_error)

        await self._ask(noted)

    async def members(self, group: str) -> int:
        """Return how many consumers a group has."""
        request = DescribeGroupsRequest([group])

        async def told(client: Any) -> int:
            answer = await self._of_coordinator(client, group, request, lambda each: each.groups[0][0])
            return len(answer.groups[0][5])

        return await self._ask(told)

    async def ends(self, name: str, topic: Topic, *, first: bool = False) -> dict[int, int]:
        """Return the offset after the last message of each partition that has a leader, or of the first one."""
        of_leader: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for partition, leader in topic.leaders.items():
            if leader >= 0:
                of_leader[leader].append((partition, _EARLIEST if first else _LATEST))

        async def told(client: Any) -> dict[int, int]:
            found: dict[int, int] = {}
            for leader, wanted in of_leader.items():
                answer = await client.send(leader, OffsetRequest(-1, 0, [(name, wanted)]))
                for _, partitions in answer.topics:
                    found.update({each[0]: each[3] for each in partitions if not each[1]})
            return found

        return await self._ask(told)

    async def backlog(self, name: str, group: str, topic: Topic) -> int:
        """Return how many messages a group has not committed: those of a topic that no one else has taken."""
        ends, starts = await self.ends(name, topic), await self.ends(name, topic, first=True)
        committed = (await self.committed(group, {name: topic.leaders})).get(name, {})
        done = {partition: each.offset for partition, each in committed.items()}
        return sum(
            max(0, end - max(done.get(partition, 0), starts.get(partition, 0)))
            for partition, end in ends.items()
        )

    # --- inside

    async def _topics(self, client: Any, names: Collection[str]) -> dict[str, Topic]:
        # an answer for no name is about the brokers alone; the flag keeps a lenient cluster from making the topics
        request = MetadataRequest(list(names), allow_auto_topic_creation=False)
        answer = await client.send(client.get_random_node(), request)
        self.brokers = len(answer.brokers)
        found: dict[str, Topic] = {}
        for code, name, _, partitions in answer.topics:
            if code == _UNKNOWN_TOPIC or not partitions:
                continue
            leaders = {each[1]: each[2] for each in partitions}
            found[name] = Topic(leaders, min(len(each[3]) for each in partitions))
        return found

    async def _ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """Ask on the present client; one that fails is not asked again."""

        used: list[Any] = []

        async def asked() -> T:
            used.append(await self._ready())
            return await question(used[0])

        try:
            return await bounded(ANSWER_SECONDS_MAX, asked(), spawner=self._spawner, name="saga-kafka-ask")
        except FAILURES as error:
            if used and used[0] is self._client:
                await self.close()
            raise BrokerUnavailable(
                f"Kafka at {self._place} did not answer: {type(error).__name__}."
            ) from None

    async def _of_coordinator(
        self, client: Any, group: str, request: Any, error_of: Callable[[Any], int]
    ) -> Any:
        """Ask the broker that keeps a group, and ask again while it is only finding out that it does."""
        while True:
            try:
                node = await client.coordinator_lookup(0, group)
                answer = await client.send(node, request)
            except KafkaError as error:
                if error.errno not in _MOVED:
                    raise
            else:
                code = error_of(answer)
                if code not in _MOVED:
                    if code:
                        raise for_code(code)()
                    return answer
            await self._clock.sleep(_AGAIN_SECONDS)  # its question is bounded

    async def _ready(self) -> Any:
        async with self._opening:
            if self._client is None:
                client = self._clients.client()
                try:
                    await client.bootstrap()
                except BaseException:
                    await self._clients.end_client(client)
                    raise
                self._client = client
            return self._client


def _first_error(answer: Any) -> int:
    return next((code for _, partitions in answer.topics for _, code in partitions if code), 0)
