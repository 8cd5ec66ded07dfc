"""The table of failures, against the real drivers: what each error is, what it means, and what may be logged of it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncmy.errors
import pymysql
import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from devservices import LocalPostgres
from saga.storage.sqlalchemy.failures import Failure, classify, code, describe, is_refusal, sqlstate
from saga.storage.sqlalchemy.mysqllink import QuietCursor
from tests.proxy import ProxyFactory
from tests.storage.conftest import URLS

CANARY = "canary-4711"


def raising(state: str) -> str:
    return f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END $$"


POSTGRESQL: dict[str, tuple[str, Failure]] = {
    "serialization failure": (raising("40001"), Failure.BUSY),
    "deadlock": (raising("40P01"), Failure.BUSY),
    "lock not available": ("SET LOCAL lock_timeout = 1; LOCK TABLE held", Failure.BUSY),
    "statement timeout": ("SET LOCAL statement_timeout = 1; SELECT pg_sleep(5)", Failure.BUSY),
    "too many connections": (raising("53300"), Failure.LOST),
    "server shuts down": (raising("57P01"), Failure.LOST),
    "server crashed": (raising("57P02"), Failure.LOST),
    "server starts": (raising("57P03"), Failure.LOST),
    "connection failure": (raising("08006"), Failure.LOST),
    "backend killed": ("SELECT pg_terminate_backend(pg_backend_pid())", Failure.LOST),
    "unique key": ("INSERT INTO moves VALUES (1, 'x')", Failure.FATAL),
    "check": ("INSERT INTO moves VALUES (-1, 'x')", Failure.FATAL),
    "null": ("INSERT INTO moves VALUES (2, NULL)", Failure.FATAL),
    "no such table": ("SELECT * FROM absent", Failure.FATAL),
    "no such feature": (raising("0A000"), Failure.FATAL),
    "disk full": (raising("53100"), Failure.FATAL),
    "division by zero": ("SELECT 1 / 0", Failure.FATAL),
}


@pytest.fixture
async def engine(postgres_url: str) -> AsyncIterator[AsyncEngine]:
    """A plain engine, without what `Database` adds."""
    engine = create_async_engine(postgres_url)
    async with engine.begin() as connection:
        await connection.execute(
            text(
                "CREATE TABLE moves (id int PRIMARY KEY CONSTRAINT positive CHECK (id > 0), body text NOT NULL)"
            )
        )
        await connection.execute(text("CREATE TABLE held (id int)"))
        await connection.execute(text(f"INSERT INTO moves VALUES (1, '{CANARY}')"))
    yield engine
    await engine.dispose()


@asynccontextmanager
async def held(engine: AsyncEngine) -> AsyncIterator[None]:
    async with engine.connect() as connection:
        await connection.execute(text("LOCK TABLE held"))
        yield


async def provoke(engine: AsyncEngine, statements: str) -> BaseException:
    """Return what a driver raises, whatever it is: several are no errors of SQLAlchemy's."""
    try:
        async with engine.connect() as connection:
            for statement in [statements] if statements.startswith("DO") else statements.split("; "):
                await connection.execute(text(statement))
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.parametrize("case", POSTGRESQL)
async def test_asyncpg(engine: AsyncEngine, case: str) -> None:
    """SQL-5."""
    statements, meaning = POSTGRESQL[case]
    async with held(engine):
        assert classify(await provoke(engine, statements)) is meaning


@pytest.mark.stack("postgres-rabbitmq")
async def test_quirk_asyncpg_reports_a_serialization_failure_as_no_operational_error(
    engine: AsyncEngine,
) -> None:
    """SQL-5: so the class tells nothing and the SQLSTATE decides."""
    error = await provoke(engine, raising("40001"))
    assert type(error) is DBAPIError
    assert sqlstate(error) == "40001"


