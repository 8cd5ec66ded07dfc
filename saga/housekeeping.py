"""What a started app purges, and who does it when: the retention of its own tables, put together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from saga.clock import Clock, Ids, Spawner
from saga.declared import Declared
from saga.retention.ages import MARGIN, PARKED_AGE, Horizon
from saga.retention.archive import Archive
from saga.retention.purge import RunPurge, purge
from saga.retention.purge import preview as preview_of
from saga.retention.upkeep import Upkeep
from saga.storage.base import Purge
from saga.storage.sqlalchemy import tables
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.outbox import SqlOutboxStore
from saga.storage.sqlalchemy.purging import SqlOldRows, SqlRetentionStore, SqlRunRows


class Housekeeping:
    """The upkeeps of one app's database."""

    def __init__(
        self,
        app: Declared,
        database: Database,
        spawner: Spawner,
        *,
        clock: Clock,
        ids: Ids,
        archive: Archive | None,
    ) -> None:
        self._app = app
        self._database = database
        self._spawner = spawner
        self._clock = clock
        self._ids = ids
        self._archive = archive
        self._horizon = Horizon(app.settings.barrier_retention, clock)
        self._decisions = SqlRunRows(
            database, app.namespace, tables.barrier, app.settings.barrier_retention + MARGIN
        )
        self._upkeeps: list[Upkeep] = []

    async def horizon(self, *, known: bool) -> Horizon:
        """Return which commands and events come too late; `known` asks how far decisions were purged already."""
        if known:
            await self._look()
        return self._horizon

    def keep_runs(self) -> None:
        """Purge, from now on, the runs that this app coordinates."""
        self._keep("coordinator", self._runs(), None)

    def keep_participants(self) -> None:
        """Purge, from now on, what this app's participants and inboxes remember."""
        self._keep("participant", self._memories(), self._look)

    async def purge(self, *, preview: bool) -> Mapping[str, int]:
        """Make one pass over everything; return how much went, or would go, by table."""
        app = self._app
        purges = {
            each.name: each
            for each in (
                *(self._runs() if app.registry.served() else ()),
                *(self._memories() if app.participants or app.inboxes else ()),
            )
        }
        if preview:
            return await preview_of(purges.values())
        return await purge(purges.values(), clock=self._clock)

    async def stop(self) -> None:
        """End what goes on."""
        for upkeep in self._upkeeps:
            await upkeep.stop()

    async def _look(self) -> None:
        self._horizon.purged_before = await self._decisions.purged_before()

    def _runs(self) -> list[Purge]:
        app = self._app
        store, age = SqlRetentionStore(self._database, app.namespace), app.settings.retention
        runs = RunPurge(store, app.registry, app.namespace, age=age, archive=self._archive)
        return [runs, self._parked()]

    def _memories(self) -> list[Purge]:
        app = self._app
        age = app.settings.barrier_retention + MARGIN
        inbox = SqlOldRows(self._database, app.namespace, tables.inbox.c.received_at, age)
        return [
            *([self._decisions] if app.participants else ()),
            *([inbox] if app.inboxes else ()),
            SqlOldRows(self._database, app.namespace, tables.lone_run.c.last_run_at, age),
            self._parked(),
        ]

    def _parked(self) -> Purge:
        return SqlOldRows(self._database, self._app.namespace, tables.parked.c.id, PARKED_AGE)

    def _keep(self, name: str, purges: Sequence[Purge], before: Callable[[], Awaitable[None]] | None) -> None:
        upkeep = Upkeep(
            name,
            purges,
            SqlOutboxStore(self._database, self._app.namespace),
            clock=self._clock,
            ids=self._ids,
            spawner=self._spawner,
            before=before,
        )
        upkeep.start()
        self._upkeeps.append(upkeep)
