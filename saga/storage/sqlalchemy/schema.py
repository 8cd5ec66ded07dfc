"""Keeps the database and this release in step: upgrade, printable SQL, what differs, and what the server must be.

Works on a plain `Connection` inside the caller's transaction, so that DDL commits or vanishes as a whole where the
database can do that. Start-up calls `prepare`; only the embedded database is ever upgraded without being asked.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    CheckConstraint,
    Column,
    Connection,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.schema import CreateSchema

from saga.clock import Clock
from saga.errors import ConfigurationError, SchemaMismatch, UnsupportedDatabase
from saga.failpoints import failpoint
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.tables import metadata

log: Final[logging.Logger] = logging.getLogger("saga.storage")

VERSION_TABLE: Final = "saga_alembic_version"
DIALECTS: Final = ("postgresql", "sqlite")
POSTGRESQL_MIN: Final = 14
SQLITE_MIN: Final = (3, 35)
CLOCK_OFFSET_MAX: Final = timedelta(seconds=1)
UPGRADE_LOCK: Final = 0x73616761  # "saga": two upgrades of one PostgreSQL database take turns
_HEAD: Final = "saga@head"


async def prepare(database: Database) -> None:
    """Check server and schema before anything else starts; an embedded database is upgraded first.

    Errors: UnsupportedDatabase, SchemaMismatch (run the command in its text), StorageUnavailable (try again).
    """
    embedded = database.dialect == "sqlite"

    def look(connection: Connection) -> None:
        check_server(connection, database.clock)
        if embedded:
            upgrade(connection)
        validate(connection, url=database.url, schema=database.schema)

    await database.run(look)


def upgrade(connection: Connection, *, schema: str | None = None) -> None:
    """Bring the database to this release inside the caller's transaction; does nothing if it is there already.

    `schema` (PostgreSQL) is made if it is missing. Two upgrades at once take turns.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(UPGRADE_LOCK)))
        _enter(connection, schema)
    context = MigrationContext.configure(
        connection, opts=_options(version_table_schema=_current_schema(connection))
    )
    context.run_migrations(op=Operations(context))
    failpoint("M2")  # tables made, nothing committed: DDL vanishes as a whole where the database can do that


def restore_indexes(connection: Connection) -> list[str]:
    """Make the indexes that somebody dropped, and return their names. On a large table do it by hand, CONCURRENTLY."""
    found = inspect(connection).get_multi_indexes(
        schema=_current_schema(connection), filter_names=list(metadata.tables)
    )
    present = {index["name"] for indexes in found.values() for index in indexes}
    missing = [
        index
        for table in metadata.sorted_tables
        for index in sorted(table.indexes, key=lambda index: str(index.name))
        if str(index.name) not in present
    ]
    for index in missing:
        index.create(connection)
    return [str(index.name) for index in missing]


def printable_sql(dialect: str, *, schema: str | None = None) -> str:
    """Return the SQL that makes an empty database ready, one transaction, for psql or sqlite3.

    Raises ConfigurationError for a dialect that we do not have.
    """
    if dialect not in DIALECTS:
        raise ConfigurationError(f"There is no SQL for {dialect!r}; use one of {', '.join(DIALECTS)}.")
    buffer = io.StringIO()
    context = MigrationContext.configure(
        dialect_name=dialect,
        opts=_options(as_sql=True, output_buffer=buffer, transactional_ddl=True),
    )
    with context.begin_transaction():
        if schema is not None and dialect == "postgresql":
            context.impl.static_output(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)};")
            context.impl.static_output(f"SET LOCAL search_path = {quoted(schema)};\n")
        context.run_migrations(op=Operations(context))
    return buffer.getvalue()


