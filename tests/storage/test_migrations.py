"""The migrations make exactly the tables of this release: again and again, side by side, in a schema of their own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from devservices import Postgres
from saga.storage.sqlalchemy import schema, tables
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.shapes import actual
from tests.storage.conftest import EVERY_DRIVER, Opener, drop_index

DRIVERS = EVERY_DRIVER

ROOT = Path(__file__).parents[2]


def shapes(connection: Connection) -> dict[object, str]:
    where = (
        connection.scalar(text("SELECT current_schema()"))
        if connection.dialect.name == "postgresql"
        else None
    )
    found = actual(connection, where)
    return {part: found[part] for part in found}


@pytest.mark.feature("G-09")
async def test_the_migrations_make_the_tables_of_tables_py(
    stack: str, database: Database, opened: Opener
) -> None:
    """Two judges: our own comparison with a database made from the metadata, and Alembic's with the metadata."""

    def alembic_finds(connection: Connection) -> list[object]:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "include_object": lambda _object, name, *_rest: name != schema.VERSION_TABLE,
            },
        )
        return list(compare_metadata(context, tables.metadata))

    def both(connection: Connection) -> tuple[dict[object, str], dict[object, str]]:
        migrated = shapes(connection)
        tables.metadata.drop_all(connection)
        tables.metadata.create_all(connection)
        return migrated, shapes(connection)

    assert await database.run(schema.check) == []
    assert await database.run(alembic_finds) == []
    migrated, created = await database.run(both)
    assert migrated == created
    assert len(migrated) > 100


@pytest.mark.feature("G-09")
async def test_an_upgrade_of_an_upgraded_database_changes_nothing(stack: str, database: Database) -> None:
    before = await database.run(shapes)
    await database.run(schema.upgrade)
    assert await database.run(shapes) == before


@pytest.mark.feature("G-09")
async def test_each_step_can_be_run_again(stack: str, database: Database) -> None:
    """MDB-9: where DDL is no part of a transaction, a step that broke off half way is simply run again."""

    def forget(connection: Connection) -> None:
        connection.execute(text("DROP TABLE saga_alembic_version"))
        connection.execute(text("DROP TABLE saga_lone_run"))
        connection.execute(text(drop_index("ix_saga_outbox_part", "saga_outbox", connection)))
        connection.execute(text("INSERT INTO saga_lease VALUES ('n', 'x', NULL, 7, '2030-01-01 00:00:00')"))

    await database.run(forget)
    await database.run(schema.upgrade)
    assert await database.run(schema.check) == []
    kept = await database.run(lambda connection: connection.scalar(text("SELECT epoch FROM saga_lease")))
    assert kept == 7


@pytest.mark.feature("G-09")
async def test_upgrades_at_the_same_moment_take_turns(stack: str, url: str, opened: Opener) -> None:
    """Several processes of a release start together, or two operators type the same command."""
    databases = [opened(url) for _ in range(4)]
    await asyncio.gather(*(each.run(schema.upgrade) for each in databases))
    assert await databases[0].run(schema.check) == []


async def test_two_databases_are_upgraded_on_one_loop_at_once(tmp_path: Path, opened: Opener) -> None:
    """Alembic's own commands keep their context in a variable of the process and would mix these up."""
    several = [opened(f"sqlite:///{tmp_path / str(number)}.db") for number in range(4)]
    await asyncio.gather(*(each.run(schema.upgrade) for each in several))
    for each in several:
        assert await each.run(schema.check) == []


@pytest.mark.feature("G-08")
@pytest.mark.stack("postgres-rabbitmq")
async def test_the_tables_can_live_in_a_schema_of_their_own(postgres_url: str, opened: Opener) -> None:
    """Also in one whose name needs quoting; nothing of ours is left elsewhere."""
    own = opened(postgres_url, schema='our "Own" tables')
    await own.run(lambda connection: schema.upgrade(connection, schema=own.schema))
    await schema.prepare(own)
    outside = opened(postgres_url)
    assert "table saga_instance is missing" in await outside.run(schema.check)
    assert await outside.run(lambda connection: schema.check(connection, schema=own.schema)) == []
    await own.run(lambda connection: connection.execute(text("SELECT * FROM saga_instance")))


@pytest.mark.stack("postgres-rabbitmq")
async def test_a_role_without_the_right_to_make_schemas_can_upgrade_in_its_own(
    postgres_server: Postgres, postgres_url: str, opened: Opener
) -> None:
    role, password = postgres_server.create_role()
    postgres_server.create_schema(postgres_url, "accounts", owner=role)
    name = postgres_url.rpartition("/")[2]
    database = opened(postgres_server.database_url(name, role=role, password=password), schema="accounts")
    await database.run(lambda connection: schema.upgrade(connection, schema="accounts"))
    await schema.prepare(database)


@pytest.mark.stack("postgres-rabbitmq")
async def test_tables_of_another_service_further_down_the_search_path_are_not_ours(
    postgres_server: Postgres, postgres_url: str, opened: Opener
) -> None:
    """Two services in one database: a participant must never find the coordinator's barrier and take it for its own."""
    await opened(postgres_url).run(schema.upgrade)
    postgres_server.create_schema(postgres_url, "accounts")
    database = opened(postgres_url)

    def upgrade_in_accounts(connection: Connection) -> list[str]:
        connection.execute(text("SET LOCAL search_path = accounts, public"))
        before = schema.check(connection)
        schema.upgrade(connection)
        assert schema.check(connection) == []
        return before

    assert "table saga_barrier is missing" in await database.run(upgrade_in_accounts)
    found = await database.run(
        lambda connection: connection.execute(
            text("SELECT schemaname FROM pg_tables WHERE tablename = 'saga_barrier' ORDER BY 1")
        ).scalars()
    )
    assert list(found) == ["accounts", "public"]


@pytest.mark.stack("postgres-rabbitmq")
async def test_storage_settings_fit_what_the_tables_are_for(postgres_url: str, opened: Opener) -> None:
    """pitfalls 6.2: queues are vacuumed by their number of dead rows; instances keep room for heap-only updates."""
    short_lived = {
        "autovacuum_vacuum_scale_factor=0",
        "autovacuum_vacuum_threshold=1000",
        "autovacuum_vacuum_cost_delay=0",
    }
    database = opened(postgres_url)
    await database.run(schema.upgrade)

    def options(connection: Connection) -> dict[str, set[str]]:
        rows = connection.execute(
            text("SELECT relname, reloptions FROM pg_class WHERE reloptions IS NOT NULL")
        )
        return {row.relname: set(row.reloptions) for row in rows if row.relname.startswith("saga_")}

    assert await database.run(options) == {
        "saga_outbox": short_lived,
        "saga_queue": short_lived,
        "saga_claim": short_lived,
        "saga_instance": {"fillfactor=75"},
    }


@pytest.mark.feature("G-09")
@pytest.mark.stack("sqlite", "postgres-rabbitmq")
def test_the_wheel_brings_the_migrations_along(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    steps = {path.name for path in Path(schema.__file__).parent.glob("migrations/versions/*.py")}
    assert {f"saga/storage/sqlalchemy/migrations/versions/{step}" for step in steps} <= set(names)
    assert len(steps) >= 1
