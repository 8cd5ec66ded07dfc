"""The statements that differ on MySQL and MariaDB, one form for both.

Neither can return what an UPDATE changed, and MySQL returns nothing of an INSERT either: row counts tell, and a SELECT
in the same transaction. Many changed rows go as one JSON document; `executemany` would be a statement for each.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    Connection,
    CursorResult,
    Insert,
    Select,
    Table,
    TextClause,
    bindparam,
    insert,
    select,
    text,
)

from saga.storage.base import Lease, MovedRow, OutboxRow, StoredRow
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.statements import LOAD, Fenced, Statements, queue_row, taking
from saga.storage.sqlalchemy.types import UtcDateTime

STATEMENT_BYTES: Final = 900_000
"""Both drivers send rows as one statement up to some 1,000 KB; what is larger goes as several."""
ROW_BYTES: Final = 2_000
"""More than a row of the outbox takes beside its body."""

_o, _q, _l = t.outbox.c, t.queue.c, t.lease.c

NOW: Final = text("SELECT UTC_TIMESTAMP(6) AS now").columns(now=UtcDateTime())

# A member that is absent is NULL; null itself is an error on MySQL. Every row is found by its key, one after the other.
MOVE: Final = text("""
UPDATE JSON_TABLE(:moved, '$[*]' COLUMNS (
         run_id char(32) PATH '$.run_id', expected int PATH '$.expected', was varchar(40) PATH '$.was',
         version int PATH '$.version', status varchar(40) PATH '$.status', state mediumtext PATH '$.state',
         wakeup_ms bigint PATH '$.wakeup_ms', result longtext PATH '$.result')) AS u
       STRAIGHT_JOIN saga_instance AS i FORCE INDEX (PRIMARY)
       ON i.namespace = :namespace AND i.run_id = UNHEX(u.run_id) AND i.version = u.expected AND i.status = u.was
   SET i.version = u.version, i.status = u.status, i.state = u.state, i.result = FROM_BASE64(u.result),
       i.wakeup_at = i.created_at + INTERVAL u.wakeup_ms * 1000 MICROSECOND,
       i.closed_at = CASE WHEN u.wakeup_ms IS NULL THEN COALESCE(i.closed_at, UTC_TIMESTAMP(6)) END
""")

WAKE: Final = text("""
UPDATE JSON_TABLE(:woken, '$[*]' COLUMNS (run_id char(32) PATH '$.run_id', wakeup_ms bigint PATH '$.wakeup_ms')) AS u
       STRAIGHT_JOIN saga_instance AS i FORCE INDEX (PRIMARY)
       ON i.namespace = :namespace AND i.run_id = UNHEX(u.run_id) AND i.closed_at IS NULL
   SET i.wakeup_at = i.created_at + INTERVAL u.wakeup_ms * 1000 MICROSECOND
""")

# What locks goes by the key, however small the table is: a scan would lock rows of others on its way, or wait for them.
_BY_KEY: Final = "FORCE INDEX (PRIMARY)"
LOAD_LOCKED: Final = LOAD.with_hint(t.instance, _BY_KEY).with_for_update()
_FREE: Final = (
    select(_o.id)
    .with_hint(t.outbox, _BY_KEY)
    .where(_o.namespace == bindparam("b_namespace"), _o.id.in_(bindparam("b_ids", expanding=True)))
    .with_for_update(skip_locked=True)
)
_DELETE: Final = text("""
DELETE o FROM JSON_TABLE(:ids, '$[*]' COLUMNS (id bigint PATH '$')) AS k
       STRAIGHT_JOIN saga_outbox AS o FORCE INDEX (PRIMARY) ON o.id = k.id AND o.namespace = :namespace
""")
_DELETE_RUNS: Final[Mapping[Table, TextClause]] = {
    t.history: text("""
DELETE r FROM JSON_TABLE(:runs, '$[*]' COLUMNS (run_id char(32) PATH '$')) AS k
       STRAIGHT_JOIN saga_history AS r FORCE INDEX (PRIMARY) ON r.namespace = :namespace AND r.run_id = UNHEX(k.run_id)
"""),
    t.value: text("""
DELETE r FROM JSON_TABLE(:runs, '$[*]' COLUMNS (run_id char(32) PATH '$')) AS k
       STRAIGHT_JOIN saga_value AS r FORCE INDEX (PRIMARY) ON r.namespace = :namespace AND r.run_id = UNHEX(k.run_id)
"""),
    t.incident: text("""
DELETE r FROM JSON_TABLE(:runs, '$[*]' COLUMNS (run_id char(32) PATH '$')) AS k
       STRAIGHT_JOIN saga_incident AS r FORCE INDEX (PRIMARY) ON r.namespace = :namespace AND r.run_id = UNHEX(k.run_id)
"""),
    t.instance: text("""
DELETE r FROM JSON_TABLE(:runs, '$[*]' COLUMNS (run_id char(32) PATH '$')) AS k
       STRAIGHT_JOIN saga_instance AS r FORCE INDEX (PRIMARY) ON r.namespace = :namespace AND r.run_id = UNHEX(k.run_id)
"""),
    t.barrier: text("""
DELETE r FROM JSON_TABLE(:runs, '$[*]' COLUMNS (run_id char(32) PATH '$')) AS k
       STRAIGHT_JOIN saga_barrier AS r FORCE INDEX (PRIMARY) ON r.namespace = :namespace AND r.run_id = UNHEX(k.run_id)
