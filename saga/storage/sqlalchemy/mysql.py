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
from operator import itemgetter
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

from saga.storage.base import (
    HistoryRow,
    Lease,
    Loaded,
    MovedRow,
    NewInstance,
    OutboxRow,
    StoredRow,
    ValueRow,
)
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.statements import Fenced, Statements, queue_row, taking
from saga.storage.sqlalchemy.types import UtcDateTime

STATEMENT_BYTES: Final = 900_000
"""Both drivers send rows as one statement up to some 1,000 KB; what is larger goes as several, documents as well."""
ROW_BYTES: Final = 2_000
"""More than a row of the outbox takes beside its body."""

_o, _q, _l = t.outbox.c, t.queue.c, t.lease.c

NOW: Final = text("SELECT UTC_TIMESTAMP(6) AS now").columns(now=UtcDateTime())

# Many rows go as one JSON document, in bytes, which our connections write down without looking at each character. A
# member that is absent is NULL; null itself is an error on MySQL or, as a text, the word. A text that is too long for
# its column here is cut off without a word on MariaDB, so none of them has a length of its own: the table's counts.

# What locks goes by the key, in the order of the document, however small the table is: a scan would lock rows of others
# on its way, or wait for them.
_LOAD: Final = """
SELECT i.run_id, i.saga, i.saga_version, i.saga_id, i.version, i.state, i.input,
       TIMESTAMPDIFF(MICROSECOND, i.created_at, UTC_TIMESTAMP(6)) DIV 1000,
       TIMESTAMPDIFF(MICROSECOND, i.created_at, i.wakeup_at) DIV 1000, i.status
  FROM JSON_TABLE(:runs, '$[*]' COLUMNS (run_id char(32) PATH '$')) AS k
       STRAIGHT_JOIN saga_instance AS i FORCE INDEX (PRIMARY) ON i.namespace = :namespace AND i.run_id = UNHEX(k.run_id)
"""
LOAD: Final = text(_LOAD)
# MySQL would lock the rows of the document, too, if it could, and MariaDB has no word for that
# lint: allow SQL because the parts are constants of this module
LOAD_LOCKED: Final = text(_LOAD + " FOR UPDATE /*!80000 OF i */")

MOVE: Final = text("""
UPDATE JSON_TABLE(CONVERT(:rows USING utf8mb4), '$[*]' COLUMNS (
         run_id char(32) PATH '$.run_id', expected int PATH '$.expected', was mediumtext PATH '$.was',
         version int PATH '$.version', status mediumtext PATH '$.status', state mediumtext PATH '$.state',
         wakeup_ms bigint PATH '$.wakeup_ms', result longtext PATH '$.result')) AS u
       STRAIGHT_JOIN saga_instance AS i FORCE INDEX (PRIMARY)
       ON i.namespace = :namespace AND i.run_id = UNHEX(u.run_id) AND i.version = u.expected AND i.status = u.was
   SET i.version = u.version, i.status = u.status, i.state = u.state, i.result = FROM_BASE64(u.result),
       i.wakeup_at = i.created_at + INTERVAL u.wakeup_ms * 1000 MICROSECOND,
       i.closed_at = CASE WHEN u.wakeup_ms IS NULL THEN COALESCE(i.closed_at, UTC_TIMESTAMP(6)) END
""")

START: Final = text("""
INSERT IGNORE INTO saga_instance (namespace, run_id, saga, saga_version, saga_id, run_number, version, status, state,
                                  input, result, created_at, closed_at, wakeup_at)
SELECT :namespace, UNHEX(u.run_id), u.saga, u.saga_version, FROM_BASE64(u.saga_id), u.run_number, 1, u.status, u.state,
       FROM_BASE64(u.input), FROM_BASE64(u.result), UTC_TIMESTAMP(6),
       CASE WHEN u.wakeup_ms IS NULL THEN UTC_TIMESTAMP(6) END,
       UTC_TIMESTAMP(6) + INTERVAL u.wakeup_ms * 1000 MICROSECOND
  FROM JSON_TABLE(CONVERT(:rows USING utf8mb4), '$[*]' COLUMNS (
         run_id char(32) PATH '$.run_id', saga mediumtext PATH '$.saga', saga_version int PATH '$.saga_version',
         saga_id mediumtext PATH '$.saga_id', run_number int PATH '$.run_number', status mediumtext PATH '$.status',
         state mediumtext PATH '$.state', input longtext PATH '$.input', result longtext PATH '$.result',
         wakeup_ms bigint PATH '$.wakeup_ms')) AS u
""")

