"""The outbox where the broker is in the coordinator's own database: a commit puts its commands into the queue itself.

There is nothing to send, to confirm, to delete or to sweep. All that is left to do after a commit is to wake consumers,
and should that be lost with its process, their own look finds the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from saga.storage.base import StoredRow


class QueuedRows:
    """Takes the place of `DirectPublisher`. `wake` is told the channels that have something new."""

    def __init__(self, wake: Callable[[Collection[str]], None]) -> None:
        self._wake = wake

    def publish(self, rows: Sequence[StoredRow]) -> None:
        """These rows are committed: wake the consumers of their channels."""
        if rows:
            self._wake({row.channel for row in rows})

    def take_confirmed(self) -> list[int]:
        """Return nothing: rows leave the queue when they are acked."""
        return []

    def untake(self, ids: Sequence[int]) -> None:
        """Nothing was taken."""

    def deleted(self, ids: Collection[int]) -> None:
        """Nothing was deleted."""

    async def close(self) -> None:
        """Nothing is under way."""
