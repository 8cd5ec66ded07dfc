"""`saga broker check`: the operator's way to see whether queues and topics are what an app needs."""

from __future__ import annotations

import asyncio
from typing import Final

import typer

from saga.brokers.base import Severity
from saga.cli.apps import AppOption, JsonOption
from saga.cli.errors import FINDING, told
from saga.cli.output import document, say, visible
from saga.cli.processes import load

commands: Final = typer.Typer(help="The broker's queues and topics.", no_args_is_help=True)


@commands.callback()
def broker() -> None:
    """The broker's queues and topics."""


@commands.command()
def check(app: AppOption, as_json: JsonOption = False) -> None:
    """List what differs from what the app needs, and what to do; exit with 1 if production mode would refuse it."""
    with told():
        loaded = load(app)
        if not callable(getattr(loaded, "check_broker", None)):
            raise typer.BadParameter(f"{app!r} is not an app", param_hint="--app")
        found = asyncio.run(loaded.check_broker())
    channels = [channel.name for channel in loaded.channels()]
    if as_json:
        document({"channels": channels, "findings": found})
    else:
        for each in found:
            say(f"{each.severity.upper()}  {each.code}  {visible(each.channel)}")
            say(f"    {visible(each.text)}")
            say(f"    to do: {visible(each.fix)}")
        if not found:
            say(f"nothing to say of {', '.join(map(visible, channels))}")
    if any(each.severity is Severity.REFUSE for each in found):
        raise typer.Exit(FINDING)
