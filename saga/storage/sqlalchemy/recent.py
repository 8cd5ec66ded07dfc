"""Instances as this process wrote them last, so that most batches need not load them (docs/design/0006).

A guess, never an authority: the version check of the write (P1) tells when another process moved an instance meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from saga.clock import Clock
from saga.storage.base import Changes, Loaded, NewInstance, ValueRow

INSTANCES_MAX: Final = 10_000
BYTES_MAX: Final = 4_096
"""Of input, state and payloads together; larger instances are loaded, so that all of them stay below some 50 MB."""
ANCHOR_SECONDS: Final = 60.0
"""For so long the database's time is reckoned on from the last reading of it (P10); then it is read again."""
DISTRUST_SECONDS: Final = 10.0
"""For so long everything is loaded after a guess was wrong: other coordinators take part in the same sagas."""


# Neither frozen nor made anew when its instance moves: two are taken and kept for every step.
@dataclass(slots=True)
class Known:
    """An instance. Its `now_ms` was true at `at`, reckoned on from a reading of the database's clock at `anchor`.

    Each is the time before the question was sent: a slow answer is time that has passed, and what is reckoned on from
    its arrival would be behind, and what is due early.
    """

    row: Loaded
    at: float
    anchor: float
    values: tuple[ValueRow, ...] = ()
    """Payloads of it that this process wrote; they never change."""

    def reckon(self, now: float) -> Known:
        """Reckon the instance's time on, and return it."""
        row = self.row
        now_ms = row.now_ms + round((now - self.at) * 1000)
        self.row, self.at = Loaded(*row[:7], now_ms, row.wakeup_ms, row.status), now
        return self


class RecentInstances:
    """The open instances that this process wrote last: bounded, oldest out first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[UUID, Known] = {}
        self._trusted_from = 0.0

    def now(self) -> float:
        """Return the local time that what is kept is reckoned on from."""
        return self._clock.monotonic()

    def take(self, run_ids: Iterable[UUID]) -> dict[UUID, Known]:
        """Take out what is known of these, at the present time; a batch that asks meanwhile loads them."""
        now = self._clock.monotonic()
        found = [(run_id, self._known.pop(run_id, None)) for run_id in run_ids]
        return {
            run_id: known.reckon(now)
            for run_id, known in found
            if known is not None and now - known.anchor < ANCHOR_SECONDS
        }

    def keep_moved(self, known: Mapping[UUID, Known], changes: Changes) -> None:
        """Keep what was moved just now from what was known before; moves of anything else did not take place."""
        for value in changes.values:
            if (of := known.get(value.key.run_id)) is not None:
                of.values += (value,)
        for moved in changes.moved:
            # neither one that is closed now nor, not known any more, one that another process moved
            if moved.wakeup_ms is not None and (of := known.get(moved.run_id)) is not None:
                row = of.row
                of.row = Loaded(
                    *row[:4], moved.version, moved.state, row.input, row.now_ms, moved.wakeup_ms, moved.status
                )
                self.keep(of)

    def keep_new(self, instances: Iterable[NewInstance], at: float) -> None:
        """Keep what was inserted: its time begins with the statement that was sent `at` that local time."""
        for new in instances:
            row = Loaded(*new[:4], 1, new.state, new.input, 0, new.wakeup_ms, new.status)
            self.keep(Known(row, at, at))

    def keep(self, known: Known) -> None:
        """Keep an instance unless it is closed or large."""
        row = known.row
        size = len(row.input) + len(row.state) + sum([len(value.data) for value in known.values])
        if row.wakeup_ms is None or size > BYTES_MAX or self._clock.monotonic() < self._trusted_from:
            return
        self._known[row.run_id] = known
        if len(self._known) > INSTANCES_MAX:
            del self._known[next(iter(self._known))]

    def forget(self) -> None:
        """Let everything be loaded the next time."""
        self._known.clear()

    def mistaken(self) -> None:
        """A guess was wrong: forget all, and guess nothing for a while."""
        self.forget()
        self._trusted_from = self._clock.monotonic() + DISTRUST_SECONDS
