"""The stacks on PostgreSQL: with a broker, or alone and the broker too; each process has a role and a database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.brokers import Broker, start_broker
from benchmarks.counters import Counts, StatementCounter
from benchmarks.stack import ROLES, Place, ServerStack, Stack
from devservices import Postgres, start_postgres


class PostgresStack(ServerStack):
    """Servers, of which each process of each system has a part to itself."""

    database = "postgresql"
    package = "asyncpg"

    def __init__(self, postgres: Postgres, broker: Broker | None, counter: StatementCounter) -> None:
        super().__init__(postgres, broker)
        self._postgres = postgres
        self._counter = counter

    async def _make_database(self, place: Place, role: str) -> str:
        name = self.name_of(place, role)
        _, password = await asyncio.to_thread(self._postgres.create_role, name)
        await asyncio.to_thread(self._postgres.create_database, name, owner=name)
        return self._postgres.database_url(name, role=name, password=password)

    async def _remove_databases(self, place: Place) -> None:
        for role in ROLES:
            await asyncio.to_thread(self._postgres.drop_database, self.name_of(place, role))
            await asyncio.to_thread(self._postgres.drop_role, self.name_of(place, role))

    async def count(self, place: Place) -> dict[str, Counts]:
        """Our coordinator's batches are single statements, without a COMMIT to be counted."""
        names = {self.name_of(place, role): role for role in place.urls}
        alone = [name for name, role in names.items() if (place.system, role) == ("saga", "coordinator")]
        counted = await self._counter.read(list(names), self_committing=alone)
        return {names[name]: counts for name, counts in counted.items()}

    async def settle(self) -> None:
        await self._counter.checkpoint()


@asynccontextmanager
async def start(*, broker: str | None) -> AsyncIterator[Stack]:
    """Start the servers, or take those given in the environment. Raises Unavailable."""
    with contextlib.ExitStack() as servers:
        postgres = servers.enter_context(await asyncio.to_thread(start_postgres))
        beside = None
        if broker is not None:
            beside = await asyncio.to_thread(start_broker, broker)
            servers.enter_context(beside.server)
        counter = await StatementCounter.connect(postgres.url)
        try:
            yield PostgresStack(postgres, beside, counter)
        finally:
            await counter.close()
