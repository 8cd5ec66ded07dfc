"""The program `saga`: its entry point, which needs the extra `cli` and says so if that is missing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Run the program with the arguments of this process."""
    try:
        program = build()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "click"):
            raise
        print("saga: the command line needs a package more: pip install 'saga[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    program(prog_name="saga")


def build() -> typer.Typer:
    """Return the program with all its commands."""
    import typer

    from saga.cli import asyncapi, broker, config, db, look, operate, processes
    from saga.cli.errors import Program
    from saga.engine.verbs import Verb

    # Tracebacks made pretty show local variables, and those hold payloads and passwords.
    program = typer.Typer(
        cls=Program,
        help="Sagas over message queues.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    program.command("start")(operate.start)
    program.command("list")(look.listing)
    program.command("show")(look.show)
    for verb in Verb:
        program.command(str(verb))(operate.command(verb))
    program.command("incidents")(look.incidents)
    program.add_typer(look.dead_letters, name="dead-letters")
    program.command("outbox")(look.outbox)
    program.add_typer(db.commands, name="db")
    program.add_typer(broker.commands, name="broker")
    program.command("config")(config.config)
    program.command("asyncapi")(asyncapi.write)
    program.command("coordinator")(processes.coordinator)
    program.command("participant")(processes.participant)
    return program
