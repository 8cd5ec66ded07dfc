"""Runs compensations and fences: the action's own key first, then the undo, in one transaction (D-10, P7, P21, P25).

Order of writes: forward key as `cancelled` unless a row is there - undo handler's statements - compensate row -
COMMIT. If the forward insert wins, the action has not run and never will: an empty compensation. If the row that stands
says refused or cancelled, there is nothing to undo either, on every copy. Only `done` is undone, with the output and
undo data of that row, never of the command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from pydantic_core import from_json

from saga.failpoints import failpoint
from saga.messages import NULL
from saga.participant import answers
from saga.participant.answers import Answer
from saga.participant.attempts import Attempt
from saga.participant.calls import Ended
from saga.participant.forward import Given, call, given_answers
from saga.participant.repeating import run_in_parts
from saga.participant.served import InputInvalid, Served
from saga.participant.settling import CallFailed, Runs
from saga.participant.threads import Seat
from saga.storage.base import BarrierKey, BarrierRow, HandlerTransaction

Standing = Mapping[BarrierKey, BarrierRow]


class UndoRuns(Runs):
    """Runs groups of compensations of one handler, and fences."""

    async def run(self, group: list[Attempt]) -> None:
        """Answer every compensation of the group, unless the process gives them up."""
        failpoint("W1")
        await run_in_parts(self._settling, group, self._once)

    async def run_fence(self, attempt: Attempt) -> None:
        """Make sure that the action never runs from now on, or tell that it had run."""
        failpoint("W1")
        await run_in_parts(self._settling, [attempt], self._fence_once)

    # A fence knows only keys: the action's before a failed pivot turns back, the undo's once a person settled it.
    async def _fence_once(self, group: list[Attempt], rerun: bool, deadline: float) -> list[Attempt]:
        (attempt,) = group
        async with self._store.transaction("fence") as transaction:
            standing = await transaction.cancel([attempt.closes], [])
            row = standing.get(attempt.closes)
            if row is None:
                await transaction.commit([])
        if row is not None and row.outcome == answers.DONE:
            self._settling.answer(attempt, Answer(answers.HAD_RUN, NULL if row.reply is None else row.reply))
        else:
            self._settling.answer(attempt, answers.EMPTY)
        return []

    async def _once(self, group: list[Attempt], rerun: bool, deadline: float) -> list[Attempt]:
        """Run the group in one transaction; return those that must run again. Raises CallFailed, StorageBusy, ..."""
        served = group[0].served
        given: Given = []
        live: list[Attempt] = []
        taken: frozenset[BarrierKey] = frozenset()
        async with (
            self._seat(served) as seat,
            self._store.transaction(served.name, seat) as transaction,
        ):
            standing = await self._cancelled(transaction, group)
            group = self._settling.without_standing(group, standing)
            empty, undoable = self._sorted(group, standing)
            live, failures = self._ready(undoable, standing)
            if live and served.needs_session:
                ended = await self._call(served, live, transaction, seat, deadline)
                given = given_answers(served, live, ended)
                taken = await self._commit(transaction, ended, [*empty, *given])
                live = []
            elif empty:
                taken = await transaction.commit(_rows(empty))
        if live and not taken:
            given, taken = await self._outside(served, live, deadline)
        return await self._settle(empty, given, failures, taken, group)

    def _seat(self, served: Served) -> AbstractAsyncContextManager[Seat | None]:
        """Return the thread of the transaction; a handler without a session is called after it, in one of its own."""
        return self._calls.seat(served) if served.needs_session else nullcontext()

    async def _cancelled(self, transaction: HandlerTransaction, group: Sequence[Attempt]) -> Standing:
        """Close the forward keys; return what stood, forward and compensate."""
        forward = sorted({attempt.closes for attempt in group})
        return await transaction.cancel(forward, [attempt.key for attempt in group])

    def _sorted(self, group: Sequence[Attempt], standing: Standing) -> tuple[Given, list[Attempt]]:
        """Return what has nothing to undo, with its answer, and what has."""
        empty: Given = []
        undoable = []
        for attempt in group:
            row = standing.get(attempt.closes)
            if row is None or row.outcome != answers.DONE:
                empty.append((attempt, answers.EMPTY))
            else:
                undoable.append(attempt)
        return empty, undoable

    def _ready(self, group: Sequence[Attempt], standing: Standing) -> tuple[list[Attempt], Given]:
        """Decode inputs and pasts, check deadlines; return those to call and the failures to answer."""
        now = self._clock.monotonic()
        ready: list[Attempt] = []
        failures: Given = []
        for attempt in group:
            reply = standing[attempt.closes].reply
            try:
                attempt.input = attempt.served.input(attempt.command)
                attempt.past = attempt.served.past(None if reply is None else from_json(reply))
            except InputInvalid as invalid:
                failures.append((attempt, answers.payload_invalid(invalid.error)))
                continue
            if attempt.deadline <= now:
                failures.append((attempt, answers.DEADLINE))
            else:
                ready.append(attempt)
        return ready, failures

    async def _call(
        self,
        served: Served,
        live: Sequence[Attempt],
        transaction: HandlerTransaction | None,
        seat: Seat | None,
        deadline: float,
    ) -> Ended:
        session = None if transaction is None else transaction.session
        if served.batch is None:
            (one,) = live
            arguments: dict[str, Any] = served.arguments(one.input, one.command, session, one.past)
        else:
            items = [(attempt.input, attempt.command, attempt.past) for attempt in live]
            arguments = served.batch_arguments(items, session=session)
        self._counts["handler_calls"] += 1
        return await call(self._calls, served, arguments, transaction, deadline, self._clock, seat)

    async def _outside(
        self, served: Served, live: Sequence[Attempt], deadline: float
    ) -> tuple[Given, frozenset[BarrierKey]]:
        """Undo without a session: the handler first, its row in a transaction of its own."""
        ended = await self._call(served, live, None, None, deadline)
        given = given_answers(served, live, ended)
        async with self._store.transaction(served.name) as transaction:
            return given, await self._commit(transaction, ended, given)

    async def _commit(
        self, transaction: HandlerTransaction, ended: Ended, given: Given
    ) -> frozenset[BarrierKey]:
        if not ended.run.commits(self._clock.monotonic()):
            raise CallFailed(ended)
        failpoint("W3")
        try:
            return await transaction.commit(_rows(given))
        except Exception as error:
            ended.error = error
            raise CallFailed(ended) from error

    async def _settle(
        self,
        empty: Given,
        given: Given,
        failures: Given,
        taken: frozenset[BarrierKey],
        group: Sequence[Attempt],
    ) -> list[Attempt]:
        if taken:
            # everything was rolled back: the losers are answered from what stands, the others run again
            return await self._settling.unless_standing(group)
        for attempt, answer in empty:
            self._counts["empty"] += 1
            self._settling.answer(attempt, answer)
        unlooked = list(failures)
        for attempt, answer in given:
            if answer.outcome == answers.DONE:
                self._settling.answer(attempt, answer)
            else:
                unlooked.append((attempt, answer))
        if unlooked:
            await self._settling.fail(unlooked)
        return []


def _rows(given: Given) -> list[BarrierRow]:
    """P20: a refused undo leaves no row, so that every later retry asks the handler again."""
    return [
        BarrierRow(attempt.key, answer.outcome, None)
        for attempt, answer in given
        if answer.outcome in (answers.DONE, answers.NOTHING_TO_UNDO)
    ]
