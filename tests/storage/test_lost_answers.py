"""Each transaction of the stores loses the answer to its commit once and leaves what it leaves without that (G-10)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from uuid import UUID

import pytest
from sqlalchemy import Connection, insert, select

from devservices import MySqlServer, Postgres
from saga.clock import SystemClock
from saga.storage.base import (
    BarrierKey,
    BarrierRow,
    Changes,
    HistoryRow,
    Lease,
    Loaded,
    MovedRow,
    NewInstance,
    OutboxRow,
    ParkedRow,
    StoredRow,
    ValueKey,
    ValueRow,
)
from saga.storage.sqlalchemy import schema, tables
from saga.storage.sqlalchemy.coordinator import SqlClientStore, SqlCoordinatorStore
from saga.storage.sqlalchemy.database import TRANSACTION_SECONDS, Database
from saga.storage.sqlalchemy.outbox import SqlOutboxStore
from saga.storage.sqlalchemy.parking import SqlParkingStore
from saga.storage.sqlalchemy.participant import SqlParticipantStore
from tests.plugins.features import Faults
from tests.proxy import Proxy, ProxyFactory
from tests.storage.conftest import EVERY_DRIVER, POSTGRES, Opener

DRIVERS = EVERY_DRIVER

RUNS = [UUID(int=(7 << 76) | number) for number in range(1, 4)]
OWNER = UUID(int=99)
ANSWERED = b"Z\x00\x00\x00\x05I"
"""PostgreSQL's word that it is ready and in no transaction: the answer to COMMIT, or to a statement without BEGIN."""
VOLATILE = {
    "created_at",
    "closed_at",
    "wakeup_at",
    "at",
    "received_at",
    "expires_at",
    "parked_at",
    "decided_at",
} | {
    "first_seen_at",
    "last_seen_at",
    "resolved_at",
    "next_try_at",
    "last_run_at",
    "due_at",
}
NUMBERED = {"saga_outbox", "saga_parked", "saga_audit", "saga_stale_reply", "saga_pending_reply"}


def message(number: int) -> OutboxRow:
    return OutboxRow(UUID(int=number), 3, "accounts", str(RUNS[0]), b"{}")


def started() -> Changes:
    changes = Changes()
    for number, run_id in enumerate(RUNS):
        changes.new.append(
            NewInstance(run_id, "transfer", 1, f"t-{number}", 1, "running", "{}", b"{}", 1000, None)
        )
        changes.history.append(HistoryRow(run_id, 1, "Started", None, None, None, None))
        changes.values.append(ValueRow(ValueKey(run_id, "withdraw", 0, 0, "input"), b"{}"))
        changes.outbox.append(OutboxRow(UUID(int=200 + number), 3, "accounts", str(run_id), b"{}"))
    return changes


@dataclass
class Move:
    """The work of a batch: instances at version 1 go to 2, and when that is done there is nothing to do."""

    moved: list[Loaded] = field(default_factory=list)

    def decide(self, loaded: Mapping[UUID, Loaded]) -> Collection[ValueKey]:
        self.moved = [instance for instance in loaded.values() if instance.version == 1]
        return [ValueKey(instance.run_id, "withdraw", 0, 0, "input") for instance in self.moved]

    def changes(self, values: Mapping[ValueKey, bytes]) -> Changes:
        changes = Changes()
        for number, instance in enumerate(sorted(self.moved)):
            run_id = instance.run_id
            changes.moved.append(MovedRow(run_id, 1, "running", 2, "running", '{"step": 2}', 2000, None))
            changes.history.append(HistoryRow(run_id, 2, "Completed", "withdraw", "forward", 1, None))
            changes.outbox.append(OutboxRow(UUID(int=300 + number), 3, "accounts", str(run_id), b"{}"))
        return changes