@pytest.mark.stack("postgres-rabbitmq")
async def test_quirk_asyncpg_reports_a_killed_backend_with_its_state_or_without_one(
    engine: AsyncEngine,
) -> None:
    """SQL-5: by the statement that is running it has a state, by the next one it is an InterfaceError without."""
    running = await provoke(engine, "SELECT pg_terminate_backend(pg_backend_pid())")
    assert isinstance(running, DBAPIError)
    async with engine.connect() as victim, engine.connect() as killer:
        pid = (await victim.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        kill = text("SELECT pg_terminate_backend(:pid, 5000)")
        assert (await killer.execute(kill, {"pid": pid})).scalar_one()
        with pytest.raises(DBAPIError) as lost:
            await victim.execute(text("SELECT 1"))
    assert isinstance(lost.value, InterfaceError)
    assert (sqlstate(lost.value), lost.value.connection_invalidated) == ("", True)
    assert classify(lost.value) is Failure.LOST


@pytest.mark.stack("postgres-rabbitmq")
async def test_quirk_a_cut_at_commit_raises_although_the_row_is_there(
    engine: AsyncEngine, postgres_url: str, proxy: ProxyFactory
) -> None:
    """SQL-1: with `connection_invalidated`, which is what makes it LOST."""
    link = await proxy(postgres_url)
    through = create_async_engine(link.url)
    async with through.connect() as connection:
        await connection.execute(text("INSERT INTO moves VALUES (7, 'x')"))
        link.cut_at_commit()
        with pytest.raises(DBAPIError) as lost:
            await connection.commit()
    await through.dispose()
    assert lost.value.connection_invalidated
    assert classify(lost.value) is Failure.LOST
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM moves WHERE id = 7"))).scalar_one() == 1


@pytest.mark.stack("postgres-rabbitmq")
async def test_quirk_ddl_under_a_live_connection_spoils_its_next_transaction_once(
    engine: AsyncEngine,
) -> None:
    """PG-5: a migration beside running processes; the second run of the function is fine."""
    select = text("SELECT * FROM moves")
    async with engine.connect() as connection:
        await connection.execute(select)
        await connection.commit()
        async with engine.begin() as other:
            await other.execute(text("ALTER TABLE moves ADD COLUMN note text"))
        with pytest.raises(DBAPIError) as stale:
            await connection.execute(select)
        await connection.rollback()
        assert type(stale.value.orig).__name__ == "InvalidCachedStatementError"
        assert classify(stale.value) is Failure.BUSY
        await connection.execute(select)


@pytest.mark.stack("postgres-rabbitmq")
async def test_connections_that_cannot_be_made(postgres_url: str) -> None:
    """SQL-5: what fails before there is a connection comes as a builtin, or as the driver's without its class."""

    async def connect(url: str, **arguments: object) -> BaseException:
        engine = create_async_engine(url, connect_args=arguments)
        try:
            return await provoke(engine, "SELECT 1")
        finally:
            await engine.dispose()

    refused = await connect("postgresql+asyncpg://u@127.0.0.1:1/x")
    assert (type(refused), classify(refused)) == (ConnectionRefusedError, Failure.LOST)

    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts, nobody ever answers
        port = silent.getsockname()[1]
        late = await connect(f"postgresql+asyncpg://u@127.0.0.1:{port}/x", timeout=0.2)
    assert (type(late), classify(late)) == (TimeoutError, Failure.LOST)

    absent = await connect(postgres_url.rpartition("/")[0] + "/no_such_database")
    assert (sqlstate(absent), classify(absent)) == ("3D000", Failure.FATAL)


@pytest.mark.stack("postgres-rabbitmq")
async def test_a_command_that_times_out_in_the_driver_loses_its_connection(postgres_url: str) -> None:
    """SQL-5, SQL-6: a builtin TimeoutError."""
    engine = create_async_engine(postgres_url, connect_args={"command_timeout": 0.2})
    error = await provoke(engine, "SELECT pg_sleep(5)")
    await engine.dispose()
    assert (type(error), classify(error)) == (TimeoutError, Failure.LOST)


@pytest.mark.stack("postgres-rabbitmq")
async def test_a_pool_without_a_free_connection_is_busy(postgres_url: str) -> None:
    """SQL-7: SQLAlchemy's TimeoutError is neither a DBAPIError nor the builtin."""
    engine = create_async_engine(postgres_url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    async with engine.connect():
        error = await provoke(engine, "SELECT 1")
    await engine.dispose()
    assert (type(error), classify(error)) == (PoolTimeout, Failure.BUSY)


@pytest.mark.stack("postgres-rabbitmq")
async def test_quirk_asyncpgs_own_text_holds_the_rows_values_and_only_the_wrapper_drops_it(
    postgres_url: str,
) -> None:
    """SQL-9: so what is logged is class, state and constraint, never a text."""
    engine = create_async_engine(postgres_url, hide_parameters=True)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE cards (number text CONSTRAINT one_card PRIMARY KEY)"))
    insert = text("INSERT INTO cards VALUES (:number)")
    async with engine.begin() as connection:
        await connection.execute(insert, {"number": CANARY})
    with pytest.raises(IntegrityError) as duplicate:
        async with engine.begin() as connection:
            await connection.execute(insert, {"number": CANARY})
    await engine.dispose()
    cause = duplicate.value.orig
    assert cause is not None
    assert CANARY not in str(duplicate.value)
    assert CANARY in str(getattr(cause.__cause__, "detail", ""))
    assert describe(duplicate.value) == "UniqueViolationError 23505 one_card"


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (ConnectionResetError(), Failure.LOST),
        (TimeoutError(), Failure.LOST),
        (OSError(113, "no route"), Failure.LOST),
        (ValueError("ours"), Failure.FATAL),
        (asyncio.CancelledError(), Failure.FATAL),
        (KeyboardInterrupt(), Failure.FATAL),
    ],
)
def test_errors_that_no_driver_wrapped(error: BaseException, meaning: Failure) -> None:
    assert classify(error) is meaning


