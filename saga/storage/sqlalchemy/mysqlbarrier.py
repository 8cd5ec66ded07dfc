"""The barrier's statements on MySQL and MariaDB: constant texts with the drivers' own marks, JSON for many keys.

Handlers' transactions are READ COMMITTED, so a SELECT after an INSERT that left rows out sees those that stood in its
way (MDB-4).
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from sqlalchemy import Connection

from saga.storage.base import BarrierKey, BarrierRow

_KEYS: Final = (
    "JSON_TABLE(%s, '$[*]' COLUMNS (run_id char(32) PATH '$[0]', step varchar(255) PATH '$[1]',"
    " iteration int PATH '$[2]', round int PATH '$[3]', direction varchar(40) PATH '$[4]')) AS k"
)
_INSERT: Final = (
    "INSERT IGNORE INTO saga_barrier"
    " (namespace, run_id, step, iteration, round, direction, outcome, reply, decided_at) "
)


class MySQLBarrier:
    """What is inserted tells by row count, and nothing returns it."""

    INSERT_ONE: Final = _INSERT + "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, UTC_TIMESTAMP(6))"
    # what a row does not have is NULL, while null itself is an error on MySQL
    INSERT: Final = (
        _INSERT + "SELECT %s, UNHEX(r.run_id), r.step, r.iteration, r.round, r.direction, r.outcome,"
        " FROM_BASE64(r.reply), UTC_TIMESTAMP(6) FROM JSON_TABLE(%s, '$[*]' COLUMNS (run_id char(32) PATH '$[0]',"
        " step varchar(255) PATH '$[1]', iteration int PATH '$[2]', round int PATH '$[3]',"
        " direction varchar(40) PATH '$[4]', outcome varchar(40) PATH '$[5]', reply longtext PATH '$[6]')) AS r"
    )
    SAVEPOINT: Final = "SAVEPOINT saga_barrier"
    BACK: Final = "ROLLBACK TO SAVEPOINT saga_barrier"
    SELECT: Final = (
        f"SELECT b.run_id, b.step, b.iteration, b.round, b.direction, b.outcome, b.reply FROM {_KEYS}"
        " STRAIGHT_JOIN saga_barrier AS b ON b.namespace = %s AND b.run_id = UNHEX(k.run_id) AND b.step = k.step"
        " AND b.iteration = k.iteration AND b.round = k.round AND b.direction = k.direction"
    )
    REPLACE: Final = (
        "UPDATE saga_barrier SET outcome = %s, reply = %s, decided_at = UTC_TIMESTAMP(6) WHERE namespace = %s"
        " AND run_id = %s AND step = %s AND iteration = %s AND round = %s AND direction = %s AND outcome = %s"
    )
    # LAST_INSERT_ID(x) has the answer itself tell x, as the number that an insert gave
    COUNT_LONE_RUN: Final = (
        "INSERT INTO saga_lone_run (namespace, command_id, runs, last_run_at)"
        " VALUES (%s, %s, LAST_INSERT_ID(1), UTC_TIMESTAMP(6))"
        " ON DUPLICATE KEY UPDATE runs = LAST_INSERT_ID(runs + 1), last_run_at = UTC_TIMESTAMP(6)"
    )
    FORGET_LONE_RUN: Final = "DELETE FROM saga_lone_run WHERE namespace = %s AND command_id = %s"

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def insert_one(self, connection: Connection, row: BarrierRow) -> bool:
        values = (*self._key(row.key), row.outcome, row.reply)
        return connection.exec_driver_sql(self.INSERT_ONE, values).rowcount == 1

    def insert(self, connection: Connection, rows: Sequence[BarrierRow]) -> set[BarrierKey]:
        if len(rows) == 1:
            return {row.key for row in rows if self.insert_one(connection, row)}
        if not rows:
            return set()
        connection.exec_driver_sql(self.SAVEPOINT)
        listed = json.dumps([_listed(row) for row in rows])
        inserted = connection.exec_driver_sql(self.INSERT, (self._namespace, listed)).rowcount
        if inserted == len(rows):
            return {row.key for row in rows}
        if inserted == 0:
            return set()
        # a count does not tell which, so these go again, one by one
        connection.exec_driver_sql(self.BACK)
        return {row.key for row in rows if self.insert_one(connection, row)}

    def select(self, connection: Connection, keys: Sequence[BarrierKey]) -> dict[BarrierKey, BarrierRow]:
        listed = json.dumps([[key.run_id.hex, *key[1:]] for key in keys])
        found = connection.exec_driver_sql(self.SELECT, (listed, self._namespace))
        rows = (BarrierRow(BarrierKey(UUID(bytes=row[0]), *row[1:5]), row[5], row[6]) for row in found)
        return {row.key: row for row in rows}

    def replace(self, connection: Connection, row: BarrierRow, was: str) -> None:
        values = (row.outcome, row.reply, *self._key(row.key), was)
        connection.exec_driver_sql(self.REPLACE, values)

    def count_lone_run(self, connection: Connection, command_id: str) -> int:
        counted: int = connection.exec_driver_sql(
            self.COUNT_LONE_RUN, (self._namespace, command_id)
        ).lastrowid
        return counted

    def forget_lone_run(self, connection: Connection, command_id: str) -> None:
        connection.exec_driver_sql(self.FORGET_LONE_RUN, (self._namespace, command_id))

    def _key(self, key: BarrierKey) -> tuple[str, bytes, str, int, int, str]:
        return self._namespace, key.run_id.bytes, *key[1:]


def _listed(row: BarrierRow) -> list[str | int]:
    reply = [] if row.reply is None else [b64encode(row.reply).decode()]
    return [row.key.run_id.hex, *row.key[1:], row.outcome, *reply]