class Stores:
    """Every store of ours on one database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.coordinator = SqlCoordinatorStore(database, "default")
        self.client = SqlClientStore(database, "default")
        self.outbox = SqlOutboxStore(database, "default")
        self.parking = SqlParkingStore(database, "default")
        self.participant = SqlParticipantStore(database, "default")


async def add_delayed(stores: Stores) -> None:
    row = message(400)._asdict() | {"namespace": "default", "due_at": SystemClock().now()}
    await stores.database.run(
        lambda connection: connection.execute(insert(tables.outbox_delayed).values(**row)).rowcount
    )


DECISION = BarrierRow(BarrierKey(RUNS[0], "withdraw", 0, 0, "forward"), "done", b"{}")
FENCE = Lease("outbox-3", 1)
STUCK = StoredRow(1, UUID(int=200), "accounts", str(RUNS[0]), b"{}")
PARKED = ParkedRow("accounts", "undecodable", "f", "application/json", {}, b"?")

# In the order of an instance's life; each works on what the ones before it left.
TRANSACTIONS: dict[str, Callable[[Stores], Awaitable[object]]] = {
    "register": lambda stores: stores.coordinator.register([("transfer", 1, "f", "{}")]),
    "start": lambda stores: stores.client.start(started()),
    "advance": lambda stores: stores.coordinator.advance(RUNS, Move(), []),
    "read_due": lambda stores: stores.coordinator.read_due(10, [("transfer", 1)]),
    "renew": lambda stores: stores.outbox.renew(["outbox-3"], OWNER, 5.0),
    "read_outbox": lambda stores: stores.outbox.read_outbox(range(16), 0, 0.0, 100),
    "delete_confirmed": lambda stores: stores.outbox.delete_confirmed([1, 2]),
    "block": lambda stores: stores.outbox.block(FENCE, OWNER, STUCK, "unroutable", 1.0),
    "unblock": lambda stores: stores.outbox.unblock([str(RUNS[0])]),
    "release": lambda stores: stores.outbox.release(OWNER),
    "move_due": lambda stores: stores.outbox.move_due(10),
    "park": lambda stores: stores.parking.park([PARKED]),
    "decide": lambda stores: stores.participant.decide([DECISION]),
    "count_lone_run": lambda stores: stores.participant.count_lone_run("c"),
    "forget_lone_run": lambda stores: stores.participant.forget_lone_run("c"),
}
COUNTS_TWICE = {
    "block": {"saga_outbox_blocked": "attempts", "saga_incident": "count"},
    "count_lone_run": {"saga_lone_run": "runs"},
}
"""Counters that a second run raises once more: they warn and give up too early by one at worst, never too late."""


def contents(connection: Connection) -> dict[str, list[dict[str, object]]]:
    """Return every row of every table, without times and without ids that order only."""
    found = {}
    for table in tables.metadata.sorted_tables:
        left_out = VOLATILE | ({"id"} if table.name in NUMBERED else set())
        columns = [column for column in table.c if column.name not in left_out]
        rows = connection.execute(select(*columns))
        found[table.name] = sorted((dict(row._mapping) for row in rows), key=repr)
    return found


def forgiving(state: dict[str, list[dict[str, object]]], counters: Mapping[str, str]) -> object:
    return {
        name: [{key: value for key, value in row.items() if key != counters.get(name)} for row in rows]
        for name, rows in state.items()
    }


@pytest.fixture
async def link(server_url: str, proxy: ProxyFactory) -> Proxy:
    return await proxy(server_url)


def cut_answer(link: Proxy, stack: str) -> None:
    """Break the connection in place of the answer that ends the next transaction."""
    if stack == POSTGRES:
        link.cut_before(ANSWERED)
    else:
        link.cut_at_commit()  # there a statement is never a transaction by itself


@pytest.mark.feature("G-10", acceptance=True, scale=0.1)
async def test_every_transaction_that_loses_its_answer_leaves_what_it_leaves_without_that(
    stack: str, server: Postgres | MySqlServer, link: Proxy, opened: Opener, faults: Faults
) -> None:
    """P3, SQL-1: the same life of three instances twice, once with a cut at the end of each transaction."""
    faults.declare("answer cut")
    other = server.create_database()
    calm, rough = Stores(opened(other)), Stores(opened(link.url, pool_size=1))
    counted: dict[str, str] = {}
    for stores in (calm, rough):
        await stores.database.run(schema.upgrade)
    for name, transaction in TRANSACTIONS.items():
        if name == "move_due":
            for stores in (calm, rough):
                await add_delayed(stores)
        await transaction(calm)
        before = link.fired["cut"]
        cut_answer(link, stack)
        since = SystemClock().monotonic()
        await transaction(rough)
        assert SystemClock().monotonic() - since < TRANSACTION_SECONDS, name
        assert link.fired["cut"] == before + 1, name
        faults.fired("answer cut")
        counted |= COUNTS_TWICE.get(name, {})
        states = [forgiving(await stores.database.run(contents), counted) for stores in (calm, rough)]
        assert states[0] == states[1], name
    await calm.database.dispose()
    server.drop_database(other)
