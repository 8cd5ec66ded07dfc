"""F-11: purging beside the work, while the broker answers nothing, loses no unsent row and archives what it deletes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta

import pytest
from sqlalchemy import text

from saga.brokers.base import OutMessage, PublishOutcome
from saga.clock import SystemClock
from saga.retention.archive import ArchivedRun
from saga.retention.purge import RunPurge, purge
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.purging import SqlRetentionStore
from tests.coordinator.harness import Node, Order, Stack
from tests.coordinator.sagas import sequence
from tests.features_due import DUE
from tests.plugins.features import Faults

SAGAS = 25
PURGERS = 2


class Down:
    """The broker of a process stops to answer: what is sent arrives, or does not any more, and nobody is told."""

    def __init__(self, node: Node) -> None:
        self.arrives = True
        self.unanswered: list[asyncio.Future[PublishOutcome]] = []
        self._wire = node.broker
        self._publish = node.broker.publish
        node.broker.publish = self.publish  # type: ignore[method-assign]

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        if self.arrives:
            self._publish(messages)
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[PublishOutcome]] = [loop.create_future() for _ in messages]
        self.unanswered += futures
        return futures

    def come_back(self) -> None:
        self._wire.publish = self._publish  # type: ignore[method-assign]
        for future in self.unanswered:
            if not future.done():
                future.set_result(PublishOutcome.UNKNOWN)


async def deadlocks(stack: Stack) -> int:
    if stack.name != "postgres-rabbitmq":
        return 0  # what MySQL and MariaDB refuse is raised, and would fail the pass
    query = text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    return int(await stack.run(lambda connection: connection.execute(query).scalar_one()))


@pytest.mark.parametrize("stack", DUE["F-11"], indirect=True)
@pytest.mark.feature("F-11", acceptance=True)
async def test_purging_under_load_with_the_broker_down_past_the_age(stack: Stack, faults: Faults) -> None:
    """0 unsent rows lost, no deadlock, archive complete."""
    deadlocks_before = await deadlocks(stack)
    saga = sequence(3)
    node = await stack.node(saga)
    await stack.participant()
    archived: list[ArchivedRun] = []

    async def archive(runs: list[ArchivedRun]) -> None:
        archived.extend(runs)

    store = SqlRetentionStore(stack.database(), stack.namespace)
    store._page = 7
    runs = RunPurge(
        store,
        node.registry,
        stack.namespace,
        age=timedelta(milliseconds=1),
        archive=archive,  # type: ignore[arg-type]
    )

    confirmed = [await node.client.start(saga, Order(), id=f"sent-{n}") for n in range(SAGAS)]
    await stack.ended(confirmed)
    down = Down(node)
    unconfirmed = [await node.client.start(saga, Order(), id=f"unsure-{n}") for n in range(SAGAS)]
    await stack.ended(unconfirmed)
    down.arrives = False
    waiting = [await node.client.start(saga, Order(), id=f"held-{n}") for n in range(SAGAS)]
    there = {key for (key,) in await stack.rows(t.outbox.select().with_only_columns(t.outbox.c.ordering_key))}
    keys = {str(each.run_id) for each in (*unconfirmed, *waiting)}
    assert keys <= there
    faults.fired("broker down", len(down.unanswered))

    async def load() -> list[object]:
        return [await node.client.start(saga, Order(), id=f"load-{n}") for n in range(SAGAS)]

    async def purging() -> int:
        gone = 0
        for _ in range(3):
            gone += (await purge([runs], clock=SystemClock()))["saga_instance"]
        return gone

    started, *gone = await asyncio.gather(load(), *(purging() for _ in range(PURGERS)))
    assert isinstance(started, list)

    left = {key for (key,) in await stack.rows(t.outbox.select().with_only_columns(t.outbox.c.ordering_key))}
    assert keys | {str(each.run_id) for each in started} <= left
    i = t.instance.c
    runs_left = {row[0] for row in await stack.rows(t.instance.select().with_only_columns(i.run_id))}
    assert {each.run_id for each in (*unconfirmed, *waiting)} <= runs_left
    purged = {each.run_id for each in confirmed} - runs_left
    assert purged, "everything that was confirmed could go"
    assert sum(count for count in gone if isinstance(count, int)) == len(purged)
    assert purged <= {each.instance.run_id for each in archived}
    assert all(len(each.instance.history) == 4 and len(each.payloads) >= 5 for each in archived)
    assert await deadlocks(stack) == deadlocks_before

    down.come_back()
    await stack.ended([*waiting, *started], step=1.0)
    await stack.empty(t.outbox, step=1.0)
    await purge([runs], clock=SystemClock())
    assert await stack.count(t.instance) == 0
    everything = {each.run_id for each in (*confirmed, *unconfirmed, *waiting, *started)}
    assert {each.instance.run_id for each in archived} == everything
