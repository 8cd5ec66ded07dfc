"""Runs actions in a database: handler, then barrier row with the reply in it, then COMMIT, in one transaction (D-10).

A fresh command of a one-input handler is BEGIN, the handler's statements, one insert, COMMIT. The insert comes last: a
copy that raced it runs its handler and is rolled back by the conflict, judged by row count (P22). What may have run
before (resend, retry, redelivery, rerun, batch) is looked up before the handler is called.

Order of writes: W1 - handler's statements - W3 - barrier row - W2 - COMMIT - W4 (unknown: look, then run again) -
W5 reply - W6 ack - W7.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from saga.clock import Clock
from saga.failpoints import failpoint
from saga.outcomes import Refused
from saga.participant import answers
from saga.participant.answers import Answer
from saga.participant.attempts import Attempt
from saga.participant.calls import Calls, Ended
from saga.participant.repeating import run_in_parts
from saga.participant.served import InputInvalid, Served
from saga.participant.settling import CallFailed, InvalidOutput, Runs
from saga.participant.stateless import WrongLength, batch_values, item_answer
from saga.participant.switch import ABANDONED, EXPIRED
from saga.participant.threads import Seat
from saga.storage.base import BarrierRow, HandlerTransaction

Given = list[tuple[Attempt, Answer]]


class ForwardRuns(Runs):
    """Runs groups of forward commands of one handler: one command, or up to N of a batch handler (P24)."""

    async def run(self, group: list[Attempt]) -> None:
        """Answer every command of the group, unless the process gives them up."""
        failpoint("W1")
        ready = await self._decoded(group)
        if ready:
            await run_in_parts(self._settling, ready, self._once)

    async def _decoded(self, group: Sequence[Attempt]) -> list[Attempt]:
        ready: list[Attempt] = []
        invalid: Given = []
        for attempt in group:
            try:
                attempt.input = attempt.served.input(attempt.command)
                ready.append(attempt)
            except InputInvalid as error:
                invalid.append((attempt, answers.payload_invalid(error.error)))
        if invalid:
            await self._settling.fail(invalid)
        return ready

    async def _once(self, group: list[Attempt], rerun: bool, deadline: float) -> list[Attempt]:
        """Run the group in one transaction; return those that must run again. Raises CallFailed, StorageBusy, ..."""
        first = group[0]
        served = first.served
        look = rerun or first.marked or served.batch is not None
        within = served.batch is not None and served.needs_session
        if look and not within:
            # in a transaction of its own: that of a one-input handler begins at the handler's first statement (P36)
            group = await self._settling.unless_standing(group)
            if not group:
                return []
        if not served.needs_session:
            return await self._outside(served, group, deadline)
        async with (
            self._calls.seat(served) as seat,
            self._store.transaction(served.name, seat) as transaction,
        ):
            if within:
                # a batch has one transaction, its look included (K-05)
                rows = await transaction.find([attempt.key for attempt in group])
                group = self._settling.without_standing(group, rows)
            live, late = self._in_time(group)
            given: Given = []
            taken: frozenset[Any] = frozenset()
            if live:
                ended = await self._call(served, live, transaction, seat, deadline)
                given = given_answers(served, live, ended)
                taken = await self._commit(transaction, ended, given)
        return await self._settle(given, late, taken)

    async def _outside(self, served: Served, group: list[Attempt], deadline: float) -> list[Attempt]:
        """The same for a handler that asked for no session: the transaction holds the barrier row alone."""
        live, late = self._in_time(group)
        given: Given = []
        taken: frozenset[Any] = frozenset()
        if live:
            ended = await self._call(served, live, None, None, deadline)
            given = given_answers(served, live, ended)
            async with self._store.transaction(served.name) as transaction:
                taken = await self._commit(transaction, ended, given)
        return await self._settle(given, late, taken)

    def _in_time(self, group: Sequence[Attempt]) -> tuple[list[Attempt], Given]:
        # directly before the handler, after every wait for a connection
        now = self._clock.monotonic()
        late = [(attempt, answers.DEADLINE) for attempt in group if attempt.deadline <= now]
        return [attempt for attempt in group if attempt.deadline > now], late

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
            arguments = served.arguments(live[0].input, live[0].command, session, None)
        else:
            items = [(attempt.input, attempt.command, None) for attempt in live]
            arguments = served.batch_arguments(items, session=session)
        self._counts["handler_calls"] += 1
        return await call(self._calls, served, arguments, transaction, deadline, self._clock, seat)

    async def _commit(self, transaction: HandlerTransaction, ended: Ended, given: Given) -> frozenset[Any]:
        """Take the switch (P28), insert the rows and COMMIT; return the keys that were taken by others."""
        if not ended.run.commits(self._clock.monotonic()):
            raise CallFailed(ended)
        failpoint("W3")
        rows = [
            BarrierRow(attempt.key, answer.outcome, answer.data)
            for attempt, answer in given
            if _stays(attempt, answer)
        ]
        try:
            return await transaction.commit(rows)
        except Exception as error:
            ended.error = error
            raise CallFailed(ended) from error

    async def _settle(self, given: Given, late: Given, taken: frozenset[Any]) -> list[Attempt]:
        if late:
            await self._settling.fail(late)
        if taken:
            # P24: everything was rolled back. The losers are answered from what stands, the others run again.
            group = [attempt for attempt, _ in given]
            return await self._settling.unless_standing(group)
        unlooked: Given = []
        for attempt, answer in given:
            if _stays(attempt, answer):
                self._settling.answer(attempt, answer)
            else:
                unlooked.append((attempt, answer))
        if unlooked:
            await self._settling.fail(unlooked)
        return []


def _stays(attempt: Attempt, answer: Answer) -> bool:
    """Whether an answer has a row: an effect always, a refusal where it is final (P20), a failure never."""
    return answer.outcome == answers.DONE or (answer.outcome == answers.REFUSED and attempt.command.final)


async def call(
    calls: Calls,
    served: Served,
    arguments: dict[str, Any],
    transaction: HandlerTransaction | None,
    deadline: float,
    clock: Clock,
    seat: Seat | None = None,
) -> Ended:
    """Call a handler under `deadline`, or from now on under its limit. Raises CallFailed if it gave no result.

    `seat` is the thread of the transaction, where it has one.
    """
    if deadline == inf:
        deadline = clock.monotonic() + served.limit_seconds
    ended = await calls.apart(served, arguments, deadline, seat)
    if ended.stuck is not None and transaction is not None:
        await transaction.abandon()
    if ended.error is not None or ended.run.phase in (EXPIRED, ABANDONED):
        raise CallFailed(ended)
    return ended


def given_answers(served: Served, live: Sequence[Attempt], ended: Ended) -> Given:
    """Return each item's answer. Raises CallFailed if a batch handler's list has the wrong length, or one answer fails.

    An answer that cannot be sent must not be committed: its effect would have no reply. The batch is halved until the
    item stands alone.
    """
    if served.batch is None:
        values: Sequence[Any] = [ended.value]
    else:
        try:
            values = batch_values(served, ended.value, len(live))
        except WrongLength as wrong:
            ended.error = wrong
            raise CallFailed(ended) from None
    given = [(attempt, item_answer(served, value)) for attempt, value in zip(live, values, strict=True)]
    for _, answer in given:
        if answer.outcome == answers.FAILED:
            raise InvalidOutput(ended, answer)
    if served.batch is None and isinstance(ended.value, Refused):
        ended.error = ended.value
        raise CallFailed(ended)
    return given
