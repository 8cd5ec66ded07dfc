"""P28: one switch per handler call, running -> committing or expired; and the watch that throws it at the limit.

What expired never commits. What is committing is never cancelled, nor answered as failed. The switch is moved on the
loop only, in plain code between two awaits, so nobody can be between looking and moving it. That holds for handlers in
threads too: no thread moves it, and COMMIT is handed to theirs only after it was taken, so it needs no lock. The clock
is read once more there, because a process that was stopped (SIGSTOP) comes back past its limit before any timer fires.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from math import inf
from typing import Any, Final

from saga.clock import Clock, Spawner

UNWINDING_SECONDS: Final = 2.0
"""How long a handler may take to end after its limit before it is given up."""


class Phase(Enum):
    """Where a handler call stands."""

    RUNNING = "running"
    COMMITTING = "committing"
    EXPIRED = "expired"
    """`start_to_close` passed."""
    ABANDONED = "abandoned"
    """The process shuts down and the grace is over: no answer is given, the command is delivered again."""


RUNNING: Final = Phase.RUNNING
COMMITTING: Final = Phase.COMMITTING
EXPIRED: Final = Phase.EXPIRED
ABANDONED: Final = Phase.ABANDONED


class Run:
    """One call of a handler."""

    __slots__ = ("deadline", "given_up", "phase", "task")

    def __init__(
        self, deadline: float, task: asyncio.Task[Any] | None, given_up: Callable[[], None] | None
    ) -> None:
        self.deadline: float = deadline
        self.task: asyncio.Task[Any] | None = task
        """What is cancelled at the limit; None for a thread, which nothing ends."""
        self.given_up: Callable[[], None] | None = given_up
        """Called if the handler still runs 2 s after its limit."""
        self.phase: Phase = RUNNING

    def commits(self, now: float) -> bool:
        """Take the switch towards the commit; False if it is too late for that."""
        if self.phase is RUNNING:
            self.phase = COMMITTING if now < self.deadline else EXPIRED
        return self.phase is COMMITTING

    def ends(self, phase: Phase) -> bool:
        """Take the switch away from the commit and cancel the handler; False if it is committing."""
        if self.phase is RUNNING:
            self.phase = phase
            if self.task is not None:
                self.task.cancel()
            return True
        return False


class Watch:
    """Ends the runs that reach their limit: one timer for all of them, set to the earliest."""

    def __init__(self, clock: Clock, spawner: Spawner) -> None:
        self._clock = clock
        self._spawner = spawner
        self._runs: dict[Run, None] = {}
        self._unwinding: dict[Run, float] = {}
        self._wakes_at = inf
        self._timer: asyncio.Task[None] | None = None

    def enter(self, run: Run) -> None:
        """Watch a run from now on."""
        self._runs[run] = None
        if run.deadline < self._wakes_at:
            self._arm(run.deadline)

    def leave(self, run: Run) -> None:
        """The handler ended: it will not be cancelled any more."""
        del self._runs[run]
        if self._unwinding:
            self._unwinding.pop(run, None)

    def abandon(self) -> None:
        """End everything that is not committing: the grace is over (P17)."""
        for run in list(self._runs):
            if run.ends(ABANDONED) and run.task is None and run.given_up is not None:
                run.given_up()  # a thread: it would never learn of it

    def close(self) -> None:
        """Watch nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = inf

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = at
        self._timer = self._spawner.spawn(self._wait(at), name="saga-start-to-close")

    async def _wait(self, at: float) -> None:
        await self._clock.sleep(max(0.0, at - self._clock.monotonic()))
        self._timer = None
        self._wakes_at = inf
        now = self._clock.monotonic()
        for run in list(self._runs):
            if run.deadline <= now and run.ends(EXPIRED):
                self._unwinding[run] = now + UNWINDING_SECONDS
        for run, until in list(self._unwinding.items()):
            if until <= now:
                del self._unwinding[run]
                if run.given_up is not None:
                    run.given_up()
        following = [run.deadline for run in self._runs if run.phase is RUNNING] + list(
            self._unwinding.values()
        )
        if following and (earliest := min(following)) < inf:
            self._arm(earliest)
