"""The load generator: keeps a number of sagas in flight for a while and notes what ended in the measured part of it.

It runs inside the coordinator's process, for both systems alike: every loop starts a saga, waits for its end, and
starts the next one. Sagas that are started together tend to end together, in waves; so the measured part begins and
ends where the count of ended sagas is a multiple of the number in flight, and no half wave is counted.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

SAGA_SECONDS_MAX: Final = 180.0
"""Long enough for 500 naive sagas of five steps in flight where a few hundred transactions a second is all there is."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run gave."""

    sagas: int
    """Ended within the measured part."""
    seconds: float
    p50_ms: float
    p99_ms: float
    total: int
    """Ended in all, with warm-up and the last ones in flight."""


class Load:
    """One run."""

    def __init__(
        self,
        execute: Callable[[dict[str, Any]], Awaitable[None]],
        transfers: Iterator[dict[str, Any]],
        in_flight: int,
    ) -> None:
        self._execute = execute
        self._transfers = transfers
        self._in_flight = in_flight
        self._latencies: list[float] = []
        self._measuring = False
        self._stopping = False
        self._total = 0
        self._awaited = 0
        self._reached = asyncio.Event()

    async def run(self, *, warm_seconds: float, seconds: float, mark: Callable[[str], None]) -> Measured:
        """Warm up, measure between `mark("begin")` and `mark("end")`, and let everything end."""
        loops = [asyncio.create_task(self._loop()) for _ in range(self._in_flight)]
        failed = asyncio.create_task(asyncio.wait(loops, return_when=asyncio.FIRST_EXCEPTION))
        try:
            await self._rounds(failed, warm_seconds)
            mark("begin")
            begun, self._measuring = time.monotonic(), True
            await self._rounds(failed, seconds)
            lasted = time.monotonic() - begun
            self._measuring, self._stopping = False, True
            mark("end")
            await asyncio.gather(*loops)
        finally:
            for task in (failed, *loops):
                task.cancel()
        if len(self._latencies) < 2:
            raise RuntimeError("fewer than two sagas ended in the measured time")
        cuts = statistics.quantiles(self._latencies, n=100, method="inclusive")
        return Measured(len(self._latencies), lasted, cuts[49] * 1000, cuts[98] * 1000, self._total)

    async def _rounds(self, failed: asyncio.Task[Any], seconds: float) -> None:
        """Let so many seconds go by, then wait until a round is full, or until a loop has failed."""
        await asyncio.wait({failed}, timeout=seconds)
        self._awaited = (self._total // self._in_flight + 1) * self._in_flight
        self._reached.clear()
        full = asyncio.create_task(self._reached.wait())
        await asyncio.wait({failed, full}, timeout=SAGA_SECONDS_MAX, return_when=asyncio.FIRST_COMPLETED)
        full.cancel()

    async def _loop(self) -> None:
        while not self._stopping:
            since = time.monotonic()
            async with asyncio.timeout(SAGA_SECONDS_MAX):
                await self._execute(next(self._transfers))
            self._total += 1
            if self._measuring:
                self._latencies.append(time.monotonic() - since)
            if self._total == self._awaited:
                self._reached.set()
