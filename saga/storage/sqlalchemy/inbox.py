"""The inbox's statements: the rows that say which events were acted on, in the place of a barrier's (row F-08).

A row is there or not; it has no outcome but `done`, and nothing ever replaces it. Its time is the host's: it is read by
the purge alone, which has a day of margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, select

from saga.storage.base import BarrierKey, BarrierRow
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.barrier import BarrierStatements
from saga.storage.sqlalchemy.coordinator import statements_for
from saga.storage.sqlalchemy.database import Database

DONE: Final = "done"


class InboxStatements:
    """Adapter of `BarrierStatements` for keys of events: topic as step, message key as run."""

    def __init__(self, database: Database, namespace: str, lone: BarrierStatements) -> None:
        """`lone` counts the runs of events that may kill their process."""
        self._namespace = namespace
        self._clock = database.clock
        # SQLAlchemy asks psycopg for the count of an INSERT only if told to
        insert = statements_for(database, namespace).insert_ignore(t.inbox)
        self._insert = insert.execution_options(preserve_rowcount=True)
        self._lone = lone

    def insert_one(self, connection: Connection, row: BarrierRow) -> bool:
        return connection.execute(self._insert, self._values(row.key)).rowcount == 1

    def insert(self, connection: Connection, rows: Sequence[BarrierRow]) -> set[BarrierKey]:
        return {row.key for row in rows if self.insert_one(connection, row)}

    def select(self, connection: Connection, keys: Sequence[BarrierKey]) -> dict[BarrierKey, BarrierRow]:
        n = t.inbox.c
        wanted = {(key.step, key.run_id): key for key in keys}
        query = select(n.topic, n.message_key).where(
            n.namespace == self._namespace,
            n.topic.in_({key.step for key in keys}),
            n.message_key.in_([key.run_id for key in keys]),
        )
        found = (wanted.get((topic, key)) for topic, key in connection.execute(query))
        return {key: BarrierRow(key, DONE, None) for key in found if key is not None}

    def replace(self, connection: Connection, row: BarrierRow, was: str) -> None:
        """Nothing: what was acted on stays so."""

    def count_lone_run(self, connection: Connection, command_id: str) -> int:
        return self._lone.count_lone_run(connection, command_id)

    def forget_lone_run(self, connection: Connection, command_id: str) -> None:
        self._lone.forget_lone_run(connection, command_id)

    def _values(self, key: BarrierKey) -> dict[str, Any]:
        return {
            "namespace": self._namespace,
            "topic": key.step,
            "message_key": key.run_id,
            "received_at": self._clock.now(),
        }
