"""One way to run a transaction: again after locks and lost answers, never cancelled, never waiting without a bound."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError, ProgrammingError
from sqlalchemy.util import await_only

from saga import failpoints
from saga.clock import SystemClock, TaskSpawner
from saga.errors import ConfigurationError, StorageBusy, StorageUnavailable
from saga.storage.sqlalchemy.database import (
    TRANSACTION_SECONDS,
    TRIES,
    Database,
    async_url,
)
from tests.plugins.features import Faults
from tests.proxy import ProxyFactory
from tests.storage.conftest import EVERY_DRIVER, Opener

DRIVERS = EVERY_DRIVER
BOUND = TRANSACTION_SECONDS + 1.0
"""Seconds that no call may take; the one above the promise is for a slow test machine."""


REFUSALS = {
    "postgresql": ("DO $$ BEGIN RAISE EXCEPTION 'row canary-4711' USING ERRCODE = '40001'; END $$", "40001"),
    "mysql": ("SIGNAL SQLSTATE '40001' SET MESSAGE_TEXT = 'row canary-4711', MYSQL_ERRNO = 1213", "1213"),
}
SLEEP = {"postgresql": "SELECT pg_sleep(:seconds)", "mysql": "SELECT sleep(:seconds)"}
BOUNDS = {
    "postgres-rabbitmq": {
        "statement_timeout": "5s",
        "lock_timeout": "3s",
        "idle_in_transaction_session_timeout": "1min",
    },
    "mariadb": {
        "max_statement_time": "5.000000",
        "innodb_lock_wait_timeout": "3",
        "lock_wait_timeout": "3",
        "idle_transaction_timeout": "60",
    },
    "mysql": {
        "max_execution_time": "5000",
        "innodb_lock_wait_timeout": "3",
        "lock_wait_timeout": "3",
        "wait_timeout": "60",
    },
}


@pytest.fixture
def armed() -> Iterator[Callable[[str], None]]:
    yield failpoints.arm
    failpoints.disarm()


@pytest.fixture
async def moves(empty: Database) -> Database:
    """A database with the table `moves`."""
    await empty.run(create_moves)
    return empty


@pytest.fixture
async def moves_on_postgres(postgres_url: str, opened: Opener) -> Database:
    database = opened(postgres_url)
    await database.run(create_moves)
    return database


@pytest.fixture
async def served_moves(server_url: str, moves: Database) -> Database:
    """The same, of a server."""
    return moves


def create_moves(connection: Connection) -> None:
    connection.execute(text("CREATE TABLE moves (id INTEGER PRIMARY KEY, amount INTEGER NOT NULL)"))


def insert(number: int, amount: int = 1) -> Callable[[Connection], int]:
    """A transaction that can be run twice: the key makes the second run a no-op (P3)."""

    def transaction(connection: Connection) -> int:
        done = connection.execute(
            text(unless_there(connection, "INSERT INTO moves VALUES (:id, :amount)")),
            {"id": number, "amount": amount},
        )
        return done.rowcount

    return transaction


def unless_there(connection: Connection, insert: str) -> str:
    """Return an INSERT that leaves out a row whose key is there."""
    if connection.dialect.name == "mysql":
        return insert.replace("INSERT", "INSERT IGNORE")
    return f"{insert} ON CONFLICT DO NOTHING"


def read(connection: Connection) -> list[tuple[int, int]]:
    return [
        (row.id, row.amount) for row in connection.execute(text("SELECT id, amount FROM moves ORDER BY id"))
    ]


def checked_out(database: Database) -> int:
    pool: Any = database.engine.sync_engine.pool
    return int(pool.checkedout())


def elapsed(since: float) -> float:
    return SystemClock().monotonic() - since


# --- unknown commits --------------------------------------------------------------------------


async def test_what_a_thread_gives_back_after_the_end_is_closed(moves: Database) -> None:
    """A handler that outlives the grace holds its connection until it returns."""
    engine = moves.serve_threads(1)
    held, ended = threading.Event(), threading.Event()
    kept: list[Any] = []

    def handler() -> None:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            held.set()
            ended.wait(60)
            kept.append(connection.connection._connection_record)

    running = asyncio.create_task(asyncio.to_thread(handler))
    try:
        await asyncio.to_thread(held.wait, 60)
        await moves.dispose()
    finally:
        ended.set()
    await running
    assert kept[0].dbapi_connection is None


@pytest.mark.feature("G-10")
async def test_a_transaction_whose_commit_answer_is_lost_runs_again_and_changes_nothing_twice(
    stack: str, moves: Database, armed: Callable[[str], None]
) -> None:
    """SQL-1, P3."""
    runs: list[int] = []

    def transaction(connection: Connection) -> None:
        runs.append(insert(1)(connection))

    armed("C7:raise")
    await moves.run(transaction, lost_commit="C7")
    assert runs == [1, 0]
    assert await moves.run(read) == [(1, 1)]


@pytest.mark.feature("G-10", acceptance=True, scale=0.1)
async def test_a_connection_cut_at_commit_converges_every_time(
    stack: str, served_moves: Database, proxy: ProxyFactory, opened: Opener, faults: Faults
) -> None:
    """SQL-1: the driver raises and the row is there; the second run finds it."""
    faults.declare("cut at COMMIT")
    link = await proxy(str(served_moves.url.render_as_string(hide_password=False)))
    database = opened(link.url)
    inserted = list[int]()

    def transaction(number: int) -> Callable[[Connection], None]:
        return lambda connection: inserted.append(insert(number)(connection))

    await database.run(read)  # so that there is a connection, and no COMMIT of making one
    for number in range(10):
        link.cut_at_commit()
        await database.run(transaction(number))
        faults.fired("cut at COMMIT", link.fired["cut"] - faults.counts["cut at COMMIT"])
    assert link.fired["cut"] == 10
    assert inserted == [1, 0] * 10
    assert await served_moves.run(read) == [(number, 1) for number in range(10)]
    assert checked_out(database) == 0


# --- what is repeated and what is not ---------------------------------------------------------


async def test_the_loser_of_a_deadlock_runs_again(stack: str, served_moves: Database) -> None:
    """40P01, 1213: the database ends one of the two, and both are done in the end."""
    database, runs = served_moves, list[str]()
    await database.run(insert(1))
    await database.run(insert(2))
    locked = {"a": asyncio.Event(), "b": asyncio.Event()}

    def transaction(mine: str, first: int, other: str, second: int) -> Callable[[Connection], None]:
        def add(connection: Connection) -> None:
            runs.append(mine)
            update = text("UPDATE moves SET amount = amount + 1 WHERE id = :id")
            connection.execute(update, {"id": first})
            locked[mine].set()
            await_only(locked[other].wait())
            connection.execute(update, {"id": second})

        return add

    await asyncio.gather(database.run(transaction("a", 1, "b", 2)), database.run(transaction("b", 2, "a", 1)))
    # the loser's second run may meet the other one before it went on, and lose again
    assert set(runs) == {"a", "b"}
    assert len(runs) >= 3
    assert await database.run(read) == [(1, 3), (2, 3)]


@pytest.mark.stack("postgres-rabbitmq")
async def test_a_serialization_failure_runs_again(moves_on_postgres: Database) -> None:
    """40001."""
    database, seen = moves_on_postgres, list[int]()
    await database.run(insert(1))

    def add_twice_as_much_as_seen(connection: Connection) -> None:
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        seen.append(connection.execute(text("SELECT amount FROM moves WHERE id = 1")).scalar_one())
        if len(seen) == 1:
            add = text("UPDATE moves SET amount = amount + 1 WHERE id = 1")
            await_only(database.run(lambda other: other.execute(add).rowcount))
        connection.execute(text("UPDATE moves SET amount = :amount WHERE id = 1"), {"amount": 2 * seen[-1]})

    await database.run(add_twice_as_much_as_seen)
    assert seen == [1, 2]
    assert await database.run(read) == [(1, 4)]


async def test_a_refusal_that_does_not_end_is_reported_as_busy_without_the_statement(
    stack: str, served_moves: Database, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[int] = []
    statement, code = REFUSALS[served_moves.dialect]

    def refuse(connection: Connection) -> None:
        runs.append(1)
        connection.execute(text(statement))

    with caplog.at_level(logging.DEBUG), pytest.raises(StorageBusy) as busy:
        await served_moves.run(refuse)
    assert len(runs) == TRIES
    assert code in busy.value.text
    assert "canary" not in busy.value.text + str(busy.value) + caplog.text


async def test_what_the_function_itself_gets_wrong_is_raised_at_once_and_rolled_back(
    stack: str, moves: Database
) -> None:
    runs: list[int] = []

    def insert_twice(connection: Connection) -> None:
        runs.append(1)
        connection.execute(text("INSERT INTO moves VALUES (1, 1)"))
        connection.execute(text("INSERT INTO moves VALUES (1, 1)"))

    def fail(connection: Connection) -> None:
        runs.append(2)
        insert(1)(connection)
        raise LookupError("ours")

    with pytest.raises(IntegrityError):
        await moves.run(insert_twice)
    with pytest.raises(LookupError, match="ours"):
        await moves.run(fail)
    assert runs == [1, 2]
    assert await moves.run(read) == []


async def test_a_failed_try_is_no_line_of_the_spawners(
    stack: str, moves: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Its waiter hears of it; an ERROR for every deadlock that is repeated would teach people to look away."""
    with pytest.raises(IntegrityError):
        await moves.run(lambda connection: insert(1)(connection) and insert_duplicate(connection))
    assert caplog.records == []


