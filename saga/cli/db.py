"""`saga db upgrade | sql | check | purge`: the operator's way to bring a database to this release, and to clear it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, TypeVar

import typer
from sqlalchemy import Connection

from saga import links, settings
from saga.cli.apps import AppOption, JsonOption, YesOption, confirm
from saga.cli.errors import FINDING, told
from saga.cli.output import document, say
from saga.cli.processes import load
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.errors import ConfigurationError
from saga.storage.sqlalchemy import schema as schemas
from saga.storage.sqlalchemy.database import Database, async_url

T = TypeVar("T")

commands: Final = typer.Typer(help="The database's schema.", no_args_is_help=True)

DatabaseOption = Annotated[
    str,
    typer.Option(
        "--database",
        envvar="SAGA_DATABASE",
        metavar="URL",
        help="postgresql://user:password@host/name, mysql://... or sqlite:///file",
        show_default=False,
    ),
]
SchemaOption = Annotated[
    str | None,
    typer.Option("--schema", envvar="SAGA_SCHEMA", help="schema of our tables, PostgreSQL only"),
]


@commands.command()
def upgrade(database: DatabaseOption, schema: SchemaOption = None, as_json: JsonOption = False) -> None:
    """Bring the database to this release, before its processes start; dropped indexes come back."""

    def bring_up(connection: Connection) -> list[str]:
        schemas.upgrade(connection, schema=schema)
        schemas.restore_indexes(connection)
        return schemas.check(connection, schema=schema)

    with told():
        _report(_run(database, schema, bring_up), "the database is up to date", as_json)


@commands.command()
def check(database: DatabaseOption, schema: SchemaOption = None, as_json: JsonOption = False) -> None:
    """List what differs from this release; exit with 1 if something does."""
    with told():
        _report(
            _run(database, schema, lambda connection: schemas.check(connection, schema=schema)),
            "the database fits this release",
            as_json,
        )


@commands.command()
def sql(
    dialect: Annotated[
        str | None,
        typer.Option("--dialect", help=f"one of {', '.join(schemas.DIALECTS)}", show_default=False),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            "--database",
            envvar="SAGA_DATABASE",
            metavar="URL",
            help="only its kind matters; nothing is connected",
            show_default=False,
        ),
    ] = None,
    schema: SchemaOption = None,
) -> None:
    """Print the SQL that makes an empty database ready, to be run by hand with psql, mysql or sqlite3."""
    with told():
        if dialect is None and database is None:
            raise ConfigurationError(
                "Say for which database: --dialect postgresql, mysql, mariadb or sqlite."
            )
        name = dialect or async_url(database or "").get_backend_name()
        typer.echo(schemas.printable_sql(name, schema=schema), nl=False)


@commands.command("purge")
def purge(app: AppOption, yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Purge now what is old enough, as the app's processes do every hour; what would go is shown first."""
    with told():
        loaded = load(app)
        if not callable(getattr(loaded, "purge", None)):
            raise typer.BadParameter(f"{app!r} is not an app", param_hint="--app")
        if not yes:
            planned = asyncio.run(_purge(loaded, preview=True))
            for line in _counted(planned):
                say(line, err=True)
            if any(planned.values()):
                confirm("purge these?", yes)
        gone = asyncio.run(_purge(loaded, preview=False))
        if as_json:
            document({"purged": gone})
            return
        for line in _counted(gone):
            say(line)


async def _purge(app: Any, *, preview: bool) -> Mapping[str, int]:
    await app.start(coordinator=False, participants=False, broker=False)
    try:
        gone: Mapping[str, int] = await app.purge(preview=preview)
        return gone
    finally:
        await app.stop()


def _counted(counts: Mapping[str, int]) -> list[str]:
    return [f"{name}: {count}" for name, count in counts.items()]


def _report(differences: list[str], good: str, as_json: bool) -> None:
    if as_json:
        document({"differences": differences})
    else:
        for line in differences or [good]:
            typer.echo(line)
    if differences:
        raise typer.Exit(FINDING)


def _run(url: str, schema: str | None, function: Callable[[Connection], T]) -> T:
    links.check([links.of_database(url)], production=settings.load().production)

    async def work() -> T:
        spawner = TaskSpawner()
        database = Database(
            url, clock=SystemClock(), ids=SystemIds(), spawner=spawner, pool_size=1, schema=schema
        )
        try:
            return await database.run(function)
        finally:
            await database.dispose()
            await spawner.close()

    return asyncio.run(work())
