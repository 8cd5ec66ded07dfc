"""What every run in a database shares: answers from rows that stand, the look before a failure is answered, waiting.

P22: no failure, refusal or timeout is answered before its key was looked up in a new transaction; if a row is there,
its reply is the answer. While the database cannot be asked nothing is answered: the command stays held, copies join
it, and no nack brings it back in a hot loop (RMQ-21).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Final, TypeVar

from saga.clock import Clock
from saga.messages import NULL
from saga.outcomes import Refused
from saga.participant import answers
from saga.participant.answers import Answer
from saga.participant.attempts import Attempt
from saga.participant.calls import Calls, Ended
from saga.participant.switch import ABANDONED, COMMITTING, EXPIRED
from saga.patience import Patience
from saga.storage.base import BarrierKey, BarrierRow, ParticipantStore

T = TypeVar("T")
REPEATS_MAX: Final = 5
"""How often a transaction that the database refused is repeated in place, uncounted (row D-03)."""
log: Final[logging.Logger] = logging.getLogger("saga.participant")


class CallFailed(Exception):
    """A handler call ended without a result; its transaction is rolled back."""

    def __init__(self, ended: Ended) -> None:
        super().__init__()
        self.ended = ended

    @property
    def abandoned(self) -> bool:
        return self.ended.run.phase is ABANDONED

    @property
    def expired(self) -> bool:
        return self.ended.run.phase is EXPIRED

    @property
    def committing(self) -> bool:
        """Whether the error came from the commit, so that its outcome may be unknown."""
        return self.ended.run.phase is COMMITTING


class InvalidOutput(CallFailed):
    """The handler gave something that cannot be sent."""

    def __init__(self, ended: Ended, answer: Answer) -> None:
        super().__init__(ended)
        self.answer = answer


class Settling:
    """Answers attempts by what the barrier says."""

    def __init__(
        self,
        store: ParticipantStore,
        *,
        answer: Callable[[Attempt, Answer], None],
        patience: Patience,
        counts: Counter[str],
    ) -> None:
        self.store = store
        self.patience: Patience = patience
        self._answer = answer
        self._counts = counts

    def answer(self, attempt: Attempt, answer: Answer) -> None:
        """Give an answer that is known to stand."""
        self._answer(attempt, answer)

    def answer_standing(self, attempt: Attempt, row: BarrierRow) -> None:
        """Answer from a row."""
        self._answer(attempt, self.standing(row))

    def standing(self, row: BarrierRow) -> Answer:
        """Return what a row answers: a duplicate its stored reply, a late action after its undo a refusal (P7)."""
        if row.outcome in (answers.CANCELLED, answers.CLOSED):
            self._counts["hanging"] += 1
            return answers.HANGING
        self._counts["duplicates"] += 1
        return Answer(row.outcome, NULL if row.reply is None else row.reply)

    def without_standing(
        self, group: Sequence[Attempt], rows: Mapping[BarrierKey, BarrierRow]
    ) -> list[Attempt]:
        """Answer those of the group whose row says how it ended; return the others."""
        if not rows:
            return list(group)
        rest = []
        for attempt in group:
            row = rows.get(attempt.key)
            if row is None or row.outcome == answers.ATTEMPTED:
                rest.append(attempt)
            else:
                self.answer_standing(attempt, row)
        return rest

    async def unless_standing(self, group: Sequence[Attempt]) -> list[Attempt]:
        """Look the group up in a new transaction; answer those that stand, return the others."""
        if not group:
            return []
        return self.without_standing(group, await self.look_up([attempt.key for attempt in group]))

    async def fail(self, failures: Iterable[tuple[Attempt, Answer]]) -> None:
        """Answer failures, after the look (P22)."""
        wanted = dict(failures)
        for attempt in await self.unless_standing(list(wanted)):
            self._counts["failures"] += 1
            self._answer(attempt, wanted[attempt])

    async def refuse(self, attempt: Attempt, refusal: Refused) -> None:
        """Answer a refusal. P20: where it is final its row goes in, in a transaction of its own, and stays."""
        answer = answers.refused(refusal, attempt.served.name)
        if not (attempt.command.final and attempt.served.forward):
            await self.fail([(attempt, answer)])
            return
        row = BarrierRow(attempt.key, answers.REFUSED, answer.data)
        stands = (await self.outlast(lambda: self.store.decide([row])))[attempt.key]
        if stands.outcome == answers.ATTEMPTED:
            stands = await self.outlast(lambda: self.store.replace(row, answers.ATTEMPTED))
        if stands == row:
            self._answer(attempt, answer)
        else:
            self.answer_standing(attempt, stands)

    async def look_up(self, keys: Collection[BarrierKey]) -> Mapping[BarrierKey, BarrierRow]:
        """Return the rows that are there, however long the database takes to come back."""
        return await self.outlast(lambda: self.store.look_up(list(keys)))

    async def outlast(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return what `call` returns; while it raises, wait and call it again."""
        return await self.patience.outlast(call, _told)


def _told(error: Exception) -> None:
    log.warning("the participant's database does not answer (%s); tried again", type(error).__name__)


class Runs:
    """What every path of commands in a database works with."""

    def __init__(self, settling: Settling, calls: Calls, *, clock: Clock, counts: Counter[str]) -> None:
        self._settling = settling
        self._store = settling.store
        self._calls = calls
        self._clock = clock
        self._counts = counts