def insert_duplicate(connection: Connection) -> int:
    return connection.execute(text("INSERT INTO moves VALUES (1, 1)")).rowcount


async def test_a_log_in_that_is_refused_is_a_wrong_setting(
    stack: str, server_url: str, opened: Opener
) -> None:
    database = opened(server_url.rpartition("/")[0] + "/no_such_database")
    with pytest.raises(ConfigurationError) as refused:
        await database.run(read)
    assert {"postgresql": "3D000", "mysql": "1049"}[database.dialect] in refused.value.text


# --- cancellation -----------------------------------------------------------------------------


async def test_cancelling_the_waiter_does_not_cancel_the_transaction(stack: str, moves: Database) -> None:
    """SQL-2, SQL-3: a waiter may leave; what it asked for is done, and the pool is whole."""
    begun, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def slow(connection: Connection) -> None:
        insert(1)(connection)
        begun.set()
        await_only(go_on.wait())
        insert(2)(connection)
        ended.set()

    waiter = asyncio.create_task(moves.run(slow))
    await begun.wait()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert not ended.is_set()
    go_on.set()
    await ended.wait()
    await quiet(moves)
    assert await moves.run(read) == [(1, 1), (2, 1)]
    assert checked_out(moves) == 0


async def quiet(database: Database) -> None:
    """Return when no transaction is under way."""
    spawner = database.spawner
    assert isinstance(spawner, TaskSpawner)
    while tasks := list(spawner._tasks):
        await asyncio.wait(tasks)


