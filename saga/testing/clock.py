"""Time that a test owns: it stands still, or ticks as usual, and jumps when it is told to."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Final

from saga.clock import SystemClock

_REAL: Final = SystemClock()


class VirtualClock:
    """A Clock whose time is jumped over, never slept through.

    It stands still between jumps; with `ticking` the real time passes as well, until `freeze`.
    """

    def __init__(self, *, ticking: bool = False) -> None:
        self.offset: float = 0.0
        """Seconds jumped so far. Whoever adds to it by hand lets time pass without waking anybody."""
        self.jumped_at: float = 0.0
        """Monotonic time directly after the latest jump."""
        self._frozen: tuple[float, datetime] | None = None
        self._sleepers: dict[asyncio.Future[None], float] = {}
        if not ticking:
            self.freeze()

    def monotonic(self) -> float:
        """Return seconds that never go backwards."""
        return (_REAL.monotonic() if self._frozen is None else self._frozen[0]) + self.offset

    def now(self) -> datetime:
        """Return the aware UTC wall time."""
        return (_REAL.now() if self._frozen is None else self._frozen[1]) + timedelta(seconds=self.offset)

    def freeze(self) -> None:
        """Let time stand still from now on, save for jumps."""
        self._frozen = (_REAL.monotonic(), _REAL.now())

    def jump(self, seconds: float) -> None:
        """Let so much time pass at once. Whoever sleeps looks whether it is his time; nobody wakes twice."""
        self.offset += seconds
        self.jumped_at = self.monotonic()
        for sleeper in self._sleepers:
            if not sleeper.done():
                sleeper.set_result(None)

    @property
    def next_wake_seconds(self) -> float | None:
        """How long the first sleeper still sleeps; 0 if he is late already, None if nobody sleeps."""
        due = min(self._sleepers.values(), default=None)
        return None if due is None else max(due - self.monotonic(), 0.0)

    async def sleep(self, seconds: float) -> None:
        """Wait until so much time has passed or was jumped over. Cancelling is safe."""
        due = self.monotonic() + seconds
        while True:
            left = due - self.monotonic()
            if left <= 0:
                await _REAL.sleep(0)
                return
            sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._sleepers[sleeper] = due
            try:
                if self._frozen is None:
                    await asyncio.wait({sleeper}, timeout=left)
                else:
                    await sleeper
            finally:
                del self._sleepers[sleeper]
