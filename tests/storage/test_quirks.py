"""What SQLite really does where our tables lean on it; a test that fails means that a rule of ours may change."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import BigInteger, Column, DateTime, MetaData, Table, Text, create_engine, insert, select
from sqlalchemy.engine import Engine
from sqlalchemy.exc import IntegrityError

from saga.storage.sqlalchemy import tables
from saga.storage.sqlalchemy.types import IDENTITY, instant

pytestmark = pytest.mark.stack("sqlite")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'quirks.db'}")
    yield engine
    engine.dispose()


def make(engine: Engine, *columns: Column[Any], **options: Any) -> Table:
    table: Table = Table("t", MetaData(), *columns, **options)
    table.metadata.create_all(engine)
    return table


@pytest.mark.parametrize(("autoincrement", "numbers"), [(False, [1, 2, 2]), (True, [1, 2, 3])])
def test_a_deleted_highest_id_comes_back_unless_autoincrement_is_asked_for(
    engine: Engine, autoincrement: bool, numbers: list[int]
) -> None:
    """LITE-3: an outbox id that came back would let a late deletion delete another row."""
    table = make(engine, Column("id", IDENTITY, primary_key=True), sqlite_autoincrement=autoincrement)
    given = []
    with engine.begin() as connection:
        for _ in range(3):
            (number,) = connection.execute(insert(table)).inserted_primary_key or (0,)
            given.append(number)
            if number == 2 and len(given) == 2:
                connection.execute(table.delete().where(table.c.id == number))
    assert given == numbers


def test_every_table_whose_numbers_leave_the_process_never_gives_one_twice() -> None:
    """LITE-3."""
    numbered = [
        table
        for table in tables.metadata.sorted_tables
        if "id" in table.c and table.c.id.autoincrement is True
    ]
    assert {table.name for table in numbered} >= {"saga_outbox", "saga_pending_reply"}
    for table in numbered:
        assert table.dialect_options["sqlite"]["autoincrement"], table.name


def test_a_big_integer_key_does_not_number_itself(engine: Engine) -> None:
    """LITE-4: so identity columns are INTEGER on SQLite."""
    table = make(engine, Column("id", BigInteger, primary_key=True), Column("x", Text))
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(insert(table).values(x="x"))


def test_an_aware_datetime_comes_back_naive_and_ours_comes_back_as_the_same_instant(engine: Engine) -> None:
    """LITE-4, MDB-8: the plain type drops the offset and with it two hours."""
    table = make(engine, Column("plain", DateTime(timezone=True)), Column("ours", instant()))
    noon = datetime(2031, 5, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    with engine.begin() as connection:
        connection.execute(insert(table).values(plain=noon, ours=noon))
        plain, ours = connection.execute(select(table.c.plain, table.c.ours)).one()
    assert (plain, plain.tzinfo) == (noon.replace(tzinfo=None), None)
    assert (ours, ours.tzinfo) == (noon.astimezone(UTC), UTC)


def test_an_instant_without_zone_is_refused(engine: Engine) -> None:
    table = make(engine, Column("ours", instant()))
    with pytest.raises(Exception, match="an instant without time zone"), engine.begin() as connection:
        connection.execute(insert(table).values(ours=datetime(2031, 5, 1)))  # noqa: DTZ001 - that is the point


def test_sqlite_starts_without_wal_and_foreign_keys_and_takes_text_for_a_number(tmp_path: Path) -> None:
    """LITE-6: so they are set on connect and checked at start, and values are validated before."""
    connection = sqlite3.connect(tmp_path / "plain.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert connection.execute("PRAGMA foreign_keys").fetchone() == (0,)
    connection.execute("CREATE TABLE t (n INTEGER)")
    connection.execute("INSERT INTO t VALUES ('abc')")
    assert connection.execute("SELECT n FROM t").fetchone() == ("abc",)
    connection.close()


def test_two_connections_to_memory_are_two_databases() -> None:
    """LITE-6: so an address without a file is refused."""
    one, two = sqlite3.connect(":memory:"), sqlite3.connect(":memory:")
    one.execute("CREATE TABLE t (n INTEGER)")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        two.execute("SELECT * FROM t")
    one.close()
    two.close()
