"""What the program prints: columns for people, one JSON document with `--json`; control characters are made visible."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final

import typer

from saga.views import plain

INERT: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode categories that could move a cursor, turn text around or break a line."""


def visible(text: object) -> str:
    """Return text that does nothing but be read: what a terminal would obey stands as its escape."""
    return "".join(
        character.encode("unicode_escape", "surrogatepass").decode()
        if unicodedata.category(character) in INERT
        else character
        for character in str(text)
    )


def say(text: str = "", *, err: bool = False) -> None:
    """Print one line that is ours; what comes from elsewhere in it went through `visible`."""
    typer.echo(text.rstrip(), err=err)


def document(value: Any) -> None:
    """Print a value as one JSON document: ASCII only, so that nothing in it can act."""
    typer.echo(json.dumps(plain(value), indent=2, ensure_ascii=True))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, err: bool = False) -> None:
    """Print rows as columns, as wide as their widest cell; nothing but a word if there are none."""
    cells = [[visible("-" if cell is None else cell) for cell in row] for row in rows]
    if not cells:
        say("none", err=err)
        return
    widths = [max(len(row[place]) for row in [list(head), *cells]) for place in range(len(head))]
    for row in [[name.upper() for name in head], *cells]:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), err=err)


def moment(at: datetime | None) -> str:
    """Return an instant for people, in UTC, to the second."""
    return "-" if at is None else at.strftime("%Y-%m-%d %H:%M:%S")
