"""What must not be given up is tried until it succeeds, with pauses that double, jittered, up to 10 s."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from saga.clock import Clock, Ids

T = TypeVar("T")
FIRST_SECONDS: Final = 0.1
SECONDS_MAX: Final = 10.0
DOUBLINGS_MAX: Final = 10


class Patience:
    """Waits on a clock of its own."""

    def __init__(self, clock: Clock, ids: Ids) -> None:
        self._clock = clock
        self._ids = ids

    async def pause(self, failures: int) -> None:
        """Wait before repetition number `failures`, counted from 1."""
        seconds = min(SECONDS_MAX, FIRST_SECONDS * 2.0 ** min(failures - 1, DOUBLINGS_MAX))
        await self._clock.sleep(seconds * (0.5 + self._ids.fraction() / 2))

    async def outlast(self, call: Callable[[], Awaitable[T]], failed: Callable[[Exception], None]) -> T:
        """Return what `call` returns; each time that it raises, tell `failed`, wait and call it again."""
        failures = 0
        while True:
            try:
                return await call()
            # lint: allow broad-except because `failed` is told of each, and giving up would lose what is kept here
            except Exception as error:
                failed(error)
            failures += 1
            await self.pause(failures)
