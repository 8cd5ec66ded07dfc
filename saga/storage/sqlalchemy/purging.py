"""What goes with age, over SQLAlchemy: closed runs with all that is theirs, rows named by a run, and rows with a time.

Pages go along the primary key: run ids begin with the time of their start, so what closed long ago stands in front, and
no index is needed that each transition would have to write. A look locks nothing and reads a bounded number of rows,
whatever it finds. On SQLite pages are small, because all other writers wait for each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Column, ColumnElement, Connection, Table, delete, literal, or_, select, tuple_, update

from saga.engine.state import Status
from saga.storage.base import (
    AuditEntry,
    Described,
    Found,
    HistoryRow,
    IncidentRow,
    Payload,
    RunVersion,
    WholeRun,
)
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.coordinator import statements_for
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.statements import Statements
from saga.uuids import first_at, made_at

PAGE: Final = 1_000
SQLITE_PAGE: Final = 100
ENDED: Final = (Status.COMPLETED, Status.COMPENSATED)
"""What a person closed is kept: its audit row alone names the effects that stand."""
OF_RUNS: Final = (t.history, t.value, t.incident)
"""Tables whose primary key begins with the run."""
ABOUT_RUNS: Final = (t.audit, t.stale_reply, t.pending_reply)
"""Tables with a number of their own, which have few rows."""

_i = t.instance.c
_INSTANCE: Final = (
    _i.run_id,
    _i.saga,
    _i.saga_version,
    _i.saga_id,
    _i.run_number,
    _i.version,
    _i.status,
    _i.state,
    _i.created_at,
    _i.closed_at,
    _i.input,
    _i.result,
)


def page_size(database: Database) -> int:
    """Return how many runs or rows go in one transaction."""
    return PAGE if database.writer is None else SQLITE_PAGE


class SqlRetentionStore:
    """Adapter of `RetentionStore`."""

    def __init__(self, database: Database, namespace: str) -> None:
        self._database = database
        self._namespace = namespace
        self._sql: Statements = statements_for(database, namespace)
        self._page = page_size(database)

    async def find_closed(self, ages: Mapping[str, timedelta], above: UUID | None) -> Found:
        def look(connection: Connection) -> Found:
            now = self._sql.now(connection)
            query = (
                select(_i.run_id, _i.version, _i.saga, _i.status, _i.closed_at)
                .where(
                    _i.namespace == self._namespace,
                    # who closed before then, began before then
                    _i.run_id < first_at(now - min(ages.values())),
                    *([] if above is None else [_i.run_id > above]),
                )
                .order_by(_i.run_id)
                .limit(self._page)
            )
            rows = connection.execute(query).all()
            old = [
                RunVersion(row.run_id, row.version)
                for row in rows
                if row.status in ENDED and row.saga in ages and row.closed_at < now - ages[row.saga]
            ]
            unsent = self._unsent(connection, old)
            return Found(
                [run for run in old if run.run_id not in unsent],
                rows[-1].run_id if len(rows) == self._page else None,
            )

        return await self._database.run(look, reads=True)

    async def read_whole(self, runs: Sequence[RunVersion]) -> Sequence[WholeRun]:
        return await self._database.run(lambda connection: self._read_whole(connection, runs), reads=True)

    async def delete_closed(self, runs: Sequence[RunVersion]) -> int:
        def purge(connection: Connection) -> int:
            # as found and not moved since: whoever opens a run again counts its version up
            locked = connection.execute(
                select(_i.run_id, _i.version)
                .with_hint(t.instance, "FORCE INDEX (PRIMARY)", "mysql")
                .where(_i.namespace == self._namespace, *_of(t.instance, [run.run_id for run in runs]))
                .order_by(_i.run_id)
                .with_for_update(skip_locked=True)
            )
            held = {RunVersion(*row) for row in locked}.intersection(runs)
            # a row of the outbox is written under the lock of its run, so none can come now
            gone = sorted({run.run_id for run in held} - self._unsent(connection, held))
            if gone:
                for table in ABOUT_RUNS:
                    self._delete_about(connection, table, gone)
                for table in (*OF_RUNS, t.instance):
                    self._sql.delete_runs(connection, table, gone)
            return len(gone)

        return await self._database.run(purge)

    # --- one transaction's parts

    def _unsent(self, connection: Connection, runs: Collection[RunVersion]) -> set[UUID]:
        """Return those of which a message is still to be sent."""
        keys = {str(run.run_id): run.run_id for run in runs}
        if not keys:
            return set()
        waiting = [
            connection.execute(
                select(table.c.ordering_key)
                .where(table.c.namespace == self._namespace, table.c.ordering_key.in_(keys))
                .distinct()
            ).scalars()
            for table in (t.outbox, t.outbox_delayed)
        ]
        return {keys[key] for found in waiting for key in found}

    def _delete_about(self, connection: Connection, table: Table, run_ids: Sequence[UUID]) -> None:
        """Delete by number what is found without locks: a scan that locks would wait for rows that others write."""
        c = table.c
        numbers = connection.execute(
            select(c.id).where(c.namespace == self._namespace, c.run_id.in_(run_ids)).order_by(c.id)
        )
        if found := numbers.scalars().all():
            connection.execute(delete(table).where(c.namespace == self._namespace, c.id.in_(found)))

    def _read_whole(self, connection: Connection, runs: Sequence[RunVersion]) -> Sequence[WholeRun]:
        wanted, ids = set(runs), [run.run_id for run in runs]
        h, n, a, v = t.history.c, t.incident.c, t.audit.c, t.value.c
        history = self._by_run(
            connection, (h.run_id, h.version, h.event, h.step, h.direction, h.attempt, h.detail, h.at), ids
        )
        incidents = self._by_run(connection, (n.run_id, n.kind, n.step, n.saga, n.error, n.fingerprint), ids)
        audit = self._by_run(
            connection,
            (a.run_id, a.at, a.verb, a.actor, a.reason, a.status_before, a.status_after, a.detail),
            ids,
            a.id,
        )
        values = self._by_run(connection, (v.run_id, v.step, v.iteration, v.round, v.kind, v.data), ids)
        # the runs last: one that still stands at its version lost and gained none of the rows read before it, though
        # each statement sees what another purge or an operator commits meanwhile
        rows = connection.execute(
            select(*_INSTANCE)
            .where(_i.namespace == self._namespace, *_of(t.instance, ids))
            .order_by(_i.run_id)
        ).all()
        whole = []
        for row in rows:
            run_id = row.run_id
            if RunVersion(run_id, row.version) not in wanted:
                continue
            past = [(HistoryRow(*each[:7]), each.at) for each in history.get(run_id, ())]
            told = [IncidentRow(*each) for each in incidents.get(run_id, ())]
            own = [
                Payload(None, 0, 0, kind, data)
                for kind, data in (("input", row.input), ("result", row.result))
                if data is not None
            ]
            whole.append(
                WholeRun(
                    Described._make((*row[:10], past, told)),
                    [AuditEntry(*each[1:]) for each in audit.get(run_id, ())],
                    own + [Payload(*each[1:]) for each in values.get(run_id, ())],
                )
            )
        return whole

    def _by_run(
        self,
        connection: Connection,
        columns: Sequence[Column[Any]],
        run_ids: Sequence[UUID],
        *order: Column[Any],
    ) -> dict[UUID, list[Any]]:
        """Return rows by run, each run's in the order of its primary key unless another is given."""
        table = columns[0].table
        assert isinstance(table, Table)
        query = (
            select(*columns)
            .where(table.c.namespace == self._namespace, *_of(table, run_ids))
            .order_by(*(order or table.primary_key))
        )
        found: dict[UUID, list[Any]] = {}
        for row in connection.execute(query):
            found.setdefault(row.run_id, []).append(row)
        return found


