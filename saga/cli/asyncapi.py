"""`saga asyncapi`: the app's commands and replies as an AsyncAPI document, for participants in other languages."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from saga import asyncapi
from saga.cli.errors import told
from saga.cli.processes import load


def write(
    app: Annotated[str, typer.Argument(metavar="MODULE:APP", help="the app with the sagas and participants")],
    title: Annotated[str, typer.Option("--title", help="name of the document")] = "saga",
    version: Annotated[str, typer.Option("--version", help="version of the document")] = "1.0.0",
) -> None:
    """Print the AsyncAPI 3.0 document of an app's activities; nothing is connected."""
    with told():
        loaded = load(app)
        typer.echo(
            json.dumps(asyncapi.document(title, version, loaded.namespace, loaded.activities()), indent=2)
        )
