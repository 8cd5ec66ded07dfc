"""Sent means confirmed and routed (row F-05): a queue that is gone, a link that is cut, a confirm that never comes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import aiormq
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from saga import Handle, Participant, Saga
from saga.app import App
from saga.brokers.base import Channel, PublishOutcome
from saga.brokers.rabbitmq import RabbitMQBroker, RabbitMQOptions
from saga.clock import SystemClock, TaskSpawner
from saga.messages import commands_channel, parking_channel
from saga.storage.sqlalchemy import tables as t
from tests.client.shop import Order, purchase
from tests.client.shop import shop as other_shop
from tests.outbox.harness import ManualClock, Outbox, ScriptedBroker
from tests.plugins.features import Faults
from tests.proxy import Direction, Proxy, ProxyFactory

pytestmark = pytest.mark.feature("F-05")

SHOPS = ("a", "b", "c", "d")
GONE = SHOPS[:3]
INCIDENT_SECONDS = 5.0
SLOWNESS = 3
PATIENCE_SECONDS = 60.0
clock = SystemClock()


def shop(name: str) -> tuple[Participant, Saga[int, None]]:
    """A participant with a queue of its own, and a saga of two of its steps."""
    participant = Participant(f"shop-{name}", start_to_close=timedelta(seconds=10))

    @participant.activity(no_compensation="nothing is sold")
    async def look(number: int) -> None: ...

    saga = Saga(f"visit-{name}", int).step(look, name="once").step(look, name="twice")
    return participant, saga


@dataclass
class Street:
    """An app with a queue for each of its shops; its broker is reached through a link."""

    app: App
    link: Proxy
    url: str
    namespace: str
    sagas: dict[str, Saga[int, None]]
    handles: list[Handle[None]] = field(default_factory=list)

    def channels(self, names: Sequence[str]) -> list[Channel]:
        queues = [commands_channel(self.namespace, f"shop-{name}") for name in names]
        return [Channel(queue, parking_channel(queue)) for queue in queues]

    async def visit(self, name: str, count: int) -> list[Handle[None]]:
        starts = [self.app.client.start(self.sagas[name], n) for n in range(count)]
        made = await asyncio.gather(*starts)
        self.handles += made
        return list(made)

    async def rows(self, query: str) -> list[Any]:
        engine = create_async_engine(self.url)
        async with engine.connect() as connection:
            found = list((await connection.execute(text(query))).all())
        await engine.dispose()
        return found

    async def until(self, query: str, wanted: int, seconds: float = PATIENCE_SECONDS) -> float:
        """Poll until the query finds that many; return how long that took."""
        since = clock.monotonic()
        while len(await self.rows(query)) != wanted:
            assert clock.monotonic() - since < seconds, f"{await self.rows(query)} for {query}"
            await clock.sleep(0.05)
        return clock.monotonic() - since


@pytest.fixture
async def street(url: str, rabbitmq_url: str, proxy: ProxyFactory) -> AsyncIterator[Street]:
    spawner = TaskSpawner()
    link = await proxy(rabbitmq_url)
    broker = RabbitMQBroker(
        link.url, spawner=spawner, options=RabbitMQOptions(publish_seconds_max=1.5, backoff_seconds_max=0.5)
    )
    participants, sagas = zip(*map(shop, SHOPS), strict=True)
    namespace = f"street-{secrets.token_hex(4)}"
    app = App(
        url,
        broker=broker,
        namespace=namespace,
        sagas=sagas,
        participants=participants,
        redrive=timedelta(seconds=2),
    )
    async with app:
        yield Street(app, link, url, namespace, dict(zip(SHOPS, sagas, strict=True)))
    await spawner.close()


OPEN = "SELECT 1 FROM saga_incident WHERE kind = 'unroutable' AND resolved_at IS NULL"


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["postgres-rabbitmq"])
@pytest.mark.feature("F-05", acceptance=True)
async def test_no_row_is_lost_to_a_queue_that_is_gone_a_link_that_is_cut_or_a_confirm_that_never_comes(
    street: Street, rabbitmq_url: str, faults: Faults
) -> None:
    """I6, F13, F16: rows stay, an incident says why, other keys go on, and all end once it is mended."""
    faults.declare("queue deleted", "connection cut", "confirm swallowed")
    connection = await aiormq.connect(rabbitmq_url)
    admin = await connection.channel()
    loads = [asyncio.ensure_future(street.visit(name, 8)) for name in SHOPS]
    for channel in street.channels(GONE):
        await admin.queue_delete(channel.name)
        faults.fired("queue deleted")
    await connection.close()
    await asyncio.gather(*loads)
    stuck = [handle for name in GONE for handle in await street.visit(name, 2)]

    waiting = f"{OPEN} AND run_id IN ({listed(stuck)})"
    waited = await street.until(waiting, len(stuck))
    began = clock.monotonic()
    others = await street.visit("d", 8)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.gather(*(handle.result() for handle in others))
    # beside other work everything takes longer: counted in what healthy sagas of the same run take
    assert waited <= INCIDENT_SECONDS + SLOWNESS * (clock.monotonic() - began)
    kept = f"SELECT DISTINCT ordering_key FROM saga_outbox WHERE ordering_key IN ({listed(stuck)})"
    assert len(await street.rows(kept)) == len(stuck)

    await street.app.broker.declare(street.channels(GONE))
    await ended(street)
    await street.until(OPEN, 0)

    while faults.counts["connection cut"] < 3:
        await street.visit("d", 4)
        faults.fired("connection cut", min(street.link.reset(), 1))
        await clock.sleep(0.05)
    await ended(street)
    for _ in range(3):
        before = street.link.fired["drop"]
        street.link.drop(Direction.TO_CLIENT)
        await street.visit("d", 2)
        await street.link.wait_fired("drop", before + 1)
        faults.fired("confirm swallowed")
        street.link.heal()
    await ended(street)
    await street.until("SELECT 1 FROM saga_outbox", 0)
    await street.until("SELECT 1 FROM saga_outbox_blocked", 0)
    assert await street.rows("SELECT status FROM saga_instance WHERE status <> 'completed'") == []


def listed(handles: Sequence[Handle[None]]) -> str:
    return ", ".join(f"'{handle.run_id}'" for handle in handles)


async def ended(street: Street) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.gather(*(handle.result() for handle in street.handles))


# --- what is set aside --------------------------------------------------------------------------


async def test_a_key_set_aside_is_tried_again_ever_later_and_blocks_no_other(outbox: Outbox) -> None:
    """At 1, 2, 4, ... 60 s; the database counts, so that a later owner of the partition knows."""
    broker, local = ScriptedBroker(), ManualClock()
    node = outbox.node(broker, local)
    broker.answers["gone"] = PublishOutcome.UNROUTABLE
    await outbox.add(b"stuck", channel="gone")
    waits = []
    for _ in range(8):
        await node.sweep()
        assert broker.take_sent() == [b"stuck"]
        await outbox.add(b"other")
        await node.sweep()
        assert broker.take_sent() == [b"other"]
        ((_, until),) = node.relay._blocked.values()
        waits.append(round(until - local.seconds))
        local.seconds = until + 0.001
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    ((*_, attempts, _),) = await outbox.rows(t.blocked_key)
    assert attempts == 8
    broker.answers.clear()
    await node.sweep()
    assert broker.take_sent() == [b"stuck"]
    assert await outbox.rows(t.blocked_key) == []
    assert await outbox.left() == []


async def test_who_takes_a_partition_over_knows_what_was_set_aside(outbox: Outbox) -> None:
    broker = ScriptedBroker()
    broker.answers["gone"] = PublishOutcome.UNROUTABLE
    first = outbox.node(broker, ManualClock())
    await outbox.add(b"stuck", channel="gone")
    await first.sweep()
    assert broker.take_sent() == [b"stuck"]
    await first.relay.stop()
    local = ManualClock()
    second = outbox.node(broker, local)
    await second.sweep()
    assert broker.take_sent() == [], "its next try is not yet due"
    broker.answers.clear()
    local.seconds += 2
    await second.sweep()
    assert broker.take_sent() == [b"stuck"]
    assert await outbox.rows(t.blocked_key) == []


async def test_an_incident_is_opened_once_per_key_counted_and_resolved_when_the_broker_takes_it(
    outbox: Outbox,
) -> None:
    url = outbox.database.url.render_as_string(hide_password=False)
    async with App(url, sagas=[purchase], participants=[other_shop]).as_client() as client:
        await client.start(
            purchase, Order(), id="o-1"
        )  # its queue was never declared: it stays in the outbox
        (left,) = await outbox.rows(t.outbox)
    broker, local = ScriptedBroker(), ManualClock()
    broker.answers[left.channel] = PublishOutcome.UNROUTABLE
    node = outbox.node(broker, local)
    for _ in range(3):
        await node.sweep(woken=True)
        local.seconds += 70
    (incident,) = await outbox.rows(t.incident)
    assert (incident.kind, incident.saga, incident.count, incident.error) == (
        "unroutable",
        "purchase",
        3,
        left.channel,
    )
    assert incident.resolved_at is None
    broker.answers.clear()
    await node.sweep(woken=True)
    (incident,) = await outbox.rows(t.incident)
    assert incident.resolved_at is not None
