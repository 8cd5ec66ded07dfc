"""The barrier's statements, one class per dialect: constant texts, so that drivers keep them prepared.

Hot statements go past the SQL compiler (`exec_driver_sql`): the single insert is on every command. Any number of keys
is one statement: arrays on PostgreSQL, a JSON array elsewhere, in the order given, which is sorted by key (P24).
PostgreSQL's texts number their parameters as its protocol does; drivers with marks of their own get them rewritten.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final, Protocol
from uuid import UUID

from sqlalchemy import Connection, CursorResult

from saga.clock import Clock
from saga.storage.base import BarrierKey, BarrierRow
from saga.storage.sqlalchemy.mysqlbarrier import MySQLBarrier

CANCELLED: Final = "cancelled"


class BarrierStatements(Protocol):
    """What the participant's store writes and reads, for one namespace."""

    def insert_one(self, connection: Connection, row: BarrierRow) -> bool:
        """Insert a row unless its key is taken; whether it went in, by row count."""
        ...

    def insert(self, connection: Connection, rows: Sequence[BarrierRow]) -> set[BarrierKey]:
        """Insert rows whose keys are free, in the order given; return the keys that went in."""
        ...

    def select(self, connection: Connection, keys: Sequence[BarrierKey]) -> dict[BarrierKey, BarrierRow]:
        """Return the rows that are there."""
        ...

    def replace(self, connection: Connection, row: BarrierRow, was: str) -> None:
        """Give a row another outcome and reply if its outcome is `was`."""
        ...

    def count_lone_run(self, connection: Connection, command_id: str) -> int:
        """Count a lone run; return the count."""
        ...

    def forget_lone_run(self, connection: Connection, command_id: str) -> None:
        """Delete the count."""
        ...


class PostgresqlBarrier:
    """Arrays in, rows out; time is `clock_timestamp()` (PG-1)."""

    INSERT_ONE: Final = (
        "INSERT INTO saga_barrier (namespace, run_id, step, iteration, round, direction, outcome, reply, decided_at)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, clock_timestamp()) ON CONFLICT DO NOTHING"
    )
    INSERT: Final = (
        "INSERT INTO saga_barrier (namespace, run_id, step, iteration, round, direction, outcome, reply, decided_at)"
        " SELECT $1, r.*, clock_timestamp() FROM unnest($2::uuid[], $3::text[], $4::int[], $5::int[], $6::text[],"
        " $7::text[], $8::bytea[]) AS r ON CONFLICT DO NOTHING"
        " RETURNING run_id, step, iteration, round, direction"
    )
    SELECT: Final = (
        "SELECT b.run_id, b.step, b.iteration, b.round, b.direction, b.outcome, b.reply"
        " FROM unnest($2::uuid[], $3::text[], $4::int[], $5::int[], $6::text[])"
        " AS k (run_id, step, iteration, round, direction)"
        " JOIN saga_barrier b ON b.namespace = $1 AND b.run_id = k.run_id AND b.step = k.step"
        " AND b.iteration = k.iteration AND b.round = k.round AND b.direction = k.direction"
    )
    REPLACE: Final = (
        "UPDATE saga_barrier SET outcome = $7, reply = $8, decided_at = clock_timestamp()"
        " WHERE namespace = $1 AND run_id = $2 AND step = $3 AND iteration = $4 AND round = $5 AND direction = $6"
        " AND outcome = $9"
    )
    COUNT_LONE_RUN: Final = (
        "INSERT INTO saga_lone_run AS r (namespace, command_id, runs, last_run_at)"
        " VALUES ($1, $2, 1, clock_timestamp()) ON CONFLICT (namespace, command_id)"
        " DO UPDATE SET runs = r.runs + 1, last_run_at = clock_timestamp() RETURNING runs"
    )
    FORGET_LONE_RUN: Final = "DELETE FROM saga_lone_run WHERE namespace = $1 AND command_id = $2"

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def insert_one(self, connection: Connection, row: BarrierRow) -> bool:
        values = (self._namespace, *row.key, row.outcome, row.reply)
        return _execute(connection, self.INSERT_ONE, values).rowcount == 1

    def insert(self, connection: Connection, rows: Sequence[BarrierRow]) -> set[BarrierKey]:
        columns = _columns((*row.key, row.outcome, row.reply) for row in rows)
        found = _execute(connection, self.INSERT, (self._namespace, *columns))
        return {BarrierKey(*row) for row in found}

    def select(self, connection: Connection, keys: Sequence[BarrierKey]) -> dict[BarrierKey, BarrierRow]:
        found = _execute(connection, self.SELECT, (self._namespace, *_columns(keys)))
        rows = (BarrierRow(BarrierKey(*row[:5]), row[5], row[6]) for row in found)
        return {row.key: row for row in rows}

    def replace(self, connection: Connection, row: BarrierRow, was: str) -> None:
        values = (self._namespace, *row.key, row.outcome, row.reply, was)
        _execute(connection, self.REPLACE, values)

    def count_lone_run(self, connection: Connection, command_id: str) -> int:
        counted: int = _execute(connection, self.COUNT_LONE_RUN, (self._namespace, command_id)).scalar_one()
        return counted

    def forget_lone_run(self, connection: Connection, command_id: str) -> None:
        _execute(connection, self.FORGET_LONE_RUN, (self._namespace, command_id))


