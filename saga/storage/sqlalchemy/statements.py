"""The coordinator's and client's statements in portable Core; a dialect module replaces those that are hot there.

Many rows go by `executemany`, one statement each kind, so the number of statements does not grow with the batch.
Due times: SQLite has no clock of its own, so its host's is the database time (P10).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Insert,
    Select,
    Table,
    Update,
    bindparam,
    case,
    delete,
    func,
    insert,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.sql.dml import ReturningUpdate

from saga.clock import Clock
from saga.engine.effects import IncidentKind
from saga.engine.state import Status
from saga.messages import CONTENT_TYPE
from saga.storage.base import (
    Advanced,
    Changes,
    HistoryRow,
    IncidentRow,
    Lease,
    Loaded,
    MovedRow,
    NewInstance,
    OutboxRow,
    StoredRow,
    ValueKey,
    ValueRow,
)
from saga.storage.sqlalchemy import tables as t

Instant = Callable[[str], ColumnElement[Any]]
"""`instant` of a dialect's statements."""

# Those of every transition are built once: building one takes as long as running it on SQLite.
_i, _o, _h, _v, _l = t.instance.c, t.outbox.c, t.history.c, t.value.c, t.lease.c
_NAMESPACE: Final[BindParameter[Any]] = bindparam("b_namespace")
_RUNS: Final[BindParameter[Any]] = bindparam("b_runs", expanding=True)
SERVED: Final[BindParameter[Any]] = bindparam("b_served", expanding=True)
LOAD: Final = (
    select(
        _i.run_id,
        _i.saga,
        _i.saga_version,
        _i.saga_id,
        _i.version,
        _i.state,
        _i.input,
        _i.created_at,
        _i.wakeup_at,
        _i.status,
    )
    .where(_i.namespace == _NAMESPACE, _i.run_id.in_(_RUNS))
    .order_by(_i.run_id)
)
KNOWN: Final = select(_i.run_id, _i.created_at, _i.closed_at).where(
    _i.namespace == _NAMESPACE, _i.run_id.in_(_RUNS)
)
MOVE: Final = (
    update(t.instance)
    .where(
        _i.namespace == _NAMESPACE,
        _i.run_id == bindparam("b_run_id"),
        _i.version == bindparam("b_expected"),
        _i.status == bindparam("b_was"),
    )
    .values(
        version=bindparam("b_version"),
        status=bindparam("b_status"),
        state=bindparam("b_state"),
        wakeup_at=bindparam("b_wakeup_at"),
        closed_at=bindparam("b_closed_at"),
        result=bindparam("b_result"),
    )
)
STARTED: Final = select(_h.run_id).where(_h.namespace == _NAMESPACE, _h.run_id.in_(_RUNS), _h.version == 1)
READ_DUE: Final = (
    select(_i.run_id)
    .where(_i.namespace == _NAMESPACE, tuple_(_i.saga, _i.saga_version).in_(SERVED))
    .order_by(_i.wakeup_at)
    .limit(bindparam("b_limit"))
)
READ_VALUES: Final = select(_v.run_id, _v.step, _v.iteration, _v.round, _v.kind, _v.data).where(
    _v.namespace == _NAMESPACE,
    _v.run_id.in_(_RUNS),
    tuple_(_v.step, _v.kind).in_(bindparam("b_names", expanding=True)),
)
READ_OUTBOX: Final = (
    select(_o.id, _o.message_id, _o.channel, _o.ordering_key, _o.body)
    .where(
        _o.namespace == _NAMESPACE,
        _o.part.in_(bindparam("b_parts", expanding=True)),
        _o.id > bindparam("b_low"),
    )
    .order_by(_o.id)
    .limit(bindparam("b_limit"))
)
DELETE: Final = delete(t.outbox).where(_o.namespace == _NAMESPACE, _o.id == bindparam("b_id"))
LAST_ID: Final = select(func.last_insert_rowid())


class Fenced(Exception):
    """A version was not the one that was decided on (P1): everything is to be rolled back.

    Where rows were locked before they were decided on, a sound database does not allow it.
    """


def milliseconds(later: datetime, earlier: datetime) -> int:
    """Return the whole milliseconds between two instants."""
    return (later - earlier) // timedelta(milliseconds=1)