def check(connection: Connection, *, schema: str | None = None) -> list[str]:
    """Return what this release misses or finds different, one line each; empty if it can run here.

    Tables, columns, indexes and keys that are not ours are no difference, and neither is a later release's version:
    release N runs on schema N+1 (row G-09).
    """
    if connection.dialect.name == "postgresql" and schema is not None:
        connection.execute(select(func.set_config("search_path", quoted(schema), True)))
    where = _current_schema(connection)
    if connection.dialect.name == "postgresql" and where is None:
        return [f"schema {schema or 'of the search path'} is missing"]
    actual, expected = _actual(connection, where), _expected(connection.dialect)
    missing = {part.table for part in expected if part.kind == TABLE and part not in actual}
    return [
        *_version_differences(connection, where),
        *(
            line
            for part, shape in expected.items()
            if part.kind == TABLE or part.table not in missing
            for line in _difference(part, shape, actual.get(part))
        ),
        *(f"{part} must be filled and this release does not" for part in actual if part.kind == FOREIGN),
    ]


def validate(connection: Connection, *, url: URL | None = None, schema: str | None = None) -> None:
    """Raise SchemaMismatch, with the command to run, unless the schema is that of this release."""
    found = check(connection, schema=schema)
    if not found:
        return
    more = f" (and {len(found) - 1} more; `saga db check` lists them)" if len(found) > 1 else ""
    raise SchemaMismatch(f"The database does not fit: {found[0]}{more}. Run: {upgrade_command(url, schema)}")


def upgrade_command(url: URL | None, schema: str | None) -> str:
    """Return the command that upgrades this database, without the password."""
    if url is None:
        return "saga db upgrade"
    # the driver too, unless it is the one that is taken anyway: no other may be installed
    kind = url.drivername if url.get_driver_name() == "psycopg" else url.get_backend_name()
    bare = URL.create(kind, username=url.username, host=url.host, port=url.port, database=url.database)
    return f"saga db upgrade --database {bare.render_as_string()}" + (f" --schema {schema}" if schema else "")


def check_server(connection: Connection, clock: Clock) -> None:
    """Raise UnsupportedDatabase unless the server's version and settings are those that the promises rest on."""
    if connection.dialect.name == "sqlite":
        _check_sqlite(connection)
    else:
        _check_postgresql(connection, clock)


