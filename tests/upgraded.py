"""Databases with our tables in them and no rows: one is upgraded per run and stack, others are copies of it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from devservices import MySqlServer, Postgres
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy.database import Database
from tests.stacks import SERVERS, in_file


@contextmanager
def upgraded(stack: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Give the address of a database that is this test's alone."""
    if in_file(stack):
        yield f"sqlite+aiosqlite:///{_copied_file(request)}"
        return
    server: Postgres | MySqlServer = request.getfixturevalue(SERVERS[stack])
    with server.lent("saga-upgraded", upgrade) as url:
        yield url


def _copied_file(request: pytest.FixtureRequest) -> Path:
    template: Path = request.getfixturevalue("tmp_path_factory").getbasetemp() / "upgraded.db"
    if not template.exists():
        upgrade(f"sqlite+aiosqlite:///{template}")
    copy: Path = request.getfixturevalue("tmp_path") / "saga.db"
    shutil.copy(template, copy)
    return copy


def upgrade(url: str) -> None:
    """Make our tables."""
    with ThreadPoolExecutor(max_workers=1) as thread:  # whether or not a loop runs in this one
        thread.submit(asyncio.run, _upgrade_async(url)).result()


async def _upgrade_async(url: str) -> None:
    spawner = TaskSpawner()
    database = Database(url, clock=SystemClock(), ids=SystemIds(), spawner=spawner)
    await database.run(schema.upgrade)
    await database.dispose()
    await spawner.close()
