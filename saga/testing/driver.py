"""Lets time pass: waits until nothing moves any more, then jumps to the next instant at which anything is due.

Time never passes while a transaction or a handler runs, so that no bound of theirs is missed by waiting for the real
world; only a handler that takes longer than some two seconds is taken as hanging, and meets its `start_to_close`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sized
from datetime import datetime
from typing import Final, NamedTuple, Protocol, TypeVar

from saga.clock import SystemClock
from saga.testing.clock import VirtualClock

T = TypeVar("T")

CALM_PASSES: Final = 40
"""Turns of the loop in which nothing was under way: whatever wanted to go on has done so."""
IDLE_PASSES: Final = 3
"""As many are enough if nobody else wanted to go on in any of them."""
LOOK_SECONDS: Final = 0.0005
HANGING_LOOKS: Final = 2_000
"""A handler that runs through so many is taken as hanging: two seconds, or more on a machine with no time for us."""
PATIENCE_SECONDS: Final = 60.0
"""Of real time, after which waiting for something is given up."""
POLL_SECONDS: Final = 1.0
"""How far time goes if nothing is due: everybody who polls has looked once."""
PAST: Final = 0.001
"""Nobody is woken a rounding error too early."""


class StoodStill(AssertionError):
    """What a test waits for does not come about."""


class Due(NamedTuple):
    """What the database waits for."""

    at: datetime | None
    """The first instant at which an instance or a delayed message is due."""
    unsent: bool
    """Rows of the outbox wait for a relay or for their deletion."""


class Moving(Protocol):
    """What the driver must know of an environment."""

    @property
    def under_way(self) -> bool:
        """Whether a transaction runs, or a process comes back."""
        ...

    @property
    def handling(self) -> list[str]:
        """What handlers are doing now."""
        ...

    async def due(self) -> Due:
        """Return what the database waits for."""
        ...


class Driver:
    """Owns the time of one environment. Whoever waits for something drives; one at a time."""

    def __init__(self, clock: VirtualClock, moving: Moving) -> None:
        self._clock = clock
        self._real = SystemClock()
        self._moving = moving
        self._wheel = asyncio.Lock()
        self._hanging: list[str] = []
        """What was found to hang: nobody waits for it a second time."""

    async def until(self, look: Callable[[], Awaitable[T | None]], *, told: Callable[[], str]) -> T:
        """Let time pass until `look` gives something, and return it. Raises StoodStill, with what `told` says."""
        async with self._wheel:
            ends = self._real.monotonic() + PATIENCE_SECONDS
            while True:
                await self.quiet()
                if (found := await look()) is not None:
                    return found
                if self._real.monotonic() > ends:
                    raise StoodStill(
                        f"Waited {PATIENCE_SECONDS:g} s, in which the clock went to {self._clock.now()}: {told()}"
                    )
                seconds = await self._next_seconds()
                self._clock.jump(POLL_SECONDS if seconds is None else seconds)

    async def advance(self, seconds: float) -> None:
        """Let so much time pass; everything that is due on the way happens in its order."""
        async with self._wheel:
            ends = self._clock.monotonic() + seconds
            while True:
                await self.quiet()
                left = ends - self._clock.monotonic()
                if left <= 0:
                    return
                following = await self._next_seconds()
                self._clock.jump(left if following is None else min(following, left))

    async def quiet(self) -> None:
        """Return when nothing moves, or only handlers that hang."""
        calm, idle, looks = 0, 0, 0
        # what waits to run in the next turn of asyncio's own loop; another kind of loop does not tell
        ready: Sized = getattr(asyncio.get_running_loop(), "_ready", (None,))
        while calm < CALM_PASSES and idle < IDLE_PASSES:
            handling = self._moving.handling
            if looks >= HANGING_LOOKS:
                self._hanging = handling
            elif handling != self._hanging:
                self._hanging = []
            if (self._moving.under_way or handling) and not (handling and handling == self._hanging):
                calm, idle, looks = 0, 0, looks + 1 if handling else 0
                await self._real.sleep(LOOK_SECONDS)
            else:
                calm, idle = calm + 1, 0 if ready else idle + 1
                await self._real.sleep(0)

    async def _next_seconds(self) -> float | None:
        """Return how long to the next thing that is due; None if nothing is."""
        sleeper = self._clock.next_wake_seconds
        soonest = POLL_SECONDS if sleeper is None else sleeper + PAST
        if self._moving.handling:
            return soonest  # it hangs: its limit may come before anything else
        due = await self._moving.due()
        if due.unsent:
            return soonest
        if due.at is None:
            return None
        left = (due.at - self._clock.now()).total_seconds() + PAST
        if left <= PAST:
            return soonest  # it is due already: whoever polls for it has only to wake
        return left