async def test_cancelling_at_any_moment_loses_no_transaction_and_no_connection(
    stack: str, moves: Database
) -> None:
    """SQL-2: of waiters cancelled at random moments, all have their row."""
    waiters = []
    for number in range(40):
        waiter = asyncio.create_task(moves.run(insert(number)))
        waiters.append(waiter)
        for _ in range(number % 8):
            await asyncio.sleep(0)
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    await quiet(moves)
    started = {row[0] for row in await moves.run(read)}
    assert {number for number in range(40) if number % 8 >= 2} <= started
    assert checked_out(moves) == 0
    assert [await moves.run(insert(number)) for number in (100, 101, 102, 103, 104, 105)] == [1] * 6


# --- bounded waits ----------------------------------------------------------------------------


@pytest.mark.feature("G-10", acceptance=True, scale=0.1)
@pytest.mark.slow
async def test_a_black_hole_ends_within_the_bound_and_the_pool_is_whole_after_it(
    stack: str, served_moves: Database, proxy: ProxyFactory, opened: Opener, faults: Faults
) -> None:
    """SQL-6: in mid-query, while connecting, and with several callers at once."""
    faults.declare("black hole")
    link = await proxy(served_moves.url.render_as_string(hide_password=False))
    database = opened(link.url, pool_size=2)
    await database.run(insert(1))
    link.drop()
    since = SystemClock().monotonic()
    found = await asyncio.gather(
        *(database.run(insert(number)) for number in range(2, 6)), return_exceptions=True
    )
    assert elapsed(since) < BOUND
    assert [type(each) for each in found] in (
        [StorageUnavailable] * 4,
        [StorageUnavailable] * 2 + [StorageBusy] * 2,  # these two waited for a connection of the pool
    )
    faults.fired("black hole", link.fired["drop"])
    link.heal()
    assert await database.run(insert(7)) == 1
    await quiet(database)
    assert checked_out(database) == 0