def quoted(identifier: str) -> str:
    """Quote an SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'


# --- migrations -------------------------------------------------------------------------------


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(Path(__file__).parent / "migrations"))


@cache
def _known() -> frozenset[str]:
    return frozenset(script.revision for script in _scripts().walk_revisions())


def _options(**more: Any) -> dict[str, Any]:
    scripts = _scripts()

    def steps(current: Sequence[str], _context: MigrationContext) -> Any:
        if not _known().issuperset(current):
            return []  # a later release was here; what it did is not ours to undo
        # Alembic's public way to this is `command.upgrade`, which installs one proxy per process; see migrations.
        return scripts._upgrade_revs(_HEAD, cast(Any, current))  # pyright: ignore[reportPrivateUsage]

    return {"fn": steps, "script": scripts, "version_table": VERSION_TABLE, **more}


def _enter(connection: Connection, schema: str | None) -> None:
    """Make `schema` if needed and let this transaction work in it."""
    if schema is None:
        return
    # CREATE SCHEMA IF NOT EXISTS asks for the right to create even when there is nothing to create
    if connection.scalar(select(func.to_regnamespace(quoted(schema)))) is None:
        connection.execute(CreateSchema(schema))
    connection.execute(select(func.set_config("search_path", quoted(schema), True)))


def _current_schema(connection: Connection) -> str | None:
    """Return where our tables are made and found: the first schema of the search path, never a later one."""
    if connection.dialect.name != "postgresql":
        return None
    found: str | None = connection.scalar(select(func.current_schema()))
    return found


# --- differences ------------------------------------------------------------------------------
# A schema as text: what a part is called and what it looks like. Two of them are compared part by part.

TABLE: Final = "table"
KEY: Final = "primary key of"
FOREIGN: Final = "column that is not ours,"


class _Part(NamedTuple):
    table: str
    kind: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name} on {self.table}" if self.name else f"{self.kind} {self.table}"


def _expected(dialect: Dialect) -> dict[_Part, str]:
    shapes: dict[_Part, str] = {}
    for table in metadata.sorted_tables:
        shapes[_Part(table.name, TABLE)] = ""
        for column in table.columns:
            shapes[_Part(table.name, "column", column.name)] = _column_shape(
                column.type.compile(dialect), bool(column.nullable), column.autoincrement is True
            )
        # SQLite numbers only a key that is declared with its column, which leaves it without a name
        nameless = dialect.name == "sqlite" and table.dialect_options["sqlite"]["autoincrement"]
        key = table.primary_key
        shapes[_Part(table.name, KEY)] = _key_shape(
            None if nameless else str(key.name), [column.name for column in key.columns]
        )
        for constraint in table.constraints:
            if isinstance(constraint, UniqueConstraint):
                part = _Part(table.name, "unique key", str(constraint.name))
                shapes[part] = ", ".join(column.name for column in constraint.columns)
            elif isinstance(constraint, CheckConstraint):
                part = _Part(table.name, "check", str(constraint.name))
                shapes[part] = _condition(constraint.sqltext)
        for index in table.indexes:
            shapes[_Part(table.name, "index", str(index.name))] = _index_shape(
                [column.name for column in index.columns],
                bool(index.unique),
                index.dialect_options[dialect.name]["where"],
            )
    return shapes


def _actual(connection: Connection, schema: str | None) -> dict[_Part, str]:
    inspector, shapes = inspect(connection), dict[_Part, str]()
    dialect, ours = connection.dialect, list(metadata.tables)
    numbered = _numbered_in_sqlite(connection) if dialect.name == "sqlite" else None
    for (_, table), columns in inspector.get_multi_columns(schema=schema, filter_names=ours).items():
        shapes[_Part(table, TABLE)] = ""
        for column in columns:
            name, nullable = column["name"], column["nullable"]
            counts = (
                bool(column.get("autoincrement")) if numbered is None else name == "id" and table in numbered
            )
            shapes[_Part(table, "column", name)] = _column_shape(
                column["type"].compile(dialect), nullable, counts
            )
            if name not in metadata.tables[table].columns and not nullable and column["default"] is None:
                shapes[_Part(table, FOREIGN, name)] = ""
    for (_, table), key in inspector.get_multi_pk_constraint(schema=schema, filter_names=ours).items():
        shapes[_Part(table, KEY)] = _key_shape(key["name"], key["constrained_columns"])
    for (_, table), uniques in inspector.get_multi_unique_constraints(
        schema=schema, filter_names=ours
    ).items():
        for unique in uniques:
            shapes[_Part(table, "unique key", str(unique["name"]))] = ", ".join(unique["column_names"])
    for (_, table), checks in inspector.get_multi_check_constraints(schema=schema, filter_names=ours).items():
        for each in checks:
            shapes[_Part(table, "check", str(each["name"]))] = _condition(each["sqltext"])
    for (_, table), indexes in inspector.get_multi_indexes(schema=schema, filter_names=ours).items():
        for index in indexes:
            shapes[_Part(table, "index", str(index["name"]))] = _index_shape(
                [str(name) for name in index["column_names"]],
                bool(index["unique"]),
                index.get("dialect_options", {}).get(f"{dialect.name}_where"),
            )
    return shapes


def _numbered_in_sqlite(connection: Connection) -> set[str]:
    """Return the tables whose numbers never come back (LITE-3); reflection does not tell."""
    rows = connection.execute(
        text("SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE '%AUTOINCREMENT%'")
    )
    return set(rows.scalars())


def _column_shape(type_: str, nullable: bool, numbered: bool) -> str:
    return type_ + ("" if nullable else " NOT NULL") + (" numbered" if numbered else "")


def _key_shape(name: str | None, columns: Sequence[str]) -> str:
    return f"({', '.join(columns)})" + (f" named {name}" if name else "")


def _index_shape(columns: Sequence[str], unique: bool, where: object) -> str:
    shape = ("unique " if unique else "") + ", ".join(columns)
    return shape if where is None else f"{shape} where {_condition(where)}"


def _condition(sql: object) -> str:
    """Return a condition without what a database adds when it stores one: blanks, brackets, quotes and case."""
    return re.sub(r'[\s()"]+', "", str(sql)).lower()


def _difference(part: _Part, expected: str, actual: str | None) -> Iterator[str]:
    if actual is None:
        yield f"{part} is missing"
    elif actual != expected:
        yield f"{part} is {actual}, not {expected}"


def _version_differences(connection: Connection, schema: str | None) -> Iterator[str]:
    if not inspect(connection).has_table(VERSION_TABLE, schema=schema):
        yield f"table {VERSION_TABLE} is missing"
        return
    table = Table(VERSION_TABLE, MetaData(), Column("version_num", String), schema=schema)
    # lint: allow namespace because the schema belongs to all
    found = sorted(connection.execute(select(table.c.version_num)).scalars())
    head = _scripts().get_current_head()
    if found == [head]:
        return
    if len(found) == 1 and found[0] not in _known():
        log.info("the schema is of a later release: %s", found[0])
        return
    yield f"version is {', '.join(found) or 'not recorded'}, not {head}"


# --- server -----------------------------------------------------------------------------------


def _check_sqlite(connection: Connection) -> None:
    version: str = connection.scalar(select(func.sqlite_version())) or ""
    if tuple(int(part) for part in version.split(".")[:2]) < SQLITE_MIN:
        raise UnsupportedDatabase(f"SQLite {version} is too old; 3.35 or later is needed.")
    for pragma, wanted, name in (
        ("PRAGMA journal_mode", "wal", "WAL"),
        ("PRAGMA synchronous", 2, "FULL"),
        ("PRAGMA foreign_keys", 1, "on"),
    ):
        found = connection.exec_driver_sql(pragma).scalar()
        if found != wanted:
            raise UnsupportedDatabase(
                f"SQLite: {pragma} is {found}, not {name}; is the file on a network disk?"
            )


def _check_postgresql(connection: Connection, clock: Clock) -> None:
    before = clock.now()
    row = connection.execute(
        select(
            func.clock_timestamp(),
            func.pg_is_in_recovery(),
            *(func.current_setting(name) for name in _SETTINGS),
        )
    ).one()
    after = clock.now()
    database_now, replica, version, number, isolation, read_only, durable, *timeouts = row
    if int(number) // 10_000 < POSTGRESQL_MIN:
        raise UnsupportedDatabase(f"PostgreSQL {version} is too old; {POSTGRESQL_MIN} or later is needed.")
    if replica or read_only == "on":
        raise UnsupportedDatabase(
            "This PostgreSQL is a replica or read-only; give the address of the primary."
        )
    if isolation != "read committed":
        raise UnsupportedDatabase(f"Transactions run at {isolation.upper()}, not READ COMMITTED.")
    for name, value in zip(_TIMEOUTS, timeouts, strict=True):
        if value == "0":
            raise UnsupportedDatabase(
                f"{name} did not reach the server; a connection pooler drops it: set it on the role."
            )
    if durable == "off":
        log.warning("synchronous_commit is off: a crash of the database may take back what was promised")
    offset = database_now - (before + (after - before) / 2)
    if abs(offset) > CLOCK_OFFSET_MAX:
        log.warning("the clock of this host is %+.1f s off the database's", -offset.total_seconds())


_TIMEOUTS: Final = ("statement_timeout", "lock_timeout")
_SETTINGS: Final = (
    "server_version",
    "server_version_num",
    "transaction_isolation",
    "transaction_read_only",
    "synchronous_commit",
    *_TIMEOUTS,
)
