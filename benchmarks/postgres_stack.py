"""The stacks on PostgreSQL: with RabbitMQ, or alone and the broker too; each process has a role and a database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aio_pika

from benchmarks import naive
from benchmarks.counters import Counts, StatementCounter, server_pid
from benchmarks.stack import ROLES, Place, Stack, versions
from devservices import Postgres, RabbitMq, start_postgres, start_rabbitmq
from saga.messages import commands_channel, parking_channel, replies_channel


class PostgresStack(Stack):
    """Servers, of which each process of each system has a part to itself."""

    database = "postgresql"

    def __init__(self, postgres: Postgres, rabbitmq: RabbitMq | None, counter: StatementCounter) -> None:
        self._postgres = postgres
        self._rabbitmq = rabbitmq
        self._counter = counter
        servers = {"postgresql": postgres} | ({"rabbitmq": rabbitmq} if rabbitmq else {})
        self.broker = "rabbitmq" if rabbitmq else self.database
        self.description = ", ".join(server.description for server in servers.values())
        self.server_pids = {
            name: pid for name, server in servers.items() if (pid := server_pid(server.url)) is not None
        }
        self.versions = versions(
            ("asyncpg", "aio-pika"), {name: server.version for name, server in servers.items()}
        )

    def broker_url(self, place: Place) -> str:
        return self._rabbitmq.url if self._rabbitmq else super().broker_url(place)

    async def _make_database(self, place: Place, role: str) -> str:
        name = _database(place, role)
        _, password = await asyncio.to_thread(self._postgres.create_role, name)
        await asyncio.to_thread(self._postgres.create_database, name, owner=name)
        return self._postgres.database_url(name, role=name, password=password)

    async def _remove(self, place: Place) -> None:
        for role in ROLES:
            await asyncio.to_thread(self._postgres.drop_database, _database(place, role))
            await asyncio.to_thread(self._postgres.drop_role, _database(place, role))
        if self._rabbitmq is None:
            return
        connection = await aio_pika.connect(self._rabbitmq.url, timeout=10)
        async with connection, connection.channel() as channel:
            for queue in _queues(place.name):
                await channel.queue_delete(queue)

    async def count(self, place: Place) -> dict[str, Counts]:
        """Our coordinator's batches are single statements, without a COMMIT to be counted."""
        names = {_database(place, role): role for role in place.urls}
        alone = [name for name, role in names.items() if (place.system, role) == ("saga", "coordinator")]
        counted = await self._counter.read(list(names), self_committing=alone)
        return {names[name]: counts for name, counts in counted.items()}

    async def settle(self) -> None:
        await self._counter.checkpoint()


def _database(place: Place, role: str) -> str:
    """Return the name of a process's database and database role."""
    return f"{place.name}-{role}".replace("-", "_")


def _queues(name: str) -> list[str]:
    services = set(naive.SERVICES.values())
    ours = [replies_channel(name), *(commands_channel(name, service) for service in services)]
    theirs = [f"{name}.{queue}" for queue in ("replies", *services)]
    return [*ours, *map(parking_channel, ours), *theirs]


@asynccontextmanager
async def start(*, with_rabbitmq: bool) -> AsyncIterator[Stack]:
    """Start the servers, or take those given in the environment. Raises Unavailable."""
    with contextlib.ExitStack() as servers:
        postgres = servers.enter_context(await asyncio.to_thread(start_postgres))
        rabbitmq = None
        if with_rabbitmq:
            rabbitmq = servers.enter_context(await asyncio.to_thread(start_rabbitmq))
        counter = await StatementCounter.connect(postgres.url)
        try:
            yield PostgresStack(postgres, rabbitmq, counter)
        finally:
            await counter.close()