async def test_a_connection_in_a_black_hole_is_given_back_while_the_hole_is_still_there(
    stack: str, served_moves: Database, proxy: ProxyFactory, opened: Opener
) -> None:
    """SQL-6: it is the driver that must give up, or the pool is soon empty."""
    link = await proxy(served_moves.url.render_as_string(hide_password=False))
    database = opened(link.url)
    await database.run(insert(1))
    link.drop()
    async with asyncio.timeout(BOUND):
        with pytest.raises(StorageUnavailable):
            await database.run(insert(2), once=True)
        await quiet(database)
    assert checked_out(database) == 0


@pytest.mark.feature("G-10")
async def test_a_connection_that_died_while_idle_is_not_handed_out(
    stack: str, served_moves: Database, proxy: ProxyFactory, opened: Opener
) -> None:
    """Else what runs once, an ack or a claim, would fail for each that the pool still holds."""
    link = await proxy(served_moves.url.render_as_string(hide_password=False))
    database = opened(link.url, pool_size=3)
    there = asyncio.Event()

    def meet(connection: Connection) -> Any:
        connection.execute(text("SELECT 1"))
        await_only(there.wait())
        return connection.connection.driver_connection

    three = [asyncio.create_task(database.run(meet)) for _ in range(3)]
    while link.open_connections < 3:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)
    there.set()
    idle = await asyncio.gather(*three)
    link.reset()
    while not all(connection.is_closed() for connection in idle):  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)  # both drivers must see the reset, and only asyncpg reads by itself
    for number in range(4):
        assert await database.run(insert(number), once=True) == 1


@pytest.mark.feature("G-10")
async def test_connections_broken_in_mid_query_and_refused_for_a_while_converge(
    stack: str, served_moves: Database, proxy: ProxyFactory, opened: Opener
) -> None:
    link = await proxy(served_moves.url.render_as_string(hide_password=False))
    database = opened(link.url)
    started = asyncio.Event()

    def sleep(connection: Connection) -> int:
        connection.execute(text("SELECT 1"))
        started.set()
        connection.execute(
            text(SLEEP[served_moves.dialect]), {"seconds": 2 if link.fired["reset"] == 0 else 0}
        )
        return insert(1)(connection)

    running = asyncio.create_task(database.run(sleep))
    await started.wait()
    link.refuse()
    link.reset()
    await link.wait_fired("refuse")
    link.heal()
    assert await running == 1
    assert await served_moves.run(read) == [(1, 1)]