class SqliteBarrier:
    """JSON in, rows out; ids are 32 hex digits, replies are JSON text, time is the host's (P10)."""

    INSERT_ONE: Final = (
        "INSERT INTO saga_barrier (namespace, run_id, step, iteration, round, direction, outcome, reply, decided_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
    )
    INSERT: Final = (
        "INSERT INTO saga_barrier (namespace, run_id, step, iteration, round, direction, outcome, reply, decided_at)"
        " SELECT ?, value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5,"
        " CAST(value ->> 6 AS BLOB), ? FROM json_each(?) WHERE true ON CONFLICT DO NOTHING"
        " RETURNING run_id, step, iteration, round, direction"
    )
    SELECT: Final = (
        "SELECT b.run_id, b.step, b.iteration, b.round, b.direction, b.outcome, b.reply"
        " FROM json_each(?) AS k CROSS JOIN saga_barrier b ON b.namespace = ? AND b.run_id = k.value ->> 0"
        " AND b.step = k.value ->> 1 AND b.iteration = k.value ->> 2 AND b.round = k.value ->> 3"
        " AND b.direction = k.value ->> 4"
    )
    REPLACE: Final = (
        "UPDATE saga_barrier SET outcome = ?, reply = ?, decided_at = ? WHERE namespace = ? AND run_id = ?"
        " AND step = ? AND iteration = ? AND round = ? AND direction = ? AND outcome = ?"
    )
    COUNT_LONE_RUN: Final = (
        "INSERT INTO saga_lone_run (namespace, command_id, runs, last_run_at) VALUES (?, ?, 1, ?)"
        " ON CONFLICT (namespace, command_id) DO UPDATE SET runs = runs + 1, last_run_at = excluded.last_run_at"
        " RETURNING runs"
    )
    FORGET_LONE_RUN: Final = "DELETE FROM saga_lone_run WHERE namespace = ? AND command_id = ?"

    def __init__(self, namespace: str, clock: Clock) -> None:
        self._namespace = namespace
        self._clock = clock

    def _now(self) -> str:
        return self._clock.now().strftime("%Y-%m-%d %H:%M:%S.%f")

    def insert_one(self, connection: Connection, row: BarrierRow) -> bool:
        key = row.key
        values = (self._namespace, key.run_id.hex, *key[1:], row.outcome, row.reply, self._now())
        return connection.exec_driver_sql(self.INSERT_ONE, values).rowcount == 1

    def insert(self, connection: Connection, rows: Sequence[BarrierRow]) -> set[BarrierKey]:
        listed = [
            [row.key.run_id.hex, *row.key[1:], row.outcome, None if row.reply is None else row.reply.decode()]
            for row in rows
        ]
        found = connection.exec_driver_sql(self.INSERT, (self._namespace, self._now(), json.dumps(listed)))
        return {BarrierKey(UUID(row[0]), *row[1:]) for row in found}

    def select(self, connection: Connection, keys: Sequence[BarrierKey]) -> dict[BarrierKey, BarrierRow]:
        listed = json.dumps([[key.run_id.hex, *key[1:]] for key in keys])
        found = connection.exec_driver_sql(self.SELECT, (listed, self._namespace))
        rows = (BarrierRow(BarrierKey(UUID(row[0]), *row[1:5]), row[5], row[6]) for row in found)
        return {row.key: row for row in rows}

    def replace(self, connection: Connection, row: BarrierRow, was: str) -> None:
        key = (self._namespace, row.key.run_id.hex, *row.key[1:])
        connection.exec_driver_sql(self.REPLACE, (row.outcome, row.reply, self._now(), *key, was))

    def count_lone_run(self, connection: Connection, command_id: str) -> int:
        counted: int = connection.exec_driver_sql(
            self.COUNT_LONE_RUN, (self._namespace, command_id, self._now())
        ).scalar_one()
        return counted

    def forget_lone_run(self, connection: Connection, command_id: str) -> None:
        connection.exec_driver_sql(self.FORGET_LONE_RUN, (self._namespace, command_id))


def statements(dialect: str, namespace: str, clock: Clock) -> BarrierStatements:
    """Return the statements of a dialect."""
    if dialect == "sqlite":
        return SqliteBarrier(namespace, clock)
    return MySQLBarrier(namespace) if dialect == "mysql" else PostgresqlBarrier(namespace)


def _columns(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _execute(
    connection: Connection, numbered: str, values: tuple[Any, ...]
) -> CursorResult[*tuple[Any, ...]]:
    """Run a statement whose parameters are `$1` and so on."""
    if connection.dialect.paramstyle == "numeric_dollar":
        return connection.exec_driver_sql(numbered, values)
    named = {str(number): value for number, value in enumerate(values, 1)}
    return connection.exec_driver_sql(named_marks(numbered), named)


@cache
def named_marks(numbered: str) -> str:
    """Return a statement with `%(1)s` for `$1`: a name may repeat and come in any order, as a number may."""
    return re.sub(r"\$(\d+)", r"%(\1)s", numbered.replace("%", "%%"))
