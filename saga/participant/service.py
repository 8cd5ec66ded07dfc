"""The participant's shell: one consumer per queue, and the parts between a delivery and its ack, started and stopped.

deliveries -> Intake -> Scheduler -> Runner -> Replies -> ack
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from math import inf
from typing import Final

from saga.brokers.base import Broker, Channel, Consumer
from saga.clock import Clock, Ids, Spawner
from saga.definition.activity import Participant
from saga.failpoints import failpoint
from saga.messages import commands_channel, parking_channel
from saga.outbox.parking import Parking
from saga.participant.attempts import Attempt
from saga.participant.calls import Calls
from saga.participant.forward import ForwardRuns
from saga.participant.intake import Intake
from saga.participant.outside import OutsideRuns
from saga.participant.replies import Replies
from saga.participant.runner import Runner
from saga.participant.scheduler import Scheduler
from saga.participant.served import Table, fence, serve
from saga.participant.settling import Settling
from saga.participant.stateless import StatelessRuns
from saga.participant.switch import Watch
from saga.participant.threads import Threads
from saga.participant.undo import UndoRuns
from saga.retention.ages import Horizon
from saga.storage.base import ParkingStore, ParticipantStore

PREFETCH: Final = 256
WAITING_MAX: Final = 1024
GRACE: Final = timedelta(seconds=30)
FENCED_SECONDS: Final = 10.0
"""Bound for what is committing when the grace is over: every statement of it is bounded more tightly."""
log: Final[logging.Logger] = logging.getLogger("saga.participant")


class ParticipantService:
    """Serves every activity of its participants that has a handler here.

    `store` is None for a participant without a database; without `parking` refused messages go to the parking
    channels. `concurrency` bounds running commands; it is raised to two
    batches of the largest batch handler. `prefetch` counts messages per queue. What is behind `horizon` is refused;
    without a barrier there is none, since there is nothing that could be purged. `counts` tells what happened, by name.
    Raises at construction what `serve` raises: DefinitionError, DuplicateActivity, MissingCapability; and MissingExtra
    if a plain `def` handler asks for a session and its driver is not installed.
    """

    def __init__(
        self,
        participants: Sequence[Participant],
        broker: Broker,
        store: ParticipantStore | None,
        parking: ParkingStore | None,
        *,
        namespace: str,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        concurrency: int = 64,
        prefetch: int = PREFETCH,
        horizon: Horizon | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        kept = Parking(parking, broker, clock=clock, ids=ids)
        self._broker = broker
        self._clock = clock
        self._spawner = spawner
        self._prefetch = prefetch
        self._tables = {
            commands_channel(namespace, queue): table
            for queue, table in serve(
                participants, stateless=store is None, capabilities=broker.capabilities
            ).items()
        }
        batches = [served.batch or 1 for table in self._tables.values() for served in table.values()]
        commands_max = max(concurrency, 2 * max(batches, default=1))
        if store is not None and any(
            served.threaded and served.needs_session
            for table in self._tables.values()
            for served in table.values()
        ):
            store.serve_threads()
        self._watch = Watch(clock, spawner)
        self._threads = Threads()
        self._replies = Replies(
            broker, clock=clock, ids=ids, spawner=spawner, settled=self._settled, counts=self.counts
        )
        self._scheduler = Scheduler(
            commands_max=commands_max,
            waiting_max=max(WAITING_MAX, 4 * commands_max),
            transactions_max=inf if store is None else store.transactions_max,
            clock=clock,
            spawner=spawner,
        )
        self._intake = Intake(
            namespace=namespace,
            stateless=store is None,
            horizon=horizon,
            fence=fence(),
            parking=kept,
            add=self._scheduler.add,
            answer=self._replies.send,
            clock=clock,
            spawner=spawner,
            counts=self.counts,
        )
        self._scheduler.runs(self._make_runner(store, kept, ids).run)
        self._consumers: list[Consumer] = []
        self._receiving: list[asyncio.Task[None]] = []
        self._stopping: asyncio.Task[None] | None = None
        self._draining = False

    def _make_runner(self, store: ParticipantStore | None, parking: Parking, ids: Ids) -> Runner:
        calls = Calls(self._watch, self._threads, clock=self._clock, spawner=self._spawner)
        answer, clock, counts = self._replies.send, self._clock, self.counts
        settling = forward = undo = outside = stateless = None
        if store is None:
            stateless = StatelessRuns(calls, answer=answer, clock=clock, counts=counts)
        else:
            settling = Settling(store, answer=answer, clock=clock, ids=ids, counts=counts)
            forward = ForwardRuns(settling, calls, clock=clock, counts=counts)
            undo = UndoRuns(settling, calls, clock=clock, counts=counts)
            outside = OutsideRuns(settling, calls, clock=clock, counts=counts)
        return Runner(
            stateless=stateless,
            settling=settling,
            forward=forward,
            undo=undo,
            outside=outside,
            parking=parking,
            answer=answer,
            forget=self._settled,
            counts=counts,
        )

    def _settled(self, attempt: Attempt) -> None:
        self._intake.settled(attempt)

    # --- life -------------------------------------------------------------------------------------

    @property
    def channels(self) -> Sequence[Channel]:
        """The work channels of the queues served here, each with its parking channel."""
        return [Channel(name, parking_channel(name)) for name in self._tables]

    @property
    def threads_taken(self) -> int:
        """How many threads have a command, from before its handler to after its COMMIT."""
        return self._threads.taken

    async def start(self) -> None:
        """Declare the channels and begin to receive. Raises TopologyMismatch, BrokerUnavailable."""
        await self._broker.declare(self.channels)
        for name, table in self._tables.items():
            consumer = await self._broker.consume(name, prefetch=self._prefetch)
            self._consumers.append(consumer)
            self._receiving.append(
                self._spawner.spawn(self._supervise(name, table, consumer), name=f"saga-receive-{name}")
            )

    async def stop(self, grace: timedelta = GRACE) -> None:
        """Stop taking commands, finish what runs within `grace`, hand the rest back unacked (P17). Idempotent."""
        if self._stopping is None:
            self._stopping = self._spawner.spawn(self._stop(grace), name="saga-participant-stop")
        await asyncio.wait({self._stopping})

    async def _stop(self, grace: timedelta) -> None:
        self._draining = True
        for consumer in self._consumers:
            await consumer.stop()
        draining = self._spawner.spawn(self._drain(), name="saga-participant-drain")
        if self._scheduler.running:
            failpoint("M4")
        done, _ = await asyncio.wait({draining}, timeout=grace.total_seconds())
        if not done:
            log.warning(
                "the grace is over: %d commands are given back unfinished, %d replies unconfirmed",
                self._scheduler.running,
                self._replies.pending,
            )
            self._watch.abandon()
            # what is committing is never cancelled: it ends by itself, bounded
            await asyncio.wait({draining}, timeout=FENCED_SECONDS)
            draining.cancel()
        self._watch.close()
        self._threads.close()
        for consumer in self._consumers:
            await consumer.close()
        for task in self._receiving:
            task.cancel()

    async def _drain(self) -> None:
        """Wait until nothing runs and every reply is confirmed: a reply that went out saves a run elsewhere."""
        await self._scheduler.stop()
        await self._intake.join()
        await self._replies.join()

    # --- receiving --------------------------------------------------------------------------------

    async def _supervise(self, name: str, table: Table, consumer: Consumer) -> None:
        """Receive until stopped; a fault of one pass is logged, and the next begins after a pause."""
        ended = False
        while not ended and not self._draining:
            ended = await self._survived(name, table, consumer)

    async def _survived(self, name: str, table: Table, consumer: Consumer) -> bool:
        try:
            return not await self._receive(table, consumer)
        except Exception as error:
            log.error("receiving from %s failed with %s and goes on", name, type(error).__name__)
            await self._clock.sleep(1.0)
            return False

    async def _receive(self, table: Table, consumer: Consumer) -> bool:
        """Take deliveries in while there is room; False once there will be no more.

        Commands that wait are bounded, replies on their way are not: receiving never waits for publishing (P33).
        """
        deliveries = await consumer.receive()
        for delivery in deliveries:
            await self._scheduler.room()
            if self._draining:
                return False
            self._intake.take(table, consumer, delivery)
            self._scheduler.wake()
        return bool(deliveries)
