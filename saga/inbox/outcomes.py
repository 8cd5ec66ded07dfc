"""What becomes of an event when its handler has ended: done is acked, an error tried again later, the rest parked.

Order of writes: N1 - handler's statements, the inbox row, COMMIT - N2 - ack. A failed attempt: N3 - the next attempt as
a delayed message of the outbox, COMMIT - N4 - ack. A crash at N2 or N4 brings the event again: the row, or the key of
the delayed message, says that it was there. Nothing of an event that waits for its next attempt is held in memory.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple

from pydantic_core import from_json

from saga.batcher import Batcher
from saga.clock import Clock, Spawner
from saga.failpoints import failpoint
from saga.inbox.envelope import Event, again, message_key, original
from saga.inbox.served import EventCommand, ServedEvent
from saga.outbox.parking import Parking, parked_row
from saga.participant import answers
from saga.participant.answers import PAYLOAD_INVALID, Answer
from saga.participant.attempts import Attempt
from saga.participant.replies import Acks
from saga.patience import Patience
from saga.retry import RetryPolicy
from saga.storage.base import EventStore, OutboxRow, ParkedRow, part_of

BATCH_MAX: Final = 256
log: Final[logging.Logger] = logging.getLogger("saga.inbox")


class _Failed(NamedTuple):
    attempt: Attempt
    next: tuple[OutboxRow, timedelta] | None
    parked: ParkedRow | None


class Outcomes:
    """From an answer to the ack of its delivery."""

    def __init__(
        self,
        store: EventStore,
        parking: Parking,
        *,
        clock: Clock,
        patience: Patience,
        spawner: Spawner,
        settled: Callable[[Attempt], None],
        counts: Counter[str],
    ) -> None:
        self._store = store
        self._parking = parking
        self._clock = clock
        self._patience = patience
        self._settled = settled
        self._counts = counts
        self._done: Batcher[Attempt] = Batcher(
            self._ack, spawner=spawner, name="saga-inbox-acks", batch_max=BATCH_MAX
        )
        self._failed: Batcher[_Failed] = Batcher(
            self._keep, spawner=spawner, name="saga-inbox-failed", batch_max=BATCH_MAX
        )
        self.pending: int = 0
        """Events whose handlers have ended and which are not acked yet."""

    def settle(self, attempt: Attempt, answer: Answer) -> None:
        """See to what an attempt came to."""
        attempt.answer = answer
        self.pending += 1
        if answer.outcome == answers.DONE or answer is answers.POISON:  # poison is parked already
            self._counts["done"] += answer.outcome == answers.DONE
            self._done.offer(attempt)
        else:
            self._counts["failed"] += 1
            self._failed.offer(self._judged(attempt, answer))

    async def join(self) -> None:
        """Wait until everything is safe and acked."""
        await self._failed.join()
        await self._done.join()

    # --- failures

    def _judged(self, attempt: Attempt, answer: Answer) -> _Failed:
        """Decide by the consumer's policy between the next attempt and the end of them."""
        served, command = attempt.served, attempt.command
        assert isinstance(served, ServedEvent)
        assert isinstance(command, EventCommand)
        event, policy = command.event, served.consumer.retry
        said: dict[str, Any] = from_json(answer.data)
        if answer.outcome != answers.REFUSED and said["retryable"] and self._goes_on(event, policy):
            delay_ms = max(policy.delay_ms(command.commandid, event.attempt), said["retry_after_ms"] or 0)
            return _Failed(attempt, (self._next(command), timedelta(milliseconds=delay_ms)), None)
        return _Failed(attempt, None, _parked(attempt, event, answer, said))

    def _goes_on(self, event: Event, policy: RetryPolicy) -> bool:
        if policy.attempts is not None and event.attempt >= policy.attempts:
            return False
        budget, since = policy.schedule_to_close, event.since
        return budget is None or since is None or self._clock.now() - since < budget

    def _next(self, command: EventCommand) -> OutboxRow:
        # the same name for the same attempt: a copy that fails too makes no second one
        message_id = message_key("attempt", command.commandid, command.topic, str(command.event.attempt + 1))
        key = command.event.subject or command.commandid
        body = again(command.event, self._clock.now())
        return OutboxRow(message_id, part_of(key), command.topic, key, body)

    async def _keep(self, failed: Sequence[_Failed]) -> None:
        failpoint("N3")
        rows = [each.next for each in failed if each.next is not None]
        if rows:
            await self._patience.outlast(lambda: self._store.schedule(rows), _told)
        if parked := [each.parked for each in failed if each.parked is not None]:
            self._counts["parked"] += len(parked)
            await self._parking.park(parked)
        failpoint("N4")
        self._done.offer_all([each.attempt for each in failed])

    # --- acks

    async def _ack(self, ended: Sequence[Attempt]) -> None:
        """Ack what is complete. The work of a batcher, so that the acks of many go together."""
        failpoint("N2")
        acks = Acks()
        for attempt in ended:
            self._settled(attempt)
            for held in attempt.held:
                acks.settle(held)
        acks.send()
        self.pending -= len(ended)


def _told(error: Exception) -> None:
    log.warning("a failed event is not kept yet (%s); tried again", type(error).__name__)


def _parked(attempt: Attempt, event: Event, answer: Answer, said: Mapping[str, Any]) -> ParkedRow:
    """Return what is left of an event after its last attempt: as its publisher sent it, to be sent again as new."""
    reason = error = "refused"
    detail = ""
    if answer.outcome != answers.REFUSED:
        error = said["error"]
        invalid = error == PAYLOAD_INVALID
        reason = error if invalid else "handler_failed"
        # where the payload is wrong holds no values; what the handler raised may
        detail = (
            said["message"] if invalid else " at ".join(each for each in (error, said.get("at", "")) if each)
        )
    return parked_row(
        attempt.held[0].delivery, reason, body=original(event), kind=f"{event.type}:{error}", detail=detail
    )
