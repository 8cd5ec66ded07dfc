"""What operators look at, over SQLAlchemy: lists, counts, incidents by cause, parked messages, the outbox."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, ColumnElement, Connection, and_, cast, func, or_, select, type_coerce

from saga.engine.state import CLOSED
from saga.storage.base import (
    AuditEntry,
    DeadLetter,
    Filter,
    IncidentGroup,
    Listed,
    Loaded,
    OutboxStatus,
    Payload,
)
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.coordinator import statements_for
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.statements import milliseconds

BLOCKED_MAX = 100


class SqlOperatorStore:
    """Adapter of `OperatorStore`."""

    def __init__(self, database: Database, namespace: str) -> None:
        self._database = database
        self._namespace = namespace
        self._sql = statements_for(database, namespace)

    async def list(self, filter: Filter, below: UUID | None, limit: int) -> Sequence[Listed]:
        i = t.instance.c
        query = (
            select(
                i.run_id,
                i.saga,
                i.saga_version,
                i.saga_id,
                i.run_number,
                i.status,
                i.state,
                i.created_at,
                i.closed_at,
            )
            .where(
                i.namespace == self._namespace,
                *self._conditions(filter),
                *([] if below is None else [i.run_id < below]),
            )
            .order_by(i.run_id.desc())
            .limit(limit)
        )
        return await self._database.run(
            lambda connection: [Listed(*row) for row in connection.execute(query)]
        )

    async def count(self, filter: Filter, limit: int) -> int:
        i = t.instance.c
        some = (
            select(i.run_id)
            .where(i.namespace == self._namespace, *self._conditions(filter))
            .limit(limit)
            .subquery()
        )
        query = select(func.count()).select_from(some)

        def count(connection: Connection) -> int:
            counted: int = connection.execute(query).scalar_one()
            return counted

        return await self._database.run(count)

    def _conditions(self, filter: Filter) -> Sequence[ColumnElement[bool]]:
        i = t.instance.c
        found: list[ColumnElement[bool]] = []
        if filter.saga is not None:
            found.append(i.saga == filter.saga)
        if filter.id is not None:
            found.append(i.saga_id == filter.id)
        if filter.run_id is not None:
            found.append(i.run_id == filter.run_id)
        if filter.statuses:
            found.append(i.status.in_(sorted(filter.statuses)))
            if CLOSED.isdisjoint(
                filter.statuses
            ):  # no condition more, but the index of the open ones serves it
                found.append(i.wakeup_at.is_not(None))
        if filter.steps is not None:
            found.append(self._outstanding(filter.steps))
        if filter.id_prefix:
            # no LIKE: SQLite's takes upper and lower case for the same
            # and LENGTH counts what SUBSTR counts, which on MySQL is bytes here
            prefix = type_coerce(filter.id_prefix, i.saga_id.type)
            found.append(func.substr(i.saga_id, 1, func.length(prefix)) == prefix)
        if filter.fingerprint is not None:
            n = t.incident.c
            held = select(n.run_id).where(
                n.namespace == self._namespace, n.fingerprint == filter.fingerprint, n.resolved_at.is_(None)
            )
            found.append(i.run_id.in_(held))
        return found

    def _outstanding(self, steps: Collection[tuple[str, int, int]]) -> ColumnElement[bool]:
        """Compare the outstanding command's step, the first number of `o` in the snapshot."""
        i = t.instance.c
        snapshot: Any = (
            cast(i.state, JSON) if self._database.dialect == "postgresql" else type_coerce(i.state, JSON)
        )
        step = snapshot[("o", 0)].as_integer()
        return or_(
            *(
                and_(i.saga == saga, i.saga_version == version, step == index)
                for saga, version, index in sorted(steps)
            ),
            False,  # type: ignore[arg-type]  # of no steps: nothing
        )

    async def load(self, run_ids: Collection[UUID]) -> Mapping[UUID, Loaded]:
        return await self._database.run(lambda connection: self._sql.load(connection, run_ids))

    async def audit(self, run_id: UUID) -> Sequence[AuditEntry]:
        a = t.audit.c
        query = (
            select(a.at, a.verb, a.actor, a.reason, a.status_before, a.status_after, a.detail)
            .where(a.namespace == self._namespace, a.run_id == run_id)
            .order_by(a.id)
        )
        return await self._database.run(
            lambda connection: [AuditEntry(*row) for row in connection.execute(query)]
        )

    async def payloads(self, run_id: UUID) -> Sequence[Payload]:
        i, v = t.instance.c, t.value.c
        own = select(i.input, i.result).where(i.namespace == self._namespace, i.run_id == run_id)
        steps = (
            select(v.step, v.iteration, v.round, v.kind, v.data)
            .where(v.namespace == self._namespace, v.run_id == run_id)
            .order_by(v.step, v.iteration, v.round, v.kind)
        )

        def read(connection: Connection) -> Sequence[Payload]:
            row = connection.execute(own).one_or_none()
            whole = () if row is None else (("input", row.input), ("result", row.result))
            found = [Payload(None, 0, 0, kind, data) for kind, data in whole if data is not None]
            return found + [Payload(*row) for row in connection.execute(steps)]

        return await self._database.run(read)

    async def incident_groups(self, saga: str | None, limit: int) -> Sequence[IncidentGroup]:
        n = t.incident.c
        instances = func.count(n.run_id.distinct())
        query = (
            select(
                n.fingerprint,
                n.kind,
                n.saga,
                n.step,
                n.error,
                instances,
                func.min(n.first_seen_at),
                func.max(n.last_seen_at),
            )
            .where(
                n.namespace == self._namespace,
                n.resolved_at.is_(None),
                *([] if saga is None else [n.saga == saga]),
            )
            .group_by(n.fingerprint, n.kind, n.saga, n.step, n.error)
            .order_by(instances.desc(), n.fingerprint)
            .limit(limit)
        )
        return await self._database.run(
            lambda connection: [IncidentGroup(*row) for row in connection.execute(query)]
        )

    async def dead_letters(
        self, channel: str | None, fingerprint: str | None, below: UUID | None, limit: int
    ) -> Sequence[DeadLetter]:
        p = t.parked.c
        query = (
            select(p.id, p.channel, p.reason, p.fingerprint, p.content_type, func.length(p.body), p.parked_at)
            .where(
                p.namespace == self._namespace,
                *([] if channel is None else [p.channel == channel]),
                *([] if fingerprint is None else [p.fingerprint == fingerprint]),
                *([] if below is None else [p.id < below]),
            )
            .order_by(p.id.desc())
            .limit(limit)
        )
        return await self._database.run(
            lambda connection: [DeadLetter(*row) for row in connection.execute(query)]
        )

    async def outbox(self) -> OutboxStatus:
        return await self._database.run(self._outbox)

    def _outbox(self, connection: Connection) -> OutboxStatus:
        o, d, b = t.outbox.c, t.outbox_delayed.c, t.blocked_key.c
        pending, oldest = connection.execute(
            select(func.count(), func.min(o.created_at)).where(o.namespace == self._namespace)
        ).one()
        delayed: int = connection.execute(
            select(func.count()).select_from(t.outbox_delayed).where(d.namespace == self._namespace)
        ).scalar_one()
        blocked = connection.execute(
            select(b.ordering_key, b.reason, b.attempts)
            .where(b.namespace == self._namespace)
            .order_by(b.ordering_key)
            .limit(BLOCKED_MAX)
        )
        age = None if oldest is None else milliseconds(self._sql.now(connection), oldest) / 1000
        return OutboxStatus(
            pending, age, delayed, [(key, reason, attempts) for key, reason, attempts in blocked]
        )
