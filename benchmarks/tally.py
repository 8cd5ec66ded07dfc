"""Counts the statements and commits of a process where no server counts them, in a file that others read meanwhile."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, event

from benchmarks.counters import Counts
from saga.storage.sqlalchemy.sqlite import WRITES

_FORMAT: Final = struct.Struct("=QQ")
_BESIDE: Final = ("BEGIN", "COMMIT", "ROLLBACK", "PRAGMA")


def count_into(path: str) -> None:
    """Count what all engines of this process do from now on: statements and commits, on SQLite those of writers."""
    with Path(path).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), _FORMAT.size)
    commits = statements = 0

    @event.listens_for(Engine, "after_cursor_execute")
    def executed(
        connection: Connection, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool
    ) -> None:
        nonlocal statements
        if statement == "BEGIN IMMEDIATE":  # the naive form's own
            connection.info[WRITES] = True
        elif not statement.startswith(_BESIDE):
            statements += len(parameters) if many else 1
            _FORMAT.pack_into(memory, 0, commits, statements)

    @event.listens_for(Engine, "commit")
    def committed(connection: Connection) -> None:
        nonlocal commits
        if connection.dialect.name != "sqlite" or connection.info.get(WRITES):
            commits += 1
            _FORMAT.pack_into(memory, 0, commits, statements)


def make(path: Path) -> str:
    """Make the file for a process that is started later, and return its path."""
    path.write_bytes(bytes(_FORMAT.size))
    return str(path)


def read(path: str) -> Counts:
    """Return what has been counted so far."""
    return Counts(*_FORMAT.unpack(Path(path).read_bytes()))
