"""How much may be sent again: a silent destination is probed with its oldest command only, others get a tenth (P4)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

WINDOW_SECONDS: Final = 30.0
SHARE: Final = 0.1
PROBE_FORGOTTEN_SECONDS: Final = 330.0


@dataclass
class _Destination:
    replies: deque[tuple[float, int]] = field(default_factory=deque)
    resends: deque[float] = field(default_factory=deque)
    oldest: UUID | None = None
    oldest_seen: float = 0.0


class RedriveBudget:
    """Counts replies and resends per destination over the last 30 s, in this process."""

    def __init__(self) -> None:
        self._destinations: dict[str, _Destination] = {}

    def answered(self, destination: str, count: int, now: float) -> None:
        """Replies came from `destination`."""
        known = self._of(destination)
        known.replies.append((now, count))
        # It is silent no more: if it falls silent again, the oldest command is looked for anew, for the one that was
        # probed last may have ended, and nobody older would come to take its place.
        known.oldest = None

    def may_resend(self, destination: str, run_id: UUID, now: float) -> bool:
        """Return whether the command of this run may be sent again now. Run ids order by age."""
        known = self._of(destination)
        self._forget(known, now)
        if not known.replies:
            stale = known.oldest is None or now - known.oldest_seen > PROBE_FORGOTTEN_SECONDS
            if stale or (known.oldest is not None and run_id <= known.oldest):
                known.oldest, known.oldest_seen = run_id, now
                return True
            return False
        answered = sum(count for _, count in known.replies)
        return len(known.resends) < max(1, int(answered * SHARE))

    def resent(self, destination: str, now: float) -> None:
        """A command was sent again to `destination`."""
        self._of(destination).resends.append(now)

    def _of(self, destination: str) -> _Destination:
        return self._destinations.setdefault(destination, _Destination())

    @staticmethod
    def _forget(known: _Destination, now: float) -> None:
        while known.replies and known.replies[0][0] < now - WINDOW_SECONDS:
            known.replies.popleft()
        while known.resends and known.resends[0] < now - WINDOW_SECONDS:
            known.resends.popleft()
