"""From a delivery to attempts: read the event, park what is none, let copies join (P30)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID

from saga.batcher import Batcher
from saga.brokers.base import Consumer, Delivery
from saga.clock import Clock, Spawner
from saga.errors import MessageInvalid
from saga.inbox.envelope import Event, read_event
from saga.inbox.served import EventCommand, KeyFailed, ServedEvent
from saga.messages import Direction, split
from saga.outbox.parking import Parking, parked_row
from saga.participant.answers import PAYLOAD_INVALID
from saga.participant.attempts import Attempt, Held
from saga.participant.replies import Acks
from saga.participant.served import InputInvalid, Table
from saga.storage.base import BarrierKey, ParkedRow

ONCE: Final = "event"
"""Direction of an event's key: it has no other."""


class EventIntake:
    """Turns the deliveries of every topic into attempts; knows the attempts that are under way."""

    def __init__(
        self,
        *,
        namespace: str,
        skipped: frozenset[str],
        parking: Parking,
        add: Callable[[Attempt], None],
        clock: Clock,
        spawner: Spawner,
        counts: Counter[str],
    ) -> None:
        """`skipped` names the topics whose events of other types are none of ours."""
        self._namespace = namespace
        self._skipped = skipped
        self._parking = parking
        self._add = add
        self._clock = clock
        self._counts = counts
        self._done: Batcher[tuple[ParkedRow | None, Held]] = Batcher(
            self._finish, spawner=spawner, name="saga-inbox-refused", batch_max=64
        )
        self._open: dict[str, Attempt] = {}

    def take(self, table: Table, consumer: Consumer, delivery: Delivery) -> None:
        """Take one delivery in, an event or a batch of them. Does not wait."""
        try:
            pack = delivery.body.lstrip()[:1] == b"["
            bodies = split(delivery.body) if pack else [delivery.body]
        except MessageInvalid as error:
            self._park(Held(consumer, delivery, 1), "message_invalid", error.text)
            return
        held = Held(consumer, delivery, len(bodies))
        for body in bodies:
            self._take(table, held, body)

    def settled(self, attempt: Attempt) -> None:
        """The attempt has ended: a copy that comes later is a new one."""
        if self._open.get(attempt.command.commandid) is attempt:
            del self._open[attempt.command.commandid]

    async def join(self) -> None:
        """Wait until everything to be parked is."""
        await self._done.join()

    # --- one event

    def _take(self, table: Table, held: Held, body: bytes) -> None:
        try:
            event = read_event(body)
        except MessageInvalid as error:
            self._park(held, error.reason, error.text, body=body)
            return
        served = table.get((event.type, Direction.FORWARD.value))
        if served is not None:
            assert isinstance(served, ServedEvent)
            self._accept(served, event, held)
        elif held.delivery.channel in self._skipped:
            self._counts["skipped"] += 1
            self._done.offer((None, held))
        else:
            self._park(held, "unknown_type", body=body)

    def _accept(self, served: ServedEvent, event: Event, held: Held) -> None:
        command = self._command(event, held.delivery.channel)
        try:
            key = served.key(command)
        except InputInvalid as invalid:
            self._park(held, PAYLOAD_INVALID, invalid.error.text, body=event.body)
            return
        except KeyFailed as failed:
            self._park(held, "key_failed", type(failed.error).__name__, body=event.body)
            return
        command.commandid = command.runid = key
        known = self._open.get(key)
        if known is not None and known.joins(command):
            known.join(command, held)
            self._counts["joined"] += 1
            return
        barrier_key = BarrierKey(UUID(key), command.topic, 0, 0, ONCE)
        attempt = Attempt(command, served, held, self._clock.monotonic(), barrier_key)
        self._open[key] = attempt
        self._add(attempt)

    def _command(self, event: Event, topic: str) -> EventCommand:
        return EventCommand(
            id=event.id,
            namespace=self._namespace,
            saga="",
            sagaversion=0,
            sagaid=event.id,
            runid="",
            step=topic,
            activity=event.type,
            direction="forward",
            commandid="",
            attempt=event.attempt,
            replyto="",
            data=event.data,
            topic=topic,
            event=event,
        )

    # --- what is not ours

    def _park(self, held: Held, reason: str, detail: str = "", *, body: bytes | None = None) -> None:
        self._counts["parked"] += 1
        self._done.offer((parked_row(held.delivery, reason, body=body, kind=detail, detail=detail), held))

    async def _finish(self, items: Sequence[tuple[ParkedRow | None, Held]]) -> None:
        if rows := [row for row, _ in items if row is not None]:
            await self._parking.park(rows)
        acks = Acks()
        for _, held in items:
            acks.settle(held)
        acks.send()
