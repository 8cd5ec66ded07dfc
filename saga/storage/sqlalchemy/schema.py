"""Keeps the database and this release in step: upgrade, printable SQL, what differs, and what the server must be.

Works on a plain `Connection` inside the caller's transaction, so that DDL commits or vanishes as a whole where the
database can do that. Start-up calls `prepare`; only the embedded database is ever upgraded without being asked.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    Column,
    Connection,
    MetaData,
    String,
    Table,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.schema import CreateSchema

from saga.errors import ConfigurationError, SchemaMismatch
from saga.failpoints import failpoint
from saga.storage.sqlalchemy import shapes
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.failures import TryAgain
from saga.storage.sqlalchemy.serverchecks import check_server
from saga.storage.sqlalchemy.tables import metadata
from saga.storage.sqlalchemy.types import MYSQL

log: Final[logging.Logger] = logging.getLogger("saga.storage")

VERSION_TABLE: Final = "saga_alembic_version"
DIALECTS: Final = ("mariadb", "mysql", "postgresql", "sqlite")
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
    with _TURNS[connection.dialect.name](connection):
        if connection.dialect.name == "postgresql":
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
    """Return the SQL that makes an empty database ready, for psql, mysql, mariadb or sqlite3.

    Raises ConfigurationError for a dialect that we do not have.
    """
    if dialect not in DIALECTS:
        raise ConfigurationError(f"There is no SQL for {dialect!r}; use one of {', '.join(DIALECTS)}.")
    buffer = io.StringIO()
    mysql = dialect in MYSQL  # one text for both; every statement of it is a transaction (MDB-9)
    context = MigrationContext.configure(
        dialect_name="mysql" if mysql else dialect,
        opts=_options(as_sql=True, output_buffer=buffer, transactional_ddl=not mysql),
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
    actual, expected = shapes.actual(connection, where), shapes.expected(connection.dialect)
    missing = {part.table for part in expected if part.kind == shapes.TABLE and part not in actual}
    return [
        *_version_differences(connection, where),
        *(
            line
            for part, shape in expected.items()
            if part.kind == shapes.TABLE or part.table not in missing
            for line in _difference(part, shape, actual.get(part))
        ),
        *(
            f"{part} must be filled and this release does not"
            for part in actual
            if part.kind == shapes.FOREIGN
        ),
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


def _turn_on_postgresql(connection: Connection) -> AbstractContextManager[None]:
    connection.execute(select(func.pg_advisory_xact_lock(UPGRADE_LOCK)))
    return nullcontext()


@contextmanager
def _turn_on_mysql(connection: Connection) -> Iterator[None]:
    """Hold a lock of the connection's, for DDL ends a transaction and its locks (MDB-9)."""
    if connection.scalar(_GET_LOCK) != 1:
        raise TryAgain
    try:
        yield
        connection.exec_driver_sql("COMMIT")  # the version, too, before the next one looks at it
    except BaseException:
        with suppress(SQLAlchemyError):  # a connection that is lost has lost the lock
            connection.execute(_RELEASE_LOCK)
        raise
    connection.execute(_RELEASE_LOCK)


def _turn_on_sqlite(_connection: Connection) -> AbstractContextManager[None]:
    return nullcontext()  # there is one writer


_TURNS: Final[dict[str, Callable[[Connection], AbstractContextManager[None]]]] = {
    "mysql": _turn_on_mysql,
    "postgresql": _turn_on_postgresql,
    "sqlite": _turn_on_sqlite,
}
# locks are named for the whole server, in no more than 64 characters
_GET_LOCK: Final = text("SELECT GET_LOCK(CONCAT('saga-', SHA1(DATABASE())), 3)")
_RELEASE_LOCK: Final = text("DO RELEASE_LOCK(CONCAT('saga-', SHA1(DATABASE())))")


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


def _difference(part: shapes.Part, expected: str, actual: str | None) -> Iterator[str]:
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
