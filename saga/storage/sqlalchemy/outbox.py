"""The relay's store over SQLAlchemy: leases with a fencing epoch, loss-free reading, deletion, blocked keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final
from uuid import UUID

from sqlalchemy import BindParameter, Connection, Select, bindparam, delete, insert, select, update

from saga.failpoints import failpoint
from saga.storage.base import IncidentRow, Lease, OutboxRow, StoredRow
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.coordinator import statements_for
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.statements import Instant, queue_row

BLOCKED_SECONDS_MAX = 60.0


# Those of every sweep are built once.
_d, _b = t.outbox_delayed.c, t.blocked_key.c
_NAMESPACE: Final[BindParameter[Any]] = bindparam("namespace")
DUE: Final = (
    select(_d.message_id, _d.part, _d.channel, _d.ordering_key, _d.body)
    .where(_d.namespace == _NAMESPACE)
    .order_by(_d.due_at)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True)
)
LONG_AGO: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""When a lease that nobody has had yet was over."""
BLOCKED: Final = select(_b.ordering_key, _b.next_try_at).where(_b.namespace == _NAMESPACE)


@cache
def _reading_due(instant: Instant) -> Select[Any]:
    return DUE.where(_d.due_at <= instant("now"))


class SqlOutboxStore:
    """Adapter of `OutboxStore`. With `queued`, delayed rows that are due go into the database broker's queue."""

    def __init__(self, database: Database, namespace: str, *, queued: bool = False) -> None:
        self._queued = queued
        self._database = database
        self._namespace = namespace
        self._sql = statements_for(database, namespace)
        self._rows_there: set[str] = set()

    async def renew(self, names: Collection[str], owner: UUID, seconds: float) -> Sequence[Lease]:
        def transaction(connection: Connection) -> Sequence[Lease]:
            if missing := sorted(set(names) - self._rows_there):
                new = {"namespace": self._namespace, "epoch": 0, "expires_at": LONG_AGO}
                connection.execute(
                    self._sql.insert_ignore(t.lease), [{**new, "name": name} for name in missing]
                )
            return sorted(self._sql.take_leases(connection, names, owner, seconds))

        leases = await self._database.run(transaction)
        self._rows_there.update(names)
        return leases

    async def release(self, owner: UUID) -> None:
        row = t.lease.c
        query = (
            update(t.lease)
            .where(row.namespace == self._namespace, row.owner == owner)
            .values(owner=None, epoch=row.epoch + 1)
        )
        await self._database.run(lambda connection: connection.execute(query).rowcount)

    async def read_outbox(
        self, parts: Collection[int], low: int, older_than_seconds: float, limit: int
    ) -> Sequence[StoredRow]:
        def transaction(connection: Connection) -> Sequence[StoredRow]:
            return self._sql.read_outbox(connection, parts, low, older_than_seconds, limit)

        return await self._database.run(transaction, single=True)

    async def delete_confirmed(self, ids: Collection[int]) -> None:
        await self._database.run(
            lambda connection: self._sql.delete_outbox(connection, ids), lost_commit="R4", single=True
        )

    async def move_due(self, limit: int) -> int:
        return await self._database.run(lambda connection: self._move_due(connection, limit))

    async def rescan(self, limit: int) -> Mapping[str, float]:
        def transaction(connection: Connection) -> Mapping[str, float]:
            self._move_due(connection, limit)
            return self._read_blocked(connection)

        return await self._database.run(transaction)

    async def block(
        self, lease: Lease, owner: UUID, row: StoredRow, reason: str, retry_seconds: float
    ) -> bool:
        held, b, i = t.lease.c, t.blocked_key.c, t.instance.c

        def transaction(connection: Connection) -> bool:
            # The fence: a former owner's count would push back a key that the new owner is sending.
            fence = connection.execute(
                update(t.lease)
                .where(
                    held.namespace == self._namespace,
                    held.name == lease.name,
                    held.owner == owner,
                    held.epoch == lease.epoch,
                )
                .values(owner=owner)
            )
            if fence.rowcount != 1:
                return False
            failpoint("M3")
            now = self._sql.now(connection)
            counted = connection.execute(
                update(t.blocked_key)
                .where(b.namespace == self._namespace, b.ordering_key == row.ordering_key)
                .values(
                    attempts=b.attempts + 1, reason=reason, next_try_at=now + timedelta(seconds=retry_seconds)
                )
            )
            if counted.rowcount == 0:
                connection.execute(
                    insert(t.blocked_key).values(
                        namespace=self._namespace,
                        ordering_key=row.ordering_key,
                        part=int(lease.name.rpartition("-")[2]),
                        reason=reason,
                        attempts=1,
                        next_try_at=now + timedelta(seconds=retry_seconds),
                    )
                )
            run_id = _run_of(row.ordering_key)
            saga = connection.execute(
                select(i.saga).where(i.namespace == self._namespace, i.run_id == run_id)
            ).scalar()
            if saga is not None and run_id is not None:
                kind = IncidentRow(run_id, "unroutable", "", saga, row.channel, f"unroutable:{row.channel}")
                self._sql.raise_incident(connection, kind, now)
            return True

        return await self._database.run(transaction)

    async def unblock(self, keys: Collection[str]) -> None:
        b, n = t.blocked_key.c, t.incident.c

        def transaction(connection: Connection) -> None:
            connection.execute(
                delete(t.blocked_key).where(b.namespace == self._namespace, b.ordering_key.in_(sorted(keys)))
            )
            connection.execute(
                update(t.incident)
                .where(
                    n.namespace == self._namespace,
                    n.run_id.in_([run_id for key in keys if (run_id := _run_of(key)) is not None]),
                    n.kind == "unroutable",
                    n.resolved_at.is_(None),
                )
                .values(resolved_at=self._sql.now(connection))
            )

        await self._database.run(transaction)

    def _move_due(self, connection: Connection, limit: int) -> int:
        d = t.outbox_delayed.c
        sought = {"namespace": self._namespace, "limit": limit, **self._sql.at(connection, now=0.0)}
        due = connection.execute(_reading_due(self._sql.instant), sought).all()
        if due:
            now = self._sql.now(connection)
            if self._queued:
                connection.execute(
                    insert(t.queue), [queue_row(OutboxRow(**row._mapping), now) for row in due]
                )
            else:
                rows = [{"namespace": self._namespace, "created_at": now, **row._mapping} for row in due]
                connection.execute(insert(t.outbox), rows)
            connection.execute(
                delete(t.outbox_delayed).where(
                    d.namespace == self._namespace, d.message_id.in_([row.message_id for row in due])
                )
            )
        return len(due)

    def _read_blocked(self, connection: Connection) -> Mapping[str, float]:
        rows = connection.execute(BLOCKED, {"namespace": self._namespace}).all()
        if not rows:
            return {}
        now = self._sql.now(connection)
        return {row.ordering_key: max((row.next_try_at - now).total_seconds(), 0.0) for row in rows}


def _run_of(ordering_key: str) -> UUID | None:
    """Return the run that a command's key names; the key of a domain event is its publisher's."""
    try:
        return UUID(ordering_key)
    except ValueError:
        return None
