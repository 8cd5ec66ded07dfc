"""Consuming: a subscription that outlives its memberships, with a window of offsets for each partition it has.

Deliveries are settled in the window that they came from. When partitions are taken away their windows are dropped and
what was unfinished is fetched again by whoever gets them: revocation is the lost connection of the port, and a late ack
finds a window that is not in use any more. Commits are made by one task, off the path of whoever acks.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Final

from saga.brokers.base import Delivery
from saga.brokers.kafka.clients import Clients
from saga.brokers.kafka.cluster import Cluster, Topic
from saga.brokers.kafka.membership import Membership
from saga.brokers.kafka.names import topic_of
from saga.brokers.kafka.offsets import Held, Window
from saga.brokers.kafka.options import KafkaOptions
from saga.brokers.kafka.records import delivery_of
from saga.clock import Clock, Ids, Spawner
from saga.errors import BrokerUnavailable

log: Final[logging.Logger] = logging.getLogger("saga.kafka")

FIRST_SECONDS_MAX: Final = 8.0
"""A subscription waits so long for its first partitions; where members of its group have just died they come later."""
CLOSE_SECONDS_MAX: Final = 8.0
LEAVING_SECONDS_MAX: Final = 1.0
_COMMIT_FAILURES_MAX: Final = 5

Park = Callable[[Delivery], Awaitable[bool]]


class KafkaConsumer:
    """A subscription to one channel. `park` publishes poison to the parking channel and says whether it is there."""

    def __init__(
        self,
        channel: str,
        *,
        prefetch: int,
        clients: Clients,
        cluster: Cluster,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        options: KafkaOptions,
        park: Park | None,
        forget: Callable[[KafkaConsumer], None],
    ) -> None:
        self.channel = channel
        self._topic = topic_of(channel)
        self._prefetch = prefetch
        self._clients = clients
        self._cluster = cluster
        self._clock = clock
        self._ids = ids
        self._spawner = spawner
        self._options = options
        self._park = park
        self._forget = forget
        self._windows: dict[int, Window] = {}
        """Of the present assignment; another assignment is another dictionary."""
        self._buffer: deque[Delivery] = deque()
        self._out_of_reach = 0
        """Unfinished messages that nobody will settle here: given back after `stop`."""
        self._there = asyncio.Event()
        self._settled = asyncio.Event()
        self._finished = asyncio.Event()
        self._assigned = asyncio.Event()
        self._has_assignment = False
        """Whether the group has answered, if only that there is no partition for us."""
        self._progress_at = 0.0
        self._fetched = 0
        self._stopping = asyncio.Event()
        self._stopped = asyncio.Event()
        self._closing = asyncio.Event()
        self._revoking = False
        self._joined = asyncio.Event()
        self._member: Membership | None = None
        self._task: asyncio.Task[None] | None = None
        self.assignments: int = 0
        """How often it was given partitions: 1 in a quiet life."""
        self.memberships: int = 0
        """How many clients it has had: 1 in a quiet life."""

    # --- the life of a subscription

    async def open(self) -> None:
        """Join the group and wait for the first partitions. Raises BrokerUnavailable within 10 s."""
        self._task = self._spawner.spawn(self._run(), name="saga-kafka-consumer")
        waiting = self._spawner.spawn(self._assigned.wait(), name="saga-kafka-first-partitions")
        try:
            await asyncio.wait({waiting}, timeout=FIRST_SECONDS_MAX)
        except asyncio.CancelledError:
            self.abandon()
            raise
        finally:
            waiting.cancel()
        if not self._joined.is_set():
            self.abandon()
            raise BrokerUnavailable(f"topic {self._topic}: its group was not reached in time")

    async def _run(self) -> None:
        """One membership after the other, until `stop`."""
        failures = 0
        while not self._stopping.is_set():
            before = self._fetched
            member = self._member = Membership(
                self._topic,
                self._clients,
                options=self._options,
                spawner=self._spawner,
                assigned=self._on_assigned,
                revoked=self._on_revoked,
            )
            try:
                await member.join()
                self.memberships += 1
                self._joined.set()
                await self._live(member)
            # lint: allow broad-except because this loop is its own supervisor: without it a channel stands still
            except Exception as error:
                log.info("kafka consumer of %s lost its client: %s", self._topic, type(error).__name__)
            finally:
                # not cancelled with us: a client that is left half way keeps its partitions from the others
                ending = self._spawner.spawn(self._end(member), name="saga-kafka-consumer-end")
                await asyncio.wait({ending})
            failures = 1 if self._fetched > before else failures + 1
            if not self._stopping.is_set():
                await self._clock.sleep(self._options.pause(failures, self._ids.fraction()))
        self._stopped.set()
        self._there.set()

    async def _live(self, member: Membership) -> None:
        """Return when stopped and done; raise, or return, when the client has to be made again."""
        self._progress_at = self._clock.monotonic()
        fetching = self._spawner.spawn(self._fetch(member), name="saga-kafka-fetch")
        committing = self._spawner.spawn(self._keep_committing(member), name="saga-kafka-commits")
        watching = self._spawner.spawn(self._watch(member), name="saga-kafka-watch")
        stopping = self._spawner.spawn(self._stopping.wait(), name="saga-kafka-stopping")
        tasks = (fetching, committing, watching, stopping)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                await self._wind_up(fetching)
        finally:
            for task in tasks:
                task.cancel()

    async def _wind_up(self, fetching: asyncio.Task[None]) -> None:
        """Fetch no more, and keep the partitions until what was fetched is settled or taken away."""
        fetching.cancel()
        await asyncio.wait({fetching})
        self._stopped.set()
        self._there.set()
        while self._unfinished > self._out_of_reach and not self._closing.is_set():
            self._settled.clear()
            await self._settled.wait()

    async def _end(self, member: Membership) -> None:
        await self._commit(member)
        self._drop()
        await member.leave()

    @property
    def _unfinished(self) -> int:
        return sum(map(len, self._windows.values()))

    # --- partitions come and go

    def _on_assigned(self, partitions: Collection[int]) -> None:
        self._windows = {partition: Window(partition) for partition in partitions}
        self.assignments += 1
        self._progress_at = self._clock.monotonic()
        self._has_assignment = True
        self._assigned.set()
        self._settled.set()

    async def _on_revoked(self) -> None:
        """Let what is being worked on end, commit it, and let go: bounded, because the whole group waits (KAF-6)."""
        member = self._member
        if not self._windows or member is None:
            return
        self._revoking = True
        unseen = len(self._buffer)
        self._buffer.clear()
        try:
            await self._drain(unseen)
            await self._commit(member)
        finally:
            self._revoking = False
            self._drop()

    async def _drain(self, unseen: int) -> None:
        """Wait until all is settled but what nobody has received and what was given back."""
        deadline = self._clock.monotonic() + self._options.drain_seconds_max
        while (
            self._unfinished > unseen + self._out_of_reach
            and (left := deadline - self._clock.monotonic()) > 0
        ):
            self._settled.clear()
            waiting = self._spawner.spawn(self._settled.wait(), name="saga-kafka-drain")
            await asyncio.wait({waiting}, timeout=left)
            waiting.cancel()

    def _drop(self) -> None:
        """The partitions are no longer ours: what is unfinished is somebody's again (RMQ-13, KAF-17)."""
        self._windows = {}
        self._has_assignment = False
        self._out_of_reach = 0
        self._buffer.clear()
        if not self._stopped.is_set():
            self._there.clear()
        self._settled.set()

    # --- fetching

    async def _fetch(self, member: Membership) -> None:
        while True:
            room = self._prefetch - self._unfinished
            limit = self._options.ahead_messages_max
            wanted = [each for each, window in self._windows.items() if window.ahead < limit]
            if room <= 0 or not wanted or self._revoking:
                self._settled.clear()
                await self._settled.wait()
                continue
            for partition, records in (await member.fetch(wanted, room)).items():
                # while it waited the partitions may have gone and come back: these are of the present assignment
                window = self._windows.get(partition)
                if window is None:
                    member.rewind(partition, records[0].offset)
                    continue
                if records[0].offset < window.position:
                    window = self._windows[partition] = Window(partition)  # the topic was made anew
                for record in records:
                    held = window.add(record.offset)
                    self._buffer.append(delivery_of(self.channel, record, held))
                self._fetched += len(records)
                self._progress_at = self._clock.monotonic()
                self._there.set()

    # --- committing

    async def _keep_committing(self, member: Membership) -> None:
        while True:
            await self._finished.wait()
            self._finished.clear()
            if not await self._commit(member):
                self._finished.set()
            await self._clock.sleep(self._options.commit_seconds)

    async def _commit(self, member: Membership) -> bool:
        """Commit every partition up to its first unfinished message; return whether nothing is left to be said."""
        due = [
            (window, window.finished_to)
            for window in self._windows.values()
            if window.finished_to > window.committed
        ]
        if not due:
            return True
        if not await member.commit({window.partition: offset for window, offset in due}):
            return False
        for window, offset in due:
            window.committed = max(window.committed, offset)
        return True

    # --- watching

    async def _watch(self, member: Membership) -> None:
        """Return when the client has to be made again: silent although messages wait, or unable to commit (KAF-5)."""
        suspected = False
        while True:
            await self._clock.sleep(self._options.silent_seconds / 3)
            stuck = await self._is_stuck(member)
            if stuck and suspected:
                log.warning("kafka consumer of %s makes no progress: joining again", self._topic)
                return
            suspected = stuck

    async def _is_stuck(self, member: Membership) -> bool:
        quiet = self._clock.monotonic() - self._progress_at >= self._options.silent_seconds * 2 / 3
        mute = member.commit_failures >= _COMMIT_FAILURES_MAX
        if not quiet and not mute:
            return False
        try:
            topic = (await self._cluster.topics([self._topic])).get(self._topic)
            if topic is None:
                return False  # deleted: it is waited for until it is declared again
            if not self._windows:
                return not self._has_assignment  # with more members than partitions some have none
            return mute or (self._unfinished < self._prefetch and await self._is_behind(topic))
        except BrokerUnavailable:
            return False  # away: nobody makes progress

    async def _is_behind(self, topic: Topic) -> bool:
        """Whether there is something in our partitions that could be fetched."""
        windows = self._windows
        ends = await self._cluster.ends(self._topic, topic)
        starts = await self._cluster.ends(self._topic, topic, first=True)
        committed = (await self._cluster.committed(self._topic, {self._topic: windows})).get(self._topic, {})
        for partition, window in windows.items():
            known = committed[partition].offset if partition in committed else 0
            position = max(window.position, known, starts.get(partition, 0))
            if ends.get(partition, 0) > position and window.ahead < self._options.ahead_messages_max:
                return True
        return False

    # --- the port

    async def receive(self) -> Sequence[Delivery]:
        # The buffer is taken without an await after the wait, so a cancelled receive has taken nothing.
        while not self._buffer:
            if self._stopped.is_set():
                return ()
            self._there.clear()
            await self._there.wait()
        batch = tuple(self._buffer)
        self._buffer.clear()
        return batch

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        for _, held in self._ours(deliveries):
            held.window.finish(held)
            self._finished.set()
            self._settled.set()

    def retry(self, deliveries: Sequence[Delivery]) -> None:
        again: list[Delivery] = []
        for delivery, held in self._ours(deliveries):
            renewed = held.window.again(held)
            if self._stopped.is_set():
                self._out_of_reach += 1
                self._settled.set()
            else:
                again.append(replace(delivery, redelivered=True, delivery_count=2, token=renewed))
        if again:
            self._spawner.spawn(self._hand_out_again(again), name="saga-kafka-retry")

    def _ours(self, deliveries: Sequence[Delivery]) -> Iterator[tuple[Delivery, Held]]:
        """Yield those that are still to be settled here, each once."""
        for delivery in deliveries:
            held = delivery.token
            if isinstance(held, Held) and self._is_current(held):
                yield delivery, held

    def _is_current(self, held: Held) -> bool:
        window = held.window
        return self._windows.get(window.partition) is window and window.holds(held)

    async def _hand_out_again(self, deliveries: Sequence[Delivery]) -> None:
        await self._clock.sleep(self._options.retry_seconds)
        for delivery, held in list(self._ours(deliveries)):
            if self._park is not None and held.returns >= self._options.delivery_limit:
                await self._pass(delivery, held)
            elif self._stopped.is_set() or self._revoking:
                self._out_of_reach += 1
                self._settled.set()
            else:
                self._buffer.append(delivery)
                self._there.set()

    async def _pass(self, delivery: Delivery, held: Held) -> None:
        """Poison would hold its partition back: park it, and only then step past it (KAF-9)."""
        assert self._park is not None
        while self._is_current(held):
            if await self._park(delivery):
                log.warning("kafka parked a message of %s after %d deliveries", self._topic, held.returns)
                if self._is_current(held):
                    held.window.finish(held)
                    self._finished.set()
                    self._settled.set()
                return
            await self._clock.sleep(self._options.backoff_seconds_max)

    async def stop(self) -> None:
        self._stopping.set()
        if self._task is not None and not self._stopped.is_set():
            waiting = self._spawner.spawn(self._stopped.wait(), name="saga-kafka-stopped")
            await asyncio.wait(
                {waiting, self._task}, return_when=asyncio.FIRST_COMPLETED, timeout=CLOSE_SECONDS_MAX
            )
            waiting.cancel()
        self._stopped.set()
        self._there.set()
        if self._task is not None and not self._unfinished:
            # it is leaving its group: whoever is told of the stop may expect that others have its partitions
            await asyncio.wait({self._task}, timeout=LEAVING_SECONDS_MAX)

    async def close(self) -> None:
        self._closing.set()
        await self.stop()
        self._settled.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=CLOSE_SECONDS_MAX)
        self.abandon()

    def abandon(self) -> None:
        """Stop without waiting for the group to say goodbye."""
        self._stopping.set()
        self._closing.set()
        if self._task is not None:
            self._task.cancel()
        self._drop()
        self._stopped.set()
        self._there.set()
        self._forget(self)
