"""From a delivery to attempts: decode, park what is no command of ours or comes too late, and let copies join (P30).

One bad envelope of a pack is parked alone, the others go on. The namespace of the channel must equal the envelope's.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID

from saga.batcher import Batcher
from saga.brokers.base import Consumer, Delivery
from saga.clock import Clock, Spawner
from saga.errors import MessageInvalid
from saga.messages import FENCES, Command, Direction, apart, decode_commands, replies_channel, split
from saga.outbox.parking import Parking, parked_row
from saga.participant.answers import TOO_OLD, UNKNOWN_ACTIVITY, Answer
from saga.participant.attempts import Attempt, Held
from saga.participant.replies import Acks
from saga.participant.served import Served, Table
from saga.retention.ages import Horizon
from saga.storage.base import BarrierKey, ParkedRow

NO_KEY: Final = BarrierKey(UUID(int=0), "", 0, 0, "")
"""Of attempts in a participant without a database, which has no barrier to name."""
log: Final[logging.Logger] = logging.getLogger("saga.participant")


class Intake:
    """Turns the deliveries of every queue into attempts; knows the attempts that are under way."""

    def __init__(
        self,
        *,
        namespace: str,
        stateless: bool,
        horizon: Horizon | None,
        fence: Served,
        parking: Parking,
        add: Callable[[Attempt], None],
        answer: Callable[[Attempt, Answer], None],
        clock: Clock,
        spawner: Spawner,
        counts: Counter[str],
    ) -> None:
        self._namespace = namespace
        self._replies = replies_channel(namespace)
        self._stateless = stateless
        self._horizon = horizon
        self._fence = fence
        self._add = add
        self._answer = answer
        self._clock = clock
        self._counts = counts
        self._parking = parking
        self._parked: Batcher[tuple[ParkedRow, Held]] = Batcher(
            self._park, spawner=spawner, name="saga-parking", batch_max=64
        )
        self.open: dict[str, Attempt] = {}
        """Attempts under way by command id, until their reply is confirmed."""

    def take(self, table: Table, consumer: Consumer, delivery: Delivery) -> None:
        """Take one delivery in. Does not wait."""
        try:
            commands = decode_commands(delivery.body)
        except MessageInvalid:
            self._take_apart(table, consumer, delivery)
            return
        held = Held(consumer, delivery, len(commands))
        received = self._clock.monotonic()
        for command in commands:
            self._accept(table, command, held, received)

    def settled(self, attempt: Attempt) -> None:
        """The attempt's reply is confirmed: a copy that comes later is a new attempt."""
        command_id = attempt.command.commandid
        if self.open.get(command_id) is attempt:
            del self.open[command_id]

    async def join(self) -> None:
        """Wait until everything to be parked is."""
        await self._parked.join()

    # --- one command

    def _accept(self, table: Table, command: Command, held: Held, received: float) -> None:
        if command.namespace != self._namespace or command.replyto != self._replies:
            # a reply that no queue takes would be published again without end, and its delivery held as long
            self._refuse(held, "foreign_namespace", command)
            return
        known = self.open.get(command.commandid)
        if known is not None and known.joins(command):
            known.join(command, held)
            self._counts["joined"] += 1
            return
        if command.direction in FENCES:
            served: Served | None = table.get((command.activity, Direction.FENCE.value), self._fence)
        else:
            served = table.get((command.activity, command.direction))
        key = NO_KEY if self._stateless else barrier_key(command)
        if key is None:
            self._refuse(held, "message_invalid", command)
            return
        attempt = Attempt(command, served or self._fence, held, received, key)
        if command.direction == "close":
            attempt.closes = key._replace(direction=Direction.COMPENSATE.value)
        elif command.direction != "forward" and not self._stateless:
            attempt.closes = BarrierKey(
                key.run_id,
                command.step,
                command.forwarditeration,
                command.forwardround,
                Direction.FORWARD.value,
            )
        if self._horizon is not None and self._horizon.is_behind(key.run_id):
            # fences and undos too: their action's row may be purged, and would be taken for one that never was (P12)
            self._refuse_and_answer(attempt, held, "too_old", TOO_OLD)
            return
        if served is None:
            self._refuse_and_answer(attempt, held, "unknown_activity", UNKNOWN_ACTIVITY)
            return
        self.open[command.commandid] = attempt
        self._add(attempt)

    def _refuse_and_answer(self, attempt: Attempt, held: Held, reason: str, answer: Answer) -> None:
        # Parked for the operator and answered, so that the schedule goes on: the ack waits for both.
        held.left += 1
        self._refuse(held, reason, attempt.command)
        self.open[attempt.command.commandid] = attempt
        self._answer(attempt, answer)

    # --- what is not ours

    def _take_apart(self, table: Table, consumer: Consumer, delivery: Delivery) -> None:
        parts = list(apart(delivery.body, decode_commands))
        held = Held(consumer, delivery, len(parts))
        received = self._clock.monotonic()
        for body, command, error in parts:
            if command is not None:
                self._accept(table, command, held, received)
            if error is not None:
                self._give_up(
                    held, parked_row(delivery, error.reason, body=body, kind=error.text, detail=error.text)
                )

    def _refuse(self, held: Held, reason: str, command: Command) -> None:
        kind = f"{command.activity}:{command.direction}"
        self._give_up(
            held, parked_row(held.delivery, reason, body=envelope(held.delivery, command), kind=kind)
        )

    def _give_up(self, held: Held, row: ParkedRow) -> None:
        self._counts["parked"] += 1
        self._parked.offer((row, held))

    async def _park(self, items: Sequence[tuple[ParkedRow, Held]]) -> None:
        await self._parking.park([row for row, _ in items])
        acks = Acks()
        for _, held in items:
            acks.settle(held)
        acks.send()


def envelope(delivery: Delivery, command: Command) -> bytes:
    """Return the bytes of one command of a delivery: the body itself unless it is a pack."""
    if delivery.body.lstrip()[:1] != b"[":
        return delivery.body
    for body in split(delivery.body):
        if any(each.id == command.id and each.commandid == command.commandid for each in _decoded(body)):
            return body
    return delivery.body


def _decoded(body: bytes) -> Sequence[Command]:
    try:
        return decode_commands(body)
    except MessageInvalid:
        return ()


def barrier_key(command: Command) -> BarrierKey | None:
    """Return the barrier's name for a command, or None if no row could bear it."""
    try:
        run_id = UUID(command.runid)
    except ValueError:
        return None
    return BarrierKey(run_id, command.step, command.iteration, command.round, command.direction)
