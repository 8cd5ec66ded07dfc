"""The hot statements on PostgreSQL: a batch goes as arrays, and all that it writes is one statement.

Reads of time: `statement_timestamp()` and `clock_timestamp()`, never `now()`, which stands still (PG-1).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Insert,
    Interval,
    Table,
    TextClause,
    bindparam,
    func,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import insert as postgresql_insert

from saga.messages import CONTENT_TYPE
from saga.storage.base import Advanced, Changes, Loaded, OutboxRow, StoredRow, ValueKey
from saga.storage.sqlalchemy.statements import Statements, has_rare, without

LOAD: Final = text("""
SELECT run_id, saga, saga_version, saga_id, version, state, input,
       CAST(EXTRACT(EPOCH FROM clock_timestamp() - created_at) * 1000 AS bigint),
       CAST(EXTRACT(EPOCH FROM wakeup_at - created_at) * 1000 AS bigint), status
  FROM saga_instance
 WHERE namespace = :namespace AND run_id = ANY(CAST(:run_ids AS uuid[]))
""")

LOCK: Final = text("""
SELECT 1 FROM saga_instance WHERE namespace = :namespace AND run_id = ANY(CAST(:run_ids AS uuid[]))
 ORDER BY run_id FOR NO KEY UPDATE
""")

VALUES: Final = text("""
SELECT v.run_id, v.step, v.iteration, v.round, v.kind, v.data
  FROM unnest(CAST(:run_ids AS uuid[]), CAST(:steps AS text[]), CAST(CAST(:iterations AS text) AS int[]),
              CAST(CAST(:rounds AS text) AS int[]), CAST(:kinds AS text[])) AS k(run_id, step, iteration, round, kind)
  JOIN saga_value v ON v.namespace = :namespace AND v.run_id = k.run_id AND v.step = k.step
       AND v.iteration = k.iteration AND v.round = k.round AND v.kind = k.kind
""")

# Names of the array parameters, in the order of the rows' fields.
MOVED: Final = ("run_ids", "expected", "were", "versions", "statuses", "states", "wakeups", "results")
STARTED: Final = (
    "run_ids",
    "sagas",
    "saga_versions",
    "saga_ids",
    "run_numbers",
    "statuses",
    "states",
    "inputs",
    "wakeups",
    "results",
)
HISTORY: Final = ("h_run_ids", "h_versions", "h_events", "h_steps", "h_directions", "h_attempts", "h_details")
VALUE: Final = ("v_run_ids", "v_steps", "v_iterations", "v_rounds", "v_kinds", "v_datas")
OUTBOX: Final = ("o_message_ids", "o_parts", "o_channels", "o_keys", "o_bodies")

NUMBERS: Final = frozenset(
    {
        *("expected", "versions", "wakeups", "saga_versions", "run_numbers", "h_versions", "h_attempts"),
        *("v_iterations", "v_rounds", "iterations", "rounds", "o_parts"),
    }
)
"""Sent as PostgreSQL's array literals, which hold nothing to escape: the driver looks at every element of a list."""

_HISTORY: Final = """
INSERT INTO saga_history (namespace, run_id, version, event, step, direction, attempt, detail, at)
SELECT :namespace, h.run_id, h.version, h.event, h.step, h.direction, h.attempt, h.detail, statement_timestamp()
  FROM unnest(CAST(:h_run_ids AS uuid[]), CAST(CAST(:h_versions AS text) AS int[]), CAST(:h_events AS text[]),
              CAST(:h_steps AS text[]), CAST(:h_directions AS text[]), CAST(CAST(:h_attempts AS text) AS int[]),
              CAST(:h_details AS text[])) AS h(run_id, version, event, step, direction, attempt, detail)
"""

_VALUES: Final = """
INSERT INTO saga_value (namespace, run_id, step, iteration, round, kind, data)
SELECT :namespace, v.run_id, v.step, v.iteration, v.round, v.kind, v.data
  FROM unnest(CAST(:v_run_ids AS uuid[]), CAST(:v_steps AS text[]), CAST(CAST(:v_iterations AS text) AS int[]),
              CAST(CAST(:v_rounds AS text) AS int[]), CAST(:v_kinds AS text[]), CAST(:v_datas AS bytea[]))
       AS v(run_id, step, iteration, round, kind, data)
"""