# --- psycopg ----------------------------------------------------------------------------------


def psycopg_url(url: str) -> URL:
    return make_url(url).set(drivername="postgresql+psycopg")


@pytest.fixture
async def plain(engine: AsyncEngine, postgres_url: str) -> AsyncIterator[Engine]:
    """A plain engine of the synchronous driver on the same tables."""
    plain = create_engine(psycopg_url(postgres_url), hide_parameters=True)
    yield plain
    plain.dispose()


def provoke_plain(engine: Engine, statements: str) -> BaseException:
    try:
        with engine.connect() as connection:
            for statement in [statements] if statements.startswith("DO") else statements.split("; "):
                connection.execute(text(statement))
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.parametrize("case", POSTGRESQL)
async def test_psycopg(engine: AsyncEngine, plain: Engine, case: str) -> None:
    """SQL-5: the same table."""
    statements, meaning = POSTGRESQL[case]
    async with held(engine):
        assert classify(await asyncio.to_thread(provoke_plain, plain, statements)) is meaning


@pytest.mark.stack("postgres-rabbitmq")
async def test_psycopg_one_of_two_that_wait_for_each_other_is_busy(plain: Engine) -> None:
    """SQL-1: a deadlock that PostgreSQL itself has found."""
    both, errors = threading.Barrier(2), list[BaseException]()

    def cross(first: int, second: int) -> None:
        try:
            with plain.begin() as connection:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": first})
                both.wait()
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": second})
        except DBAPIError as error:
            errors.append(error)

    await asyncio.gather(asyncio.to_thread(cross, 1, 2), asyncio.to_thread(cross, 2, 1))
    assert [(sqlstate(error), classify(error)) for error in errors] == [("40P01", Failure.BUSY)]


@pytest.mark.stack("postgres-rabbitmq")
def test_psycopg_a_serialization_failure_is_busy(plain: Engine) -> None:
    """SQL-5: it is an OperationalError here."""
    update = text("UPDATE moves SET body = 'y' WHERE id = 1")
    serial = plain.execution_options(isolation_level="REPEATABLE READ")
    with serial.connect() as late, serial.connect() as early:
        late.execute(text("SELECT * FROM moves"))
        early.execute(update)
        early.commit()
        with pytest.raises(OperationalError) as failure:
            late.execute(update)
    assert (sqlstate(failure.value), classify(failure.value)) == ("40001", Failure.BUSY)


