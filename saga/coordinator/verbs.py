"""Operators' verbs: the same `decide`, and one audit row in the commit of what was done (P16)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from saga import statelog
from saga.clock import Clock, Ids
from saga.coordinator.arrivals import VerbArrival
from saga.coordinator.redrive import RedriveBudget
from saga.coordinator.work import BatchWork
from saga.definition.registry import Registry
from saga.engine.verbs import Moved, Verb
from saga.errors import SagaNotFound, UnknownSaga, VerbNotAllowed
from saga.storage.base import Advanced, Closed, CoordinatorStore, Loaded, StoredRow


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

    async def order(
        self, verb: Verb, run_id: UUID, *, actor: str, reason: str, force: bool = False, session: Any = None
    ) -> Moved:
        """Do `verb` on an instance and say what it did, in the caller's transaction if `session` is given.

        Raises PastPivot, VerbNotAllowed, SagaNotFound and UnknownSaga (its version is not registered here), having
        written nothing.
        """
        request = VerbArrival(run_id, self._ids.uuid7(), verb, actor, reason, force)
        work, advanced = await self._advance(request, session)
        while advanced.lost or request.request_id in work.rejected:
            # Another process moved it between our look and our write. Or we did: the COMMIT's answer was lost, and what
            # ran again found the version, or the state, of its own first run (P31).
            if session is None and (done := await self._store.audited(request.request_id)) is not None:
                return Moved(*done, None)
            if not advanced.lost:
                break
            work, advanced = await self._advance(request, session)
        moved = self._judge(work, request)
        if session is None:
            self._publish(advanced.rows)
            self._on_closed(work.closed)
            statelog.tell(self._namespace, work.state_changes)
        return moved

    def preview(self, verb: Verb, loaded: Loaded, *, force: bool = False) -> Moved:
        """Say what `order` would do to an instance as it was loaded, and write nothing. Raises what it would raise."""
        request = VerbArrival(loaded.run_id, self._ids.uuid7(), verb, "", "", force)
        work = self._work(request)
        work.decide({loaded.run_id: loaded})
        return self._judge(work, request)

    async def _advance(self, request: VerbArrival, session: Any) -> tuple[BatchWork, Advanced]:
        work = self._work(request)
        return work, await self._store.advance([request.run_id], work, (), session)

    def _judge(self, work: BatchWork, request: VerbArrival) -> Moved:
        """Say what the verb does to the instance, or raise why it does nothing."""
        if (refusal := work.rejected.get(request.request_id)) is not None:
            raise refusal
        if request.run_id in work.missing:
            raise SagaNotFound()
        if (row := work.unserved.get(request.run_id)) is not None:
            raise UnknownSaga(
                f"Version {row.saga_version} is not among the sagas of this app; order it where it is.",
                saga=row.saga,
                saga_id=row.saga_id,
            )
        moved = work.moved(request.run_id)
        if moved is None:
            raise VerbNotAllowed(
                f"{request.verb} cannot be decided: the instance is set apart, and its incident says why."
            )
        return moved

    def _work(self, request: VerbArrival) -> BatchWork:
        return BatchWork(
            self._namespace,
            self._registry,
            [request],
            ids=self._ids,
            budget=RedriveBudget(),
            monotonic=self._clock.monotonic(),
        )