_OUTBOX: Final = """
INSERT INTO saga_outbox (namespace, part, message_id, channel, ordering_key, body, created_at)
SELECT :namespace, o.part, o.message_id, o.channel, o.ordering_key, o.body, statement_timestamp()
  FROM unnest(CAST(CAST(:o_parts AS text) AS smallint[]), CAST(:o_message_ids AS uuid[]), CAST(:o_channels AS text[]),
              CAST(:o_keys AS text[]), CAST(:o_bodies AS bytea[])) AS o(part, message_id, channel, ordering_key, body)
"""

_QUEUE: Final = """
INSERT INTO saga_queue (channel, message_id, ordering_key, content_type, headers, body, created_at)
SELECT o.channel, o.message_id, o.ordering_key, :content_type, '{}', o.body, statement_timestamp()
  FROM unnest(CAST(CAST(:o_parts AS text) AS smallint[]), CAST(:o_message_ids AS uuid[]), CAST(:o_channels AS text[]),
              CAST(:o_keys AS text[]), CAST(:o_bodies AS bytea[])) AS o(part, message_id, channel, ordering_key, body)
"""

DELETE: Final = """
DELETE FROM saga_outbox WHERE id IN (
  SELECT id FROM saga_outbox WHERE namespace = :namespace AND id = ANY(CAST(:confirmed AS bigint[]))
   ORDER BY id FOR UPDATE SKIP LOCKED)
"""


@cache
def write_statement(*, values: bool, outbox: str, confirmed: bool) -> TextClause:
    """Return the statement that writes a batch, with those parts that the batch has: an empty one is not free.

    Rows are locked in id order before any is changed, so that batches which overlap never deadlock (PG-8). A row that
    was locked by another writer is read again once he is done, so `version` is the newest: a loser changes nothing,
    and nothing else of it is written, because all else joins the rows that moved.
    """
    moved = """\
u AS MATERIALIZED (
  SELECT * FROM unnest(CAST(:run_ids AS uuid[]), CAST(CAST(:expected AS text) AS int[]), CAST(:were AS text[]),
                       CAST(CAST(:versions AS text) AS int[]), CAST(:statuses AS text[]), CAST(:states AS text[]),
                       CAST(CAST(:wakeups AS text) AS bigint[]), CAST(:results AS bytea[]))
         AS u(run_id, expected, was, version, status, state, wakeup_ms, result)),
locked AS MATERIALIZED (
  SELECT i.run_id, i.version, i.status FROM saga_instance i
   WHERE i.namespace = :namespace AND i.run_id = ANY(CAST(:run_ids AS uuid[]))
   ORDER BY i.run_id FOR NO KEY UPDATE),
moved AS (
  UPDATE saga_instance i
     SET version = u.version, status = u.status, state = u.state, result = u.result,
         wakeup_at = i.created_at + u.wakeup_ms * interval '1 millisecond',
         closed_at = CASE WHEN u.wakeup_ms IS NULL THEN COALESCE(i.closed_at, statement_timestamp()) END
    FROM u JOIN locked ON locked.run_id = u.run_id AND locked.version = u.expected AND locked.status = u.was
   WHERE i.namespace = :namespace AND i.run_id = u.run_id
  RETURNING i.run_id)"""
    also = [f"d AS ({DELETE})"] if confirmed else []
    return _with("moved", moved, values=values, outbox=outbox, also=also)


@cache
def start_statement(*, values: bool, outbox: str) -> TextClause:
    """Return the statement that writes new instances, with those parts that they have."""
    started = """\
started AS (
  INSERT INTO saga_instance (namespace, run_id, saga, saga_version, saga_id, run_number, version, status, state, input,
                             result, created_at, closed_at, wakeup_at)
  SELECT :namespace, u.run_id, u.saga, u.saga_version, u.saga_id, u.run_number, 1, u.status, u.state, u.input, u.result,
         statement_timestamp(), CASE WHEN u.wakeup_ms IS NULL THEN statement_timestamp() END,
         statement_timestamp() + u.wakeup_ms * interval '1 millisecond'
    FROM unnest(CAST(:run_ids AS uuid[]), CAST(:sagas AS text[]), CAST(CAST(:saga_versions AS text) AS int[]),
                CAST(:saga_ids AS text[]), CAST(CAST(:run_numbers AS text) AS int[]), CAST(:statuses AS text[]),
                CAST(:states AS text[]), CAST(:inputs AS bytea[]), CAST(CAST(:wakeups AS text) AS bigint[]),
                CAST(:results AS bytea[]))
         AS u(run_id, saga, saga_version, saga_id, run_number, status, state, input, wakeup_ms, result)
   ORDER BY u.saga, u.saga_id
  ON CONFLICT DO NOTHING
  RETURNING run_id)"""
    return _with("started", started, values=values, outbox=outbox)