HISTORY: Final = text("""
INSERT INTO saga_history (namespace, run_id, version, event, step, direction, attempt, detail, at)
SELECT :namespace, UNHEX(h.run_id), h.version, h.event, h.step, h.direction, h.attempt, h.detail, UTC_TIMESTAMP(6)
  FROM JSON_TABLE(CONVERT(:rows USING utf8mb4), '$[*]' COLUMNS (
         run_id char(32) PATH '$.run_id', version int PATH '$.version', event mediumtext PATH '$.event',
         step mediumtext PATH '$.step', direction mediumtext PATH '$.direction', attempt int PATH '$.attempt',
         detail mediumtext PATH '$.detail')) AS h
""")

VALUES: Final = text("""
INSERT INTO saga_value (namespace, run_id, step, iteration, round, kind, data)
SELECT :namespace, UNHEX(v.run_id), v.step, v.iteration, v.round, v.kind, FROM_BASE64(v.data)
  FROM JSON_TABLE(CONVERT(:rows USING utf8mb4), '$[*]' COLUMNS (
         run_id char(32) PATH '$.run_id', step mediumtext PATH '$.step', iteration int PATH '$.iteration',
         round int PATH '$.round', kind mediumtext PATH '$.kind', data longtext PATH '$.data')) AS v
""")

# By itself a row needs neither the time nor a look at its number.
OUTBOX_ONE: Final = text("""
INSERT INTO saga_outbox (namespace, part, message_id, channel, ordering_key, body, created_at)
VALUES (:namespace, :part, :message_id, :channel, :ordering_key, :body, UTC_TIMESTAMP(6))
""")

WAKE: Final = text("""
UPDATE JSON_TABLE(:woken, '$[*]' COLUMNS (run_id char(32) PATH '$.run_id', wakeup_ms bigint PATH '$.wakeup_ms')) AS u
       STRAIGHT_JOIN saga_instance AS i FORCE INDEX (PRIMARY)
       ON i.namespace = :namespace AND i.run_id = UNHEX(u.run_id) AND i.closed_at IS NULL
   SET i.wakeup_at = i.created_at + INTERVAL u.wakeup_ms * 1000 MICROSECOND
""")

