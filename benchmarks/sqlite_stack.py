"""The stack on SQLite: a file per process, of which the coordinator's is the broker too; each counts for itself."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks import tally
from benchmarks.counters import Counts
from benchmarks.stack import ROLES, Place, Stack, versions


class SqliteStack(Stack):
    """A folder, with one below it for each system of each cell."""

    database = broker = "sqlite"

    def __init__(self, folder: Path) -> None:
        self._folder = self.tallies = folder
        self.description = f"SQLite {sqlite3.sqlite_version} in {folder.parent}"
        self.server_pids: dict[str, int] = {}
        self.versions = versions(("aiosqlite",), {"sqlite": sqlite3.sqlite_version})

    async def _make_database(self, place: Place, role: str) -> str:
        folder = self._folder / place.name
        folder.mkdir(exist_ok=True)
        return f"sqlite+aiosqlite:///{folder / role}.db"

    async def _remove(self, place: Place) -> None:
        await asyncio.to_thread(shutil.rmtree, self._folder / place.name, ignore_errors=True)

    async def count(self, place: Place) -> dict[str, Counts]:
        return {role: tally.read(place.tallies[role]) for role in ROLES}

    async def settle(self) -> None:
        """Nothing is due here: each file has a log of its own, and whoever lets it grow writes it out."""


@asynccontextmanager
async def start() -> AsyncIterator[Stack]:
    """Make the folder where temporary files go: a disk that keeps what it was told to, or the figures mean nothing."""
    with tempfile.TemporaryDirectory(prefix="saga-bench-") as folder:
        yield SqliteStack(Path(folder))
