"""Publishing: one flusher hands messages to the producer, and each gets exactly one outcome within its bound.

aiokafka's `send` may wait: for an unknown topic 40 s (KAF-13), for room in a full batch (KAF-21). So the flusher asks
whether a topic exists before it sends, and nobody waits for the flusher. A producer whose messages expire is stuck or
cut off: it is abandoned with all that is pending in it and replaced, because what is UNKNOWN must not go out later, and
an idempotent producer would try for ever (KAF-2, KAF-20).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final

from aiokafka.errors import (
    InvalidTopicError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

from saga.brokers.base import OutMessage, PublishOutcome
from saga.brokers.kafka.clients import Clients, bounded
from saga.brokers.kafka.cluster import Cluster
from saga.brokers.kafka.names import topic_of
from saga.brokers.kafka.options import KafkaOptions
from saga.brokers.kafka.records import Record, record_of
from saga.brokers.kafka.room import Room
from saga.clock import Clock, Ids, Spawner
from saga.errors import BrokerUnavailable

log: Final[logging.Logger] = logging.getLogger("saga.kafka")

TICK_SECONDS: Final = 0.25
_TOPICS_MAX: Final = 1_000
_NEIGHBOURS_SECONDS_MAX: Final = 1.0
_STOP_SECONDS_MAX: Final = 2.0
_REFUSALS: Final = (
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    InvalidTopicError,
)

Outcome = asyncio.Future[PublishOutcome]


class _Publish:
    """One message on its way."""

    __slots__ = ("future", "record", "settled", "since", "size", "topic")

    def __init__(self, future: Outcome, since: float, size: int, topic: str, record: Record) -> None:
        self.future = future
        self.since = since
        self.size = size
        self.topic = topic
        self.record = record
        self.settled = False


class Publisher:
    """Publishes through one producer at a time. `run` and `watch` are its two loops."""

    def __init__(
        self,
        clients: Clients,
        cluster: Cluster,
        *,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        options: KafkaOptions,
    ) -> None:
        self._clients = clients
        self._cluster = cluster
        self._clock = clock
        self._ids = ids
        self._spawner = spawner
        self._options = options
        limit = options.queue_length_max
        self._room = None if limit is None else Room(cluster, limit, clock)
        self._waiting: deque[_Publish] = deque()
        self._sent: dict[int, _Publish] = {}
        """Handed to the producer, in the order of that."""
        self._number = 0
        self._bytes = 0
        self._due = asyncio.Event()
        self._replace = asyncio.Event()
        self._closed = False
        self.up: asyncio.Event = asyncio.Event()
        """Whether there is a producer that has started."""
        self.producers: int = 0
        """How many have started: 1 in a quiet life."""

    @property
    def pending(self) -> int:
        """Publishes without an outcome."""
        return len(self._waiting) + len(self._sent)

    # --- publish

    def publish(self, messages: Sequence[OutMessage]) -> list[Outcome]:
        """See `Broker.publish`."""
        create_future = asyncio.get_running_loop().create_future
        now = self._clock.monotonic()
        futures: list[Outcome] = []
        room = self._options.pending_messages_max - self.pending
        for message in messages:
            future: Outcome = create_future()
            futures.append(future)
            size = len(message.body)
            if self._closed:
                future.set_result(PublishOutcome.UNKNOWN)
                continue
            if (
                room <= 0
                or size > self._options.message_bytes_max
                or self._bytes + size > self._options.pending_bytes_max
            ):
                future.set_result(PublishOutcome.REFUSED)
                continue
            try:
                record = record_of(message)
            except ValueError:  # text that is not Unicode
                future.set_result(PublishOutcome.REFUSED)
                continue
            room -= 1
            self._bytes += size
            self._waiting.append(_Publish(future, now, size, topic_of(message.channel), record))
        if self._waiting:
            self._due.set()
        return futures

    def _settle(self, publish: _Publish, outcome: PublishOutcome) -> None:
        if publish.settled:
            return
        publish.settled = True
        self._bytes -= publish.size
        if (
            not publish.future.done()
        ):  # the caller may have cancelled it; the message is on its way all the same
            publish.future.set_result(outcome)

    # --- the producer's life

    async def run(self) -> None:
        """One producer after the other, until cancelled."""
        failures = 0
        while True:
            producer = self._clients.producer()
            try:
                await bounded(
                    self._options.request_seconds_max,
                    producer.start(),
                    spawner=self._spawner,
                    name="saga-kafka-start",
                )
                failures = 0
                await self._live(producer)
            # lint: allow broad-except because this loop is its own supervisor: without it nothing is published again
            except Exception as error:
                failures += 1
                log.info("kafka has no producer yet: %s", type(error).__name__)
            finally:
                self.up.clear()
                stop_seconds = _STOP_SECONDS_MAX if self._closed and not self._sent else 0.0
                await self._clients.end_producer(producer, stop_seconds)
                self._give_up_sent()
            if failures:
                await self._clock.sleep(self._options.pause(failures, self._ids.fraction()))

    async def _live(self, producer: Any) -> None:
        """Flush until the producer is to be replaced or ended."""
        self.producers += 1
        self._replace.clear()
        self._due.set()
        self.up.set()
        flushing = self._spawner.spawn(self._flush(producer), name="saga-kafka-flush")
        replacing = self._spawner.spawn(self._replace.wait(), name="saga-kafka-replace")
        try:
            await asyncio.wait({flushing, replacing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            flushing.cancel()
            replacing.cancel()
        if not self._closed:
            log.warning("kafka producer is replaced; %d publishes are without an answer", len(self._sent))
            await self._wait_for_neighbours()

    async def _wait_for_neighbours(self) -> None:
        """Let what the producer has in flight beside the reason for its end be answered, if it can be."""
        answers = [each.future for each in self._sent.values() if not each.settled]
        if answers:
            await asyncio.wait(answers, timeout=_NEIGHBOURS_SECONDS_MAX)

    def _give_up_sent(self) -> None:
        """In flight in a producer that is gone is unknown; what waits may still make it in the next one."""
        sent, self._sent = self._sent, {}
        for publish in sent.values():
            self._settle(publish, PublishOutcome.UNKNOWN)

    # --- flushing

    async def _flush(self, producer: Any) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            while self._waiting:
                # a message leaves the queue after it was handed over: a flusher that is cancelled has taken none
                try:
                    absent = await self._absent(producer)
                except BrokerUnavailable:
                    # nobody can tell: they wait here, where they can expire, and not in a send that goes out later
                    await self._clock.sleep(self._options.backoff_seconds)
                    continue
                for publish in list(islice(self._waiting, _TOPICS_MAX)):
                    if not publish.settled:
                        await self._hand_over(producer, publish, absent)
                    if self._waiting and self._waiting[0] is publish:
                        self._waiting.popleft()

    async def _absent(self, producer: Any) -> Collection[str]:
        """Return those topics of the next messages that the cluster does not have; the others are known after this.

        Errors: BrokerUnavailable.
        """
        known = producer.client.cluster.partitions_for_topic
        topics = {each.topic for each in islice(self._waiting, _TOPICS_MAX)}
        unknown = {topic for topic in topics if not known(topic)}
        if not unknown:
            return ()
        found = await self._cluster.topics(unknown)
        for topic in found:
            await producer.client.add_topic(topic)
        return unknown - set(found)

    async def _hand_over(self, producer: Any, publish: _Publish, absent: Collection[str]) -> None:
        if publish.topic in absent:
            self._settle(publish, PublishOutcome.UNROUTABLE)
            return
        record = publish.record
        try:
            if self._room is not None and not await self._room.take(publish.topic):
                self._settle(publish, PublishOutcome.REFUSED)
                return
            answer = await producer.send(
                publish.topic, record.value, key=record.key, headers=list(record.headers)
            )
        except BrokerUnavailable:
            self._settle(publish, PublishOutcome.UNKNOWN)
            return
        except Exception as error:  # of whatever kind: the next message must not wait for this one's end
            self._settle(publish, self._outcome(error))
            return
        self._number += 1
        self._sent[self._number] = publish
        answer.add_done_callback(partial(self._answered, self._number))

    def _answered(self, number: int, answer: asyncio.Future[Any]) -> None:
        """The producer knows; if we gave up before, its word comes too late."""
        error = None if answer.cancelled() else answer.exception()
        publish = self._sent.pop(number, None)
        if publish is None:
            return
        if answer.cancelled():
            self._settle(publish, PublishOutcome.UNKNOWN)
        else:
            self._settle(publish, PublishOutcome.CONFIRMED if error is None else self._outcome(error))

    def _outcome(self, error: BaseException) -> PublishOutcome:
        if isinstance(error, _REFUSALS):
            return PublishOutcome.REFUSED
        if isinstance(error, UnknownTopicOrPartitionError):
            return PublishOutcome.UNROUTABLE
        if not self._replace.is_set():
            # what ends a message of an idempotent producer otherwise, ends the producer (KAF-2)
            log.warning("kafka producer failed with %s", type(error).__name__)
            self._replace.set()
        return PublishOutcome.UNKNOWN

    # --- time

    async def watch(self) -> None:
        """Keep the bound of each publish, and find out about topics that have gone."""
        last = self._clock.monotonic()
        asked_at = 0.0
        while True:
            await self._clock.sleep(TICK_SECONDS)
            now = self._clock.monotonic()
            lagged = now - last > TICK_SECONDS + 1.0
            last = now
            if lagged:
                continue  # AIO-3: our own loop stood still, and no answer could be read; they are before the next look
            self._expire(now)
            if now - asked_at >= self._options.late_seconds and (late := self._late_topics(now)):
                asked_at = now
                await self._give_up_topics(late)

    def _expire(self, now: float) -> None:
        """Whatever expires, on either side of the flusher, says that this producer makes no progress."""
        limit = now - (self._options.publish_seconds_max - 2 * TICK_SECONDS)
        expired = False
        while self._waiting and self._waiting[0].since <= limit:
            self._settle(self._waiting.popleft(), PublishOutcome.UNKNOWN)
            expired = True
        while self._sent and (first := next(iter(self._sent.items())))[1].since <= limit:
            del self._sent[first[0]]
            self._settle(first[1], PublishOutcome.UNKNOWN)
            expired = True
        if expired:
            self._replace.set()

    def _late_topics(self, now: float) -> set[str]:
        late = now - self._options.late_seconds
        topics: set[str] = set()
        for publish in self._sent.values():
            if publish.since > late:
                break
            topics.add(publish.topic)
        return topics

    async def _give_up_topics(self, topics: Collection[str]) -> None:
        """What waits in the producer for a topic that was deleted would wait for ever: it is unroutable."""
        try:
            gone = set(topics) - set(await self._cluster.topics(topics))
        except BrokerUnavailable:
            return
        if not gone:
            return
        for number, publish in list(self._sent.items()):
            if publish.topic in gone:
                del self._sent[number]
                self._settle(publish, PublishOutcome.UNROUTABLE)
        self._replace.set()

    def close(self) -> None:
        """Take no more; `run` is then cancelled, and `give_up` says what is unknown."""
        self._closed = True

    def give_up(self) -> None:
        """Whatever has no outcome is unknown now."""
        while self._waiting:
            self._settle(self._waiting.popleft(), PublishOutcome.UNKNOWN)
        self._give_up_sent()