@pytest.mark.feature("G-10")
async def test_every_wait_of_the_server_is_bounded_too(stack: str, served_moves: Database) -> None:
    """SQL-6, SQL-7: what a frozen process holds is given back by the server."""

    def setting(connection: Connection, name: str) -> str:
        if connection.dialect.name == "mysql":
            row = connection.execute(text("SHOW SESSION VARIABLES LIKE :name"), {"name": name}).one()
            return str(row[1])
        return str(connection.exec_driver_sql(f"SHOW {name}").scalar_one())

    bounds = BOUNDS[stack]
    found = await served_moves.run(lambda connection: {name: setting(connection, name) for name in bounds})
    assert found == bounds


@pytest.mark.parametrize(
    ("kind", "told"), [("postgresql", "ConnectionRefusedError"), ("mysql", "2003"), ("mariadb", "2003")]
)
async def test_a_database_that_is_not_there_is_unavailable_soon(opened: Opener, kind: str, told: str) -> None:
    since = SystemClock().monotonic()
    with pytest.raises(StorageUnavailable) as unavailable:
        await opened(f"{kind}://someone:s3cret@127.0.0.1:1/nowhere").run(read)
    assert elapsed(since) < BOUND
    assert told in unavailable.value.text
    assert "s3cret" not in unavailable.value.text + repr(unavailable.value)


# --- SQLite: one writer -----------------------------------------------------------------------


@pytest.fixture
async def file_moves(sqlite_url: str, opened: Opener) -> Database:
    database = opened(sqlite_url)
    await database.run(create_moves)
    return database


@pytest.mark.stack("sqlite")
async def test_writers_of_one_process_are_served_in_the_order_in_which_they_came(
    file_moves: Database,
) -> None:
    """P36: a fair queue, and not the busy timeout, whose polling lets a late one overtake."""
    order: list[int] = []

    def write(number: int) -> Callable[[Connection], None]:
        def transaction(connection: Connection) -> None:
            order.append(number)
            insert(number)(connection)

        return transaction

    await asyncio.gather(*(file_moves.run(write(number)) for number in range(30)))
    assert order == list(range(30))


@pytest.mark.stack("sqlite")
async def test_a_reader_takes_no_turn_and_its_connection_writes_in_turn_afterwards(
    file_moves: Database,
) -> None:
    assert file_moves.writer is not None
    locked = file_moves.writer.locked
    assert not await file_moves.run(lambda _: locked(), reads=True)
    for _ in range(7):  # more often than the pool has connections
        assert await file_moves.run(lambda _: locked())


@pytest.mark.stack("sqlite")
async def test_a_reader_does_not_wait_for_the_writer_and_sees_what_is_committed(file_moves: Database) -> None:
    writing, let_go = asyncio.Event(), asyncio.Event()

    def hold(connection: Connection) -> None:
        insert(1)(connection)
        writing.set()
        await_only(let_go.wait())

    holder = asyncio.create_task(file_moves.run(hold))
    await writing.wait()
    assert await file_moves.run(read, reads=True) == []
    let_go.set()
    await holder
    assert await file_moves.run(read, reads=True) == [(1, 1)]


@pytest.mark.stack("sqlite")
async def test_no_statement_is_dispatched_to_listeners(file_moves: Database) -> None:
    """One event of an engine is enough for SQLAlchemy to look for listeners at every statement."""
    assert not file_moves.engine.sync_engine._has_events
    assert not file_moves.serve_threads(1)._has_events


