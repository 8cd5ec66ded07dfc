"""What every service does that runs handlers for messages: one consumer per channel, receive while there is room, stop.

deliveries -> intake -> Scheduler -> Runner -> outgoing -> ack
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from math import inf
from typing import Final, Protocol

from saga.brokers.base import Broker, Channel, Consumer, Delivery
from saga.clock import Clock, Spawner
from saga.failpoints import failpoint
from saga.participant.calls import Calls
from saga.participant.runner import Runner
from saga.participant.scheduler import Scheduler
from saga.participant.served import Table
from saga.participant.switch import Watch
from saga.participant.threads import Threads
from saga.storage.base import ParticipantStore

PREFETCH: Final = 256
WAITING_MAX: Final = 1024
GRACE: Final = timedelta(seconds=30)
FENCED_SECONDS: Final = 10.0
"""Bound for what is committing when the grace is over: every statement of it is bounded more tightly."""
log: Final[logging.Logger] = logging.getLogger("saga.participant")


class Taking(Protocol):
    """What turns deliveries into attempts."""

    def take(self, table: Table, consumer: Consumer, delivery: Delivery) -> None:
        """Take one delivery in. Does not wait."""
        ...

    async def join(self) -> None:
        """Wait until what it refused is safe."""
        ...


class Giving(Protocol):
    """What brings answers out."""

    @property
    def pending(self) -> int:
        """Answers that are not safe yet."""
        ...

    async def join(self) -> None:
        """Wait until every answer is safe and its deliveries are acked."""
        ...


class Shell:
    """Receives, runs, and stops in order. A service gives it what is at both ends: `_connect`, before `start`."""

    def __init__(
        self,
        tables: Mapping[Channel, Table],
        broker: Broker,
        store: ParticipantStore | None,
        *,
        clock: Clock,
        spawner: Spawner,
        concurrency: int,
        prefetch: int,
    ) -> None:
        """`tables` are the handlers by channel; `concurrency` bounds messages whose handlers run.

        It is raised to two batches of the largest batch handler. `prefetch` counts messages per channel. Raises
        MissingExtra if a plain `def` handler asks for a session and its driver is not installed.
        """
        self.counts: Counter[str] = Counter()
        """What happened, by name."""
        self._tables = tables
        self._broker = broker
        self._clock = clock
        self._spawner = spawner
        self._prefetch = prefetch
        served = [each for table in tables.values() for each in table.values()]
        commands_max = max(concurrency, 2 * max((each.batch or 1 for each in served), default=1))
        if store is not None and any(each.threaded and each.needs_session for each in served):
            store.serve_threads()
        self._watch = Watch(clock, spawner)
        self._threads = Threads()
        self._calls = Calls(self._watch, self._threads, clock=clock, spawner=spawner)
        self._scheduler = Scheduler(
            commands_max=commands_max,
            waiting_max=max(WAITING_MAX, 4 * commands_max),
            transactions_max=inf if store is None else store.transactions_max,
            clock=clock,
            spawner=spawner,
        )
        self._consumers: list[Consumer] = []
        self._receiving: list[asyncio.Task[None]] = []
        self._stopping: asyncio.Task[None] | None = None
        self._draining = False

    def _connect(self, intake: Taking, runner: Runner, outgoing: Giving) -> None:
        self._intake = intake
        self._outgoing = outgoing
        self._scheduler.runs(runner.run)

    # --- life -------------------------------------------------------------------------------------

    @property
    def channels(self) -> Sequence[Channel]:
        """The channels served here, each with what takes what the broker gives up on."""
        return list(self._tables)

    @property
    def threads_taken(self) -> int:
        """How many threads have a message, from before its handler to after its COMMIT."""
        return self._threads.taken

    def close_threads(self) -> None:
        """End the threads that are free, and each of the others when what runs in it has returned. Idempotent."""
        self._threads.close()

    async def start(self) -> None:
        """Declare the channels and begin to receive. Raises TopologyMismatch, BrokerUnavailable."""
        await self._broker.declare(self.channels)
        for channel, table in self._tables.items():
            name = channel.name
            consumer = await self._broker.consume(name, prefetch=self._prefetch)
            self._consumers.append(consumer)
            self._receiving.append(
                self._spawner.spawn(self._supervise(name, table, consumer), name=f"saga-receive-{name}")
            )

    async def stop(self, grace: timedelta = GRACE) -> None:
        """Take no more messages, finish what runs within `grace`, hand the rest back unacked (P17). Idempotent."""
        if self._stopping is None:
            self._stopping = self._spawner.spawn(self._stop(grace), name="saga-stop")
        await asyncio.wait({self._stopping})

    async def _stop(self, grace: timedelta) -> None:
        self._draining = True
        for consumer in self._consumers:
            await consumer.stop()
        draining = self._spawner.spawn(self._drain(), name="saga-drain")
        if self._scheduler.running:
            failpoint("M4")
        done, _ = await asyncio.wait({draining}, timeout=grace.total_seconds())
        if not done:
            log.warning(
                "the grace is over: %d messages are given back unfinished, %d answers not safe yet",
                self._scheduler.running,
                self._outgoing.pending,
            )
            self._watch.abandon()
            # what is committing is never cancelled: it ends by itself, bounded
            await asyncio.wait({draining}, timeout=FENCED_SECONDS)
            draining.cancel()
        self._watch.close()
        self.close_threads()
        for consumer in self._consumers:
            await consumer.close()
        for task in self._receiving:
            task.cancel()

    async def _drain(self) -> None:
        """Wait until nothing runs and every answer is safe: a reply that went out saves a run elsewhere."""
        await self._scheduler.stop()
        await self._intake.join()
        await self._outgoing.join()

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
