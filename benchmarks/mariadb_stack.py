"""The stack on MariaDB with a broker beside it: each process has a user and a database.

The server counts statements, and processes their commits: what it calls so are those of each statement, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from benchmarks import tally
from benchmarks.brokers import Broker, start_broker
from benchmarks.counters import Counts
from benchmarks.stack import ROLES, Place, ServerStack, Stack
from devservices import MariaDb, start_mariadb

_COUNTED: Final = """
SELECT user, select_commands + update_commands
  FROM information_schema.user_statistics WHERE user IN ({users})
"""


class MariaDbStack(ServerStack):
    """Servers, of which each process of each system has a part to itself."""

    database = "mariadb"
    package = "asyncmy"

    def __init__(self, mariadb: MariaDb, broker: Broker, tallies: Path) -> None:
        super().__init__(mariadb, broker)
        self._mariadb, self.tallies = mariadb, tallies
        mariadb.execute("SET GLOBAL userstat = ON")

    async def _make_database(self, place: Place, role: str) -> str:
        name = self.name_of(place, role)
        await asyncio.to_thread(self._mariadb.create_database, name)
        password = await asyncio.to_thread(self._mariadb.create_user, name, name)
        return self._mariadb.database_url(name, user=name, password=password)

    async def _remove_databases(self, place: Place) -> None:
        for role in ROLES:
            await asyncio.to_thread(self._mariadb.drop_database, self.name_of(place, role))
            await asyncio.to_thread(self._mariadb.drop_user, self.name_of(place, role))

    async def count(self, place: Place) -> dict[str, Counts]:
        names = {self.name_of(place, role): role for role in place.urls}
        users = ", ".join(f"'{name}'" for name in names)
        (rows,) = await asyncio.to_thread(self._mariadb.execute, _COUNTED.format(users=users))
        found = {user: int(statements) for user, statements in rows}
        commits = {role: tally.read(path).commits for role, path in place.tallies.items()}
        return {role: Counts(commits[role], found.get(name, 0)) for name, role in names.items()}

    async def settle(self) -> None:
        """Nothing is due here: pages are written all the time."""


@asynccontextmanager
async def start(*, broker: str) -> AsyncIterator[Stack]:
    """Start the servers, or take those given in the environment. Raises Unavailable."""
    logging.getLogger("asyncmy").setLevel(logging.ERROR)  # it tells that keys have no names there
    with contextlib.ExitStack() as servers:
        mariadb = servers.enter_context(await asyncio.to_thread(start_mariadb))
        beside = await asyncio.to_thread(start_broker, broker)
        servers.enter_context(beside.server)
        folder = servers.enter_context(tempfile.TemporaryDirectory(prefix="saga-bench-"))
        yield MariaDbStack(mariadb, beside, Path(folder))