"""),
}
# The first number of a statement is known; what others inserted meanwhile may stand between ours.
_NUMBERED: Final = select(_o.id, _o.message_id).where(
    _o.namespace == bindparam("b_namespace"),
    _o.id >= bindparam("b_first"),
    _o.message_id.in_(bindparam("b_messages", expanding=True)),
)
# lint: allow namespace because a queue serves many
_QUEUED: Final = select(_q.id, _q.message_id).where(
    _q.id >= bindparam("b_first"), _q.message_id.in_(bindparam("b_messages", expanding=True))
)
_HELD: Final = select(_l.name, _l.epoch).where(
    _l.namespace == bindparam("b_namespace"),
    _l.name.in_(bindparam("b_names", expanding=True)),
    _l.owner == bindparam("b_owner"),
)


@cache
def insert_ignore(table: Table) -> Insert:
    """Return an INSERT that leaves out rows whose key is there, on tables of keys only.

    What is too long would be cut off without a word (MDB-5): the lengths of names are checked where they come from.
    ON DUPLICATE KEY would say so, and locks gaps: starts of different ids beside each other would deadlock.
    """
    return insert(table).prefix_with("IGNORE")


class MySQLStatements(Statements):
    """The same port calls."""

    writers = 2

    load_locked = LOAD_LOCKED

    def now(self, connection: Connection) -> datetime:
        now: datetime = connection.execute(NOW).scalar_one()
        return now

    def insert_ignore(self, table: Table) -> Insert:
        return insert_ignore(table)

    def as_committed(self, query: Select[Any]) -> Select[Any]:
        # MDB-4: a locking read; the caller's snapshot may be older than the row that kept an INSERT from inserting
        return query.with_for_update(read=True)

    def _move(self, connection: Connection, moved: Sequence[MovedRow], now: datetime) -> None:
        if not moved:
            return
        document = json.dumps([_present(_moved(row)) for row in moved])
        done: CursorResult[Any] = connection.execute(MOVE, {"namespace": self.namespace, "moved": document})
        if done.rowcount != len(moved):
            raise Fenced

    def _wake(self, connection: Connection, woken: Sequence[tuple[UUID, int]]) -> None:
        document = json.dumps([{"run_id": run_id.hex, "wakeup_ms": ms} for run_id, ms in woken])
        connection.execute(WAKE, {"namespace": self.namespace, "woken": document})

    def _append(self, connection: Connection, rows: Sequence[OutboxRow], now: datetime) -> list[StoredRow]:
        if not rows:
            return []
        firsts = [self._append_some(connection, some, now) for some in _portions(rows)]
        sought = {"b_first": firsts[0], "b_messages": [row.message_id for row in rows]}
        found = (
            connection.execute(_QUEUED, sought)
            if self.queued
            else connection.execute(_NUMBERED, {"b_namespace": self.namespace, **sought})
        )
        ids = {row.message_id: row.id for row in found}
        return [
            StoredRow(ids[row.message_id], row.message_id, row.channel, row.ordering_key, row.body)
            for row in rows
        ]

    def _append_some(self, connection: Connection, rows: Sequence[OutboxRow], now: datetime) -> int:
        """Insert rows by one statement; return the number of the first."""
        if self.queued:
            done = connection.execute(insert(t.queue), [queue_row(row, now) for row in rows])
        else:
            written = [{"namespace": self.namespace, **row._asdict(), "created_at": now} for row in rows]
            done = connection.execute(insert(t.outbox), written)
        first: int = done.lastrowid
        return first

    def delete_outbox(self, connection: Connection, ids: Collection[int]) -> None:
        if not ids:
            return
        # two statements: a DELETE with such a subquery waits for what the subquery would skip
        sought = {"b_namespace": self.namespace, "b_ids": sorted(ids)}
        if free := connection.execute(_FREE, sought).scalars().all():
            connection.execute(_DELETE, {"namespace": self.namespace, "ids": json.dumps(list(free))})

    def delete_runs(self, connection: Connection, table: Table, run_ids: Sequence[UUID]) -> None:
        document = json.dumps([run_id.hex for run_id in run_ids])
        connection.execute(_DELETE_RUNS[table], {"namespace": self.namespace, "runs": document})

    def take_leases(
        self, connection: Connection, names: Collection[str], owner: UUID, seconds: float
    ) -> list[Lease]:
        sought = self._sought_leases(connection, names, owner, seconds)
        connection.execute(taking(self.instant), sought)
        return [Lease(*row) for row in connection.execute(_HELD, sought)]


def _moved(row: MovedRow) -> dict[str, Any]:
    result = None if row.result is None else b64encode(row.result).decode()
    return {**row._asdict(), "run_id": row.run_id.hex, "result": result}


def _present(members: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def _portions(rows: Sequence[OutboxRow]) -> Iterator[Sequence[OutboxRow]]:
    """Divide rows so that each portion is surely one statement; escaping may double a body."""
    begin = size = 0
    for place, row in enumerate(rows):
        mine = ROW_BYTES + 2 * len(row.body)
        if size and size + mine > STATEMENT_BYTES:
            yield rows[begin:place]
            begin, size = place, 0
        size += mine
    yield rows[begin:]
