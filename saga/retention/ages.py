"""The ages at which rows go, and the rule that follows: a command whose run began too long ago is refused, never run.

A barrier row may be purged only when nobody runs its command any more. What counts is when the *run* began, which its
id tells: an undo whose own command is young but whose action's row is purged would say that there is nothing to undo.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from saga.brokers.base import Capabilities
from saga.clock import Clock
from saga.errors import RetentionTooShort
from saga.uuids import made_at

PARKED_AGE: Final = timedelta(days=30)
"""So long a parked message can be looked at and sent again (row F-09)."""
MARGIN: Final = timedelta(days=1)
"""Rows go so much later than their commands are refused: clocks differ, and a refusal may be looked at by day."""
REDRIVES: Final = 10
"""The longest pause between two sendings of a command, as a multiple of the first (P4)."""


class Horizon:
    """Tells which runs began too long ago for their commands to be run here."""

    def __init__(self, age: timedelta, clock: Clock) -> None:
        self._age = age
        self._clock = clock
        self.purged_before: datetime | None = None
        """Rows of runs that began before are gone, whatever the age is now: a longer age does not bring them back."""

    def is_behind(self, run_id: UUID) -> bool:
        """Whether a run began too long ago. An id that is no UUIDv7 tells no time: never, and its rows stay."""
        began = made_at(run_id)
        if began is None:
            return False
        gone = self.purged_before
        return self.is_past(began) or (gone is not None and began < gone)

    def is_past(self, instant: datetime) -> bool:
        """Whether an instant is longer ago than the age."""
        return instant < self._clock.now() - self._age


def check_barrier_age(age: timedelta, broker: Capabilities, redrive: timedelta) -> None:
    """Refuse an age at which commands that may still come for good reason would be refused.

    Raises RetentionTooShort.
    """
    kept = timedelta(seconds=broker.retention_seconds or 0.0)
    needed = kept + PARKED_AGE + REDRIVES * redrive
    if age <= needed:
        raise RetentionTooShort(
            f"barrier_retention is {_told(age)}, and a command may come as late as {_told(needed)} after its run "
            f"began: {_told(kept)} in the broker {broker.name}, {_told(PARKED_AGE)} parked, "
            f"{_told(REDRIVES * redrive)} until it is sent again. Set SAGA_BARRIER_RETENTION to more than "
            f"{needed.total_seconds():.0f} seconds."
        )


def _told(age: timedelta) -> str:
    days = age / timedelta(days=1)
    return f"{days:.1f} days" if days >= 1 else f"{age.total_seconds():g} s"
