"""Publishes replies, packed per reply channel, and acks a delivery once every reply of it is confirmed (W6, W7).

Receiving never waits for this (P33): `send` only notes the attempt. A reply without a confirm is published again from
memory, with growing jittered pauses, for as long as its delivery is held; it is never nacked, because a nack would
only bring the command back at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from pydantic_core import to_json

from saga.batcher import Batcher
from saga.brokers.base import Broker, Consumer, Delivery, OutMessage, PublishOutcome
from saga.clock import Ids, Spawner
from saga.failpoints import failpoint
from saga.messages import BODY_BYTES_MAX, PACK_COUNT_MAX, REPLY_TYPE, pack, packs
from saga.participant.answers import Answer
from saga.participant.attempts import Attempt, Held
from saga.patience import Patience

BATCH_MAX: Final = 1024
WORKERS: Final = 8
BESIDE_MIN: Final = 16
"""Replies that are sent although earlier ones are not confirmed yet; fewer wait for that and travel together."""
log: Final[logging.Logger] = logging.getLogger("saga.participant")


class Replies:
    """From an answer to the ack of its delivery."""

    def __init__(
        self,
        broker: Broker,
        *,
        patience: Patience,
        ids: Ids,
        spawner: Spawner,
        settled: Callable[[Attempt], None],
        counts: Counter[str],
    ) -> None:
        self._broker = broker
        self._patience = patience
        self._spawner = spawner
        self._settled = settled
        self._counts = counts
        capabilities = broker.capabilities
        self._pack_count = PACK_COUNT_MAX if capabilities.packs_commands else 1
        self._pack_bytes = min(BODY_BYTES_MAX, capabilities.body_bytes_max)
        self._out: Batcher[Attempt] = Batcher(
            self._publish,
            spawner=spawner,
            name="saga-replies",
            batch_max=BATCH_MAX,
            workers=WORKERS,
            beside_min=BESIDE_MIN,
        )
        self._confirmed: Batcher[Sequence[Attempt]] = Batcher(
            self._settle_all, spawner=spawner, name="saga-acks", batch_max=BATCH_MAX
        )
        self._unconfirmed: list[Attempt] = []
        self._failures = 0
        self._again: asyncio.Task[None] | None = None
        self._joining: list[asyncio.Future[None]] = []
        # unique like a UUID per reply, and a third of its cost
        self._id_prefix = str(ids.uuid7())
        self._sent = 0
        self.pending: int = 0
        """Answered attempts whose replies are not confirmed yet."""

    def send(self, attempt: Attempt, answer: Answer) -> None:
        """Answer an attempt. Its deliveries are acked when the broker has the reply."""
        failpoint("W5")
        attempt.answer = answer
        self._sent += 1
        attempt.reply = _envelope(attempt, f"{self._id_prefix}-{self._sent:x}", answer)
        self.pending += 1
        self._out.offer(attempt)

    async def join(self) -> None:
        """Wait until every reply is confirmed and its deliveries are acked."""
        while self.pending:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._joining.append(waiting)
            await waiting

    async def _publish(self, attempts: Sequence[Attempt]) -> None:
        """Send replies and wait for what becomes of them: meanwhile the next ones gather, and travel as one message."""
        groups: dict[str, list[Attempt]] = {}
        for attempt in attempts:
            groups.setdefault(attempt.command.replyto, []).append(attempt)
        messages: list[OutMessage] = []
        packed: list[list[Attempt]] = []
        for channel, group in groups.items():
            for members in self._packs(group):
                body, content_type = pack([attempt.reply for attempt in members])
                messages.append(OutMessage(channel, body, content_type, members[0].command.runid))
                packed.append(members)
        confirmed: list[Attempt] = []
        futures = self._broker.publish(messages)
        for future, members in zip(futures, packed, strict=True):
            if not future.done():
                future.add_done_callback(partial(self._known, members))
            elif future.result() is PublishOutcome.CONFIRMED:
                confirmed += members
            else:
                self._publish_again(members, future.result())
        if confirmed:
            self._failures = 0
            self._confirmed.offer(confirmed)
        if waiting := [future for future in futures if not future.done()]:
            await asyncio.wait(waiting)

    def _packs(self, group: list[Attempt]) -> Sequence[list[Attempt]]:
        if self._pack_count == 1 or len(group) == 1:
            return [[attempt] for attempt in group]
        bodies = (attempt.reply for attempt in group)
        return [
            [group[index] for index in indexes]
            for indexes in packs(bodies, count_max=self._pack_count, body_bytes_max=self._pack_bytes)
        ]

    def _known(self, members: list[Attempt], future: asyncio.Future[PublishOutcome]) -> None:
        outcome = PublishOutcome.UNKNOWN if future.cancelled() else future.result()
        if outcome is PublishOutcome.CONFIRMED:
            self._failures = 0
            self._confirmed.offer(members)
        else:
            self._publish_again(members, outcome)

    # --- a reply without a confirm --------------------------------------------------------------

    def _publish_again(self, members: list[Attempt], outcome: PublishOutcome) -> None:
        self._counts["replies_unconfirmed"] += len(members)
        self._unconfirmed += members
        if self._again is None or self._again.done():
            self._failures += 1
            log.warning(
                "%d replies to %s are not confirmed (%s); they are published again",
                len(members),
                members[0].command.replyto,
                outcome.value,
            )
            self._again = self._spawner.spawn(self._after_a_pause(), name="saga-replies-again")

    async def _after_a_pause(self) -> None:
        await self._patience.pause(self._failures)
        again, self._unconfirmed = self._unconfirmed, []
        self._again = None
        self._out.offer_all(again)

    # --- a reply with one -----------------------------------------------------------------------

    async def _settle_all(self, confirmed: Sequence[Sequence[Attempt]]) -> None:
        """Ack what is complete. The work of a batcher, so that the acks of many confirms go together."""
        acks = Acks()
        for members in confirmed:
            for attempt in members:
                self._settled(attempt)
                for held in attempt.held:
                    acks.settle(held)
            self.pending -= len(members)
            self._counts["replies"] += len(members)
        failpoint("W6")
        acks.send()
        failpoint("W7")
        if not self.pending:
            for waiting in self._joining:
                if not waiting.done():
                    waiting.set_result(None)
            self._joining.clear()


def _envelope(attempt: Attempt, id: str, answer: Answer) -> bytes:
    """Return what `encode_reply` makes of the Reply to this command, without making the Reply (a test compares)."""
    command = attempt.command
    head = {
        "specversion": "1.0",
        "type": REPLY_TYPE,
        "source": f"/saga/{command.namespace}/participant",
        "id": id,
        "subject": command.sagaid,
        "datacontenttype": "application/json",
        "namespace": command.namespace,
        "saga": command.saga,
        "sagaid": command.sagaid,
        "runid": command.runid,
        "step": command.step,
        "iteration": command.iteration,
        "round": command.round,
        "direction": command.direction,
        "commandid": command.commandid,
        "attempt": attempt.attempt,
        "outcome": answer.outcome,
        "schemaversion": command.schemaversion,
    }
    if command.traceparent is not None:
        head["traceparent"] = command.traceparent
    return to_json(head)[:-1] + b',"data":' + answer.data + b"}"


class Acks:
    """Deliveries that became complete, by consumer."""

    def __init__(self) -> None:
        self._ready: dict[Consumer, list[Delivery]] = {}

    def settle(self, held: Held) -> None:
        """One more command of this delivery is done for."""
        held.left -= 1
        if held.left == 0:
            self._ready.setdefault(held.consumer, []).append(held.delivery)

    def send(self) -> None:
        """Ack them (P35: each consumer its own)."""
        for consumer, deliveries in self._ready.items():
            consumer.ack(deliveries)
