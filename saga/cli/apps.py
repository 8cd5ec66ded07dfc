"""How a command reaches the app: `--app MODULE:APP`, its database, and no broker unless the command sends by itself."""

from __future__ import annotations

import asyncio
import getpass
import socket
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import typer

from saga.cli.errors import told
from saga.cli.processes import load
from saga.client import Client

T = TypeVar("T")

AppOption = Annotated[
    str,
    typer.Option(
        "--app",
        envvar="SAGA_APP",
        metavar="MODULE:APP",
        help="the app with the sagas, e.g. shop.sagas:app",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]
ActorOption = Annotated[
    str,
    typer.Option(
        "--actor", envvar="SAGA_ACTOR", help="who orders it [default: user@host]", show_default=False
    ),
]
SagaOption = Annotated[str | None, typer.Option("--saga", help="name of the saga", show_default=False)]


def run(place: str, work: Callable[[Client], Awaitable[T]]) -> T:
    """Load the app, run `work` with its client, and end the program with an error of ours."""

    async def within(app: Any) -> T:
        async with app.as_operator() as client:
            return await work(client)

    with told():
        app = load(place)
        if not callable(getattr(app, "as_operator", None)):
            raise typer.BadParameter(f"{place!r} is not an app", param_hint="--app")
        return asyncio.run(within(app))


def who(actor: str) -> str:
    """Return who orders something: as given, else the user of this process at its host."""
    return actor or f"{getpass.getuser()}@{socket.gethostname()}"


def confirm(question: str, yes: bool) -> None:
    """Ask before what cannot be taken back; without a terminal `--yes` is needed."""
    if not yes:
        typer.confirm(question, err=True, abort=True)