class Statements:
    """Everything the coordinator and the client write and read, for one namespace."""

    def __init__(self, namespace: str, clock: Clock, *, queued: bool = False) -> None:
        """`queued`: this database is the broker as well, so commands are written into its queue and not the outbox."""
        self.namespace = namespace
        self.clock = clock
        self.queued = queued

    def now(self, connection: Connection) -> datetime:
        """Return database time."""
        return self.clock.now()

    def _these(self, run_ids: Collection[UUID]) -> dict[str, Any]:
        return {"b_namespace": self.namespace, "b_runs": sorted(run_ids)}

    # --- loading ------------------------------------------------------------------------------

    def load(
        self, connection: Connection, run_ids: Collection[UUID], *, lock: bool = False
    ) -> dict[UUID, Loaded]:
        """Load instances; `lock` takes them in id order (PG-8), where the transaction does not hold the only writer."""
        rows = connection.execute(LOAD, self._these(run_ids)).all()
        now = self.now(connection)
        return {
            row.run_id: Loaded(
                row.run_id,
                row.saga,
                row.saga_version,
                row.saga_id,
                row.version,
                row.state,
                row.input,
                now_ms=milliseconds(now, row.created_at),
                wakeup_ms=None if row.wakeup_at is None else milliseconds(row.wakeup_at, row.created_at),
                status=row.status,
            )
            for row in rows
        }

    def read_values(self, connection: Connection, keys: Collection[ValueKey]) -> dict[ValueKey, bytes]:
        """Read payloads by name."""
        if not keys:
            return {}
        names = {"b_names": list({(key.step, key.kind) for key in keys})}
        rows = connection.execute(READ_VALUES, self._these({key.run_id for key in keys}) | names)
        found = {ValueKey(*row[:5]): row.data for row in rows}
        return {key: found[key] for key in keys if key in found}

    # --- writing ------------------------------------------------------------------------------

    writers: int = 1
    """How many batches it is worth to have under way at a time."""
    decides_first: bool = False
    """Whether it is worth to decide before anything is locked, as `write` checks the versions."""

    def write(self, connection: Connection, changes: Changes, confirmed: Collection[int]) -> Advanced:
        """Write a batch of transitions and delete confirmed outbox rows.

        Raises Fenced, after which nothing may be committed, if a version is not that which was decided on and it is
        not known whose.
        """
        self._move(connection, changes.moved)
        stored = self._append(connection, changes.outbox)
        self._record(connection, changes.history, changes.values)
        self.delete_outbox(connection, confirmed)
        if has_rare(changes):
            self.write_rare(connection, changes, self.now(connection))
        return Advanced(stored, ())

    def _move(self, connection: Connection, moved: Sequence[MovedRow]) -> None:
        if not moved:
            return
        now = self.now(connection)
        runs = self._these([row.run_id for row in moved])
        known = {row.run_id: row for row in connection.execute(KNOWN, runs)}
        done = connection.execute(
            MOVE,
            [
                {
                    "b_namespace": self.namespace,
                    "b_run_id": row.run_id,
                    "b_expected": row.expected,
                    "b_was": row.was,
                    "b_version": row.version,
                    "b_status": row.status,
                    "b_state": row.state,
                    "b_wakeup_at": wakeup(known[row.run_id].created_at, row.wakeup_ms),
                    "b_closed_at": (known[row.run_id].closed_at or now) if row.wakeup_ms is None else None,
                    "b_result": row.result,
                }
                for row in moved
            ],
        )
        if done.rowcount != len(moved):
            raise Fenced

    def _record(
        self, connection: Connection, history: Sequence[HistoryRow], values: Sequence[ValueRow]
    ) -> None:
        now = self.now(connection)
        self._insert(connection, t.history, [{**row._asdict(), "at": now} for row in history])
        self._insert(connection, t.value, [{**row.key._asdict(), "data": row.data} for row in values])

    def _append(self, connection: Connection, rows: Sequence[OutboxRow]) -> list[StoredRow]:
        if not rows:
            return []
        now = self.now(connection)
        # One writer at a time, so the ids of one executemany are consecutive; AUTOINCREMENT never reuses them.
        if self.queued:
            connection.execute(insert(t.queue), [queue_row(row, now) for row in rows])
        else:
            self._insert(connection, t.outbox, [{**row._asdict(), "created_at": now} for row in rows])
        last: int = connection.execute(LAST_ID).scalar_one()
        first = last - len(rows) + 1
        return [
            StoredRow(first + place, row.message_id, row.channel, row.ordering_key, row.body)
            for place, row in enumerate(rows)
        ]

    def delete_outbox(self, connection: Connection, ids: Collection[int]) -> None:
        """Delete rows by id, in id order."""
        if ids:
            connection.execute(DELETE, [{"b_namespace": self.namespace, "b_id": id_} for id_ in sorted(ids)])

    def write_rare(self, connection: Connection, changes: Changes, now: datetime) -> None:
        """Write what most batches do not have."""
        if changes.woken:
            self._wake(connection, changes.woken)
        if changes.flagged:
            self._flag(connection, changes.flagged)
        for row in changes.incidents:
            self.raise_incident(connection, row, now)
        for run_id, step in changes.resolved:
            n = t.incident.c
            connection.execute(
                update(t.incident)
                .where(
                    n.namespace == self.namespace, n.run_id == run_id, n.step == step, n.resolved_at.is_(None)
                )
                .values(resolved_at=now)
            )
        if changes.mended:
            self._mend(connection, changes.mended, now)
        self._insert(
            connection, t.stale_reply, [{**row._asdict(), "received_at": now} for row in changes.stale]
        )
        self._insert(
            connection, t.pending_reply, [{**row._asdict(), "received_at": now} for row in changes.pending]
        )
        if changes.audit:
            # P31: a verb that is run again after a lost COMMIT answer finds its own row, by request id
            rows = [{"namespace": self.namespace, **row._asdict(), "at": now} for row in changes.audit]
            connection.execute(self.insert_ignore(t.audit), rows)
        if changes.taken:
            p = t.pending_reply.c
            connection.execute(
                delete(t.pending_reply).where(p.namespace == self.namespace, p.id == bindparam("b_id")),
                [{"b_id": id_} for _, id_ in sorted(changes.taken)],
            )

    def _wake(self, connection: Connection, woken: Sequence[tuple[UUID, int]]) -> None:
        i = t.instance.c
        created = dict(
            connection.execute(
                select(i.run_id, i.created_at).where(
                    i.namespace == self.namespace, i.run_id.in_([run_id for run_id, _ in woken])
                )
            ).all()
        )
        connection.execute(
            update(t.instance)
            .where(i.namespace == self.namespace, i.run_id == bindparam("b_run_id"), i.closed_at.is_(None))
            .values(wakeup_at=bindparam("b_wakeup_at")),
            [{"b_run_id": run_id, "b_wakeup_at": wakeup(created[run_id], ms)} for run_id, ms in woken],
        )

    def _flag(self, connection: Connection, flagged: Sequence[tuple[UUID, int]]) -> None:
        """Let the row alone say that it needs a person: its state may be what cannot be read or written.

        The next transition writes the status that follows from its state. What has moved meanwhile is not set apart.
        """
        i = t.instance.c
        connection.execute(
            update(t.instance)
            .where(
                i.namespace == self.namespace,
                i.run_id == bindparam("b_run_id"),
                i.version == bindparam("b_version"),
                i.closed_at.is_(None),
            )
            .values(status=Status.NEEDS_ATTENTION),
            [{"b_run_id": run_id, "b_version": version} for run_id, version in sorted(flagged)],
        )

    def _mend(self, connection: Connection, mended: Sequence[UUID], now: datetime) -> None:
        n = t.incident.c
        connection.execute(
            update(t.incident)
            .where(
                n.namespace == self.namespace,
                n.run_id.in_(mended),
                n.kind == IncidentKind.POISON,
                n.resolved_at.is_(None),
            )
            .values(resolved_at=now)
        )

    def raise_incident(self, connection: Connection, row: IncidentRow, now: datetime) -> None:
        """Open an incident, or count it once more and open it again."""
        n = t.incident.c
        again = connection.execute(
            update(t.incident)
            .where(
                n.namespace == self.namespace, n.run_id == row.run_id, n.kind == row.kind, n.step == row.step
            )
            .values(
                count=n.count + 1,
                last_seen_at=now,
                error=row.error,
                fingerprint=row.fingerprint,
                resolved_at=None,
            )
        )
        if again.rowcount == 0:
            values = {**row._asdict(), "count": 1, "first_seen_at": now, "last_seen_at": now}
            self._insert(connection, t.incident, [values])

    def _insert(self, connection: Connection, table: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            connection.execute(_inserting(table), [{"namespace": self.namespace, **row} for row in rows])

    # --- starting -----------------------------------------------------------------------------

    def start(self, connection: Connection, changes: Changes) -> tuple[frozenset[UUID], Sequence[StoredRow]]:
        """Insert new instances with their history, values and commands, leaving out ids that are known.

        P31: a run id that is there already is this same start, run again, and counts as inserted.
        """
        there = fresh = frozenset(row.run_id for row in changes.new)
        # in the order of their ids, so that two processes at once do not deadlock
        new = sorted(changes.new, key=lambda row: (row.saga, row.saga_id))
        if new and self._insert_new(connection, new) < len(new):
            there = frozenset(connection.execute(KNOWN, self._these(there)).scalars())
            fresh = self._without_history(connection, there)
        mine = changes if len(fresh) == len(new) else only(changes, fresh)
        self._record(connection, mine.history, mine.values)
        return there, self._append(connection, mine.outbox)

    def _without_history(self, connection: Connection, run_ids: Collection[UUID]) -> frozenset[UUID]:
        seen = connection.execute(STARTED, self._these(run_ids)).scalars()
        return frozenset(run_ids) - frozenset(seen)

    def _insert_new(self, connection: Connection, rows: Sequence[NewInstance]) -> int:
        """Insert the instances that are new; return how many."""
        now = self.now(connection)
        values = []
        for row in rows:
            fields = row._asdict()
            wakeup_ms = fields.pop("wakeup_ms")
            values.append(
                {
                    "namespace": self.namespace,
                    "version": 1,
                    "created_at": now,
                    "closed_at": now if wakeup_ms is None else None,
                    "wakeup_at": wakeup(now, wakeup_ms),
                    **fields,
                }
            )
        return connection.execute(self.insert_ignore(t.instance), values).rowcount

    def insert_ignore(self, table: Table) -> Insert:
        """Return an INSERT that leaves out rows whose key is there, the same each time."""
        return _inserting_new(table)

    def as_committed(self, query: Select[Any]) -> Select[Any]:
        """Return a query that sees what is committed, also in a caller's transaction with a snapshot of its own."""
        return query

    # --- purging ------------------------------------------------------------------------------

    def delete_runs(self, connection: Connection, table: Table, run_ids: Sequence[UUID]) -> None:
        """Delete the rows of some runs, of a table whose primary key begins with the run."""
        c = table.c
        # the bounds keep a scan, if it is one, off all that is younger
        these = c.run_id.between(min(run_ids), max(run_ids)), c.run_id.in_(run_ids)
        connection.execute(delete(table).where(c.namespace == self.namespace, *these))

    # --- leases -------------------------------------------------------------------------------

    def take_leases(
        self, connection: Connection, names: Collection[str], owner: UUID, seconds: float
    ) -> list[Lease]:
        """Take and renew leases that are `owner`'s, nobody's or over; return those that he holds then."""
        taken = connection.execute(
            _returning(self.instant), self._sought_leases(connection, names, owner, seconds)
        )
        return [Lease(*each) for each in taken]

    def _sought_leases(
        self, connection: Connection, names: Collection[str], owner: UUID, seconds: float
    ) -> dict[str, Any]:
        times = self.at(connection, b_now=0.0, b_until=seconds)
        return {"b_namespace": self.namespace, "b_names": sorted(names), "b_owner": owner, **times}

    # --- polling ------------------------------------------------------------------------------

    def read_due(
        self, connection: Connection, limit: int, served: Collection[tuple[str, int]]
    ) -> Sequence[UUID]:
        """Return open instances of served versions whose wake-up has passed, oldest first."""
        sought = {"b_namespace": self.namespace, "b_served": list(served), "b_limit": limit}
        times = self.at(connection, b_now=0.0)
        return connection.execute(_reading_due(self.instant), sought | times).scalars().all()

    def read_outbox(
        self, connection: Connection, parts: Collection[int], low: int, older_than_seconds: float, limit: int
    ) -> Sequence[StoredRow]:
        """Return rows of these parts above `low` in the order of their ids; with 0 seconds the newest, too."""
        sought = {"b_namespace": self.namespace, "b_parts": sorted(parts), "b_low": low, "b_limit": limit}
        query = READ_OUTBOX
        if older_than_seconds > 0:
            query = _reading_aged(self.instant)
            sought |= self.at(connection, b_before=-older_than_seconds)
        return [StoredRow(*row) for row in connection.execute(query, sought)]

    @classmethod
    def instant(cls, name: str) -> ColumnElement[Any]:
        """Return database time for a statement, moved by the seconds that `at` is given by this name."""
        return bindparam(name, type_=_i.wakeup_at.type)

    def at(self, connection: Connection, **seconds: float) -> dict[str, Any]:
        """Return the parameters of a statement with such instants."""
        now = self.now(connection)
        return {name: now + timedelta(seconds=each) for name, each in seconds.items()}


@functools.cache
def _inserting(table: Table) -> Insert:
    """Return the INSERT of whole rows, the same each time."""
    return insert(table)


@functools.cache
def _inserting_new(table: Table) -> Insert:
    return sqlite_insert(table).on_conflict_do_nothing()


@functools.cache
def _reading_due(instant: Instant) -> Select[Any]:
    return READ_DUE.where(_i.wakeup_at <= instant("b_now"))


@functools.cache
def _reading_aged(instant: Instant) -> Select[Any]:
    return READ_OUTBOX.where(_o.created_at < instant("b_before"))


@functools.cache
def taking(instant: Instant) -> Update:
    """Return the UPDATE that takes and renews leases."""
    owner: BindParameter[Any] = bindparam("b_owner", type_=_l.owner.type)
    return (
        update(t.lease)
        .where(
            _l.namespace == _NAMESPACE,
            _l.name.in_(bindparam("b_names", expanding=True)),
            (_l.owner == owner) | _l.owner.is_(None) | (_l.expires_at < instant("b_now")),
        )
        # the epoch first: a database that assigns from left to right would compare with the new owner (MDB-2)
        .ordered_values(
            (_l.epoch, case((_l.owner == owner, _l.epoch), else_=_l.epoch + 1)),
            (_l.owner, owner),
            (_l.expires_at, instant("b_until")),
        )
    )


@functools.cache
def _returning(instant: Instant) -> ReturningUpdate[Any]:
    return taking(instant).returning(_l.name, _l.epoch)


def queue_row(row: OutboxRow, now: Any) -> dict[str, Any]:
    """Return a command as the entry of the database broker's queue that it is."""
    return {
        "channel": row.channel,
        "message_id": row.message_id,
        "ordering_key": row.ordering_key,
        "content_type": CONTENT_TYPE,
        "headers": "{}",
        "body": row.body,
        "created_at": now,
    }


def wakeup(created: datetime, wakeup_ms: int | None) -> datetime | None:
    """Return the instant of a wake-up given in milliseconds since creation."""
    return None if wakeup_ms is None else created + timedelta(milliseconds=wakeup_ms)


def only(changes: Changes, run_ids: Collection[UUID]) -> Changes:
    """Return what `changes` says of these runs: history, values and commands."""
    texts = {str(run_id) for run_id in run_ids}
    return Changes(
        history=[row for row in changes.history if row.run_id in run_ids],
        values=[row for row in changes.values if row.key.run_id in run_ids],
        outbox=[row for row in changes.outbox if row.ordering_key in texts],
    )


def without(changes: Changes, run_ids: Collection[UUID]) -> Changes:
    """Return what is rarely written, without the rows of these runs."""
    return Changes(
        woken=[row for row in changes.woken if row[0] not in run_ids],
        incidents=[row for row in changes.incidents if row.run_id not in run_ids],
        resolved=[row for row in changes.resolved if row[0] not in run_ids],
        flagged=[row for row in changes.flagged if row[0] not in run_ids],
        mended=[run_id for run_id in changes.mended if run_id not in run_ids],
        stale=[row for row in changes.stale if row.run_id not in run_ids],
        pending=[row for row in changes.pending if row.run_id not in run_ids],
        taken=[row for row in changes.taken if row[0] not in run_ids],
        audit=[row for row in changes.audit if row.run_id not in run_ids],
    )


def has_rare(changes: Changes) -> bool:
    """Return whether `write_rare` has anything to write."""
    return bool(
        changes.woken
        or changes.incidents
        or changes.resolved
        or changes.flagged
        or changes.mended
        or changes.stale
        or changes.pending
        or changes.taken
        or changes.audit
    )
