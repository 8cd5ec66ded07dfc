"""What MySQL and MariaDB really do where our statements lean on it; a test that fails means that a rule may change."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest
from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Engine,
    Integer,
    MetaData,
    Table,
    Text,
    create_engine,
    insert,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine

from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy.failures import code
from saga.storage.sqlalchemy.mysqllink import BoundedThreadConnection, QuietCursor
from saga.storage.sqlalchemy.types import instant, key, name, uuid
from tests.storage.conftest import MYSQL, Opener

STACKS = MYSQL

CANARY = "canary-4711"


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """A plain engine, at the server's own isolation level, with two rows in `moves`."""
    engine = create_engine(make_url(url).set(drivername="mysql+pymysql"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE moves (id int PRIMARY KEY, amount int, owner int)"))
        connection.execute(text("INSERT INTO moves VALUES (1, 0, 7), (2, 0, 7)"))
    yield engine
    engine.dispose()


def amounts(connection: Connection) -> list[int | None]:
    return list(connection.execute(text("SELECT amount FROM moves ORDER BY id")).scalars())


def test_quirk_a_lock_that_is_waited_for_in_vain_leaves_the_transaction_open(engine: Engine) -> None:
    """MDB-1: its earlier insert is still there to be committed, so any error ends in ROLLBACK."""
    with engine.connect() as holder, engine.connect() as late:
        holder.execute(text("UPDATE moves SET amount = 1 WHERE id = 1"))
        late.execute(text("SET innodb_lock_wait_timeout = 1"))
        late.execute(text("INSERT INTO moves VALUES (3, 3, 7)"))
        with pytest.raises(DBAPIError) as refused:
            late.execute(text("UPDATE moves SET amount = 2 WHERE id = 1"))
        assert code(refused.value) == 1205
        late.commit()
        holder.rollback()
        assert amounts(holder) == [0, 0, 3]


def test_quirk_assignments_are_made_from_left_to_right_with_new_values(engine: Engine) -> None:
    """MDB-2: so a lease's epoch is assigned before its owner."""
    with engine.begin() as connection:
        connection.execute(text("UPDATE moves SET owner = 8, amount = amount + (owner <> 8) WHERE id = 1"))
        connection.execute(text("UPDATE moves SET amount = amount + (owner <> 8), owner = 8 WHERE id = 2"))
        assert amounts(connection) == [0, 1]


def test_quirk_no_update_returns_rows(engine: Engine) -> None:
    """MDB-2: neither kind does."""
    with engine.connect() as connection, pytest.raises(ProgrammingError) as wrong:
        connection.execute(text("UPDATE moves SET amount = 1 RETURNING id"))
    assert code(wrong.value) == 1064


def test_quirk_the_default_isolation_loses_an_update(engine: Engine) -> None:
    """MDB-3: so it is set, and every write checks a version."""
    with engine.connect() as one, engine.connect() as other:
        seen = [amounts(each)[0] for each in (one, other)]
        for each, amount in zip((one, other), seen, strict=True):
            assert amount is not None
            each.execute(text("UPDATE moves SET amount = :amount WHERE id = 1"), {"amount": amount + 1})
            each.commit()
        assert amounts(one)[0] == 1


@pytest.mark.parametrize(
    ("level", "ending", "seen"),
    [
        ("REPEATABLE READ", "", [1, 2]),
        ("REPEATABLE READ", " LOCK IN SHARE MODE", [1, 2, 3]),
        ("READ COMMITTED", "", [1, 2, 3]),
    ],
)
def test_quirk_a_snapshot_does_not_show_the_row_that_kept_an_insert_from_inserting(
    engine: Engine, level: str, ending: str, seen: list[int]
) -> None:
    """MDB-4: a locking read does, and so does any read at READ COMMITTED."""
    with engine.connect().execution_options(isolation_level=level) as late, engine.connect() as early:
        amounts(late)
        early.execute(text("INSERT INTO moves VALUES (3, 0, 7)"))
        early.commit()
        assert late.execute(text("INSERT IGNORE INTO moves VALUES (3, 9, 9)")).rowcount == 0
        assert list(late.execute(text(f"SELECT id FROM moves ORDER BY id{ending}")).scalars()) == seen


def test_quirk_an_insert_that_ignores_cuts_off_what_is_too_long(engine: Engine) -> None:
    """MDB-5: so names are checked for their lengths before."""
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE names (name varchar(3))"))
        connection.execute(text("INSERT IGNORE INTO names VALUES ('abcdef')"))
        assert connection.execute(text("SELECT name FROM names")).scalar_one() == "abc"


def test_quirk_row_counts_are_those_of_rows_found_and_of_rows_inserted(engine: Engine) -> None:
    """MDB-6: a version check and an INSERT IGNORE are judged by them, ON DUPLICATE KEY cannot be."""

    def count(statement: str) -> int:
        with engine.begin() as connection:
            return connection.execute(text(statement)).rowcount

    assert count("UPDATE moves SET amount = amount") == 2
    assert count("INSERT IGNORE INTO moves VALUES (2, 1, 1), (3, 1, 1), (4, 1, 1)") == 2
    assert count("INSERT INTO moves VALUES (5, 1, 1) ON DUPLICATE KEY UPDATE owner = 1") == 1
    assert count("INSERT INTO moves VALUES (5, 1, 1) ON DUPLICATE KEY UPDATE owner = 1") == 1


def test_our_ids_differ_by_case_and_blanks_our_names_by_case_and_plain_texts_do_not(engine: Engine) -> None:
    """MDB-7."""
    ours = [Column("id", key()), Column("name", name())]
    table = Table("named", MetaData(), *ours, Column("plain", Text))
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE named MODIFY plain varchar(20) COLLATE utf8mb4_general_ci"))
        connection.execute(insert(table).values(id="order-a", name="order-a", plain="order-a"))
        for other, expected in (("Order-A", [0, 0, 1]), ("order-á", [0, 0, 1]), ("order-a ", [0, 1, 1])):
            found = [select(table).where(column == other) for column in table.c]
            assert [len(connection.execute(query).all()) for query in found] == expected


def test_an_aware_datetime_loses_its_offset_and_ours_comes_back_as_the_same_instant(engine: Engine) -> None:
    """MDB-8: the plain type drops the fractions, too."""
    table = Table("at", MetaData(), Column("plain", DateTime(timezone=True)), Column("ours", instant()))
    table.create(engine)
    noon = datetime(2031, 5, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    with engine.begin() as connection:
        connection.execute(insert(table).values(plain=noon, ours=noon))
        plain, ours = connection.execute(select(table.c.plain, table.c.ours)).one()
    assert plain == noon.replace(tzinfo=None, microsecond=0)
    assert (ours, ours.tzinfo) == (noon.astimezone(UTC), UTC)


def test_our_ids_are_ordered_by_their_bytes(engine: Engine) -> None:
    """So that rows are locked and paged through in the order in which Python sorts them."""
    table = Table("ids", MetaData(), Column("id", uuid(), primary_key=True))
    table.create(engine)
    ids = [UUID(int=(number * 0x9E3779B97F4A7C15F39CC0605CEDC835) % 2**128) for number in range(1, 30)]
    with engine.begin() as connection:
        connection.execute(insert(table), [{"id": each} for each in ids])
        assert connection.execute(select(table.c.id).order_by(table.c.id)).scalars().all() == sorted(ids)


def test_quirk_ddl_commits_what_was_written_before(engine: Engine) -> None:
    """MDB-9: so each step of a migration can be run again."""
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO moves VALUES (3, 0, 7)"))
        connection.execute(text("CREATE TABLE more (id int)"))
        connection.rollback()
        assert len(amounts(connection)) == 3


def test_quirk_the_number_that_is_told_is_that_of_the_first_row(engine: Engine) -> None:
    """From there on the rows of a batch are looked up by their own ids."""
    table = Table("numbered", MetaData(), Column("id", Integer, primary_key=True), Column("amount", Integer))
    table.create(engine)
    with engine.begin() as connection:
        for first in (1, 4):
            done = connection.execute(insert(table), [{"amount": number} for number in range(3)])
            assert (done.rowcount, done.lastrowid) == (3, first)


def test_quirk_a_delete_waits_for_what_its_subquery_skips(engine: Engine) -> None:
    """So confirmed rows are selected and deleted by two statements."""
    sought = "SELECT id FROM (SELECT id FROM moves FOR UPDATE SKIP LOCKED) AS free"
    with engine.connect() as holder, engine.connect() as late:
        holder.execute(text("SELECT * FROM moves WHERE id = 1 FOR UPDATE"))
        late.execute(text("SET innodb_lock_wait_timeout = 1"))
        found = late.execute(text("SELECT id FROM moves FOR UPDATE SKIP LOCKED")).scalars().all()
        assert found == [2]
        with pytest.raises(DBAPIError) as refused:
            late.execute(text(f"DELETE FROM moves WHERE id IN ({sought})"))
        assert code(refused.value) == 1205


@pytest.mark.parametrize("quiet", [False, True])
async def test_quirk_asyncmy_logs_warnings_with_values_of_rows_and_ours_does_not(
    url: str, engine: Engine, caplog: pytest.LogCaptureFixture, quiet: bool
) -> None:
    """SQL-9."""
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE cards (number varchar(20) PRIMARY KEY)"))
    arguments = {"cursor_cls": QuietCursor} if quiet else {}
    through = create_async_engine(url, hide_parameters=True, connect_args=arguments)
    logging.getLogger("asyncmy").filters.clear()  # those of a Database that another test has made
    with caplog.at_level(logging.WARNING, logger="asyncmy"):
        for _ in range(2):
            async with through.begin() as asynchronous:
                statement = text("INSERT IGNORE INTO cards VALUES (:number)")
                await asynchronous.execute(statement, {"number": CANARY})
    await through.dispose()
    assert (CANARY in caplog.text) is not quiet


async def test_a_database_whose_default_is_our_collation_is_no_different(
    url: str, engine: Engine, opened: Opener
) -> None:
    """Reflection tells a column's collation only where it is not the table's."""
    with engine.begin() as connection:
        connection.execute(text("ALTER DATABASE CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"))
    database = opened(url)
    await database.run(schema.upgrade)
    assert await database.run(schema.check) == []


async def test_two_upgrades_at_once_wait_for_a_lock_of_the_connection(url: str, opened: Opener) -> None:
    """MDB-9: a lock of the transaction would end with the first CREATE TABLE."""
    await asyncio.gather(*(opened(url).run(schema.upgrade) for _ in range(2)))
    free = text("SELECT IS_FREE_LOCK(CONCAT('saga-', SHA1(DATABASE())))")
    assert await opened(url).run(lambda connection: connection.scalar(free)) == 1


def test_a_thread_whose_link_checks_nobody_reads_no_authorities(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyMySQL reads all of the system's before each connection that says nothing of TLS, for 70 ms."""

    class Read(Exception):
        pass

    def read(*_: object, **__: object) -> None:
        raise Read

    monkeypatch.setattr(ssl, "create_default_context", read)
    link = BoundedThreadConnection(defer_connect=True)
    assert link.ctx.verify_mode is ssl.CERT_NONE
    with pytest.raises(Read):
        BoundedThreadConnection(defer_connect=True, ssl_ca="ca.pem")
