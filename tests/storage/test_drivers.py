"""Every statement of ours returns and leaves on each driver and server what it returns and leaves on asyncpg."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, cast
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine, create_engine, insert, make_url, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from devservices import Postgres
from saga.brokers.base import Channel, OutMessage
from saga.clock import SystemClock
from saga.engine.effects import IncidentKind
from saga.storage.base import (
    AuditRow,
    BarrierKey,
    BarrierRow,
    Changes,
    Filter,
    HistoryRow,
    IncidentRow,
    Lease,
    MovedRow,
    NewInstance,
    OutboxRow,
    ParkedRow,
    PendingRow,
    StaleRow,
    StoredRow,
    ValueKey,
    ValueRow,
)
from saga.storage.sqlalchemy import mysql, mysqllink, schema, tables
from saga.storage.sqlalchemy.barrier import named_marks, statements
from saga.storage.sqlalchemy.bells import RING
from saga.storage.sqlalchemy.coordinator import SqlClientStore, SqlCoordinatorStore, statements_for
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.inbox import InboxStatements
from saga.storage.sqlalchemy.mysql_queue import MySQLQueueStatements
from saga.storage.sqlalchemy.operators import SqlOperatorStore
from saga.storage.sqlalchemy.outbox import SqlOutboxStore
from saga.storage.sqlalchemy.parking import SqlParkingStore
from saga.storage.sqlalchemy.postgresql_queue import PostgreSQLQueueStatements
from saga.storage.sqlalchemy.queue import QueueStatements
from saga.storage.sqlalchemy.serverchecks import check_server
from saga.uuids import uuid_of
from tests.storage.conftest import URLS, Opener

T = TypeVar("T")
pytestmark = pytest.mark.stack("postgres-rabbitmq")

AWKWARD = "100% {\"a\", NULL} \\ 'o''clock' :x $1 %(1)s \u00fc\u4e2d\n"
"""What an array literal, a parameter mark or a quote could be mistaken for."""
BYTES = bytes(range(256))
RUNS = [uuid_of(((7 << 76) | number).to_bytes(16, "big")) for number in range(1, 5)]  # asyncpg's class
ABSENT = UUID(int=404)
OWNER = UUID(int=99)
TOKENS = [UUID(int=71), UUID(int=72)]
SETTINGS = "-c statement_timeout=5000 -c lock_timeout=3000"


class NumberedIds:
    """Ids that are the same in every life."""

    def __init__(self) -> None:
        self._numbers = itertools.count(10_000)

    def uuid7(self) -> UUID:
        return UUID(int=next(self._numbers))

    def fraction(self) -> float:
        return 0.5


class Driven:
    """As much of a `Database` as the stores use: each function is one transaction on an engine of any driver."""

    def __init__(self, engine: AsyncEngine | Engine) -> None:
        self.engine = engine
        # of MySQL's two names an address may have either, and what is made for them knows one
        self.dialect = {"mariadb": "mysql"}.get(engine.dialect.name, engine.dialect.name)
        self.clock = SystemClock()
        self.ids = NumberedIds()

    async def run(self, function: Callable[[Connection], T], **_: object) -> T:
        if isinstance(self.engine, Engine):
            with self.engine.begin() as connection:
                return function(connection)
        async with self.engine.begin() as async_connection:
            return await async_connection.run_sync(function)

    async def close(self) -> None:
        if isinstance(self.engine, Engine):
            self.engine.dispose()
        else:
            await self.engine.dispose()


def driven(driver: str, url: str) -> Driven:
    """Return an engine with the settings that `Database` gives its own."""
    options: dict[str, Any] = {"isolation_level": "READ COMMITTED", "hide_parameters": True}
    if driver == "asyncpg":
        timeouts = {"statement_timeout": "5000", "lock_timeout": "3000"}
        return Driven(create_async_engine(url, connect_args={"server_settings": timeouts}, **options))
    if url.startswith(("mysql", "mariadb")):
        told = mysqllink.settings(statement_seconds=5, lock_seconds=3, idle_seconds=None)
        bounds: Any = {"connect_seconds": 5, "answer_seconds": 10}
        if driver.startswith("PyMySQL"):
            sync = create_engine(
                make_url(url).set(drivername="mysql+pymysql"),
                connect_args=mysqllink.thread_arguments(told, **bounds) if driver.endswith("ours") else {},
                **options,
            )
            if driver.endswith("ours"):
                mysqllink.bound(sync)
            return Driven(sync)
        plain = {"cursor_cls": mysqllink.QuietCursor}
        ours = mysqllink.arguments(told, **bounds)
        arguments = ours if driver.endswith("ours") else plain
        return Driven(create_async_engine(url, connect_args=arguments, **options))
    options["connect_args"] = {"options": SETTINGS}
    address = make_url(url).set(drivername="postgresql+psycopg")
    if driver == "psycopg":
        return Driven(create_engine(address, **options))
    return Driven(create_async_engine(address, **options))


class Life:
    """The stores and statements of one database, whatever its driver."""

    def __init__(self, driven: Driven) -> None:
        database = cast(Database, driven)
        self.run = driven.run
        self.coordinator = SqlCoordinatorStore(database, "default")
        self.client = SqlClientStore(database, "default")
        self.outbox = SqlOutboxStore(database, "default")
        self.parking = SqlParkingStore(database, "default")
        self.operators = SqlOperatorStore(database, "default")
        self.sql = statements_for(database, "default")
        self.queued = statements_for(database, "default", queued=True)
        self.barrier = statements(driven.dialect, "default", driven.clock)
        self.inbox = InboxStatements(database, "default", self.barrier)
        postgresql = driven.dialect == "postgresql"
        kind = PostgreSQLQueueStatements if postgresql else MySQLQueueStatements
        self.queue: QueueStatements = kind(driven.clock, driven.ids, lambda: 4711, "default")
        self.absent_queue: QueueStatements = kind(driven.clock, driven.ids, lambda: None)


def new(number: int, *, wakeup_ms: int | None = 1000, result: bytes | None = None) -> NewInstance:
    return NewInstance(
        RUNS[number],
        "transfer",
        1,
        f"t-{number} {AWKWARD}",
        1,
        "running",
        AWKWARD,
        BYTES,
        wakeup_ms,
        result,
    )


def begun(run_id: UUID) -> HistoryRow:
    return HistoryRow(run_id, 1, "Started", None, None, None, None)


def command(number: int, run_id: UUID) -> OutboxRow:
    return OutboxRow(UUID(int=number), 3, "accounts", str(run_id), BYTES)


def started(*numbers: int, bare: bool = False) -> Changes:
    changes = Changes()
    for number in numbers:
        changes.new.append(new(number))
        changes.history.append(begun(RUNS[number]))
        if not bare:
            changes.values.append(ValueRow(ValueKey(RUNS[number], "withdraw", 0, 0, "input"), BYTES))
            changes.outbox.append(command(200 + number, RUNS[number]))
    return changes


def moved(*, stale: bool = True) -> Changes:
    """Two instances move, one of them to its end, and a third is not at the version that was decided on."""
    changes = Changes()
    for number, (wakeup_ms, result) in enumerate([(2000, None), (None, b""), (3000, None)][: 2 + stale]):
        run_id, expected = RUNS[number], 7 if number == 2 else 1
        status = "completed" if wakeup_ms is None else "running"
        changes.moved.append(
            MovedRow(run_id, expected, "running", expected + 1, status, AWKWARD, wakeup_ms, result)
        )
        changes.history.append(
            HistoryRow(run_id, expected + 1, "Completed", "withdraw", "forward", number or None, AWKWARD)
        )
        changes.values.append(ValueRow(ValueKey(run_id, "withdraw", 0, 1, "output"), b""))
        changes.outbox.append(command(300 + number, run_id))
    return changes


INCIDENT = IncidentRow(RUNS[0], IncidentKind.POISON, AWKWARD, "transfer", AWKWARD, "f" * 16)
AUDIT = AuditRow(RUNS[0], UUID(int=500), "retry", "anna", AWKWARD, "running", "running", None)


def rare() -> Changes:
    """All that `write_rare` writes, in one batch that moves nothing."""
    return Changes(
        woken=[(RUNS[0], 4000), (RUNS[2], 5000)],
        incidents=[INCIDENT, INCIDENT, INCIDENT._replace(kind=IncidentKind.UNROUTABLE)],
        resolved=[(RUNS[0], AWKWARD)],
        flagged=[(RUNS[2], 1)],
        mended=[RUNS[0]],
        stale=[StaleRow(RUNS[0], "withdraw", "forward", "c", 1, "done")],
        pending=[PendingRow(RUNS[0], "transfer", 2, BYTES), PendingRow(RUNS[1], "transfer", 2, b"")],
        audit=[AUDIT, AUDIT._replace(request_id=UUID(int=501), detail=AWKWARD)],
    )


def key(step: str, number: int = 0) -> BarrierKey:
    return BarrierKey(RUNS[number], step, 0, 40_000, "forward")


DECISIONS = [
    BarrierRow(key(AWKWARD), "done", BYTES),
    BarrierRow(key("", 1), "cancelled", None),
    BarrierRow(key("null", 2), "done", b""),
]
MESSAGES = [
    OutMessage("work", BYTES, "application/json", "k", {"x": AWKWARD}),
    OutMessage("nowhere", b"", "application/json"),
    OutMessage("work", b"2", "text/plain", AWKWARD),
    OutMessage("work", b"3", "text/plain"),
]
OUTPUT = ValueKey(RUNS[0], "withdraw", 0, 1, "output")
INPUT = ValueKey(RUNS[0], "withdraw", 0, 0, "input")
STUCK = StoredRow(1, UUID(int=200), "accounts", str(RUNS[0]), b"{}")


def seed(connection: Connection) -> None:
    """Rows that only the relay's port or time would bring."""
    row = command(400, RUNS[0])._asdict() | {
        "namespace": "default",
        "due_at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    connection.execute(insert(tables.outbox_delayed).values(**row))
    past = datetime(2026, 1, 1, tzinfo=UTC)
    connection.execute(
        tables.instance.update().where(tables.instance.c.run_id == RUNS[2]).values(wakeup_at=past)
    )


def step(function: Callable[[Life, Connection], object]) -> Callable[[Life], Awaitable[object]]:
    return lambda life: life.run(lambda connection: function(life, connection))


# In the order of a life; each works on what the ones before it left.
STEPS: dict[str, Callable[[Life], Awaitable[object]]] = {
    "schema check": step(lambda _, c: schema.check(c)),
    "schema indexes": step(lambda _, c: schema.restore_indexes(c)),
    "schema server": step(lambda _, c: check_server(c, SystemClock())),
    "schema upgrade again": step(lambda _, c: schema.upgrade(c)),
    "register": lambda life: life.coordinator.register(
        [("transfer", 1, "f", AWKWARD), ("other", 2, "g", "{}")]
    ),
    "register other": lambda life: life.coordinator.register([("transfer", 1, "h", "{}")]),
    "now": step(lambda life, c: life.sql.now(c)),
    "start": step(lambda life, c: life.sql.start(c, started(0, 1))),
    "start again": step(lambda life, c: life.sql.start(c, started(0, 2))),
    "start bare": step(lambda life, c: life.sql.start(c, started(3, bare=True))),
    "start queued": step(lambda life, c: life.queued.start(c, started(3))),
    "load": step(lambda life, c: life.sql.load(c, RUNS)),
    "load locked": step(lambda life, c: life.sql.load(c, [RUNS[2], RUNS[0]], lock=True)),
    "load none": step(lambda life, c: life.sql.load(c, [])),
    "write": step(lambda life, c: life.sql.write(c, moved(), [1, 77])),
    "write again": step(lambda life, c: life.queued.write(c, moved(), [])),
    "write nothing": step(lambda life, c: life.sql.write(c, Changes(), [])),
    "write rare": step(lambda life, c: life.sql.write(c, rare(), [])),
    "write rare again": step(lambda life, c: life.sql.write(c, rare(), [])),
    "take": step(lambda life, c: life.sql.write(c, Changes(taken=[(RUNS[0], 1), (RUNS[0], 77)]), [])),
    "read_values": step(lambda life, c: life.sql.read_values(c, [INPUT, OUTPUT, INPUT._replace(step="?")])),
    "read_values none": step(lambda life, c: life.sql.read_values(c, [])),
    "seed": step(lambda _, c: seed(c)),
    "read_due": step(lambda life, c: life.sql.read_due(c, 10, [("transfer", 1), (AWKWARD, 2)])),
    "read_due none": step(lambda life, c: life.sql.read_due(c, 10, [])),
    "delete_outbox": step(lambda life, c: life.sql.delete_outbox(c, [2, 88])),
    "read_open": lambda life: life.coordinator.read_open(RUNS[0], 10),
    "read_pending": lambda life: life.coordinator.read_pending(0, 10, [("transfer", 2)]),
    "audited": lambda life: life.coordinator.audited(AUDIT.request_id),
    "find": lambda life: life.client.find(None, "transfer", new(0).saga_id),
    "find none": lambda life: life.client.find(None, "transfer", "?"),
    "read_closed": lambda life: life.client.read_closed(RUNS),
    "describe": lambda life: life.client.describe(RUNS[0]),
    "renew": lambda life: life.outbox.renew(["outbox-3", "outbox-4"], OWNER, 5.0),
    "renew again": lambda life: life.outbox.renew(["outbox-3", "outbox-4"], OWNER, 5.0),
    "read_outbox": lambda life: life.outbox.read_outbox(range(16), 0, 0.0, 100),
    "read_outbox old": lambda life: life.outbox.read_outbox([3], 0, 0.000_001, 100),
    "block": lambda life: life.outbox.block(Lease("outbox-3", 1), OWNER, STUCK, "unroutable", 1.0),
    "block again": lambda life: life.outbox.block(Lease("outbox-3", 1), OWNER, STUCK, "unroutable", 1.0),
    "block fenced": lambda life: life.outbox.block(Lease("outbox-3", 7), OWNER, STUCK, "unroutable", 1.0),
    "rescan": lambda life: life.outbox.rescan(10),
    "outbox status": lambda life: life.operators.outbox(),
    "unblock": lambda life: life.outbox.unblock([str(RUNS[0])]),
    "release": lambda life: life.outbox.release(OWNER),
    "park": lambda life: life.parking.park(
        [ParkedRow("accounts", "undecodable", "f", "text/plain", {"x": "y"}, BYTES)]
    ),
    "dead_letters": lambda life: life.operators.dead_letters("accounts", "f", None, 10),
    "parked": lambda life: life.parking.read(UUID(int=10_000)),
    "list": lambda life: life.operators.list(Filter(), None, 10),
    "list some": lambda life: life.operators.list(
        Filter(saga="transfer", statuses=["running"], id_prefix="t-0 100%"), RUNS[3], 10
    ),
    "count": lambda life: life.operators.count(Filter(fingerprint="f" * 16), 10),
    "incident_groups": lambda life: life.operators.incident_groups("transfer", 10),
    "audit": lambda life: life.operators.audit(RUNS[0]),
    "payloads": lambda life: life.operators.payloads(RUNS[0]),
    "insert_one": step(lambda life, c: life.barrier.insert_one(c, BarrierRow(key("one"), "done", BYTES))),
    "insert_one bare": step(
        lambda life, c: life.barrier.insert_one(c, BarrierRow(key("bare"), "cancelled", None))
    ),
    "insert_one taken": step(
        lambda life, c: life.barrier.insert_one(c, BarrierRow(key("one"), "refused", None))
    ),
    "insert_one event": step(lambda life, c: life.inbox.insert_one(c, BarrierRow(key("one"), "done", None))),
    "insert_one event again": step(
        lambda life, c: life.inbox.insert_one(c, BarrierRow(key("one"), "done", None))
    ),
    "select events": step(lambda life, c: life.inbox.select(c, [key("one"), key("absent")])),
    "insert": step(lambda life, c: life.barrier.insert(c, DECISIONS[:2])),
    "insert taken": step(lambda life, c: life.barrier.insert(c, DECISIONS)),
    "insert bare": step(
        lambda life, c: life.barrier.insert(c, [BarrierRow(key("bare", 1), "cancelled", None)])
    ),
    "select": step(lambda life, c: life.barrier.select(c, [*(row.key for row in DECISIONS), key("absent")])),
    "select none": step(lambda life, c: life.barrier.select(c, [key("absent")])),
    "replace": step(
        lambda life, c: life.barrier.replace(c, BarrierRow(key("one"), "closed", AWKWARD.encode()), "done")
    ),
    "replace other": step(
        lambda life, c: life.barrier.replace(c, BarrierRow(key("one"), "done", None), "attempted")
    ),
    "replace bare": step(
        lambda life, c: life.barrier.replace(c, BarrierRow(key(AWKWARD), "closed", None), "done")
    ),
    "count_lone_run": step(lambda life, c: life.barrier.count_lone_run(c, AWKWARD)),
    "count_lone_run again": step(lambda life, c: life.barrier.count_lone_run(c, AWKWARD)),
    "count_lone_run other": step(lambda life, c: life.barrier.count_lone_run(c, "other")),
    "forget_lone_run": step(lambda life, c: life.barrier.forget_lone_run(c, AWKWARD)),
    "declare": step(
        lambda life, c: life.queue.declare(c, [Channel("work", "work.parked"), Channel("work.parked")])
    ),
    "declare other": step(lambda life, c: life.queue.declare(c, [Channel("work", None)])),
    "publish": step(lambda life, c: life.queue.publish(c, MESSAGES, None)),
    "publish bounded": step(lambda life, c: life.queue.publish(c, MESSAGES, 5)),
    "append": step(lambda life, c: life.queue.append(c, MESSAGES[:1])),
    "ring": step(lambda _, c: c.execute(RING, {"sender": "0" * 12, "channels": ["work", AWKWARD]}).scalar()),
    "waiting": step(lambda life, c: life.queue.waiting(c, ["work", "nowhere"])),
    "waiting nowhere": step(lambda life, c: life.absent_queue.waiting(c, [])),
    "subscribe": step(lambda life, c: life.queue.subscribe(c, TOKENS[0], "work", 30.0, [])),
    "subscribe instead": step(
        lambda life, c: life.absent_queue.subscribe(c, TOKENS[1], "work", 30.0, [ABSENT])
    ),
    "claim": step(lambda life, c: life.queue.claim(c, TOKENS[0], "work", 0, 3)),
    "settle": step(lambda life, c: life.queue.settle(c, TOKENS[0], [2], [1, 3], 0.0)),
    "claim again": step(lambda life, c: life.queue.claim(c, TOKENS[0], "work", 0, 2)),
    "claim fresh": step(lambda life, c: life.queue.claim(c, TOKENS[1], "work", 3, 100)),
    "move to parking": step(
        lambda life, c: life.queue.park(c, "work", life.queue.claim(c, TOKENS[1], "work", 0, 1) or [])
    ),
    "renew consumers": step(lambda life, c: life.queue.renew(c, TOKENS, 30.0)),
    "renew nobody": step(lambda life, c: life.absent_queue.renew(c, [], 30.0)),
    "status": step(lambda life, c: life.queue.status(c, "work")),
    "leave": step(lambda life, c: life.queue.leave(c, TOKENS)),
}


ONLY_POSTGRESQL = {name for name in STEPS if name.startswith("schema")} | {
    "ring",
    "write again",
    "move to parking",
    "renew nobody",
}
OWN_WAYS = {"saga_consumer": {"presence"}, "saga_queue": {"message_id"}, "saga_claim": {"message_id"}}
"""Columns that differ: PostgreSQL alone has presences, and gives ids to messages that it cannot route, too."""
ELSEWHERE = STEPS | {
    # rows that were locked when they were decided on are never stale
    "write": step(lambda life, c: life.sql.write(c, moved(stale=False), [1, 77]).rows),
    "write nothing": step(lambda life, c: life.sql.write(c, Changes(), []).rows),
    "write rare": step(lambda life, c: life.sql.write(c, rare(), []).rows),
    "write rare again": step(lambda life, c: life.sql.write(c, rare(), []).rows),
    "take": step(lambda life, c: life.sql.write(c, Changes(taken=[(RUNS[0], 1), (RUNS[0], 77)]), []).rows),
}


def contents(connection: Connection) -> dict[str, list[dict[str, object]]]:
    """Return every row of every table; of an instant only that it is one."""
    return {
        table.name: sorted(
            (
                {name: timeless(value) for name, value in row._mapping.items()}
                for row in connection.execute(select(table))
            ),
            key=repr,
        )
        for table in tables.metadata.sorted_tables
    }


def timeless(value: Any) -> Any:
    """Return a result with its types, without what differs between any two lives: when it was."""
    if isinstance(value, datetime):
        assert value.utcoffset() == timedelta(0)
        return "an instant"
    if isinstance(value, dict):
        return sorted(([timeless(name), timeless(each)] for name, each in value.items()), key=repr)
    if hasattr(value, "_fields"):
        named = {name: timeless(each) for name, each in zip(value._fields, value, strict=True)}
        return named | ({"now_ms": "a time"} if "now_ms" in named else {})
    if isinstance(value, list | tuple | set | frozenset):
        parts = [timeless(each) for each in value]
        return sorted(parts, key=repr) if isinstance(value, set | frozenset) else parts
    return type(value).__name__, "a time" if isinstance(value, float) else value


@pytest.fixture
async def pair(
    request: pytest.FixtureRequest, postgres_url: str, postgres_server: Postgres
) -> AsyncIterator[list[Driven]]:
    """Two databases with our tables, made by the driver that works on them: asyncpg and another one."""
    other = postgres_server.create_database()
    both = [driven("asyncpg", postgres_url), driven(request.param, other)]
    for each in both:
        await each.run(schema.upgrade)
    yield both
    for each in both:
        await each.close()
    postgres_server.drop_database(other)


@pytest.mark.feature("G-08")
@pytest.mark.parametrize("pair", ["psycopg", "psycopg async"], indirect=True)
async def test_every_statement_returns_and_leaves_the_same_on_each_driver(pair: list[Driven]) -> None:
    lives = [Life(each) for each in pair]
    filled = set[str]()
    for name, work in STEPS.items():
        results = [timeless(await work(life)) for life in lives]
        assert results[0] == results[1], name
        states = [await life.run(contents) for life in lives]
        assert states[0] == states[1], name
        filled.update(table for table, rows in states[0].items() if rows)
    assert filled == set(tables.metadata.tables)


@pytest.fixture
async def foreign_pair(
    request: pytest.FixtureRequest, postgres_url: str, opened: Opener
) -> AsyncIterator[list[Driven]]:
    """Two databases with our tables, one on PostgreSQL and the other not."""
    kind, driver = request.param
    other = request.getfixturevalue(URLS[kind])
    for url in (postgres_url, other):
        await opened(url).run(schema.upgrade)
    both = [driven("asyncpg", postgres_url), driven(driver, other)]
    yield both
    for each in both:
        await each.close()


@pytest.mark.feature("G-08")
@pytest.mark.parametrize(
    "foreign_pair",
    [
        (server, driver)
        for server in ("mariadb", "mysql")
        for driver in ("asyncmy", "PyMySQL", "asyncmy, ours", "PyMySQL, ours")
    ],
    indirect=True,
    ids="-".join,
)
async def test_every_statement_returns_and_leaves_the_same_on_each_server(foreign_pair: list[Driven]) -> None:
    lives = [Life(each) for each in foreign_pair]
    for name, work in ELSEWHERE.items():
        if name in ONLY_POSTGRESQL:
            continue
        results = [timeless(await work(life)) for life in lives]
        assert results[0] == results[1], name
        states = [comparable(await life.run(contents)) for life in lives]
        assert states[0] == states[1], name


def comparable(state: dict[str, list[dict[str, object]]]) -> dict[str, list[dict[str, object]]]:
    """Return the rows without what is another one's own way."""
    return {
        table: [
            {name: value for name, value in row.items() if name not in OWN_WAYS.get(table, ())}
            for row in rows
        ]
        for table, rows in state.items()
    }


@pytest.mark.feature("G-08")
@pytest.mark.parametrize(
    "foreign_pair", [("mariadb", "asyncmy, ours"), ("mysql", "asyncmy, ours")], indirect=True, ids="-".join
)
async def test_a_batch_that_is_too_large_for_one_statement_goes_as_several(
    foreign_pair: list[Driven], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is one transaction; one row by itself is as large as it is."""
    monkeypatch.setattr(mysql, "STATEMENT_BYTES", 1_000)
    monkeypatch.setattr(mysql, "ROW_BYTES", 100)
    lives = [Life(each) for each in foreign_pair]
    for life in lives:
        there, stored = await life.run(lambda c, life=life: life.sql.start(c, started(0, 1, 3)))  # type: ignore[misc]
        assert there == {RUNS[0], RUNS[1], RUNS[3]}
        assert len(stored) == len({row.id for row in stored}) == len(started(0, 1, 3).outbox)
        await life.run(lambda c, life=life: life.sql.write(c, moved(stale=False), []))  # type: ignore[misc]
    states = [comparable(await life.run(contents)) for life in lives]
    assert states[0] == states[1]


@pytest.mark.parametrize("kind", ["asyncpg", "psycopg", "psycopg async"])
async def test_a_statement_does_the_same_however_often_a_connection_has_run_it(
    postgres_url: str, kind: str
) -> None:
    """A driver may prepare a text after some runs of it, with types that it took from the values it saw."""
    engine = driven(kind, postgres_url)
    await engine.run(schema.upgrade)
    life = Life(engine)
    rows = [
        BarrierRow(BarrierKey(UUID(int=number), "s", 0, number, "forward"), "done", reply)
        for number, reply in zip(
            [1, 40_000, 2, 2**31 - 1, 3, 4, 5, 70_000], [None, b"x", *[b""] * 6], strict=True
        )
    ]

    def often(connection: Connection) -> None:
        for row in rows:
            assert life.barrier.insert_one(connection, row)
            assert not life.barrier.insert_one(connection, row)
            assert life.barrier.select(connection, [row.key]) == {row.key: row}
            assert life.sql.start(connection, Changes())[0] == frozenset()
        assert life.barrier.select(connection, [row.key for row in rows]) == {row.key: row for row in rows}

    await engine.run(often)
    await engine.close()


@pytest.mark.parametrize(
    ("numbered", "named"),
    [
        ("SELECT $2, $1", "SELECT %(2)s, %(1)s"),
        ("SELECT $1::int + $1::int, $12", "SELECT %(1)s::int + %(1)s::int, %(12)s"),
        ("SELECT 7 % $1", "SELECT 7 %% %(1)s"),
    ],
)
def test_numbered_parameters_become_named_ones(numbered: str, named: str) -> None:
    assert named_marks(numbered) == named
