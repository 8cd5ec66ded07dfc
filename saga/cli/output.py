"""What the program prints: columns for people, one JSON document with `--json`; control characters are made visible."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import typer

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


def plain(value: Any) -> Any:
    """Return a value as JSON types: named tuples and dataclasses by field, times as ISO 8601, bytes left out."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(item) for name, item in asdict(value).items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    return str(value) if isinstance(value, UUID) else value


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
