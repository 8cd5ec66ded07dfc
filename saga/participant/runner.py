"""Sends each group of commands down its path, and guards what must run alone (P14) or fails where nothing should."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Final

from saga.outbox.parking import Parking, parked_row
from saga.participant import answers
from saga.participant.answers import Answer
from saga.participant.attempts import Attempt
from saga.participant.forward import ForwardRuns
from saga.participant.intake import envelope
from saga.participant.outside import OutsideRuns
from saga.participant.settling import Settling
from saga.participant.stateless import StatelessRuns
from saga.participant.undo import UndoRuns

LONE_RUNS_MAX: Final = 5
log: Final[logging.Logger] = logging.getLogger("saga.participant")


class Runner:
    """Runs one group at a time per worker; never raises, save for the end of the process."""

    def __init__(
        self,
        *,
        stateless: StatelessRuns | None,
        settling: Settling | None,
        forward: ForwardRuns | None,
        undo: UndoRuns | None,
        outside: OutsideRuns | None,
        parking: Parking,
        answer: Callable[[Attempt, Answer], None],
        forget: Callable[[Attempt], None],
        counts: Counter[str],
    ) -> None:
        self._stateless = stateless
        self._settling = settling
        self._forward = forward
        self._undo = undo
        self._outside = outside
        self._parking = parking
        self._answer = answer
        self._forget = forget
        self._counts = counts

    async def run(self, group: list[Attempt]) -> None:
        """Answer every command of the group."""
        try:
            if group[0].lone:
                await self._alone(group[0])
            else:
                await self._dispatch(group)
        except Exception as error:
            log.error("%s: the participant itself failed with %s", group[0].served.name, type(error).__name__)
            await self._guarded(group, error)

    async def _dispatch(self, group: list[Attempt]) -> None:
        if self._stateless is not None:
            await self._stateless.run(group)
            return
        direction = group[0].served.direction
        if group[0].served.outside:
            assert self._outside is not None
            await self._outside.run(group)
            return
        if direction == "forward":
            assert self._forward is not None
            await self._forward.run(group)
            return
        assert self._undo is not None
        if direction == "compensate":
            await self._undo.run(group)
        else:
            for attempt in group:
                await self._undo.run_fence(attempt)

    async def _guarded(self, group: list[Attempt], error: Exception) -> None:
        """Answer what a fault of our own left open; if even that fails, let the next copy be a new attempt."""
        self._counts["internal_errors"] += 1
        unanswered = [attempt for attempt in group if attempt.answer is None]
        answer = answers.failed(type(error).__name__)
        if self._settling is None:
            for attempt in unanswered:
                self._answer(attempt, answer)
            return
        try:
            rows = await self._settling.store.look_up([attempt.key for attempt in unanswered])
        except Exception:
            for attempt in unanswered:
                self._forget(attempt)
            return
        for attempt in self._settling.without_standing(unanswered, rows):
            self._answer(attempt, answer)

    # --- poison -----------------------------------------------------------------------------------

    async def _alone(self, attempt: Attempt) -> None:
        """Run a command that may kill its process. Nothing else runs; the run is counted before it starts."""
        self._counts["lone_runs"] += 1
        if self._settling is not None and not await self._settling.unless_standing([attempt]):
            await self._forget_runs(attempt)
            return
        if await self._count_run(attempt) > LONE_RUNS_MAX:
            await self._poison(attempt)
        else:
            await self._dispatch([attempt])
        if attempt.answer is not None:
            await self._forget_runs(attempt)

    async def _count_run(self, attempt: Attempt) -> int:
        settling = self._settling
        if settling is None:
            # without a database the broker's count has to do: it counts more than runs alone, never less
            return max(held.delivery.delivery_count for held in attempt.held) - 2
        command_id = attempt.command.commandid
        return await settling.outlast(lambda: settling.store.count_lone_run(command_id))

    async def _forget_runs(self, attempt: Attempt) -> None:
        settling = self._settling
        if settling is not None:
            command_id = attempt.command.commandid
            await settling.outlast(lambda: settling.store.forget_lone_run(command_id))

    async def _poison(self, attempt: Attempt) -> None:
        """Park it, then answer it as a failed attempt, so that the step's schedule decides; the ack follows both."""
        self._counts["poison"] += 1
        delivery = attempt.held[0].delivery
        kind = f"{attempt.command.activity}:{attempt.command.direction}"
        await self._parking.park(
            [parked_row(delivery, "poison", body=envelope(delivery, attempt.command), kind=kind)]
        )
        self._answer(attempt, answers.POISON)
