"""The relay: sweeps the rows that no process sent directly. One relay per partition, by lease.

A row leaves the outbox only when the broker has confirmed and routed it. Rows are read without locks and without a
cursor: the low-water hint never passes a pending row and returns to 0 after a second, so that a row whose transaction
was committed late is on its way within 2 s as well. A key that the broker would not take is set aside with its own
retry time and blocks no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from saga.brokers.base import Broker, PublishOutcome
from saga.clock import Clock, Ids, Spawner, woken
from saga.errors import SagaError
from saga.failpoints import failpoint
from saga.outbox.publisher import DirectPublisher, pack_rows
from saga.storage.base import PARTS, Lease, OutboxStore, StoredRow, part_of

log: Final[logging.Logger] = logging.getLogger("saga.outbox")

LEASE_SECONDS: Final = 5.0
POLL_SECONDS: Final = 1.0
RESCAN_SECONDS: Final = 1.0
"""From when on a sweep reads from 0 again. With the poll on top, a row that became visible below the hint waits 2 s."""
AGE_SECONDS: Final = 0.9
"""Rows younger than this are left to the process that committed them."""
BATCH: Final = 1_000
BLOCKED_SECONDS_MAX: Final = 60.0
BACKOFF_SECONDS_MAX: Final = 5.0


class Relay:
    """Loop over the outbox of one namespace."""

    def __init__(
        self,
        broker: Broker,
        store: OutboxStore,
        publisher: DirectPublisher,
        *,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
    ) -> None:
        self._broker = broker
        self._store = store
        self._publisher = publisher
        self._clock = clock
        self._ids = ids
        self._spawner = spawner
        self._owner = ids.uuid7()
        self._wake = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._leases: dict[int, Lease] = {}
        self._lease_ends = 0.0
        self._low = 0
        self._rescan_at = 0.0
        self._blocked: dict[str, tuple[int, float]] = {}
        self._fresh = False

    def start(self) -> None:
        """Start the loop."""
        self._task = self._spawner.spawn(self._run(), name="saga-relay")

    def wake(self) -> None:
        """Rows of this process became visible that nobody publishes from memory: sweep now (P19)."""
        self._fresh = True
        self._wake.set()

    async def stop(self) -> None:
        """End after the current sweep and give the leases back."""
        self._stopping = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=10)
        try:
            await self._store.release(self._owner)
        except SagaError:
            log.info("leases are left to run out")

    async def _run(self) -> None:
        failures = 0
        while not self._stopping:
            try:
                busy = await self._sweep()
                failures = 0
            except SagaError as error:
                failures += 1
                log.warning("sweep failed: %s", error.code)
                busy = False
            except Exception as error:  # lint: allow broad-except because this loop is its own supervisor
                failures += 1  # whatever it is: without its relay an outbox only grows
                log.error("sweep failed with %s and goes on", type(error).__name__)
                busy = False
            if not busy:
                await self._pause(failures)

    async def _pause(self, failures: int) -> None:
        jitter = 0.8 + 0.2 * self._ids.fraction()
        seconds = min(POLL_SECONDS * jitter * 2.0**failures, BACKOFF_SECONDS_MAX)
        await woken(self._wake, seconds, clock=self._clock, spawner=self._spawner, name="saga-relay-pause")
        self._wake.clear()

    async def _sweep(self) -> bool:
        """Send one batch; return whether there may be more at once."""
        now = self._clock.monotonic()
        # what another holds is asked for with every sweep: it may have died just after the last look
        if len(self._leases) < PARTS or now > self._lease_ends - LEASE_SECONDS / 2:
            await self._renew(now)
        if now >= self._rescan_at:
            self._low, self._rescan_at = 0, now + RESCAN_SECONDS
            self._learn_blocked(await self._store.rescan(BATCH), now)
        if not self._leases:
            return False
        age = 0.0 if self._fresh else max(AGE_SECONDS, self._publisher.confirm_seconds * 2)
        self._fresh = False
        ours = set(self._publisher.in_flight)
        rows = await self._store.read_outbox(self._leases.keys(), self._low, age, BATCH)
        if rows:
            failpoint("R1")  # read, nothing sent: a crash here changes nothing
        # also what was in flight when the read began: its row may have been deleted since, with its confirm
        ours |= set(self._publisher.in_flight)
        mine = [row for row in rows if row.id not in ours and self._blocked_until(row) <= now]
        waiting = await self._send(mine, now) if mine else []
        if age > 0:  # beside rows as fresh as those of a woken sweep, others are still being committed
            self._raise_low(
                rows, {row.id for row in rows if row.id in ours or self._blocked_until(row) > now}, waiting
            )
        return len(rows) == BATCH and not waiting

    async def _renew(self, now: float) -> None:
        names = [f"outbox-{part}" for part in range(PARTS)]
        leases = await self._store.renew(names, self._owner, LEASE_SECONDS)
        self._leases = {int(lease.name.rpartition("-")[2]): lease for lease in leases}
        self._lease_ends = now + LEASE_SECONDS

    async def _send(self, rows: Sequence[StoredRow], now: float) -> list[int]:
        """Publish rows and delete the confirmed ones; return the ids that stay.

        F-02: in waves of one row per key and topic. What follows a row that the broker did not take is not sent.
        """
        if self._clock.monotonic() > self._lease_ends - LEASE_SECONDS / 3:
            await self._renew(self._clock.monotonic())
        confirmed: list[int] = []
        waiting: list[StoredRow] = []
        for wave in waves(rows):
            held = {row.ordering_key for row in waiting}
            waiting += [row for row in wave if row.ordering_key in held]
            if sendable := [row for row in wave if row.ordering_key not in held]:
                left = await self._send_wave(sendable, now)
                stay = {row.id for row in left}
                confirmed += [row.id for row in sendable if row.id not in stay]
                waiting += left
        if confirmed:
            await self._store.delete_confirmed(confirmed)
        return [row.id for row in waiting]

    async def _send_wave(self, rows: Sequence[StoredRow], now: float) -> list[StoredRow]:
        """Publish rows of different keys; return those that are not confirmed."""
        packed = pack_rows(rows, self._broker)
        futures = self._broker.publish([message for message, _ in packed])
        failpoint("R5")  # some are on their way: the others and they are all still in the outbox
        left: list[StoredRow] = []
        for (_, together), future in zip(packed, futures, strict=True):
            outcome = await future
            if outcome is PublishOutcome.CONFIRMED:
                await self._unblock(together)
                continue
            left += together
            if outcome is not PublishOutcome.UNKNOWN:
                await self._set_aside(together, outcome, now)
        return left

    async def _set_aside(self, rows: Sequence[StoredRow], outcome: PublishOutcome, now: float) -> None:
        for row in rows:
            attempts, _ = self._blocked.get(row.ordering_key, (0, 0.0))
            retry = min(2.0**attempts, BLOCKED_SECONDS_MAX)
            self._blocked[row.ordering_key] = (attempts + 1, now + retry)
            lease = self._leases.get(part_of(row.ordering_key))
            if lease is not None:
                await self._store.block(lease, self._owner, row, outcome.value, retry)

    async def _unblock(self, rows: Sequence[StoredRow]) -> None:
        keys = {row.ordering_key for row in rows} & self._blocked.keys()
        if keys:
            await self._store.unblock(keys)
            for key in keys:
                del self._blocked[key]

    def _blocked_until(self, row: StoredRow) -> float:
        return self._blocked.get(row.ordering_key, (0, 0.0))[1]

    def _learn_blocked(self, stored: Mapping[str, float], now: float) -> None:
        """Take over what a former owner of the partition had set aside."""
        for key, seconds in stored.items():
            self._blocked.setdefault(key, (1, now + seconds))

    def _raise_low(self, rows: Sequence[StoredRow], held: set[int], waiting: Sequence[int]) -> None:
        pending = held | set(waiting)
        if pending:
            self._low = max(self._low, min(pending) - 1)
        elif rows:
            self._low = rows[-1].id


def waves(rows: Sequence[StoredRow]) -> Iterator[list[StoredRow]]:
    """Split rows, in order, so that each part holds at most one row of a key on a channel."""
    places: dict[tuple[str, str], int] = {}
    split: list[list[StoredRow]] = []
    for row in rows:
        place = places.get((row.channel, row.ordering_key), 0)
        places[row.channel, row.ordering_key] = place + 1
        if place == len(split):
            split.append([])
        split[place].append(row)
    yield from split
