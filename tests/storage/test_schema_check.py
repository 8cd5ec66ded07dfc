"""Start refuses a database that does not fit, names the difference and the command; printed SQL makes one that fits."""

from __future__ import annotations

import logging
import re
import shutil
import sqlite3
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, make_url, text

from devservices import Postgres
from saga.clock import SystemClock
from saga.errors import ConfigurationError, SchemaMismatch, UnsupportedDatabase
from saga.storage.sqlalchemy import schema, serverchecks
from saga.storage.sqlalchemy.database import Database
from tests.storage.conftest import EVERY_DRIVER, MYSQL, URLS, Opener, drop_index

DRIVERS = EVERY_DRIVER


def run_by_hand(url: str, script: str, directory: Path) -> None:
    """Feed a script to the database's own program, or to the driver where the program is missing."""
    environment = None
    if url.startswith("sqlite"):
        path = url.partition(":///")[2]
        program = shutil.which("sqlite3")
        if program is None:
            with sqlite3.connect(path) as connection:
                connection.executescript(script)
            connection.close()
            return
        command = [program, "-bail", path]
    elif url.startswith(("mysql", "mariadb")):
        program = shutil.which("mariadb") or shutil.which("mysql")
        if program is None:
            pytest.skip("no mariadb and no mysql on this machine")
        at = make_url(url)
        environment = {"MYSQL_PWD": str(at.password)}
        where = [f"--host={at.host}", f"--port={at.port}", f"--user={at.username}", str(at.database)]
        command = [program, "--no-defaults", "--protocol=tcp", *where]
    else:
        program = shutil.which("psql")
        if program is None:
            pytest.skip("no psql on this machine")
        address = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        command = [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", address]
    subprocess.run(
        command,
        input=script,
        text=True,
        check=True,
        cwd=directory,
        env=environment,
        timeout=60,
        capture_output=True,
    )


@pytest.mark.feature("G-09", acceptance=True, scale=1.0)
async def test_printed_sql_run_by_hand_leaves_check_clean(
    stack: str, url: str, opened: Opener, tmp_path: Path
) -> None:
    dialect = {"postgres-rabbitmq": "postgresql"}.get(stack, stack)
    run_by_hand(url, schema.printable_sql(dialect), tmp_path)
    database = opened(url)
    assert await database.run(schema.check) == []
    await schema.prepare(database)
    await database.run(schema.upgrade)
    assert await database.run(schema.check) == []


@pytest.mark.feature("G-09", acceptance=True, scale=1.0)
async def test_start_refuses_after_an_index_was_dropped(stack: str, database: Database) -> None:
    await schema.prepare(database)
    await database.run(
        lambda connection: connection.execute(
            text(drop_index("ix_saga_outbox_part", "saga_outbox", connection))
        )
    )
    with pytest.raises(SchemaMismatch) as refused:
        await schema.prepare(database)
    assert "index ix_saga_outbox_part on saga_outbox is missing" in refused.value.text
    assert "saga db upgrade --database" in refused.value.text
    # and the command that it names helps
    assert await database.run(schema.restore_indexes) == ["ix_saga_outbox_part"]
    await schema.prepare(database)


@pytest.mark.feature("G-09")
@pytest.mark.stack("postgres-rabbitmq")
async def test_printed_sql_works_in_a_schema_of_its_own(
    postgres_url: str, opened: Opener, tmp_path: Path
) -> None:
    run_by_hand(postgres_url, schema.printable_sql("postgresql", schema='Odd "one"'), tmp_path)
    await schema.prepare(opened(postgres_url, schema='Odd "one"'))
    assert "table saga_outbox is missing" in await opened(postgres_url).run(schema.check)


def test_there_is_no_printed_sql_for_a_database_that_we_do_not_have() -> None:
    with pytest.raises(ConfigurationError, match="SG201"):
        schema.printable_sql("oracle")


@pytest.mark.feature("G-09")
async def test_an_embedded_database_is_upgraded_at_start_and_no_other(stack: str, empty: Database) -> None:
    if stack == "sqlite":
        await schema.prepare(empty)
        assert await empty.run(schema.check) == []
    else:
        with pytest.raises(SchemaMismatch):
            await schema.prepare(empty)
        assert "table saga_instance is missing" in await empty.run(schema.check)


DAMAGE: dict[str, tuple[str, str]] = {
    "table": ("DROP TABLE saga_lone_run", "table saga_lone_run is missing"),
    "column": (
        "ALTER TABLE saga_parked DROP COLUMN headers",
        "column headers on saga_parked is missing",
    ),
    "index columns": (
        "DROP INDEX ix_saga_outbox_part /* ON saga_outbox */; "
        "CREATE INDEX ix_saga_outbox_part ON saga_outbox (part, id)",
        "index ix_saga_outbox_part on saga_outbox is part, id, not namespace, part, id",
    ),
    "unique index": (
        "DROP INDEX ix_saga_parked_fingerprint /* ON saga_parked */;"
        "CREATE UNIQUE INDEX ix_saga_parked_fingerprint ON saga_parked (namespace, fingerprint)",
        "index ix_saga_parked_fingerprint on saga_parked is unique namespace, fingerprint, not"
        " namespace, fingerprint",
    ),
    "version table": ("DROP TABLE saga_alembic_version", "table saga_alembic_version is missing"),
    "version row": (
        "DELETE FROM saga_alembic_version",
        "version is not recorded, not 0004_inbox",
    ),
}
PARTIAL_INDEX = (
    "DROP INDEX ix_saga_instance_wakeup;"
    "CREATE INDEX ix_saga_instance_wakeup ON saga_instance (namespace, wakeup_at)",
    "index ix_saga_instance_wakeup on saga_instance is namespace, wakeup_at, not"
    " namespace, wakeup_at where wakeup_atisnotnull",
)
DAMAGE_ON_MYSQL: dict[str, tuple[str, str]] = {
    "type": (
        "ALTER TABLE saga_outbox MODIFY part int NOT NULL",
        "column part on saga_outbox is INTEGER NOT NULL, not SMALLINT NOT NULL",
    ),
    "fractions of a second": (
        "ALTER TABLE saga_outbox MODIFY created_at datetime NOT NULL",
        "column created_at on saga_outbox is DATETIME NOT NULL, not DATETIME(6) NOT NULL",
    ),
    "collation": (
        "ALTER TABLE saga_lease MODIFY name varchar(255) CHARACTER SET utf8mb4"
        " COLLATE utf8mb4_general_ci NOT NULL",
        "column name on saga_lease is VARCHAR(255) COLLATE utf8mb4_general_ci NOT NULL,"
        " not VARCHAR(255) COLLATE utf8mb4_bin NOT NULL",
    ),
    "null": (
        "ALTER TABLE saga_outbox MODIFY body mediumblob",
        "column body on saga_outbox is MEDIUMBLOB, not MEDIUMBLOB NOT NULL",
    ),
    "numbering": (
        "ALTER TABLE saga_outbox MODIFY id bigint NOT NULL",
        "column id on saga_outbox is BIGINT NOT NULL, not BIGINT NOT NULL numbered",
    ),
    "unique key": (
        "ALTER TABLE saga_audit DROP INDEX uq_saga_audit_namespace_request_id",
        "unique key uq_saga_audit_namespace_request_id on saga_audit is missing",
    ),
    "primary key": (
        "ALTER TABLE saga_lease DROP PRIMARY KEY",
        "primary key of saga_lease is (), not (namespace, name)",
    ),
    "foreign column": (
        "ALTER TABLE saga_lease ADD COLUMN colour varchar(9) NOT NULL",
        "column that is not ours, colour on saga_lease must be filled and this release does not",
    ),
}
DAMAGE_ON_POSTGRESQL: dict[str, tuple[str, str]] = {
    "type": (
        "ALTER TABLE saga_outbox ALTER part TYPE text",
        "column part on saga_outbox is TEXT NOT NULL, not SMALLINT NOT NULL",
    ),
    "null": (
        "ALTER TABLE saga_outbox ALTER body DROP NOT NULL",
        "column body on saga_outbox is BYTEA, not BYTEA NOT NULL",
    ),
    "numbering": (
        "ALTER TABLE saga_outbox ALTER id DROP DEFAULT",
        "column id on saga_outbox is BIGINT NOT NULL, not BIGINT NOT NULL numbered",
    ),
    "unique key": (
        "ALTER TABLE saga_audit DROP CONSTRAINT uq_saga_audit_namespace_request_id",
        "unique key uq_saga_audit_namespace_request_id on saga_audit is missing",
    ),
    "primary key": (
        "ALTER TABLE saga_lease DROP CONSTRAINT pk_saga_lease",
        "primary key of saga_lease is (), not (namespace, name) named pk_saga_lease",
    ),
    "check": (
        "ALTER TABLE saga_instance DROP CONSTRAINT ck_saga_instance_open_is_woken",
        "check ck_saga_instance_open_is_woken on saga_instance is missing",
    ),
    "foreign column": (
        "ALTER TABLE saga_lease ADD COLUMN colour text NOT NULL",
        "column that is not ours, colour on saga_lease must be filled and this release does not",
    ),
}


def execute(connection: Connection, statements: str) -> None:
    """Run them. What stands in a comment is for MySQL, whose indexes belong to their tables by name."""
    if connection.dialect.name == "mysql":
        statements = statements.replace("/*", "").replace("*/", "")
    for statement in statements.split(";"):
        connection.execute(text(statement))


@pytest.mark.feature("G-09")
@pytest.mark.parametrize("damage", DAMAGE)
async def test_each_kind_of_difference_is_named(stack: str, database: Database, damage: str) -> None:
    statements, line = DAMAGE[damage]
    await database.run(lambda connection: execute(connection, statements))
    assert await database.run(schema.check) == [line]


@pytest.mark.feature("G-09")
@pytest.mark.parametrize("url_of", ["sqlite_url", "postgres_url"])
async def test_a_partial_index_that_is_a_whole_one_is_named(
    request: pytest.FixtureRequest, opened: Opener, url_of: str
) -> None:
    statements, line = PARTIAL_INDEX
    database = opened(request.getfixturevalue(url_of))
    await database.run(schema.upgrade)
    await database.run(lambda connection: execute(connection, statements))
    assert await database.run(schema.check) == [line]


@pytest.mark.feature("G-09")
@pytest.mark.parametrize("kind", MYSQL)
@pytest.mark.parametrize("damage", DAMAGE_ON_MYSQL)
async def test_each_kind_of_difference_that_mysql_can_have_is_named(
    request: pytest.FixtureRequest, opened: Opener, kind: str, damage: str
) -> None:
    statements, line = DAMAGE_ON_MYSQL[damage]
    database = opened(request.getfixturevalue(URLS[kind]))
    await database.run(schema.upgrade)
    await database.run(lambda connection: execute(connection, statements))
    assert await database.run(schema.check) == [line]


@pytest.mark.feature("G-09")
@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.parametrize("damage", DAMAGE_ON_POSTGRESQL)
async def test_each_kind_of_difference_that_only_postgresql_can_have_is_named(
    postgres_url: str, opened: Opener, damage: str
) -> None:
    statements, line = DAMAGE_ON_POSTGRESQL[damage]
    database = opened(postgres_url)
    await database.run(schema.upgrade)
    await database.run(lambda connection: execute(connection, statements))
    assert await database.run(schema.check) == [line]


@pytest.mark.feature("G-09")
@pytest.mark.stack("sqlite")
async def test_a_table_whose_numbers_may_come_back_is_named(sqlite_url: str, opened: Opener) -> None:
    """LITE-3: without AUTOINCREMENT a deleted highest id is given out again."""
    database = opened(sqlite_url)
    await database.run(schema.upgrade)

    def rebuild(connection: Connection) -> None:
        sql = connection.scalar(text("SELECT sql FROM sqlite_master WHERE name = 'saga_audit'"))
        connection.execute(text("DROP TABLE saga_audit"))
        connection.exec_driver_sql(str(sql).replace(" AUTOINCREMENT", ""))

    await database.run(rebuild)
    assert await database.run(schema.check) == [
        "column id on saga_audit is INTEGER NOT NULL, not INTEGER NOT NULL numbered"
    ]


@pytest.mark.feature("G-09")
async def test_a_schema_of_a_later_release_that_only_added_is_accepted(
    stack: str, database: Database
) -> None:
    """Release N runs on schema N+1, or no rolling deployment could upgrade first."""

    def add(connection: Connection) -> None:
        connection.execute(text("UPDATE saga_alembic_version SET version_num = '0002_second_light'"))
        connection.execute(text("ALTER TABLE saga_instance ADD COLUMN priority integer NOT NULL DEFAULT 0"))
        connection.execute(text("CREATE TABLE saga_schedule (id integer PRIMARY KEY)"))
        connection.execute(text("CREATE INDEX ix_saga_instance_status ON saga_instance (status)"))

    await database.run(add)
    await schema.prepare(database)


@pytest.mark.parametrize("kind", ["postgresql", "postgresql+psycopg"])
def test_the_command_in_the_advice_holds_no_password_and_can_be_pasted(opened: Opener, kind: str) -> None:
    """With the driver that is surely there, where that is not the usual one."""
    database = opened(f"{kind}://accounts:s3cret@db.example:6432/shop?password=s3cret", schema="sagas")
    command = schema.upgrade_command(database.url, database.schema)
    assert command == f"saga db upgrade --database {kind}://accounts@db.example:6432/shop --schema sagas"


# --- the server -------------------------------------------------------------------------------


@pytest.mark.feature("G-08", acceptance=True, scale=1.0)
async def test_a_server_that_is_too_old_is_refused(
    stack: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest version that we take is moved above the one at hand, for want of such a server here."""
    monkeypatch.setattr(serverchecks, "POSTGRESQL_MIN", 99)
    for name in ("SQLITE_MIN", "MARIADB_MIN", "MYSQL_MIN"):
        monkeypatch.setattr(serverchecks, name, (99, 0))
    with pytest.raises(UnsupportedDatabase) as refused:
        await schema.prepare(database)
    assert re.search(r"(PostgreSQL|SQLite|MariaDB|MySQL) [\d.]+.* is too old", refused.value.text)


@pytest.mark.feature("G-08")
@pytest.mark.stack("postgres-rabbitmq")
async def test_a_databases_default_isolation_is_not_that_of_our_transactions_and_single_statements(
    postgres_server: Postgres, postgres_url: str, opened: Opener
) -> None:
    """PG-4: it is set by us, and verified."""
    name = postgres_url.rpartition("/")[2]
    postgres_server.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    database = opened(postgres_url)
    show = text("SHOW transaction_isolation")
    for single in (False, True):
        found = await database.run(lambda connection: connection.execute(show).scalar(), single=single)
        assert found == "read committed"
    ((default,),) = postgres_server.execute("SHOW transaction_isolation", database_url=postgres_url)[0]
    assert default == "serializable"
    await database.run(lambda connection: serverchecks.check_server(connection, database.clock))


@pytest.mark.feature("G-08")
@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "Transactions run at REPEATABLE READ"),
        ("SET TRANSACTION READ ONLY", "a replica or read-only"),
        ("SET LOCAL statement_timeout = 0", "statement_timeout did not reach the server"),
        ("SET LOCAL lock_timeout = 0", "lock_timeout did not reach the server"),
    ],
)
async def test_settings_that_break_a_promise_are_refused_on_postgresql(
    postgres_url: str, opened: Opener, setting: str, advice: str
) -> None:
    """PG-4, PG-7, SQL-6: what a pooler or a role's defaults made of our settings, as a transaction sees it."""
    database = opened(postgres_url)

    def look(connection: Connection) -> None:
        connection.execute(text(setting))
        serverchecks.check_server(connection, database.clock)

    with pytest.raises(UnsupportedDatabase) as refused:
        await database.run(look)
    assert advice in refused.value.text
    await database.run(lambda connection: serverchecks.check_server(connection, database.clock))


@pytest.mark.feature("G-08")
@pytest.mark.stack("sqlite")
@pytest.mark.parametrize(
    ("pragmas", "advice"),
    [
        ([], "journal_mode is delete, not WAL"),
        (["journal_mode=WAL", "synchronous=NORMAL"], "synchronous is 1, not FULL"),
        (["journal_mode=WAL", "synchronous=FULL"], "foreign_keys is 0, not on"),
    ],
)
def test_settings_that_break_a_promise_are_refused_on_sqlite(
    tmp_path: Path, pragmas: list[str], advice: str
) -> None:
    """LITE-6: what SQLite's own defaults are, and what a network disk makes of WAL."""
    engine = create_engine(f"sqlite:///{tmp_path / 'plain.db'}")
    with engine.connect() as connection:
        for pragma in pragmas:
            connection.exec_driver_sql(f"PRAGMA {pragma}")
        with pytest.raises(UnsupportedDatabase) as refused:
            serverchecks.check_server(connection, SystemClock())
    engine.dispose()
    assert advice in refused.value.text


class WrongClock(SystemClock):
    """A host whose wall clock is five seconds fast."""

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=5)


@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.parametrize(("clock", "lines"), [(WrongClock(), 1), (SystemClock(), 0)])
async def test_a_clock_that_is_off_is_logged_and_refuses_nothing(
    postgres_url: str,
    opened: Opener,
    caplog: pytest.LogCaptureFixture,
    clock: SystemClock,
    lines: int,
) -> None:
    """P10: deadlines are the database's time, so a host's own clock may be wrong; people should know."""
    database = opened(postgres_url, clock=clock)
    with caplog.at_level(logging.WARNING, logger="saga.storage"):
        await database.run(lambda connection: serverchecks.check_server(connection, clock))
    assert len(caplog.records) == lines
    assert all("+5.0 s off" in record.getMessage() for record in caplog.records)