@pytest.mark.stack("sqlite")
async def test_a_read_that_becomes_a_write_loses_nothing(sqlite_url: str, opened: Opener) -> None:
    """LITE-1: 4 tasks x 25 read-modify-writes, from two processes' worth of engines."""
    databases = [opened(sqlite_url), opened(sqlite_url)]
    await databases[0].run(create_moves)
    await databases[0].run(insert(1, 0))

    def add(connection: Connection) -> None:
        amount = connection.execute(text("SELECT amount FROM moves WHERE id = 1")).scalar_one()
        connection.execute(text("UPDATE moves SET amount = :amount WHERE id = 1"), {"amount": amount + 1})

    async def worker(number: int) -> None:
        for _ in range(25):
            await databases[number % 2].run(add)

    await asyncio.gather(*(worker(number) for number in range(4)))
    assert await databases[0].run(read) == [(1, 100)]


@pytest.mark.stack("sqlite")
async def test_the_writer_is_given_back_after_every_kind_of_end(
    file_moves: Database, armed: Callable[[str], None]
) -> None:
    def fail(connection: Connection) -> None:
        insert(1)(connection)
        raise LookupError

    assert file_moves.writer is not None
    for _ in range(7):  # more often than the pool has connections
        with pytest.raises(LookupError):
            await file_moves.run(fail)
        with pytest.raises(Exception, match="no such table"):
            await file_moves.run(lambda connection: connection.execute(text("SELECT * FROM absent")))
        armed("C7:raise")
        await file_moves.run(insert(1), lost_commit="C7")
        assert not file_moves.writer.locked()
    assert checked_out(file_moves) == 0


@pytest.mark.stack("sqlite")
async def test_another_process_that_holds_the_writer_is_waited_for(
    file_moves: Database, opened: Opener
) -> None:
    """Between processes the busy timeout is all there is; the lock of this process comes back meanwhile."""
    other = opened(file_moves.url)
    holding, let_go = asyncio.Event(), asyncio.Event()

    def hold(connection: Connection) -> None:
        insert(1)(connection)
        holding.set()
        await_only(let_go.wait())

    holder = asyncio.create_task(other.run(hold))
    await holding.wait()
    waiting = asyncio.create_task(file_moves.run(insert(2)))
    await asyncio.wait({waiting}, timeout=timedelta(milliseconds=200).total_seconds())
    assert not waiting.done()
    let_go.set()
    await holder
    assert await waiting == 1


# --- secrets ----------------------------------------------------------------------------------

CANARY = "canary-4711"


async def test_errors_and_logs_name_no_value_of_a_row(
    stack: str, moves: Database, caplog: pytest.LogCaptureFixture, armed: Callable[[str], None]
) -> None:
    """SQL-9: what the library itself writes; what a driver's exception says is in test_failures."""

    def wrong(connection: Connection) -> None:
        connection.execute(text("SELECT :value FROM absent"), {"value": CANARY})

    with caplog.at_level(logging.DEBUG):
        with pytest.raises(Exception) as failed:
            await moves.run(wrong)
        armed("C7:raise")
        await moves.run(
            lambda connection: connection.execute(text("SELECT :value"), {"value": CANARY}).scalar(),
            lost_commit="C7",
        )
    assert "runs again" in caplog.text
    assert CANARY not in str(failed.value)
    assert CANARY not in "".join(
        record.getMessage() for record in caplog.records if record.name.startswith("saga")
    )


@pytest.mark.parametrize(
    "address", ["postgresql://u:canary-4711@h:x/y", "canary-4711", "oracle://u:canary-4711@h/y"]
)
def test_an_address_that_does_not_fit_is_refused_without_its_password(address: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        async_url(address)
    assert CANARY not in refused.value.text + repr(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///:memory:", "sqlite+pysqlite:///x.db"])
def test_sqlite_needs_a_file_and_our_driver(address: str) -> None:
    """LITE-6: a memory database is gone with its connection."""
    with pytest.raises(ConfigurationError):
        async_url(address)


async def test_a_missing_table_is_raised_as_it_is(stack: str, served_moves: Database) -> None:
    with pytest.raises(ProgrammingError):
        await served_moves.run(lambda connection: connection.execute(text("SELECT * FROM absent")))
