"""Runs commands whose effects are outside the database: at least once, under one operation key (row D-11, P27).

Order of writes: W1 - row as `attempted`, COMMIT - W2 - the call - W3 - row as `done` if it is still `attempted`,
COMMIT - W4 - W5 reply - W6 ack - W7. A row found as `attempted` tells of a call whose outcome nobody knows: the
action's inquiry settles it, else the next attempt calls again under the same key. An undo runs all the same, without
output.

| Outcome of a row | Means                                                            | What comes again is answered  |
|------------------|------------------------------------------------------------------|-------------------------------|
| `attempted`      | a call was begun, perhaps made                                   | after an inquiry or a call    |
| `closed`         | its undo began meanwhile, or an inquiry found that it never ran  | `refused`, after an inquiry   |
| `late_effect`    | the call ended after that: its effect stands until undone again  | `late_effect`                 |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json, to_json

from saga.failpoints import failpoint
from saga.messages import NULL, Command, Direction
from saga.outcomes import Inquiry, Refused
from saga.participant import answers
from saga.participant.answers import (
    ATTEMPTED,
    CANCELLED,
    CLOSED,
    DONE,
    EMPTY,
    FAILED,
    HAD_RUN,
    LATE_EFFECT,
    NOTHING_TO_UNDO,
    REFUSED,
    Answer,
)
from saga.participant.attempts import Attempt
from saga.participant.forward import call, given_answers
from saga.participant.intake import barrier_key
from saga.participant.repeating import run_in_parts
from saga.participant.served import InputInvalid, Served
from saga.participant.settling import CallFailed, Runs
from saga.participant.stateless import item_answer
from saga.storage.base import BarrierKey, BarrierRow


class OutsideRuns(Runs):
    """Runs the commands of activities that are declared `at_least_once`, one by one."""

    async def run(self, group: Sequence[Attempt]) -> None:
        """Answer every command of the group, unless the process gives them up."""
        for attempt in group:
            failpoint("W1")
            await run_in_parts(self._settling, [attempt], self._once)

    async def _once(self, group: list[Attempt], rerun: bool, deadline: float) -> list[Attempt]:
        (attempt,) = group
        match attempt.command.direction:
            case Direction.FORWARD:
                answer = await self._act(attempt, deadline)
            case Direction.COMPENSATE:
                answer = await self._undo(attempt, deadline)
            case Direction.FENCE:
                answer = await self._fence(attempt, deadline)
            case _:
                answer = await self._close(attempt)
        if answer.outcome == FAILED:
            await self._settling.fail([(attempt, answer)])
        else:
            self._settling.answer(attempt, answer)
        return []

    async def _act(self, attempt: Attempt, deadline: float) -> Answer:
        served, key = attempt.served, attempt.key
        try:
            attempt.input = served.input(attempt.command)
        except InputInvalid as invalid:
            return answers.payload_invalid(invalid.error)
        row = await self._found(key)
        if row is not None and row.outcome in (CLOSED, LATE_EFFECT) and served.inquiry is not None:
            row = await self._looked_into(row, served.inquiry, attempt, deadline)
        if row is not None and row.outcome == ATTEMPTED and served.inquiry is not None:
            asked = await self._inquire(served.inquiry, attempt, deadline)
            if asked.outcome == FAILED:
                return asked
            if asked.outcome == DONE:
                row = await self._replaced(BarrierRow(key, DONE, asked.data))
        if row is None:
            if self._too_late(attempt):
                return answers.DEADLINE
            row = await self._inserted(BarrierRow(key, ATTEMPTED, None))
        if row.outcome != ATTEMPTED:
            return self._settling.standing(row)
        failpoint("W2")
        # P27: once more, directly before the call: a process that was stopped (SIGSTOP) since the row was committed
        # must not call what has been given up meanwhile
        if self._too_late(attempt):
            return answers.DEADLINE
        try:
            answer = await self._called(attempt, deadline)
        except CallFailed as failed:
            if not failed.abandoned and not isinstance(failed.ended.error, Refused):
                row = await self._found(key)
                if row is not None and row.outcome in (CLOSED, LATE_EFFECT):
                    # who closed the row meanwhile may have undone too early, and nobody knows what came of the call
                    await self._told_late(attempt, row, NULL)
            raise
        failpoint("W3")
        row = await self._replaced(BarrierRow(key, DONE, answer.data))
        # refused: to another copy of this call, which the provider contradicts
        if row.outcome in (CLOSED, LATE_EFFECT, REFUSED):
            row = await self._told_late(attempt, row, answer.data)
        failpoint("W4")
        return _answer(row)

    async def _told_late(self, attempt: Attempt, row: BarrierRow, data: bytes) -> BarrierRow:
        """Put on record that an effect landed, perhaps, after the undos that have begun by now.

        An undo puts its own row on record before it reads this one: begun after this look, it finds the effect there.
        """
        self._counts["late_effects"] += 1
        began = await self._rounds_begun(attempt.command)
        certain = data != NULL
        left = from_json(data) if certain else {"output": None, "undo": None}
        while True:
            known = _late(row)
            if known is not None and known["round"] >= began and known["certain"] >= certain:
                return row
            told = to_json({**left, "round": max(began, 0), "certain": certain})
            late = BarrierRow(row.key, LATE_EFFECT, told)
            row = await self._replaced(late, was=row.outcome)
            if row == late:
                return row

    async def _rounds_begun(self, command: Command) -> int:
        """Return the highest round of which an undo has begun; -1 if none has."""
        key = barrier_key(command)
        assert key is not None
        round = 0
        while (
            await self._found(key._replace(round=command.round + round, direction="compensate")) is not None
        ):
            round += 1
        return round - 1

    async def _looked_into(
        self, row: BarrierRow, inquiry: Served, attempt: Attempt, deadline: float
    ) -> BarrierRow:
        """Who made the call may have died in it, after the row was closed: ask whether its effect stands."""
        try:
            asked = await self._inquire(inquiry, attempt, deadline)
        except CallFailed as failed:
            if failed.abandoned:
                raise
            asked = answers.OUTCOME_UNKNOWN
        if asked is EMPTY:
            return row
        return await self._told_late(attempt, row, asked.data if asked.outcome == DONE else NULL)

    async def _undo(self, attempt: Attempt, deadline: float) -> Answer:
        """Close the action's row before the call, so that an action that ends from now on is told as a late effect."""
        command, key = attempt.command, attempt.key
        own = await self._inserted(BarrierRow(key, ATTEMPTED, None))
        if own.outcome != ATTEMPTED:
            return self._settling.standing(own)
        action = await self._inserted(BarrierRow(attempt.closes, CANCELLED, None))
        if action.outcome == ATTEMPTED:
            action = await self._replaced(BarrierRow(attempt.closes, CLOSED, None))
        late = _late(action)
        if late is not None and command.round <= late["round"]:
            # This undo may have been called before the effect landed, and whoever knows its key as "nothing to undo"
            # says so again. The next round has another key.
            return _answer(action)
        if action.outcome in (CANCELLED, REFUSED):
            self._counts["empty"] += 1
            return _answer(await self._replaced(BarrierRow(key, NOTHING_TO_UNDO, None)))
        try:
            attempt.input = attempt.served.input(command)
            attempt.past = attempt.served.past(None if action.reply is None else from_json(action.reply))
        except InputInvalid as invalid:
            return answers.payload_invalid(invalid.error)
        failpoint("W2")
        await self._called(attempt, deadline)
        failpoint("W3")
        await self._replaced(BarrierRow(key, DONE, None))
        failpoint("W4")
        return answers.UNDONE

    async def _fence(self, attempt: Attempt, deadline: float) -> Answer:
        """See to it that the action never counts from now on, or tell that it had run. In doubt its inquiry decides."""
        action = await self._inserted(BarrierRow(attempt.closes, CANCELLED, None))
        late = _late(action)
        if action.outcome == ATTEMPTED or (late is not None and not late["certain"]):
            if not attempt.served.inquires:
                return answers.OUTCOME_UNKNOWN
            try:
                attempt.input = attempt.served.input(attempt.command)
            except InputInvalid as invalid:
                return answers.payload_invalid(invalid.error)
            asked = await self._inquire(attempt.served, attempt, deadline)
            if asked.outcome == FAILED:
                return asked
            if late is not None:
                if asked is EMPTY:
                    return EMPTY
                action = await self._told_late(attempt, action, asked.data)
            else:
                settled = (DONE, asked.data) if asked.outcome == DONE else (CLOSED, None)
                action = await self._replaced(BarrierRow(attempt.closes, *settled))
        if action.outcome in (DONE, LATE_EFFECT):
            return Answer(HAD_RUN, NULL if action.reply is None else action.reply)
        return EMPTY

    async def _close(self, attempt: Attempt) -> Answer:
        """P26: an undo that was begun may have run, or may run yet; the person who settled it by hand is told."""
        undo = await self._inserted(BarrierRow(attempt.closes, CANCELLED, None))
        if undo.outcome == ATTEMPTED:
            undo = await self._replaced(BarrierRow(attempt.closes, CLOSED, None))
        return Answer(HAD_RUN) if undo.outcome in (DONE, CLOSED) else EMPTY

    # --- calls ------------------------------------------------------------------------------------

    def _too_late(self, attempt: Attempt) -> bool:
        return attempt.deadline <= self._clock.monotonic()

    async def _called(self, attempt: Attempt, deadline: float) -> Answer:
        """Call the handler; return what it did. Raises CallFailed, and then the row stays `attempted`."""
        served = attempt.served
        arguments = served.arguments(attempt.input, attempt.command, None, attempt.past)
        self._counts["handler_calls"] += 1
        ended = await call(self._calls, served, arguments, None, deadline, self._clock)
        ((_, answer),) = given_answers(served, [attempt], ended)
        return answer

    async def _inquire(self, inquiry: Served, attempt: Attempt, deadline: float) -> Answer:
        """Return `done` with its data, EMPTY if it has not run, or a failure if nobody can tell. Raises CallFailed."""
        arguments: dict[str, Any] = inquiry.arguments(attempt.input, attempt.command, None, None)
        self._counts["inquiries"] += 1
        try:
            ended = await call(self._calls, inquiry, arguments, None, deadline, self._clock)
        except CallFailed as failed:
            if isinstance(failed.ended.error, Refused):
                return answers.OUTCOME_UNKNOWN  # the business refuses actions, not questions
            raise
        match ended.value:
            case Inquiry.NOT_DONE:
                return EMPTY
            case Inquiry.UNKNOWN:
                return answers.OUTCOME_UNKNOWN
            case Inquiry.DONE:
                return item_answer(inquiry, None)
            case output:
                return item_answer(inquiry, output)

    # --- rows, each in a transaction of its own ---------------------------------------------------

    async def _found(self, key: BarrierKey) -> BarrierRow | None:
        return (await self._settling.look_up([key])).get(key)

    async def _inserted(self, row: BarrierRow) -> BarrierRow:
        """Insert a row unless there is one; return the one that stands."""
        return (await self._settling.outlast(lambda: self._store.decide([row])))[row.key]

    async def _replaced(self, row: BarrierRow, *, was: str = ATTEMPTED) -> BarrierRow:
        return await self._settling.outlast(lambda: self._store.replace(row, was))


def _late(row: BarrierRow) -> dict[str, Any] | None:
    """Return what is known of a late effect; None if the row tells of none."""
    known: dict[str, Any] | None = None
    if row.outcome == LATE_EFFECT:
        known = from_json(row.reply or b"null")
    return known


def _answer(row: BarrierRow) -> Answer:
    if row.outcome in (CANCELLED, CLOSED):
        return answers.HANGING
    return Answer(row.outcome, NULL if row.reply is None else row.reply)