_FREE: Final = text("""
SELECT o.id FROM JSON_TABLE(:ids, '$[*]' COLUMNS (id bigint PATH '$')) AS k
       STRAIGHT_JOIN saga_outbox AS o FORCE INDEX (PRIMARY) ON o.id = k.id AND o.namespace = :namespace
   FOR UPDATE /*!80000 OF o */ SKIP LOCKED
""")
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
# The first number of a statement is known, and the others follow it, unless numbers rise by more than one (Galera).
_NEXT: Final = text("""
SELECT id, message_id FROM saga_outbox WHERE namespace = :namespace AND id >= :first ORDER BY id LIMIT :rows
""")
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
    decides_first = True

    def now(self, connection: Connection) -> datetime:
        now: datetime = connection.execute(NOW).scalar_one()
        return now

    def insert_ignore(self, table: Table) -> Insert:
        return insert_ignore(table)

    def as_committed(self, query: Select[Any]) -> Select[Any]:
        # MDB-4: a locking read; the caller's snapshot may be older than the row that kept an INSERT from inserting
        return query.with_for_update(read=True)

    def load(
        self, connection: Connection, run_ids: Collection[UUID], *, lock: bool = False
    ) -> dict[UUID, Loaded]:
        sought = {"namespace": self.namespace, "runs": json.dumps(sorted([each.hex for each in run_ids]))}
        rows = connection.execute(LOAD_LOCKED if lock else LOAD, sought)
        found = [Loaded._make((UUID(bytes=row[0]), *row[1:3], row[3].decode(), *row[4:])) for row in rows]
        return {row.run_id: row for row in found}

    def _move(self, connection: Connection, moved: Sequence[MovedRow]) -> None:
        if not moved:
            return
        # rows are locked in the order of the document: that of their ids, as by all who lock several (PG-8)
        rows = sorted([_written(row._asdict()) for row in moved], key=itemgetter("run_id"))
        if sum([done.rowcount for done in self._write(connection, MOVE, rows)]) != len(moved):
            raise Fenced

    def _record(
        self, connection: Connection, history: Sequence[HistoryRow], values: Sequence[ValueRow]
    ) -> None:
        self._write(connection, HISTORY, [_written(row._asdict()) for row in history])
        self._write(connection, VALUES, [_written({**row.key._asdict(), "data": row.data}) for row in values])

    def _insert_new(self, connection: Connection, rows: Sequence[NewInstance]) -> int:
        written = [_written({**row._asdict(), "saga_id": row.saga_id.encode()}) for row in rows]
        return sum([done.rowcount for done in self._write(connection, START, written)])

    def _write(
        self, connection: Connection, statement: TextClause, rows: Sequence[Mapping[str, Any]]
    ) -> list[CursorResult[Any]]:
        return [
            connection.execute(statement, {"namespace": self.namespace, "rows": document})
            for document in _documents(rows)
        ]

    def _wake(self, connection: Connection, woken: Sequence[tuple[UUID, int]]) -> None:
        document = json.dumps([{"run_id": run_id.hex, "wakeup_ms": ms} for run_id, ms in woken])
        connection.execute(WAKE, {"namespace": self.namespace, "woken": document})

    def _append(self, connection: Connection, rows: Sequence[OutboxRow]) -> list[StoredRow]:
        if not rows:
            return []
        if len(rows) == 1 and not self.queued:
            row = rows[0]
            written = row._asdict() | {
                "message_id": row.message_id.bytes,
                "ordering_key": row.ordering_key.encode(),
            }
            done = connection.execute(OUTBOX_ONE, {"namespace": self.namespace, **written})
            return [_stored(done.lastrowid, row)]
        now = self.now(connection)
        firsts = [self._append_some(connection, some, now) for some in _portions(rows)]
        ids = self._numbers(connection, firsts[0], [row.message_id for row in rows])
        return [_stored(ids[row.message_id], row) for row in rows]

    def _append_some(self, connection: Connection, rows: Sequence[OutboxRow], now: datetime) -> int:
        """Insert rows by one statement; return the number of the first."""
        # values and no document: of as many rows as are known the numbers follow each other, and no lock is taken
        if self.queued:
            done = connection.execute(insert(t.queue), [queue_row(row, now) for row in rows])
        else:
            written = [{"namespace": self.namespace, **row._asdict(), "created_at": now} for row in rows]
            done = connection.execute(insert(t.outbox), written)
        first: int = done.lastrowid
        return first

    def _numbers(self, connection: Connection, first: int, messages: Sequence[UUID]) -> dict[UUID, int]:
        """Return the numbers of what was inserted, by message ids: what others insert may stand between."""
        sought = {"b_first": first, "b_messages": messages}
        if self.queued:
            return {message_id: id_ for id_, message_id in connection.execute(_QUEUED, sought)}
        near = {"namespace": self.namespace, "first": first, "rows": len(messages)}
        found = {UUID(bytes=message_id): id_ for id_, message_id in connection.execute(_NEXT, near)}
        if found.keys() >= set(messages):
            return found
        rows = connection.execute(_NUMBERED, {"b_namespace": self.namespace, **sought})
        return {message_id: id_ for id_, message_id in rows}

    def delete_outbox(self, connection: Connection, ids: Collection[int]) -> None:
        if not ids:
            return
        # two statements: a DELETE with such a subquery waits for what the subquery would skip
        sought = {"namespace": self.namespace, "ids": json.dumps(sorted(ids))}
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


def _written(members: dict[str, Any]) -> dict[str, Any]:
    """Return a row as a member of a document: without what is NULL, bytes and ids as texts."""
    return {name: _member(value) for name, value in members.items() if value is not None}


def _member(value: Any) -> Any:
    if isinstance(value, UUID):
        return value.hex
    return b64encode(value).decode() if isinstance(value, bytes) else value


def _stored(number: int, row: OutboxRow) -> StoredRow:
    return StoredRow(number, row.message_id, row.channel, row.ordering_key, row.body)


def _portions(rows: Sequence[OutboxRow]) -> Iterator[Sequence[OutboxRow]]:
    """Divide rows so that each portion is surely one statement, in which a body takes twice its size."""
    begin = size = 0
    for place, row in enumerate(rows):
        mine = ROW_BYTES + 2 * len(row.body)
        if size and size + mine > STATEMENT_BYTES:
            yield rows[begin:place]
            begin, size = place, 0
        size += mine
    yield rows[begin:]


def _documents(rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
    """Divide rows so that no document is too large for one statement."""
    if not rows:
        return
    document = json.dumps(rows, separators=(",", ":")).encode()
    if len(document) <= STATEMENT_BYTES or len(rows) == 1:
        yield document
    else:
        half = len(rows) // 2
        yield from _documents(rows[:half])
        yield from _documents(rows[half:])