@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.parametrize(
    ("how", "state"),
    [
        ("SELECT pg_terminate_backend(:pid, 5000)", "57P01"),
        (
            "SELECT set_config('idle_in_transaction_session_timeout', '1', false), pg_sleep(0.0 * :pid)",
            "25P03",
        ),
    ],
)
def test_quirk_psycopg_reports_a_backend_that_was_killed_meanwhile_with_its_state(
    plain: Engine, how: str, state: str
) -> None:
    """SQL-5: what makes it LOST is that the connection is closed, for 25P03 is in nobody's list."""
    with plain.connect() as victim, plain.connect() as killer:
        pid = victim.execute(text("SELECT pg_backend_pid()")).scalar_one()
        (killer if state == "57P01" else victim).execute(text(how), {"pid": pid})
        gone = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
        for _ in range(1000):
            killer.rollback()  # what is there is looked up once in a transaction
            if not killer.execute(gone, {"pid": pid}).scalar_one():
                break
        with pytest.raises(DBAPIError) as lost:
            victim.execute(text("SELECT 1"))
    assert sqlstate(lost.value) in (state, "")  # the end may be met before what was said of it is read
    assert lost.value.connection_invalidated
    assert classify(lost.value) is Failure.LOST


@pytest.mark.stack("postgres-rabbitmq")
async def test_quirk_psycopg_a_cut_at_commit_raises_although_the_row_is_there(
    engine: AsyncEngine, postgres_url: str, proxy: ProxyFactory
) -> None:
    """SQL-1: without a state; `connection_invalidated` is what makes it LOST."""
    link = await proxy(postgres_url)
    through = create_engine(psycopg_url(link.url))

    def write() -> DBAPIError:
        with through.connect() as connection:
            connection.execute(text("INSERT INTO moves VALUES (7, 'x')"))
            link.cut_at_commit()
            with pytest.raises(OperationalError) as lost:
                connection.commit()
        return lost.value

    error = await asyncio.to_thread(write)
    through.dispose()
    assert (sqlstate(error), error.connection_invalidated, link.fired["cut"]) == ("", True, 1)
    assert classify(error) is Failure.LOST
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM moves WHERE id = 7"))).scalar_one() == 1


@pytest.mark.stack("postgres-rabbitmq")
def test_quirk_psycopg_ddl_under_a_live_connection_spoils_its_next_transaction_once(plain: Engine) -> None:
    """PG-5: once it has prepared the statement; the state alone would say that a feature is missing."""
    select = text("SELECT * FROM moves")
    with plain.connect() as connection:
        for _ in range(7):
            connection.execute(select)
        connection.commit()
        with plain.begin() as other:
            other.execute(text("ALTER TABLE moves ADD COLUMN note text"))
        with pytest.raises(DBAPIError) as stale:
            connection.execute(select)
        connection.rollback()
        assert (sqlstate(stale.value), classify(stale.value)) == ("0A000", Failure.BUSY)
        connection.execute(select)


@pytest.mark.stack("postgres-rabbitmq")
async def test_psycopg_connections_that_cannot_be_made(postgres_url: str) -> None:
    """SQL-5: its errors of connecting have no state, so those that an operator must act on are told by their words."""

    async def connect(url: str | URL, **arguments: object) -> BaseException:
        engine = create_engine(url, connect_args=arguments)
        try:
            return await asyncio.to_thread(provoke_plain, engine, "SELECT 1")
        finally:
            engine.dispose()

    refused = await connect("postgresql+psycopg://u@127.0.0.1:1/x")
    assert (type(refused), sqlstate(refused), classify(refused)) == (OperationalError, "", Failure.LOST)

    unknown = await connect("postgresql+psycopg://u@no-such-host.invalid/x")
    assert (sqlstate(unknown), classify(unknown)) == ("", Failure.LOST)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        late = await connect(f"postgresql+psycopg://u@127.0.0.1:{port}/x", connect_timeout=2)
    assert (describe(late), classify(late)) == ("ConnectionTimeout", Failure.LOST)

    database = await connect(psycopg_url(postgres_url).set(database="no_such_database"))
    assert (sqlstate(database), classify(database)) == ("3D000", Failure.FATAL)

    role = await connect(psycopg_url(postgres_url).set(username="no_such_role"))
    assert (sqlstate(role), classify(role)) == ("28000", Failure.FATAL)