class SqlRunRows:
    """Rows whose primary key begins with a run, purged when the run began longer ago than `age`: `Purge` over runs.

    How far they were purged stands in the table of leases, so that no process takes for "never decided" what another
    has purged. Ids that are no UUIDv7 tell no time: their rows stay.
    """

    def __init__(self, database: Database, namespace: str, table: Table, age: timedelta) -> None:
        self._database = database
        self._namespace = namespace
        self._table = table
        self._age = age
        self._sql: Statements = statements_for(database, namespace)
        self._page = page_size(database)

    @property
    def name(self) -> str:
        return self._table.name

    async def find(self, above: UUID | None) -> Found:
        c = self._table.c

        def look(connection: Connection) -> Found:
            query = (
                select(c.run_id)
                .where(
                    c.namespace == self._namespace,
                    c.run_id < first_at(self._sql.now(connection) - self._age),
                    *([] if above is None else [c.run_id > above]),
                )
                .distinct()
                .order_by(c.run_id)
                .limit(self._page)
            )
            runs = connection.execute(query).scalars().all()
            timed = [run_id for run_id in runs if made_at(run_id) is not None]
            return Found(timed, runs[-1] if len(runs) == self._page else None)

        return await self._database.run(look, reads=True)

    async def delete(self, keys: Sequence[UUID]) -> int:
        def purge(connection: Connection) -> int:
            last = made_at(max(keys))
            assert last is not None
            self._mark(connection, last + timedelta(milliseconds=1))
            self._sql.delete_runs(connection, self._table, keys)
            return len(keys)

        return await self._database.run(purge)

    async def purged_before(self) -> datetime | None:
        """Return the instant before which runs began whose rows may be gone; None if none are."""
        c = t.lease.c
        query = select(c.expires_at).where(c.namespace == self._namespace, c.name == self._mark_name)

        def read(connection: Connection) -> datetime | None:
            at: datetime | None = connection.execute(query).scalar()
            return at

        return await self._database.run(read, single=True, reads=True)

    @property
    def _mark_name(self) -> str:
        return f"purged-{self._table.name}"

    def _mark(self, connection: Connection, before: datetime) -> None:
        c = t.lease.c
        connection.execute(
            self._sql.insert_ignore(t.lease),
            [{"namespace": self._namespace, "name": self._mark_name, "epoch": 0, "expires_at": before}],
        )
        connection.execute(
            update(t.lease)
            .where(c.namespace == self._namespace, c.name == self._mark_name, c.expires_at < before)
            .values(expires_at=before)
        )


