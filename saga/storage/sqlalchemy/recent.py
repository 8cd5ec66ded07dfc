"""Instances as this process wrote them last, so that most batches need not load them (docs/design/0006).

A guess, never an authority: the version check of the write (P1) tells when another process moved an instance meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple
from uuid import UUID

from saga.clock import Clock
from saga.storage.base import Loaded, MovedRow, NewInstance

INSTANCES_MAX: Final = 10_000
BYTES_MAX: Final = 4_096
"""Of input and state together; larger instances are loaded, so that all of them stay below some 50 MB."""
ANCHOR_SECONDS: Final = 60.0
"""For so long the database's time is reckoned on from the last reading of it (P10); then it is read again."""
DISTRUST_SECONDS: Final = 10.0
"""For so long everything is loaded after a guess was wrong: other coordinators take part in the same sagas."""


class Known(NamedTuple):
    """An instance. Its `now_ms` was true at `at`, reckoned on from a reading of the database's clock at `anchor`."""

    row: Loaded
    at: float
    anchor: float

    def after(self, moved: MovedRow) -> Known:
        """Return the instance as it is once `moved` is written."""
        row = self.row
        after = Loaded(*row[:4], moved.version, moved.state, row.input, row.now_ms, moved.wakeup_ms)
        return Known(after, self.at, self.anchor)

    def later(self, now: float) -> Known:
        """Return the instance with its time reckoned on."""
        row = self.row
        now_ms = row.now_ms + round((now - self.at) * 1000)
        return Known(Loaded(*row[:7], now_ms, row.wakeup_ms), now, self.anchor)


class RecentInstances:
    """The open instances that this process wrote last: bounded, oldest out first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[UUID, Known] = {}
        self._trusted_from = 0.0

    def take(self, run_ids: Iterable[UUID]) -> dict[UUID, Known]:
        """Take out what is known of these, at the present time; a batch that asks meanwhile loads them."""
        now = self._clock.monotonic()
        found = [(run_id, self._known.pop(run_id, None)) for run_id in run_ids]
        return {
            run_id: known.later(now)
            for run_id, known in found
            if known is not None and now - known.anchor < ANCHOR_SECONDS
        }

    def keep(self, instances: Iterable[Known]) -> None:
        """Keep what was written just now, unless it closed or is large."""
        if self._clock.monotonic() < self._trusted_from:
            return
        for known in instances:
            row = known.row
            if row.wakeup_ms is not None and len(row.input) + len(row.state) <= BYTES_MAX:
                self._known[row.run_id] = known
        while len(self._known) > INSTANCES_MAX:
            del self._known[next(iter(self._known))]

    def keep_new(self, instances: Iterable[NewInstance]) -> None:
        """Keep what was inserted just now: its time begins here."""
        now = self._clock.monotonic()
        self.keep(
            Known(Loaded(*new[:4], 1, new.state, new.input, 0, new.wakeup_ms), now, now) for new in instances
        )

    def mistaken(self) -> None:
        """A guess was wrong: forget all, and guess nothing for a while."""
        self._known.clear()
        self._trusted_from = self._clock.monotonic() + DISTRUST_SECONDS
