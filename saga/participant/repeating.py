"""Runs a group until every command in it has an answer: again after locks and lost connections, in halves after errors.

P3: what the database refused is repeated in place, up to 5 times and uncounted. A COMMIT without an answer is unknown:
the keys are looked up in a new transaction, and only what is not there runs again. P24: after an exception, a timeout
or a second deadlock a batch is halved, down to one; the one gets the answer that its error deserves (row D-04).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any, Final

from saga.outcomes import Refused
from saga.participant import answers
from saga.participant.attempts import Attempt
from saga.participant.settling import REPEATS_MAX, CallFailed, InvalidOutput, Settling
from saga.statelog import about
from saga.storage.base import LOST, OTHER

Once = Callable[[list[Attempt], bool, float], Awaitable[list[Attempt]]]
log: Final[logging.Logger] = logging.getLogger("saga.participant")


async def run_in_parts(settling: Settling, group: list[Attempt], once: Once) -> None:
    """Run `once(group, rerun, deadline)` until nothing of the group is left. `once` returns what must run again."""
    parts = [_Part(group)]
    stuck: list[asyncio.Future[Any]] = []
    while parts:
        part = parts.pop()
        parts += await part.run(settling, once, stuck)
    if stuck:
        # what does not end although its time is over has its answer, but keeps its slot (P28)
        await asyncio.wait(stuck)


class _Part:
    """Commands that share a transaction, and how often it was tried."""

    def __init__(self, group: list[Attempt]) -> None:
        self._group = group
        self._repeats = 0
        self._rerun = False
        self._deadline = inf  # `start_to_close` of the first call bounds its repetitions too

    async def run(self, settling: Settling, once: Once, stuck: list[asyncio.Future[Any]]) -> list[_Part]:
        """Go on until the group is answered, or return its halves."""
        while self._group:
            try:
                self._group = await once(self._group, self._rerun, self._deadline)
                self._rerun = True
            except CallFailed as failed:
                if failed.ended.stuck is not None:
                    stuck.append(failed.ended.stuck)
                if failed.abandoned:
                    return []
                if not self._repeatable(settling, failed):
                    return await self._give_up(settling, failed)
                await self._pause(settling, failed)
            except Exception as error:
                # Outside the handler call, so nothing of it can stand that a look would not find.
                if settling.store.trouble(error) == OTHER:
                    raise
                await self._pause(settling)
        return []

    def _repeatable(self, settling: Settling, failed: CallFailed) -> bool:
        error = failed.ended.error
        if failed.expired or error is None:
            return False
        trouble = settling.store.trouble(error)
        if trouble == LOST and failed.committing:
            return True  # P3: the outcome is unknown, and only a look can tell
        repeats_max = REPEATS_MAX if len(self._group) == 1 else 1
        return trouble != OTHER and self._repeats < repeats_max

    async def _pause(self, settling: Settling, failed: CallFailed | None = None) -> None:
        self._repeats += 1
        self._rerun = True
        if failed is not None:
            # after a commit whose outcome is unknown the next run has its whole time again: it must come to a decision
            self._deadline = inf if failed.committing else failed.ended.run.deadline
        await settling.patience.pause(self._repeats)

    async def _give_up(self, settling: Settling, failed: CallFailed) -> list[_Part]:
        """Halve the group, or answer the one that is left by how its call ended."""
        if len(self._group) > 1:
            middle = len(self._group) // 2
            return [_Part(self._group[middle:]), _Part(self._group[:middle])]
        (attempt,) = self._group
        error = failed.ended.error
        served = attempt.served
        if isinstance(failed, InvalidOutput):
            await settling.fail([(attempt, failed.answer)])
        elif failed.expired or error is None:
            log.warning("%s did not end within its start_to_close", served.name, extra=about(attempt.command))
            await settling.fail([(attempt, answers.TIMEOUT)])
        elif isinstance(error, Refused):
            await settling.refuse(attempt, error)
        else:
            answer = answers.raised(error, served.non_retryable, served.name, attempt.command)
            await settling.fail([(attempt, answer)])
        return []
