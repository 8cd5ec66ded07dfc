"""Direct publishing: the process that committed rows sends them from memory, at once and pipelined.

Order of writes: rows are committed, then published, then confirmed by the broker, then deleted with the next batch.
A crash after any of these leaves the row in the outbox, where a relay finds it (R1-R5); a second copy is dropped by
the participant's barrier. Nothing here ever waits for the broker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Final, Protocol

from saga.brokers.base import Broker, OutMessage, PublishOutcome
from saga.clock import Clock, Spawner
from saga.errors import SagaError
from saga.failpoints import failpoint
from saga.messages import BODY_BYTES_MAX, PACK_COUNT_MAX, is_ours, pack, packs
from saga.storage.base import OutboxStore, StoredRow

log: Final[logging.Logger] = logging.getLogger("saga.outbox")

IN_FLIGHT_MAX: Final = 10_000
FLUSH_SECONDS: Final = 0.25
LEFT_SECONDS: Final = 10.0


def pack_rows(rows: Sequence[StoredRow], broker: Broker) -> list[tuple[OutMessage, list[StoredRow]]]:
    """Group rows into broker messages, in order: several commands travel as one where the broker charges so."""
    count_max = PACK_COUNT_MAX if broker.capabilities.packs_commands else 1
    bytes_max = min(broker.capabilities.body_bytes_max, BODY_BYTES_MAX)
    by_channel: dict[str, list[StoredRow]] = {}
    for row in rows:
        by_channel.setdefault(row.channel, []).append(row)
    packed = []
    for channel, mine in by_channel.items():
        # only our own readers know packs: whoever reads a domain event gets it alone
        together_max = count_max if is_ours(channel) else 1
        for group in packs([row.body for row in mine], count_max=together_max, body_bytes_max=bytes_max):
            together = [mine[index] for index in group]
            body, content_type = pack([row.body for row in together])
            packed.append((OutMessage(channel, body, content_type, together[0].ordering_key), together))
    return packed


class CommandPublisher(Protocol):
    """What the coordinator needs of whatever sees to it that committed commands go out."""

    def publish(self, rows: Sequence[StoredRow]) -> None:
        """Send committed rows, or see that they are taken. Never waits."""
        ...

    def take_confirmed(self) -> list[int]:
        """Return the ids of rows to delete with the batch that is about to commit."""
        ...

    def untake(self, ids: Sequence[int]) -> None:
        """The batch did not commit."""
        ...

    def deleted(self, ids: Collection[int]) -> None:
        """The batch did commit."""
        ...

    async def close(self) -> None:
        """Finish what is under way."""
        ...


class DirectPublisher:
    """Sends committed rows and remembers which of them the broker has confirmed."""

    def __init__(self, broker: Broker, store: OutboxStore, *, clock: Clock, spawner: Spawner) -> None:
        self._broker = broker
        self._store = store
        self._clock = clock
        self._spawner = spawner
        self._in_flight: set[int] = set()
        self._confirmed: list[int] = []
        self._taken_at = 0.0
        self._left: dict[str, float] = {}
        self._flush: asyncio.Task[None] | None = None
        self.confirm_seconds: float = 0.0
        """Slowest confirm of late; the sweep leaves rows alone for longer when the broker is slow."""

    @property
    def in_flight(self) -> Collection[int]:
        """Ids of rows that this process has sent or confirmed, and that a sweep must not send again."""
        return self._in_flight

    def publish(self, rows: Sequence[StoredRow]) -> None:
        """Send committed rows; those behind an older row of their key, or above the bound, stay for the relay."""
        if not rows:
            return
        now = self._clock.monotonic()
        self._left = (
            {key: until for key, until in self._left.items() if until > now} if self._left else self._left
        )
        room = IN_FLIGHT_MAX - len(self._in_flight)
        direct = [row for row in rows if row.ordering_key not in self._left][: max(room, 0)]
        if len(direct) < len(rows):
            sent = {row.id for row in direct}
            self._leave((row for row in rows if row.id not in sent), now)
        packed = pack_rows(direct, self._broker)
        self._in_flight.update(row.id for row in direct)
        futures = self._broker.publish([message for message, _ in packed])
        failpoint("R2")  # bytes on their way, no confirm: the rows are still there
        for (_, together), future in zip(packed, futures, strict=True):
            future.add_done_callback(partial(self._settle, together, now))

    def _leave(self, rows: Iterable[StoredRow], now: float) -> None:
        for row in rows:
            self._left[row.ordering_key] = now + LEFT_SECONDS

    def _settle(
        self, rows: Sequence[StoredRow], sent_at: float, done: asyncio.Future[PublishOutcome]
    ) -> None:
        now = self._clock.monotonic()
        outcome = PublishOutcome.UNKNOWN if done.cancelled() else done.result()
        if outcome is PublishOutcome.CONFIRMED:
            self.confirm_seconds = max(now - sent_at, self.confirm_seconds * 0.9)
            failpoint("R3")  # confirmed, not deleted: the relay sends it again, the barrier drops the copy
            self._confirmed.extend(row.id for row in rows)
            if self._flush is None:
                self._flush = self._spawner.spawn(self._flush_when_idle(), name="saga-outbox-flush")
            return
        self._in_flight.difference_update(row.id for row in rows)
        self._leave(rows, now)

    def take_confirmed(self) -> list[int]:
        """Return the ids to delete with the batch that is about to commit; give them back with `untake` if it fails."""
        taken, self._confirmed = self._confirmed, []
        self._taken_at = self._clock.monotonic()
        return taken

    def untake(self, ids: Sequence[int]) -> None:
        """The batch did not commit: its deletions are still to do."""
        self._confirmed.extend(ids)

    def deleted(self, ids: Collection[int]) -> None:
        """The rows are gone from the outbox."""
        self._in_flight.difference_update(ids)

    async def _flush_when_idle(self) -> None:
        """Delete confirmed rows that no batch took along for 250 ms."""
        self._taken_at = self._clock.monotonic()
        try:
            while self._confirmed:
                left = self._taken_at + FLUSH_SECONDS - self._clock.monotonic()
                if left > 0:
                    await self._clock.sleep(left)
                else:
                    await self._delete_confirmed()
        finally:
            self._flush = None

    async def _delete_confirmed(self) -> None:
        ids = self.take_confirmed()
        if not ids:
            return
        try:
            await self._store.delete_confirmed(ids)
            self.deleted(ids)
        except SagaError as error:
            log.warning("confirmed rows stay for now: %s", error.code)
            self.untake(ids)
        except BaseException:
            self.untake(ids)
            raise

    async def close(self) -> None:
        """Delete what is confirmed so far; a row left behind is sent once more by the next process, harmlessly."""
        if self._flush is not None:
            self._flush.cancel()  # what it was deleting goes on in the database, or is deleted again here
            await asyncio.wait({self._flush})
        await self._delete_confirmed()
