"""When a failed attempt is tried again: pure, durable data of a step, not a loop in a process.

Jitter is drawn from a hash of the command id and the attempt, so that the same history always gives the same delays:
uniform over many steps, repeatable for one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Final


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Delays between attempts: full jitter under an exponential cap."""

    initial: timedelta = timedelta(seconds=1)
    factor: float = 2.0
    maximum: timedelta = timedelta(seconds=60)
    attempts: int | None = 10
    """Attempts in all, the first included; None is without end."""
    schedule_to_close: timedelta | None = timedelta(minutes=15)
    """Budget from the first sending to the last answer; None is without end."""
    incident_at: int | None = None
    """Attempt whose failure opens an incident, where retries have no end."""

    def __post_init__(self) -> None:
        if self.initial <= timedelta() or self.maximum < self.initial:
            raise ValueError("0 < initial <= maximum")
        if self.factor < 1 or (self.attempts is not None and self.attempts < 1):
            raise ValueError("factor and attempts are at least 1")
        if self.schedule_to_close is not None and self.schedule_to_close <= timedelta():
            raise ValueError("0 < schedule_to_close")
        if self.incident_at is not None and self.incident_at < 1:
            raise ValueError("incident_at is at least 1")

    @property
    def endless(self) -> bool:
        """Whether neither attempts nor time ever run out."""
        return self.attempts is None and self.schedule_to_close is None

    def cap_ms(self, failed_attempt: int) -> int:
        """Return the upper bound of the delay after attempt `failed_attempt` (1 is the first), in milliseconds."""
        cap = self.initial.total_seconds() * self.factor ** min(failed_attempt - 1, 64)
        return int(min(cap, self.maximum.total_seconds()) * 1000)

    def delay_ms(self, command_id: str, failed_attempt: int) -> int:
        """Return the delay in milliseconds, uniform in [0, cap] over command ids."""
        digest = hashlib.sha256(f"{command_id}:{failed_attempt}".encode()).digest()
        return self.cap_ms(failed_attempt) * int.from_bytes(digest[:6], "big") // ((1 << 48) - 1)


FORWARD: Final = RetryPolicy()
"""1 s doubling to 60 s, 10 attempts and 15 minutes in all, whichever ends first."""

COMPENSATION: Final = RetryPolicy(
    maximum=timedelta(minutes=10), attempts=None, schedule_to_close=None, incident_at=10
)
"""1 s doubling to 10 min, without end; an incident at attempt 10."""
