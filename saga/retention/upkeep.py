"""The task that purges: every hour, in one process at a time, and never in the way of the work.

A lease of most of an hour is the schedule: whoever gets it makes the pass, and nobody else gets it before its time,
not even after a crash. Two passes at once would only find each other's rows gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from saga.clock import Clock, Ids, Spawner
from saga.errors import SagaError
from saga.retention.purge import purge
from saga.storage.base import LeaseStore, Purge

log: Final[logging.Logger] = logging.getLogger("saga.retention")

EVERY_SECONDS: Final = 3_600.0
FIRST_SECONDS: Final = 60.0
"""Before the first look; a process that was just started has more urgent things to do."""
LEASE_SECONDS: Final = 3_300.0
RENEW_SECONDS: Final = 300.0
"""While a pass lasts, the lease is renewed so often."""
STOP_SECONDS: Final = 2.0
"""What a batch gets to end when the process stops. What is cut off then is found again, or archived once more."""


class Upkeep:
    """Purges by age for as long as its process runs. What fails is logged, and tried again an hour later."""

    def __init__(
        self,
        name: str,
        purges: Sequence[Purge],
        leases: LeaseStore,
        *,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        before: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`name` is that of the lease; `before` is run at every turn, whoever makes the pass."""
        self._name = name
        self._purges = purges
        self._leases = leases
        self._clock = clock
        self._ids = ids
        self._spawner = spawner
        self._before = before
        self._owner = ids.uuid7()
        self._held_until = 0.0
        self._stopping = False
        self._sleeping = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; the first pass comes after a minute."""
        self._task = self._spawner.spawn(self._run(), name=f"saga-upkeep-{self._name}")

    async def stop(self) -> None:
        """End, after the batch that is under way if that takes no longer than 2 s. Idempotent."""
        self._stopping = True
        if self._task is None:
            return
        if not self._sleeping:
            await asyncio.wait({self._task}, timeout=STOP_SECONDS)
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=STOP_SECONDS)

    async def _run(self) -> None:
        await self._sleep(FIRST_SECONDS * (0.5 + self._ids.fraction()))
        while not self._stopping:
            await self.turn()
            await self._sleep(EVERY_SECONDS * (0.95 + 0.1 * self._ids.fraction()))

    async def _sleep(self, seconds: float) -> None:
        if self._stopping:
            return
        self._sleeping = True
        await self._clock.sleep(seconds)
        self._sleeping = False

    async def turn(self) -> None:
        """Make a pass if it is nobody else's. Never raises: the service goes on, whatever is wrong here."""
        try:
            if self._before is not None:
                await self._before()
            if await self._is_ours():
                gone = await purge(self._purges, clock=self._clock, between=self._is_ours)
                if any(gone.values()):
                    log.info("purged %s", ", ".join(f"{count} of {name}" for name, count in gone.items()))
        except SagaError as error:
            log.warning("the upkeep %s waits an hour: %s", self._name, error.code)
        except Exception as error:
            log.error("the upkeep %s waits an hour after %s", self._name, type(error).__name__)

    async def _is_ours(self) -> bool:
        """Whether the pass is, and stays, ours."""
        if self._stopping:
            return False
        now = self._clock.monotonic()
        if now < self._held_until:
            return True
        held = await self._leases.renew([f"upkeep-{self._name}"], self._owner, LEASE_SECONDS)
        self._held_until = now + RENEW_SECONDS if held else 0.0
        return bool(held)
