"""C-12: what lists and counts ask the database is answered through an index, page after page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import pytest
from sqlalchemy import Connection, event, insert

from saga.storage.base import Filter
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.operators import SqlOperatorStore

pytestmark = pytest.mark.feature("C-12")

ROWS: Final = 10_000
PAGE: Final = 5
"""Is to these rows what a page of 100 is to 200,000."""
FEW: Final = ROWS // 20
"""So many may be sorted: what an index has found, not all there are."""
NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)
STUCK: Final = "f" * 16

FILTERS: Final = {
    "none": Filter(),
    "saga": Filter(saga="rare"),
    "open state": Filter(statuses=["running", "needs_attention"]),
    "closed state": Filter(statuses=["compensated"]),
    "step": Filter(steps=[("common", 1, 2), ("rare", 1, 2)]),
    "id": Filter(saga="common", id="order-17"),
    "id prefix": Filter(id_prefix="vip-"),
    "error fingerprint": Filter(fingerprint=STUCK),
}
COUNTED: Final = ("saga", "open state", "id", "error fingerprint")
"""The others are in no index: a count of them reads instances until it has found 10,001, and an operator waits."""


class Seen(NamedTuple):
    """What of a plan matters."""

    scans: list[str]
    """Everything that reads `saga_instance` from end to end."""
    sorted: float
    """The largest number of rows that anything sorts."""


@pytest.fixture
async def full(database: Database) -> Database:
    """Many instances, of which few are open, few stand still, and few are of one saga or customer."""

    def fill(connection: Connection) -> None:
        connection.execute(insert(t.instance), list(instances()))
        connection.execute(insert(t.incident), list(incidents()))
        tables = " TABLE saga_instance, saga_incident" if connection.dialect.name == "mysql" else ""
        connection.exec_driver_sql(f"ANALYZE{tables}").close()

    await database.run(fill)
    return database


def instances() -> Iterator[dict[str, Any]]:
    for number in range(ROWS):
        status = {0: "needs_attention", 1: "running", 2: "compensated"}.get(number % 100, "completed")
        closed = status in ("compensated", "completed")
        yield {
            "namespace": "default",
            "run_id": UUID(int=number),
            "saga": "rare" if number % 50 == 7 else "common",
            "saga_version": 1,
            "saga_id": f"{'vip' if number % 50 == 3 else 'order'}-{number}",
            "run_number": 1,
            "version": 3,
            "status": status,
            "state": '{"o":null}' if closed else '{"o":[2,0,0]}',
            "input": b"{}" * 100,
            "created_at": NOW,
            "closed_at": NOW if closed else None,
            "wakeup_at": None if closed else NOW + timedelta(seconds=number),
        }


def incidents() -> Iterator[dict[str, Any]]:
    for number in range(0, ROWS, 100):
        yield {
            "namespace": "default",
            "run_id": UUID(int=number),
            "kind": "compensation_failed",
            "step": "s1",
            "saga": "common",
            "error": "locked",
            "fingerprint": STUCK if number % 500 else "0" * 16,
            "count": 1,
            "first_seen_at": NOW,
            "last_seen_at": NOW,
        }


async def plan(database: Database, asked: Any) -> Seen:
    """Return the plan of the one statement that this asks."""
    statements: list[tuple[str, Any]] = []

    def noted(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT"):
            statements.append((statement, parameters))

    sync = database.engine.sync_engine
    event.listen(sync, "before_cursor_execute", noted)
    try:
        found = await asked
    finally:
        event.remove(sync, "before_cursor_execute", noted)
    assert found, "a plan of nothing tells nothing"
    [(statement, parameters)] = statements
    how, seen = PLANS[database.dialect]
    rows = await database.run(
        lambda connection: connection.exec_driver_sql(f"{how} {statement}", parameters).all()
    )
    return seen(rows)


def seen_sqlite(rows: Sequence[Any]) -> Seen:
    lines = [str(row[3]) for row in rows]
    scans = [line for line in lines if line.startswith("SCAN saga_instance") and "INDEX" not in line]
    # it does not tell of how many; what an index other than the key's found is taken for few
    by_key = any("sqlite_autoindex_saga_instance_1 (namespace=?)" in line for line in lines)
    sorts = any("USE TEMP B-TREE FOR ORDER BY" in line for line in lines)
    return Seen(scans, ROWS if sorts and by_key else 0)


def seen_mysql(rows: Sequence[Any]) -> Seen:
    steps = [row._mapping for row in rows]
    scans = [str(step) for step in steps if step["table"] == "saga_instance" and step["type"] == "ALL"]
    return Seen(
        scans,
        max((int(step["rows"] or 0) for step in steps if "filesort" in (step["Extra"] or "")), default=0),
    )


def seen_postgresql(rows: Sequence[Any]) -> Seen:
    told = rows[0][0]
    nodes = list(walk((json.loads(told) if isinstance(told, str) else told)[0]["Plan"]))
    scans = [
        str(node) for node in nodes
        if node["Node Type"] == "Seq Scan" and node["Relation Name"] == "saga_instance"
    ]  # fmt: skip
    return Seen(scans, max((node["Plan Rows"] for node in nodes if node["Node Type"] == "Sort"), default=0))


PLANS: Final[dict[str, tuple[str, Callable[[Sequence[Any]], Seen]]]] = {
    "mysql": ("EXPLAIN", seen_mysql),
    "postgresql": ("EXPLAIN (FORMAT JSON)", seen_postgresql),
    "sqlite": ("EXPLAIN QUERY PLAN", seen_sqlite),
}


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for inner in node.get("Plans", ()):
        yield from walk(inner)


async def test_every_page_of_every_filter_is_found_by_an_index(full: Database) -> None:
    """The first page and the one below a key; in the order of the key, which nothing has to sort."""
    store = SqlOperatorStore(full, "default")
    for name, where in FILTERS.items():
        for below in (None, UUID(int=ROWS * 3 // 4)):
            found = await plan(full, store.list(where, below, PAGE))
            assert not found.scans, (name, below)
            assert found.sorted <= FEW, (name, below)


async def test_a_count_of_few_does_not_read_all(full: Database) -> None:
    store = SqlOperatorStore(full, "default")
    for name in COUNTED:
        found = await plan(full, store.count(FILTERS[name], 10_001))
        assert not found.scans, name