def _with(name: str, rows: str, *, values: bool, outbox: str, also: Sequence[str] = ()) -> TextClause:
    """Return one statement: the instances' rows, and of what belongs to them only that of those really written.

    `outbox` is the insert of the commands, empty if there are none.
    """
    parts = [rows, f"h AS ({_HISTORY} JOIN {name} USING (run_id))", *also]
    sent = "NULL, NULL"
    if values:
        parts.append(f"v AS ({_VALUES} JOIN {name} USING (run_id))")
    if outbox:
        owner = f"{name}.run_id = CAST(o.ordering_key AS uuid)"
        parts.append(f"o AS ({outbox} JOIN {name} ON {owner} RETURNING id, message_id)")
        sent = "(SELECT array_agg(id) FROM o), (SELECT array_agg(message_id) FROM o)"
    # lint: allow SQL because the parts are constants of this module
    return text(f"WITH {', '.join(parts)} SELECT (SELECT array_agg(run_id) FROM {name}), {sent}")


KNOWN_RUNS: Final = text("""
SELECT run_id FROM saga_instance WHERE namespace = :namespace AND run_id = ANY(CAST(:run_ids AS uuid[]))
""")

DELETE_ONLY: Final = text(DELETE)

WAKE: Final = text("""
UPDATE saga_instance i SET wakeup_at = i.created_at + u.wakeup_ms * interval '1 millisecond'
  FROM unnest(CAST(:run_ids AS uuid[]), CAST(CAST(:wakeups AS text) AS bigint[])) AS u(run_id, wakeup_ms)
 WHERE i.namespace = :namespace AND i.run_id = u.run_id AND i.closed_at IS NULL
""")


def columns(rows: Iterable[tuple[Any, ...]], names: Sequence[str]) -> dict[str, Any]:
    """Return rows as one array per column, by parameter name."""
    turned = list(zip(*rows, strict=True)) or [()] * len(names)
    return {
        name: numbers(column) if name in NUMBERS else list(column)
        for name, column in zip(names, turned, strict=True)
    }


def numbers(column: Iterable[int | None]) -> str:
    """Return PostgreSQL's array literal of these."""
    return "{" + ",".join(map(str, column)).replace("None", "NULL") + "}"


READ_OUTBOX: Final = """\
SELECT o.id, o.message_id, o.channel, o.ordering_key, o.body
  FROM unnest(CAST(CAST(:parts AS text) AS smallint[])) AS p(part)
 CROSS JOIN LATERAL (
   SELECT id, message_id, channel, ordering_key, body FROM saga_outbox
    WHERE namespace = :namespace AND part = p.part AND id > :low /* old */
    ORDER BY id LIMIT :limit) AS o
 ORDER BY o.id LIMIT :limit"""


@cache
def read_statement(*, aged: bool) -> TextClause:
    """Return the statement that reads the outbox.

    Part by part, so that each is found in the index from `low` on: with a list of parts the planner may walk over all
    of the namespace, every dead row below `low` included, as long as the statistics say that the table is small.
    """
    old = "AND created_at < clock_timestamp() - make_interval(secs => :seconds)" if aged else ""
    return text(READ_OUTBOX.replace("/* old */", old))


@cache
def _inserting_new(table: Table) -> Insert:
    return postgresql_insert(table).on_conflict_do_nothing()


