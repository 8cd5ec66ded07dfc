"""The coordinator: takes what arrives in batches, advances the instances in one commit, then acks and publishes.

Order of writes: reply received, batch committed, reply acked, commands published. A crash before the commit leaves the
reply unacked (C5-C7); after it the reply comes again and is stale (C8), and the relay finds the commands.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Final
from uuid import UUID

from pydantic_core import to_json

from saga import statelog
from saga.batcher import BESIDE_MIN, Batcher, Lane
from saga.brokers.base import Broker, Channel, Consumer, Delivery
from saga.clock import Clock, Ids, Spawner, woken
from saga.coordinator.arrivals import Arrival, ReplyArrival, TimerArrival
from saga.coordinator.redrive import RedriveBudget
from saga.coordinator.work import BatchWork
from saga.definition.registry import Registry
from saga.errors import DefinitionChanged, MessageInvalid, SagaError
from saga.failpoints import failpoint
from saga.messages import (
    CONTENT_TYPE,
    Reply,
    apart,
    commands_channel,
    decode_replies,
    encode_reply,
    parking_channel,
    replies_channel,
)
from saga.outbox.parking import Parking, parked_row
from saga.outbox.publisher import CommandPublisher
from saga.storage.base import Advanced, Closed, CoordinatorStore, ParkedRow
from saga.uuids import parse_uuid

log: Final[logging.Logger] = logging.getLogger("saga.coordinator")

BATCH: Final = 256
PREFETCH: Final = 256
PARK_BATCH: Final = 64
DUE_BATCH: Final = 200
POLL_SECONDS: Final = 1.0
MORE_SECONDS: Final = 0.05
PENDING_SECONDS: Final = 5.0
POISON_SECONDS: Final = 60.0
RETRY_SECONDS_MAX: Final = 5.0


class Coordinator:
    """Runs the sagas of one namespace in one process, beside any number of others like it."""

    def __init__(
        self,
        registry: Registry,
        broker: Broker,
        store: CoordinatorStore,
        parking: Parking,
        publisher: CommandPublisher,
        *,
        namespace: str,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        on_closed: Callable[[Sequence[Closed]], None],
        lane: Lane | None = None,
    ) -> None:
        """`lane` is shared with the starts of this process: what arrives while one commits makes a larger batch."""
        self._registry = registry
        self._broker = broker
        self._store = store
        self._parking = parking
        self._publisher = publisher
        self._namespace = namespace
        self._clock = clock
        self._ids = ids
        self._spawner = spawner
        self._on_closed = on_closed
        self._budget = RedriveBudget()
        self._lane = lane or Lane()
        self._arrivals: Batcher[Arrival] = Batcher(
            self._advance,
            batch_max=BATCH,
            spawner=spawner,
            name="saga-advance",
            workers=store.writers,
            beside_min=BESIDE_MIN,
            lane=self._lane,
        )
        self._parked: Batcher[tuple[ParkedRow, Callable[[], None]]] = Batcher(
            self._park, batch_max=PARK_BATCH, spawner=spawner, name="saga-parking"
        )
        self._consumer: Consumer | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._wake = asyncio.Event()
        self._next_due = 0.0
        self._pending_at = 0.0
        self._pending_above = 0
        self._held_back: dict[int, float] = {}
        self._queues: dict[tuple[str, str], str] = {}
        self._done: list[tuple[Consumer, Delivery]] = []
        """Deliveries whose replies are all committed; acked together."""

    # --- life cycle ---------------------------------------------------------------------------

    def channels(self) -> list[Channel]:
        """Return every channel that the sagas served here use: the replies', and each step's."""
        queues = {
            step.queue
            for name, version in self._registry.served()
            for step in self._registry.require(name, version).steps
        }
        names = [replies_channel(self._namespace)] + [
            commands_channel(self._namespace, queue) for queue in sorted(queues)
        ]
        return [Channel(name, parking_channel(name)) for name in names]

    async def start(self) -> None:
        """Store the definitions, declare the channels, and begin. Raises DefinitionChanged, BrokerUnavailable."""
        served = [self._registry.require(name, version) for name, version in sorted(self._registry.served())]
        self._queues = {(each.name, step.name): step.queue for each in served for step in each.steps}
        changed = await self._store.register(
            [(each.name, each.version, each.fingerprint, each.content) for each in served]
        )
        if changed:
            raise DefinitionChanged(
                "The database knows this name and version with another content; raise the version.",
                saga=changed[0],
            )
        await self._broker.declare(self.channels())
        self._consumer = await self._broker.consume(replies_channel(self._namespace), prefetch=PREFETCH)
        loops: dict[str, Callable[[], Awaitable[None]]] = {
            "receive": partial(self._receive, self._consumer),
            "timers": self._watch_time,
        }
        self._loops = [
            self._spawner.spawn(self._alive(name, loop), name=f"saga-{name}") for name, loop in loops.items()
        ]
        if not self._broker.capabilities.durable:
            await self._wake_all()

    async def stop(self, grace: timedelta) -> None:
        """Take no more, commit what was received, hand the rest back unacked."""
        self._stopping.set()
        self._wake.set()
        if self._consumer is not None:
            await self._consumer.stop()
        rest = self._spawner.spawn(self._finish(), name="saga-coordinator-rest")
        await asyncio.wait({rest}, timeout=grace.total_seconds())
        if self._consumer is not None:
            await self._consumer.close()

    async def _finish(self) -> None:
        if self._loops:
            await asyncio.wait(self._loops)
        await self._arrivals.join()
        await self._parked.join()

    async def _wake_all(self) -> None:
        """A broker that forgets was restarted with us: every outstanding command is due at once."""
        above: UUID | None = None
        while page := await self._store.read_open(above, DUE_BATCH):
            self._arrivals.offer_all(TimerArrival(run_id, broker_forgot=True) for run_id in page)
            above = page[-1]

    async def _alive(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Keep a loop running until we stop: an error that it did not expect must not end it in silence."""
        while not self._stopping.is_set():
            try:
                await loop()
                return  # no error: we stop, or the consumer was closed and there will never be more
            except Exception as error:  # lint: allow broad-except because this is the supervisor of the loops
                log.error("the loop %s begins again after %s", name, type(error).__name__)
                await self._clock.sleep(POLL_SECONDS)

    # --- receiving ----------------------------------------------------------------------------

    async def _receive(self, consumer: Consumer) -> None:
        while deliveries := await consumer.receive():
            for delivery in deliveries:
                try:
                    self._take(consumer, delivery, decode_replies(delivery.body))
                except MessageInvalid:
                    self._sort_out(consumer, delivery)

    def _take(
        self, consumer: Consumer, delivery: Delivery, replies: Sequence[Reply], bad: Sequence[ParkedRow] = ()
    ) -> None:
        """Take a delivery in: it is acked when its replies are committed and what is bad in it is parked."""
        failpoint("C5")  # delivered, nothing written: it comes again
        left = len(replies) + len(bad)

        def done() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._done.append((consumer, delivery))

        arrivals = [ReplyArrival(self._run_of(reply), reply, done) for reply in replies]
        now = self._clock.monotonic()
        for queue, count in Counter(self._queues.get((r.saga, r.step), "") for r in replies).items():
            self._budget.answered(queue, count, now)
        self._arrivals.offer_all(arrivals)
        self._parked.offer_all((row, done) for row in bad)

    def _run_of(self, reply: Reply) -> UUID:
        """Return the run that a reply is for. Raises MessageInvalid if it cannot be one of this namespace."""
        if reply.namespace != self._namespace:
            raise MessageInvalid("A reply of another namespace.", reason="foreign_namespace")
        try:
            return parse_uuid(reply.runid)
        except ValueError:
            raise MessageInvalid("runid: no UUID.") from None

    def _replies(self, body: bytes) -> Sequence[Reply]:
        replies = decode_replies(body)
        for reply in replies:
            self._run_of(reply)
        return replies

    def _sort_out(self, consumer: Consumer, delivery: Delivery) -> None:
        """Tell what is bad in a delivery from the rest."""
        good: list[Reply] = []
        bad: list[ParkedRow] = []
        for part, reply, error in apart(delivery.body, self._replies):
            if reply is not None:
                good.append(reply)
            if error is not None:
                bad.append(parked_row(delivery, error.reason, body=part, kind=error.text, detail=error.text))
        self._take(consumer, delivery, good, bad)

    async def _park(self, items: Sequence[tuple[ParkedRow, Callable[[], None]]]) -> None:
        await self._parking.park([row for row, _ in items])
        for _, done in items:
            done()
        self._ack_done()

    # --- advancing ----------------------------------------------------------------------------

    async def _advance(self, arrivals: Sequence[Arrival], *, poison: str | None = None) -> None:
        """Advance a batch until it is committed; the arrivals stay unacked for as long as that takes.

        `poison` says why one instance alone could not be committed: it is set apart, its replies stay beside it.
        """
        pause = 0.05
        while True:
            try:
                work, advanced = await self._commit(arrivals, poison)
            except SagaError as error:
                log.warning("%d arrivals wait: %s", len(arrivals), error.code)
                with self._lane.aside():  # a start must not wait for this: it fails within its own bound
                    await self._clock.sleep(pause * (1 + self._ids.fraction()))
                pause = min(pause * 2, RETRY_SECONDS_MAX)
            # lint: allow broad-except because the instance is set apart with an incident
            except Exception as error:
                if poison is not None:
                    log.error("run %s stays as it is: %s", arrivals[0].run_id, type(error).__name__)
                    return
                if len({arrival.run_id for arrival in arrivals}) == 1:
                    poison = type(error).__name__
                    log.error("run %s cannot be committed: %s", arrivals[0].run_id, poison)
                    continue
                # P9: some instance makes the commit fail; halve until it stands alone
                half = len(arrivals) // 2
                await self._advance(arrivals[:half])
                await self._advance(arrivals[half:])
                return
            else:
                await self._hand_over(arrivals, work, advanced)
                return

    async def _commit(self, arrivals: Sequence[Arrival], poison: str | None) -> tuple[BatchWork, Advanced]:
        work = BatchWork(
            self._namespace,
            self._registry,
            arrivals,
            ids=self._ids,
            budget=self._budget,
            monotonic=self._clock.monotonic(),
            poison=poison,
        )
        confirmed = self._publisher.take_confirmed()
        try:
            advanced = await self._store.advance(work.run_ids, work, confirmed)
        except BaseException:
            self._publisher.untake(confirmed)
            raise
        self._publisher.deleted(confirmed)
        return work, advanced

    async def _hand_over(self, arrivals: Sequence[Arrival], work: BatchWork, advanced: Advanced) -> None:
        """Publish, ack and tell, after the commit.

        What fails here is no failed commit: the replies come again and are stale, the relay finds the commands.
        """
        rows, lost = advanced
        for window in sorted(work.windows):
            # T2 T3 K1 K2 K3: committed; what follows is in the outbox, the replies are not acked
            failpoint(window)
        if work.unknown or work.contrary:
            await self._parking.park(
                [_refused(self._namespace, each.reply, "unknown_run") for each in work.unknown]
                + [_refused(self._namespace, each.reply, "contrary_ids") for each in work.contrary]
            )
        self._publisher.publish(rows)
        for arrival in arrivals:
            if isinstance(arrival, ReplyArrival) and arrival.run_id not in lost:
                arrival.done()
        self._ack_done()
        if work.state_changes:
            statelog.tell(self._namespace, work.state_changes, lost)
        closed = [run for run in work.closed if run.run_id not in lost] if lost else work.closed
        if closed:
            self._on_closed(closed)
        if work.due_in_ms is not None:
            self._due_in(work.due_in_ms / 1000)
        if lost:
            log.info("fenced: %d instances were moved by another process and are decided again", len(lost))
            await self._advance([arrival for arrival in arrivals if arrival.run_id in lost])

    def _ack_done(self) -> None:
        if not self._done:
            return
        failpoint("C8")  # committed, not acked: it comes again and is stale
        done, self._done = self._done, []
        for consumer in {consumer for consumer, _ in done}:
            consumer.ack([delivery for its, delivery in done if its is consumer])

    # --- time ---------------------------------------------------------------------------------

    def _due_in(self, seconds: float) -> None:
        """Wake the poll when the nearest instance is due, if that is before its own next turn."""
        due = self._clock.monotonic() + seconds
        if due < self._next_due:
            self._next_due = due
            self._wake.set()

    async def _watch_time(self) -> None:
        """P11: a poll without end over every open instance of a served version, whoever made it."""
        served = self._registry.served()
        while not self._stopping.is_set():
            # set before the look: what is written while it lasts may bring the next turn forward
            self._next_due = self._clock.monotonic() + POLL_SECONDS * (0.9 + 0.2 * self._ids.fraction())
            try:
                due = await self._store.read_due(DUE_BATCH, served) if served else []
                if due:
                    failpoint("T1")  # seen, nothing written: whoever looks next sees them again
                self._arrivals.offer_all(TimerArrival(run_id) for run_id in due)
                await self._take_pending()
                if len(due) == DUE_BATCH:
                    self._due_in(MORE_SECONDS)
            except SagaError as error:
                log.warning("timers wait: %s", error.code)
            while len(self._arrivals) > BATCH:
                await self._clock.sleep(0.01)
            await self._sleep_until_due()

    async def _sleep_until_due(self) -> None:
        while not self._stopping.is_set():
            left = self._next_due - self._clock.monotonic()
            if left <= 0:
                return
            self._wake.clear()
            await woken(self._wake, left, clock=self._clock, spawner=self._spawner, name="saga-timer")

    async def _take_pending(self) -> None:
        """P29: apply replies that another release stored for versions which this process has.

        A page each turn and then from the front again: what cannot be applied yet never hides what is behind it.
        """
        now = self._clock.monotonic()
        served = self._registry.served()
        if now < self._pending_at or not served:
            return
        self._held_back = {id_: until for id_, until in self._held_back.items() if until > now}
        page = await self._store.read_pending(self._pending_above, DUE_BATCH, served)
        if len(page) < DUE_BATCH:
            self._pending_above, self._pending_at = 0, now + PENDING_SECONDS
        else:
            self._pending_above = page[-1][0]
        for id_, body in page:
            if id_ not in self._held_back:
                # applied once a minute at most: what made it fail may have been mended meanwhile
                self._held_back[id_] = now + POISON_SECONDS
                try:
                    (reply,) = self._replies(body)
                except (
                    MessageInvalid
                ):  # another release kept what this one would not take; it stays for that one
                    log.error("the reply %d that is kept beside its instance cannot be read", id_)
                    continue
                self._arrivals.offer(ReplyArrival(self._run_of(reply), reply, _nothing, pending_id=id_))


def _nothing() -> None:
    """A stored reply has no delivery to ack."""


def _refused(namespace: str, reply: Reply, reason: str) -> ParkedRow:
    channel = replies_channel(namespace)
    return ParkedRow(
        channel,
        reason,
        f"{reason}:{reply.saga}",
        CONTENT_TYPE,
        {},
        encode_reply(reply, to_json(reply.data)),
    )