class SqlOldRows:
    """Rows that go by themselves: `by` is the column that tells their age, an instant or a UUIDv7.

    It has an index, or its table few rows. A `Purge` over primary keys.
    """

    def __init__(self, database: Database, namespace: str, by: Column[Any], age: timedelta) -> None:
        assert isinstance(by.table, Table)
        self._database = database
        self._namespace = namespace
        self._table: Table = by.table
        self._by = by
        self._key: list[Column[Any]] = [each for each in self._table.primary_key if each.name != "namespace"]
        self._age = age
        self._sql: Statements = statements_for(database, namespace)
        self._page = page_size(database)

    @property
    def name(self) -> str:
        return self._table.name

    async def find(self, above: tuple[Any, ...] | None) -> Found:
        order = [self._by, *(each for each in self._key if each is not self._by)]

        def look(connection: Connection) -> Found:
            until = self._sql.now(connection) - self._age
            query = (
                select(*order)
                .where(
                    self._table.c.namespace == self._namespace,
                    self._by < (first_at(until) if self._by.type.python_type is UUID else until),
                    *([] if above is None else [_behind(order, above)]),
                )
                .order_by(*order)
                .limit(self._page)
            )
            rows = connection.execute(query).all()
            keys = [tuple(row._mapping[each] for each in self._key) for row in rows]
            return Found(keys, tuple(rows[-1]) if len(rows) == self._page else None)

        return await self._database.run(look, reads=True)

    async def delete(self, keys: Sequence[tuple[Any, ...]]) -> int:
        these = (
            self._key[0].in_([only for (only,) in keys])
            if len(self._key) == 1
            else tuple_(*self._key).in_(keys)
        )
        query = delete(self._table).where(self._table.c.namespace == self._namespace, these)
        return await self._database.run(lambda connection: connection.execute(query).rowcount)


def _of(table: Table, run_ids: Sequence[UUID]) -> Sequence[ColumnElement[bool]]:
    """Return the conditions of these runs' rows, with bounds that keep a scan, if it is one, off what is younger."""
    c = table.c
    return c.run_id.between(min(run_ids), max(run_ids)), c.run_id.in_(run_ids)


def _behind(order: Sequence[Column[Any]], place: Iterable[Any]) -> ColumnElement[bool]:
    """Return the condition of rows behind a place in an order; written out, which every database takes an index for."""
    first, *rest = zip(order, place, strict=True)
    column, value = first
    behind = column > literal(value, column.type)
    if not rest:
        return behind
    more = _behind([each for each, _ in rest], [each for _, each in rest])
    return or_(behind, (column == literal(value, column.type)) & more)
