"""Operators' verbs: the same `decide`, and one audit row in the commit of what was done (P16)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from saga import statelog
from saga.clock import Clock, Ids
from saga.coordinator.arrivals import CancelArrival
from saga.coordinator.redrive import RedriveBudget
from saga.coordinator.work import BatchWork
from saga.definition.registry import Registry
from saga.errors import SagaNotFound
from saga.storage.base import Advanced, Closed, CoordinatorStore, StoredRow


class Verbs:
    """Verbs on one instance at a time, usable in any process of the coordinator's database."""

    def __init__(
        self,
        registry: Registry,
        store: CoordinatorStore,
        *,
        namespace: str,
        clock: Clock,
        ids: Ids,
        publish: Callable[[Sequence[StoredRow]], None],
        on_closed: Callable[[Sequence[Closed]], None],
    ) -> None:
        self._registry = registry
        self._store = store
        self._namespace = namespace
        self._clock = clock
        self._ids = ids
        self._publish = publish
        self._on_closed = on_closed

    async def cancel(self, run_id: UUID, *, actor: str, reason: str, session: Any = None) -> None:
        """Ask an instance to stop and undo, in the caller's transaction if `session` is given.

        Raises PastPivot and SagaNotFound, having written nothing. An instance that compensates or has ended stays as
        it is.
        """
        request = CancelArrival(run_id, self._ids.uuid7(), actor, reason)
        work, advanced = await self._advance(request, session)
        while advanced.lost:  # another process moved it between our look and our write
            work, advanced = await self._advance(request, session)
        if request.request_id in work.rejected:
            raise work.rejected[request.request_id]
        if run_id in work.missing:
            raise SagaNotFound()
        if session is None:
            self._publish(advanced.rows)
            self._on_closed(work.closed)
            statelog.tell(self._namespace, work.state_changes)

    async def _advance(self, request: CancelArrival, session: Any) -> tuple[BatchWork, Advanced]:
        work = BatchWork(
            self._namespace,
            self._registry,
            [request],
            ids=self._ids,
            budget=RedriveBudget(),
            monotonic=self._clock.monotonic(),
        )
        return work, await self._store.advance([request.run_id], work, (), session)
