"""A subscription: claims what its prefetch leaves room for, and settles in batches under a token of its own.

Order of writes: a message is claimed (committed), handed over, and deleted by the ack. A crash after any of these
leaves the claim to run out, and whoever takes it next sees it marked. When the link to the database is lost, so is the
token: what was held is given back under the next one, and an ack that comes later names a token that is no more (P35).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

from pydantic_core import from_json

from saga.batcher import Batcher
from saga.brokers.base import EMPTY, Delivery
from saga.brokers.database.options import DatabaseOptions
from saga.clock import Clock, Ids, Spawner
from saga.errors import BrokerUnavailable, SagaError, StorageBusy, StorageUnavailable, TopologyMismatch
from saga.storage.queue import Claimed, QueueStore

log: Final[logging.Logger] = logging.getLogger("saga.database-broker")

SETTLE_BATCH: Final = 1_000
MARK_SECONDS: Final = 0.25
"""A claim passes over what was claimed before the last but one of these."""
STEP_SECONDS: Final = 3.0
"""Bound for each of the three steps of a close."""


class _Settled(NamedTuple):
    token: UUID
    id: int
    acked: bool


class DatabaseConsumer:
    """A subscription to one channel. `ring` tells every consumer of the channel that there is something to claim."""

    def __init__(
        self,
        channel: str,
        *,
        prefetch: int,
        store: QueueStore,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        options: DatabaseOptions,
        ring: Callable[[], None],
        forget: Callable[[DatabaseConsumer], None],
    ) -> None:
        self.channel = channel
        self.token: UUID = ids.uuid7()
        """Names this subscription until its link is lost; the broker renews it."""
        self.subscribed: bool = False
        """Whether the database knows the token."""
        self._prefetch = prefetch
        self._store = store
        self._clock = clock
        self._ids = ids
        self._spawner = spawner
        self._options = options
        self._ring = ring
        self._forget = forget
        self._held: set[int] = set()
        self._buffer: deque[Delivery] = deque()
        self._there = asyncio.Event()
        self._due = asyncio.Event()
        self._above = self._aged = self._seen = 0
        self._raise_at = 0.0
        self._more = False
        self._former: list[UUID] = []
        """Tokens that were lost and may still hold something."""
        self._stopping = False
        self._stopped = False
        self._claiming: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._settling: Batcher[_Settled] = Batcher(
            self._settle, spawner=spawner, name="saga-database-settle", batch_max=SETTLE_BATCH
        )

    async def open(self) -> None:
        """Subscribe. Raises TopologyMismatch, BrokerUnavailable."""
        try:
            declared = await self._store.subscribe(self.token, self.channel, self._options.visibility_seconds)
            if not declared:
                await self._store.leave([self.token])
        except (StorageUnavailable, StorageBusy) as error:
            self._forget(self)
            raise BrokerUnavailable(error.text) from None
        if not declared:
            self._forget(self)
            raise TopologyMismatch(
                f"channel {self.channel} is not declared; declare it first (the app does so at start)"
            )
        self.subscribed = True
        self._claiming = self._spawner.spawn(self._claim_all(), name="saga-database-claim")

    # --- the broker's side

    def wake(self, *, all_of: bool = False) -> None:
        """There is something to claim; `all_of` says that it may stand below what was seen already."""
        if all_of:
            self._above = self._aged = 0
        self._due.set()

    def lose(self) -> None:
        """The link is lost: all that is unsettled comes back, what is buffered is stale (RMQ-13)."""
        if not self.subscribed:
            return
        self.subscribed = False
        self._former.append(self.token)
        self.token = self._ids.uuid7()
        self._held.clear()
        self._buffer.clear()
        if not self._stopped:
            self._there.clear()
        self._due.set()

    # --- claiming

    async def _claim_all(self) -> None:
        failures = 0
        while not self._stopping:
            self._due.clear()
            try:
                if not self.subscribed:
                    await self._subscribe_again()
                at_once = await self._claim()
                failures = 0
            # lint: allow broad-except because this loop is its own supervisor: without it a channel stands still
            except Exception as error:
                failures += 1
                log.warning("claiming from %s waits: %s", self.channel, type(error).__name__)
                self.lose()
                at_once = True
                await self._clock.sleep(self._options.pause(failures, self._ids.fraction()))
            if not at_once and not self._stopping:
                await self._due.wait()

    async def _subscribe_again(self) -> None:
        token, former = self.token, list(self._former)
        await self._store.subscribe(token, self.channel, self._options.visibility_seconds, instead_of=former)
        del self._former[: len(former)]
        self.subscribed = True
        self._above = self._aged = 0

    async def _claim(self) -> bool:
        """Take what there is room for; return whether to look again at once."""
        room = self._prefetch - len(self._held)
        self._more = room <= 0
        if self._more:
            return False
        token, above = self.token, self._above
        rows = await self._store.claim(
            token,
            self.channel,
            above=above,
            limit=room,
            deliveries_max=self._options.delivery_limit + 1,
        )
        if token != self.token or self._stopped:
            return True  # lost meanwhile, or too late: given back with the token
        self._raise_mark(rows)
        self._held.update(row.id for row in rows)
        self._buffer.extend(self._delivery(row, token) for row in rows)
        if rows:
            self._there.set()
        self._more = len(rows) == room
        return self._more and len(self._held) < self._prefetch

    def _raise_mark(self, rows: Sequence[Claimed]) -> None:
        """Let later claims begin behind what was claimed half a second ago, and not at the dead rows before it.

        Ids are given before the commit, so a row may become visible behind those that were claimed already; a commit
        that takes longer than the mark is old is found by the next look, which begins from the front.
        """
        self._seen = max([self._seen, *(row.id for row in rows if row.deliveries == 1)])
        now = self._clock.monotonic()
        if now >= self._raise_at:
            self._above, self._aged = self._aged, self._seen
            self._raise_at = now + MARK_SECONDS

    def _delivery(self, row: Claimed, token: UUID) -> Delivery:
        return Delivery(
            channel=self.channel,
            body=row.body,
            content_type=row.content_type,
            headers=EMPTY if row.headers == "{}" else from_json(row.headers),
            redelivered=row.deliveries > 1,
            delivery_count=row.deliveries,
            token=(self, token, row.id),
        )

    # --- the port

    async def receive(self) -> Sequence[Delivery]:
        # The buffer is taken without an await after the wait, so a cancelled receive has taken nothing.
        while not self._buffer:
            if self._stopped:
                return ()
            self._there.clear()
            await self._there.wait()
        batch = tuple(self._buffer)
        self._buffer.clear()
        return batch

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        self._offer(deliveries, acked=True)

    def retry(self, deliveries: Sequence[Delivery]) -> None:
        self._offer(deliveries, acked=False)

    def _offer(self, deliveries: Sequence[Delivery], *, acked: bool) -> None:
        ours: list[_Settled] = []
        for delivery in deliveries:
            handle: Any = delivery.token
            owner, token, id_ = handle
            if owner is self and token == self.token and id_ in self._held:
                self._held.discard(id_)
                ours.append(_Settled(token, id_, acked))
        self._settling.offer_all(ours)
        if ours and self._more:
            self._due.set()

    async def _settle(self, batch: Sequence[_Settled]) -> None:
        for token in {each.token for each in batch}:
            mine = [each for each in batch if each.token == token]
            returned = [each.id for each in mine if not each.acked]
            try:
                await self._store.settle(
                    token, [each.id for each in mine if each.acked], returned, self._options.retry_seconds
                )
            except SagaError as error:
                log.warning("%d deliveries of %s come again: %s", len(mine), self.channel, error.text)
                if token == self.token:
                    self.lose()
                continue
            if returned:
                self._spawner.spawn(self._ring_later(), name="saga-database-retry")

    async def _ring_later(self) -> None:
        await self._clock.sleep(self._options.retry_seconds)
        self._ring()

    async def stop(self) -> None:
        self._stopping = True
        self._due.set()
        if self._claiming is not None:
            # what is being claimed at this moment was fetched; nothing is after it
            await asyncio.wait({self._claiming}, timeout=STEP_SECONDS)
        self._stopped = True
        self._there.set()

    async def close(self) -> None:
        if self._closing is None:
            self._closing = self._spawner.spawn(self._close(), name="saga-database-close")
        await asyncio.wait({self._closing}, timeout=3 * STEP_SECONDS + 0.5)

    async def _close(self) -> None:
        await self.stop()
        self._buffer.clear()
        settled = self._spawner.spawn(self._settling.join(), name="saga-database-settled")
        await asyncio.wait({settled}, timeout=STEP_SECONDS)
        settled.cancel()
        tokens = [*self._former, self.token]
        self.token, self.subscribed = self._ids.uuid7(), False
        self._forget(self)
        left = self._spawner.spawn(self._leave(tokens), name="saga-database-leave")
        await asyncio.wait({left}, timeout=STEP_SECONDS)

    async def _leave(self, tokens: Sequence[UUID]) -> None:
        try:
            await self._store.leave(tokens)
        except SagaError as error:
            log.info("claims on %s are left to run out: %s", self.channel, error.code)
            return
        if self._held:
            self._held.clear()
            self._ring()