@pytest.fixture
def guarded(own_postgres: LocalPostgres) -> Iterator[str]:
    """The address, with a wrong password, of a role whom the server asks for one."""
    role, _ = own_postgres.create_role(password=CANARY)
    ((path,),) = own_postgres.execute("SHOW hba_file")[-1]
    file = Path(path)
    before = file.read_text()
    file.write_text(f"host all {role} all scram-sha-256\n{before}")
    own_postgres.execute("SELECT pg_reload_conf()")
    yield own_postgres.database_url("postgres", role=role, password="wrong")
    file.write_text(before)
    own_postgres.execute("SELECT pg_reload_conf()")
    own_postgres.drop_role(role)


@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.parametrize("password", ["wrong", None])
async def test_a_refused_password_has_the_same_state_on_each_driver(
    guarded: str, password: str | None
) -> None:
    """An operator must act, so it is no connection that is lost."""
    address = make_url(guarded)._replace(password=password)
    plain, engine = create_engine(address.set(drivername="postgresql+psycopg")), create_async_engine(address)
    for _ in range(1000):  # the server reads its settings when it gets to it
        if sqlstate(await provoke_or_none(engine)) == "28P01":
            break
        await asyncio.sleep(0.01)
    error = provoke_plain(plain, "SELECT 1")
    assert (describe(error), classify(error)) == ("OperationalError 28P01", Failure.FATAL)
    plain.dispose()
    await engine.dispose()


async def provoke_or_none(engine: AsyncEngine) -> BaseException:
    try:
        return await provoke(engine, "SELECT 1")
    except AssertionError as error:
        return error


@pytest.mark.stack("postgres-rabbitmq")
def test_quirk_psycopgs_text_holds_the_rows_values_and_the_wrapper_shows_it(plain: Engine) -> None:
    """SQL-9: so `hide_parameters` hides nothing here."""
    with pytest.raises(IntegrityError) as wrong, plain.begin() as connection:
        connection.execute(text("INSERT INTO moves VALUES (:id, :body)"), {"id": -1, "body": CANARY})
    assert CANARY in str(wrong.value)
    assert describe(wrong.value) == "CheckViolation 23514 positive"


# --- MySQL and MariaDB ------------------------------------------------------------------------


def signal(number: int) -> str:
    return f"SIGNAL SQLSTATE 'HY000' SET MESSAGE_TEXT = '{CANARY}', MYSQL_ERRNO = {number}"


ON_MYSQL: dict[str, tuple[str, int | None, Failure]] = {
    "deadlock": (signal(1213), 1213, Failure.BUSY),
    "lock wait": ("SET innodb_lock_wait_timeout = 1; UPDATE held SET id = 2", 1205, Failure.BUSY),
    "changed since the snapshot": (signal(1020), 1020, Failure.BUSY),
    "no wait": (signal(3572), 3572, Failure.BUSY),
    "statement ended": ("KILL QUERY CONNECTION_ID()", 1317, Failure.BUSY),
    "server shuts down": (signal(1053), 1053, Failure.LOST),
    "node takes no statements": (signal(1047), 1047, Failure.LOST),
    "commit failed": (signal(1180), 1180, Failure.LOST),
    "too many connections": (signal(1040), 1040, Failure.LOST),
    "connection killed": ("KILL CONNECTION_ID(); SELECT 1", None, Failure.LOST),
    "unique key": ("INSERT INTO moves VALUES (1, 'x')", 1062, Failure.FATAL),
    "null": ("INSERT INTO moves VALUES (2, NULL)", 1048, Failure.FATAL),
    "too long": (f"INSERT INTO moves VALUES (3, '{'x' * 21}')", 1406, Failure.FATAL),
    "no such table": ("SELECT * FROM absent", 1146, Failure.FATAL),
    "syntax": ("SELEC", 1064, Failure.FATAL),
}
TOO_SLOW: dict[str, tuple[str, int]] = {
    "mariadb": (
        "SET max_statement_time = 0.1; SELECT count(*) FROM moves a, held b WHERE sleep(3) = 0",
        1969,
    ),
    "mysql": ("SET max_execution_time = 100; SELECT count(*) FROM moves a, held b WHERE sleep(3) = 0", 3024),
}


