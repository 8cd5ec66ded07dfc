"""Runs commands in a participant without a database: no barrier, no transaction, the reply confirmed before the ack.

At least once, and said so: a copy that arrives after the ack runs the handler again. Failures are answered without a
look, because there is nothing to look at.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from saga.clock import Clock
from saga.errors import PayloadInvalid, PayloadTooLarge
from saga.failpoints import failpoint
from saga.outcomes import Refused
from saga.participant import answers
from saga.participant.answers import Answer
from saga.participant.attempts import Attempt
from saga.participant.calls import Calls, Ended
from saga.participant.served import InputInvalid, Served
from saga.participant.switch import ABANDONED, EXPIRED

log: Final[logging.Logger] = logging.getLogger("saga.participant")


class StatelessRuns:
    """Runs groups of commands of one handler."""

    def __init__(
        self, calls: Calls, *, answer: Callable[[Attempt, Answer], None], clock: Clock, counts: Counter[str]
    ) -> None:
        self._calls = calls
        self._answer = answer
        self._clock = clock
        self._counts = counts

    async def run(self, group: list[Attempt]) -> None:
        """Answer every command of the group, unless the process gives them up."""
        served = group[0].served
        if served.direction == "fence":
            for attempt in group:
                self._answer(attempt, answers.NO_BARRIER)
        elif served.batch is None:
            for attempt in group:
                await self._one(attempt, served)
        else:
            await self._halving(served, group)

    async def _one(self, attempt: Attempt, served: Served) -> None:
        failpoint("W1")
        command = attempt.command
        if attempt.deadline <= self._clock.monotonic():
            self._answer(attempt, answers.DEADLINE)
            return
        try:
            past = None if served.direction == "forward" else served.past(command.data)
            arguments = served.arguments(served.input(command), command, None, past)
        except InputInvalid as invalid:
            self._answer(attempt, answers.payload_invalid(invalid.error))
            return
        ended = await self._called(served, arguments)
        self._judge(attempt, served, ended)
        if ended.stuck is not None:
            await asyncio.wait({ended.stuck})  # it has its answer, but keeps its slot (P28)

    async def _called(self, served: Served, arguments: dict[str, Any]) -> Ended:
        self._counts["handler_calls"] += 1
        if not served.threaded:
            return await self._calls.here(served, arguments)
        return await self._calls.apart(served, arguments, self._clock.monotonic() + served.limit_seconds)

    def _judge(self, attempt: Attempt, served: Served, ended: Ended) -> None:
        phase = ended.run.phase
        if phase is ABANDONED:
            return
        if phase is EXPIRED:
            self._answer(attempt, answers.TIMEOUT)
        elif ended.error is not None:
            answer = answers.raised(ended.error, served.non_retryable, served.name, attempt.command)
            self._answer(attempt, answer)
        else:
            self._answer(attempt, item_answer(served, ended.value))

    # --- batches

    async def _halving(self, served: Served, group: Sequence[Attempt]) -> None:
        """Run a batch; after an exception, a timeout or a wrong answer run its halves, down to one (P24)."""
        parts = [self._decoded(served, group)]
        stuck: list[asyncio.Future[Any]] = []
        while parts:
            part = parts.pop()
            ended = await self._batch(served, part) if part else None
            if ended is not None and ended.stuck is not None:
                stuck.append(ended.stuck)
            if ended is None or ended.run.phase is ABANDONED:
                continue
            if len(part) > 1:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
            else:
                self._judge(part[0], served, ended)
        if stuck:
            await asyncio.wait(stuck)

    def _decoded(self, served: Served, group: Sequence[Attempt]) -> list[Attempt]:
        failpoint("W1")
        now = self._clock.monotonic()
        ready = []
        for attempt in group:
            try:
                attempt.input = served.input(attempt.command)
                attempt.past = served.past(attempt.command.data)
            except InputInvalid as invalid:
                self._answer(attempt, answers.payload_invalid(invalid.error))
                continue
            if attempt.deadline <= now:
                self._answer(attempt, answers.DEADLINE)
            else:
                ready.append(attempt)
        return ready

    async def _batch(self, served: Served, part: list[Attempt]) -> Ended | None:
        """Call the handler once and answer each item; return how the call ended if it did not go well."""
        arguments = served.batch_arguments(
            [(attempt.input, attempt.command, attempt.past) for attempt in part], session=None
        )
        ended = await self._called(served, arguments)
        if ended.error is None and ended.run.phase not in (EXPIRED, ABANDONED):
            try:
                values = batch_values(served, ended.value, len(part))
            except WrongLength as wrong:
                ended.error = wrong
            else:
                for attempt, value in zip(part, values, strict=True):
                    self._answer(attempt, item_answer(served, value))
                return None
        return ended


class WrongLength(Exception):
    """A batch handler returned another number of results than it got inputs; counts as raising (P24)."""

    def __str__(self) -> str:
        return "the batch handler returned another number of results than it got inputs"


def batch_values(served: Served, value: Any, count: int) -> Sequence[Any]:
    """Return the handler's results, one for each input; a batch undo may return None for all. Raises WrongLength."""
    if value is None and not served.forward:
        return [None] * count
    if not isinstance(value, list | tuple) or len(value) != count:
        raise WrongLength
    return value


def item_answer(served: Served, value: Any) -> Answer:
    """Return the answer to a value that a handler gave for one input."""
    if isinstance(value, Refused):
        return answers.refused(value, served.name)
    try:
        return Answer(answers.DONE, served.encode(value))
    except (PayloadInvalid, PayloadTooLarge) as error:
        return answers.output_invalid(error)
