"""One aiokafka consumer as a member of one topic's group, from joining to leaving, with every wait bounded.

It tells its owner when partitions come and go. A rebalance takes all of them away and gives some back (KAF-18), so the
owner begins anew with each assignment.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, Final

from aiokafka import ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError
from aiokafka.structs import OffsetAndMetadata

from saga.brokers.kafka.clients import FAILURES, Clients, bounded
from saga.brokers.kafka.options import KafkaOptions
from saga.clock import Spawner

log: Final[logging.Logger] = logging.getLogger("saga.kafka")

JOIN_SECONDS_MAX: Final = 5.0
COMMIT_SECONDS_MAX: Final = 3.0
LEAVE_SECONDS_MAX: Final = 3.0
_POLL_SECONDS: Final = 1.0

Assigned = Callable[[Collection[int]], None]
Revoked = Callable[[], Awaitable[None]]


class Membership:
    """A member of the group that is named like its topic."""

    def __init__(
        self,
        topic: str,
        clients: Clients,
        *,
        options: KafkaOptions,
        spawner: Spawner,
        assigned: Assigned,
        revoked: Revoked,
    ) -> None:
        """`revoked` is awaited before the partitions are let go: the rebalance waits for it."""
        self._topic = topic
        self._clients = clients
        self._options = options
        self._spawner = spawner
        self._listener = _Listener(assigned, revoked)
        self._consumer: Any = clients.consumer(topic)
        self.commit_failures: int = 0
        """Commits in a row that failed for another reason than a rebalance."""

    async def join(self) -> None:
        """Connect and subscribe; the assignment comes later. Raises one of FAILURES."""
        await bounded(JOIN_SECONDS_MAX, self._consumer.start(), spawner=self._spawner, name="saga-kafka-join")
        # after the start, which would otherwise wait for the assignment (KAF-13)
        self._consumer.subscribe([self._topic], listener=self._listener)

    async def fetch(self, partitions: Collection[int], count_max: int) -> dict[int, list[Any]]:
        """Return records of these partitions, in order within each; none after a while. Cancelling is safe.

        After an error it must not be called again: aiokafka would go on behind what it could not hand out (KAF-7).
        """
        wanted = [TopicPartition(self._topic, partition) for partition in partitions]
        found = await self._consumer.getmany(
            *wanted, timeout_ms=int(_POLL_SECONDS * 1000), max_records=count_max
        )
        return {each.partition: records for each, records in found.items() if records}

    def rewind(self, partition: int, offset: int) -> None:
        """Fetch again from an offset: what was fetched came before its assignment was told."""
        with suppress(IllegalStateError):  # taken away meanwhile
            self._consumer.seek(TopicPartition(self._topic, partition), offset)

    async def commit(self, offsets: Mapping[int, int]) -> bool:
        """Commit explicit offsets (KAF-15); return whether they are. Bounded, never raises."""
        named = {
            TopicPartition(self._topic, partition): OffsetAndMetadata(offset, "")
            for partition, offset in offsets.items()
        }
        try:
            await bounded(
                COMMIT_SECONDS_MAX,
                self._consumer.commit(named),
                spawner=self._spawner,
                name="saga-kafka-commit",
            )
        except (CommitFailedError, IllegalStateError):
            log.info("kafka commit for %s comes too late: its partitions are another's", self._topic)
            return False
        except FAILURES as error:
            self.commit_failures += 1
            log.info("kafka commit for %s failed: %s", self._topic, type(error).__name__)
            return False
        self.commit_failures = 0
        return True

    async def leave(self) -> None:
        """Leave the group and end the client; abandoned if that takes too long."""
        self._listener.silence()
        await self._clients.end_consumer(self._consumer, LEAVE_SECONDS_MAX)

    async def abandon(self) -> None:
        """End the client without a word to the group, which notices after the session."""
        self._listener.silence()
        await self._clients.end_consumer(self._consumer, 0.0)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # the driver ships no types
    """What aiokafka calls, in the words of the owner."""

    def __init__(self, assigned: Assigned, revoked: Revoked) -> None:
        self._assigned = assigned
        self._revoked = revoked
        self._silent = False

    def silence(self) -> None:
        """The owner has finished with this member."""
        self._silent = True

    async def on_partitions_revoked(self, revoked: Collection[Any]) -> None:
        if not self._silent:
            await self._revoked()

    async def on_partitions_assigned(self, assigned: Collection[Any]) -> None:
        if not self._silent:
            self._assigned([each.partition for each in assigned])