@pytest.fixture(params=["mariadb", "mysql"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def mysql_address(kind: str, request: pytest.FixtureRequest) -> Iterator[URL]:
    """A database with two tables, of which `held` has a locked row."""
    address = make_url(request.getfixturevalue(URLS[kind])).set(drivername="mysql+pymysql")
    engine = create_engine(address)
    with engine.connect() as connection:
        connection.execute(text("CREATE TABLE moves (id int PRIMARY KEY, body varchar(20) NOT NULL)"))
        connection.execute(text("CREATE TABLE held (id int)"))
        connection.execute(text("INSERT INTO moves VALUES (1, :body)"), {"body": CANARY})
        connection.execute(text("INSERT INTO held VALUES (1)"))
        connection.commit()
        connection.execute(text("SELECT * FROM held FOR UPDATE"))
        yield address
    engine.dispose()


async def provoke_mysql(driver: str, address: URL, statements: str) -> BaseException:
    """Return what a driver raises; what it logs meanwhile must not have the values of rows in it (SQL-9)."""
    if driver == "pymysql":
        plain = create_engine(address, hide_parameters=True)
        try:
            return await asyncio.to_thread(provoke_plain, plain, statements)
        finally:
            plain.dispose()
    arguments = {"cursor_cls": QuietCursor}
    engine = create_async_engine(
        address.set(drivername="mysql+asyncmy"), hide_parameters=True, connect_args=arguments
    )
    try:
        return await provoke(engine, statements)
    finally:
        await engine.dispose()


@pytest.mark.parametrize("driver", ["asyncmy", "pymysql"])
@pytest.mark.parametrize("case", ON_MYSQL)
async def test_mysql(mysql_address: URL, driver: str, case: str) -> None:
    """SQL-5: the number tells, and the class does not."""
    statements, number, meaning = ON_MYSQL[case]
    error = await provoke_mysql(driver, mysql_address, statements)
    assert (code(error) if number else None, classify(error)) == (number, meaning)
    if number:
        assert describe(error) == f"{type(getattr(error, 'orig', error)).__name__} {number}"
    assert CANARY not in describe(error)


@pytest.mark.parametrize("driver", ["asyncmy", "pymysql"])
async def test_mysql_a_read_that_takes_too_long_is_busy(mysql_address: URL, kind: str, driver: str) -> None:
    """SQL-6."""
    statements, number = TOO_SLOW[kind]
    error = await provoke_mysql(driver, mysql_address, statements)
    assert (code(error), classify(error)) == (number, Failure.BUSY)


@pytest.mark.parametrize("driver", ["asyncmy", "pymysql"])
async def test_mysql_connections_that_cannot_be_made(mysql_address: URL, driver: str) -> None:
    """SQL-5: what an operator must act on is told from what is tried again."""
    refused = await provoke_mysql(driver, mysql_address.set(port=1), "SELECT 1")
    assert (code(refused), classify(refused), is_refusal(refused)) == (2003, Failure.LOST, False)

    for address, number in (
        (mysql_address.set(database="no_such_database"), 1049),
        (mysql_address.set(username="nobody", password="wrong"), 1045),
    ):
        error = await provoke_mysql(driver, address, "SELECT 1")
        assert (code(error), classify(error), is_refusal(error)) == (number, Failure.FATAL, True)


@pytest.mark.parametrize("error", [asyncmy.errors.InternalError, pymysql.err.InternalError])
def test_packets_out_of_step_are_a_lost_connection(error: type[Exception]) -> None:
    """SQL-5: the drivers say so in words and without a number."""
    wrapped = DBAPIError("SELECT 1", {}, error("Packet sequence number wrong - got 4 expected 1"))
    assert (code(wrapped), classify(wrapped)) == (0, Failure.LOST)


async def test_quirk_asyncmy_a_cut_at_commit_raises_although_the_row_is_there(
    mysql_address: URL, proxy: ProxyFactory
) -> None:
    """SQL-1: with `connection_invalidated`, which is what makes it LOST."""
    link = await proxy(mysql_address.render_as_string(hide_password=False))
    through = create_async_engine(make_url(link.url).set(drivername="mysql+asyncmy"))
    async with through.connect() as connection:
        await connection.execute(text("INSERT INTO moves VALUES (7, 'x')"))
        link.cut_at_commit()
        with pytest.raises(DBAPIError) as lost:
            await connection.commit()
        await connection.invalidate()
    await through.dispose()
    assert (lost.value.connection_invalidated, link.fired["cut"]) == (True, 1)
    assert classify(lost.value) is Failure.LOST
    engine = create_engine(mysql_address)
    with engine.connect() as direct:
        assert direct.execute(text("SELECT count(*) FROM moves WHERE id = 7")).scalar_one() == 1
    engine.dispose()


# --- SQLite -----------------------------------------------------------------------------------


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., Connection]]:
    """`connect()` gives connections to one WAL file, in the driver's own mode unless told otherwise."""
    engines = list[Connection]()

    def open_(**arguments: object) -> Connection:
        engine = create_engine(
            f"sqlite:///{tmp_path / 'x.db'}", connect_args={"timeout": 0.0, **arguments}, hide_parameters=True
        )
        connection = engine.connect()
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS moves (id INTEGER PRIMARY KEY, n INTEGER)")
        connection.commit()
        engines.append(connection)
        return connection

    yield open_
    for connection in engines:
        connection.close()
        connection.engine.dispose()


