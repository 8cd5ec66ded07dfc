"""One pass over everything that goes with age, in batches with pauses, each batch a transaction of its own.

A pass that was cut off is begun again from the front: what is deleted does not come back, and what is left is found.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from pydantic_core import from_json

from saga import views
from saga.clock import Clock
from saga.definition.registry import Registry
from saga.failpoints import failpoint
from saga.retention.archive import Archive, ArchivedRun
from saga.storage.base import Found, Purge, RetentionStore, RunVersion, WholeRun

PAUSE_SECONDS: Final = 0.05
"""Between two batches that deleted something, for whoever waits."""
ARCHIVED_MAX: Final = 100
"""Runs in memory at once, payloads and all."""

Between = Callable[[], Awaitable[bool]]
"""Called before each batch; False ends the pass."""


async def _go_on() -> bool:
    return True


async def purge(purges: Iterable[Purge], *, clock: Clock, between: Between = _go_on) -> dict[str, int]:
    """Delete what is old enough, kind by kind; return how much went, by table. Raises what storage raises."""
    gone: dict[str, int] = {}
    for each in purges:
        gone[each.name] = 0
        above: Any = None
        while await between():
            found = await each.find(above)
            if found.keys:
                gone[each.name] += await each.delete(found.keys)
                await clock.sleep(PAUSE_SECONDS)
            above = found.above
            if above is None:
                break
    return gone


async def preview(purges: Iterable[Purge]) -> dict[str, int]:
    """Return how much `purge` would delete now, by table."""
    there: dict[str, int] = {}
    for each in purges:
        found = await each.find(None)
        there[each.name] = len(found.keys)
        while found.above is not None:
            found = await each.find(found.above)
            there[each.name] += len(found.keys)
    return there


def ages_of(registry: Registry, age: timedelta) -> Mapping[str, timedelta]:
    """Return how long closed runs of each saga declared here are kept; of several versions, what is longest."""
    ages: dict[str, timedelta] = {}
    for saga in registry.definitions():
        own = age if saga.retention is None else saga.retention
        ages[saga.name] = max(own, ages.get(saga.name, own))
    return ages


class RunPurge:
    """Closed runs of the sagas declared here: a `Purge` that archives first.

    Others' runs in the same namespace are theirs, with ages of their own.
    """

    name: Final = "saga_instance"

    def __init__(
        self,
        store: RetentionStore,
        registry: Registry,
        namespace: str,
        *,
        age: timedelta,
        archive: Archive | None = None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._namespace = namespace
        self._ages = ages_of(registry, age)
        self._archive = archive

    async def find(self, above: UUID | None) -> Found:
        return await self._store.find_closed(self._ages, above)

    async def delete(self, keys: Sequence[RunVersion]) -> int:
        if self._archive is None:
            return await self._store.delete_closed(keys)
        gone = 0
        for some in _parts(keys, ARCHIVED_MAX):
            whole = await self._store.read_whole(some)
            if whole:
                await self._archive([self._archived(each) for each in whole])
                failpoint("M1")  # archived, not deleted: the next pass archives them once more
                gone += await self._store.delete_closed(
                    [RunVersion(each.run.run_id, each.run.version) for each in whole]
                )
        return gone

    def _archived(self, whole: WholeRun) -> ArchivedRun:
        run = whole.run
        definition = self._registry.get(run.saga, run.saga_version)
        return ArchivedRun(
            instance=views.describe(run, definition, self._namespace),
            state=from_json(run.state),
            audit=tuple(whole.audit),
            payloads=tuple(whole.payloads),
        )


def _parts(keys: Sequence[RunVersion], size: int) -> Iterator[Sequence[RunVersion]]:
    for begin in range(0, len(keys), size):
        yield keys[begin : begin + size]
