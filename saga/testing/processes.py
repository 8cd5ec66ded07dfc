"""Processes inside one: each is an App with tasks of its own that can be killed, on a broker and a database that stay.

What a process has sent to the database goes on without it, what it had not acked is delivered again, and nothing of it
is given back in good order: as after SIGKILL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from saga.app import App
from saga.brokers.base import Broker, Capabilities
from saga.brokers.memory import MEMORY, MemoryBroker, MemoryQueues
from saga.clock import Clock, TaskSpawner
from saga.participant.shell import Shell
from saga.storage.sqlalchemy.database import Database
from saga.testing.compiled import compile_once
from saga.testing.faults import Faults
from saga.testing.faulty import FaultyBroker, Held
from saga.testing.inline import CONNECT, inline

if TYPE_CHECKING:
    from saga.settings import Settings

T = TypeVar("T")

DURABLE: Final[Capabilities] = replace(MEMORY, name="durable memory", durable=True)
"""The queues outlive each process, as those of a server would."""
NAMESPACE: Final = "default"
DYING_SECONDS_MAX: Final = 10.0


class MortalSpawner(TaskSpawner):
    """Tasks of one process: `kill` ends them where they stand, and nothing starts afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self._dead = False

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """The tasks that run."""
        return list(self._tasks)

    def spawn(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        task = super().spawn(coroutine, name=name)
        if self._dead:
            task.cancel()
        return task

    def kill(self) -> None:
        self._dead = True
        for task in self.tasks:
            task.cancel()


class StayingDatabase(Database):
    """A database whose connections outlive the processes that use them."""

    def _sqlite_driver(self) -> tuple[URL, dict[str, Any]]:
        return inline(self.url), CONNECT

    def _sqlite_engine(self, pool_size: int) -> AsyncEngine:
        engine = super()._sqlite_engine(pool_size)
        compile_once(engine)
        return engine

    async def dispose(self) -> None:
        """Keep the connections; `shut` closes them."""

    async def shut(self) -> None:
        """Close the connections."""
        await super().dispose()


def connections_out(engine: AsyncEngine) -> int:
    """Return how many of an engine's connections somebody holds."""
    pool = engine.pool
    assert isinstance(pool, QueuePool), "what SQLAlchemy takes for a SQLite file"
    return pool.checkedout()


class Process(App):
    """One process of an environment."""

    def __init__(
        self,
        database: StayingDatabase,
        queues: MemoryQueues,
        faults: Faults,
        held: list[Held],
        clock: Clock,
        *,
        redrive: timedelta,
        strike: Callable[[], None],
        died: Callable[[Process], None],
        settings: list[Settings],
        **app: Any,
    ) -> None:
        """A fault that kills, met on this process's connection, calls `strike`; `died` is told of this one's death.

        `settings` holds those of the processes before it: all of an environment have the same.
        """
        self._same = settings
        super().__init__(
            str(database.url), broker="memory://", namespace=NAMESPACE, clock=clock, redrive=redrive, **app
        )
        self.alive: bool = True
        self._stays = database
        self._queues = queues
        self._faults = faults
        self._held = held
        self._strike = strike
        self._died = died
        self._spawners: list[MortalSpawner] = []
        self._connection: MemoryBroker | None = None

    def load_settings(self, **code: Any) -> Settings:
        if not self._same:
            self._same.append(super().load_settings(**code))
        return self._same[0]

    def make_spawner(self) -> TaskSpawner:
        self._spawners.append(made := MortalSpawner())
        return made

    def make_database(self, spawner: TaskSpawner) -> Database | None:
        return self._stays

    async def prepare_database(self, database: Database) -> None:
        """The environment has prepared it."""

    def make_broker(self, spawner: TaskSpawner, database: Database | None) -> Broker:
        self._connection = MemoryBroker(
            self._queues, clock=self._clock, ids=self._ids, spawner=spawner, capabilities=DURABLE
        )
        return FaultyBroker(self._connection, self._faults, self._strike, self._held)

    def kill(self) -> None:
        """End every task where it stands and lose the connection to the broker; nothing starts afterwards."""
        if self.alive:
            self.end()
            self._died(self)

    def end(self) -> None:
        """The same, and nobody is told of it."""
        self.alive = False
        for spawner in self._spawners:
            spawner.kill()
        for service in self._services:
            service.close_threads()
        if self._connection is not None:
            self._connection.sever()

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """The tasks that run."""
        return [task for spawner in self._spawners for task in spawner.tasks]

    @property
    def threads_taken(self) -> int:
        """How many threads have a command."""
        return sum(service.threads_taken for service in self._services)

    @property
    def _services(self) -> Sequence[Shell]:
        return () if self._running is None else self._running.services

    async def bury(self) -> None:
        """Wait until nothing of a killed process runs any more."""
        if tasks := self.tasks:
            await asyncio.wait(tasks, timeout=DYING_SECONDS_MAX)
        if self._connection is not None:
            await self._connection.close()