@pytest.mark.stack("sqlite")
def test_sqlite_a_locked_database_is_busy(connect: Callable[..., Connection]) -> None:
    """SQL-5."""
    holder, other = connect(isolation_level=None), connect(isolation_level=None)
    holder.exec_driver_sql("BEGIN IMMEDIATE")
    with pytest.raises(OperationalError) as busy:
        other.exec_driver_sql("BEGIN IMMEDIATE")
    assert classify(busy.value) is Failure.BUSY
    assert describe(busy.value) == "OperationalError SQLITE_BUSY"


@pytest.mark.stack("sqlite")
def test_quirk_a_read_that_becomes_a_write_fails_at_once_after_a_foreign_commit(
    connect: Callable[..., Connection],
) -> None:
    """LITE-1: it ignores the busy timeout, so our transactions begin as writers."""
    reader, writer = connect(isolation_level=None, timeout=30.0), connect(isolation_level=None)
    reader.exec_driver_sql("BEGIN")
    reader.exec_driver_sql("SELECT * FROM moves")
    writer.exec_driver_sql("INSERT INTO moves VALUES (1, 1)")
    with pytest.raises(OperationalError) as busy:
        reader.exec_driver_sql("INSERT INTO moves VALUES (2, 1)")
    assert describe(busy.value) == "OperationalError SQLITE_BUSY_SNAPSHOT"
    assert classify(busy.value) is Failure.BUSY


@pytest.mark.stack("sqlite")
@pytest.mark.parametrize(
    "statement",
    ["INSERT INTO moves VALUES (1, 1)", "SELECT * FROM absent", "SELEC"],
)
def test_sqlite_what_is_wrong_stays_wrong(connect: Callable[..., Connection], statement: str) -> None:
    connection = connect()
    connection.exec_driver_sql("INSERT INTO moves VALUES (1, 1)")
    with pytest.raises(DBAPIError) as wrong:
        connection.exec_driver_sql(statement)
    assert classify(wrong.value) is Failure.FATAL