class PostgreSQLStatements(Statements):
    """The same port calls with one statement for all that a batch writes."""

    def now(self, connection: Connection) -> datetime:
        now: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
        return now

    @classmethod
    def instant(cls, name: str) -> ColumnElement[Any]:
        return func.clock_timestamp() + bindparam(name, type_=Interval())

    def at(self, connection: Connection, **seconds: float) -> dict[str, Any]:
        return {name: timedelta(seconds=each) for name, each in seconds.items()}

    def insert_ignore(self, table: Table) -> Insert:
        return _inserting_new(table)

    def read_outbox(
        self, connection: Connection, parts: Collection[int], low: int, older_than_seconds: float, limit: int
    ) -> Sequence[StoredRow]:
        aged = older_than_seconds > 0
        sought = {"namespace": self.namespace, "parts": numbers(parts), "low": low, "limit": limit}
        rows = connection.execute(
            read_statement(aged=aged), sought | ({"seconds": older_than_seconds} if aged else {})
        )
        return [StoredRow(*row) for row in rows]

    def load(
        self, connection: Connection, run_ids: Collection[UUID], *, lock: bool = False
    ) -> dict[UUID, Loaded]:
        parameters = {"namespace": self.namespace, "run_ids": list(run_ids)}
        if lock:
            connection.execute(LOCK, parameters)
        rows = connection.execute(LOAD, parameters)
        return {row[0]: Loaded._make(row) for row in rows}

    def read_values(self, connection: Connection, keys: Collection[ValueKey]) -> dict[ValueKey, bytes]:
        if not keys:
            return {}
        names = ("run_ids", "steps", "iterations", "rounds", "kinds")
        rows = connection.execute(VALUES, {"namespace": self.namespace, **columns(keys, names)})
        return {ValueKey._make(row[:5]): row[5] for row in rows}

    writers = 2
    decides_first = True

    def write(self, connection: Connection, changes: Changes, confirmed: Collection[int]) -> Advanced:
        moved, stored = self._written(
            connection,
            write_statement(
                values=bool(changes.values), outbox=self._insert_of(changes), confirmed=bool(confirmed)
            ),
            columns(changes.moved, MOVED) | ({"confirmed": sorted(confirmed)} if confirmed else {}),
            changes,
        )
        lost = {row.run_id for row in changes.moved}.difference(moved)
        if has_rare(changes):
            self.write_rare(connection, without(changes, lost) if lost else changes, self.now(connection))
        return Advanced(stored, lost)

    def start(self, connection: Connection, changes: Changes) -> tuple[frozenset[UUID], Sequence[StoredRow]]:
        started, stored = self._written(
            connection,
            start_statement(values=bool(changes.values), outbox=self._insert_of(changes)),
            columns(changes.new, STARTED),
            changes,
        )
        there = frozenset(started)
        if len(there) < len(changes.new):
            # P31: a run id that is there already is this same start, run again
            ours = {"namespace": self.namespace, "run_ids": [row.run_id for row in changes.new]}
            there = frozenset(connection.execute(KNOWN_RUNS, ours).scalars())
        return there, stored

    def _insert_of(self, changes: Changes) -> str:
        if not changes.outbox:
            return ""
        return _QUEUE if self.queued else _OUTBOX

    def _written(
        self, connection: Connection, statement: TextClause, instances: Mapping[str, Any], changes: Changes
    ) -> tuple[Sequence[UUID], Sequence[StoredRow]]:
        """Run the one statement of a batch; return the instances and the outbox rows that it wrote."""
        parameters = {
            "namespace": self.namespace,
            **instances,
            **columns(changes.history, HISTORY),
            **(columns(((*row.key, row.data) for row in changes.values), VALUE) if changes.values else {}),
            **(columns(changes.outbox, OUTBOX) if changes.outbox else {}),
            **({"content_type": CONTENT_TYPE} if changes.outbox and self.queued else {}),
        }
        run_ids, ids, message_ids = connection.execute(statement, parameters).one()
        return run_ids or (), _stored(changes.outbox, ids, message_ids)

    def delete_outbox(self, connection: Connection, ids: Collection[int]) -> None:
        if ids:
            connection.execute(DELETE_ONLY, {"namespace": self.namespace, "confirmed": sorted(ids)})

    def _wake(self, connection: Connection, woken: Sequence[tuple[UUID, int]]) -> None:
        connection.execute(WAKE, {"namespace": self.namespace, **columns(woken, ("run_ids", "wakeups"))})


def _stored(
    rows: Sequence[OutboxRow], ids: list[int] | None, message_ids: list[UUID] | None
) -> list[StoredRow]:
    """Pair rows with their ids, in the order in which they were given; rows left out are left out."""
    by_message = dict(zip(message_ids or (), ids or (), strict=True))
    return [
        StoredRow(by_message[row.message_id], row.message_id, row.channel, row.ordering_key, row.body)
        for row in rows
        if row.message_id in by_message
    ]
