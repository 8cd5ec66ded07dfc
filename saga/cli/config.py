"""`saga config`: every setting with its value, where that comes from, and its default; secrets are masked."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from saga import settings
from saga.cli.errors import told
from saga.cli.processes import load


def config(
    app: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:APP]", help="count what this app says in code too", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON array")] = False,
) -> None:
    """List the settings as this environment has them; exit with 2 if one does not fit."""
    with told():
        known = settings.load() if app is None else load(app).settings
        rows = settings.rows(known)
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=2))
        return
    lines = [("setting", "value", "origin", "default")]
    lines += [(row.name, _text(row.value), row.origin, _text(row.default)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip())


def _text(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
