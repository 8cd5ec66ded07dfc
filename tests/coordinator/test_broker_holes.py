"""A broker that does not answer any more: every wait for it ends, and every saga once it is back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from saga.brokers.base import Capabilities, Channel, ChannelStatus, Consumer, OutMessage, PublishOutcome
from saga.brokers.rabbitmq import RabbitMQBroker, RabbitMQOptions
from saga.client import Handle
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.definition.activity import Participant
from saga.definition.builder import Saga
from saga.errors import BrokerUnavailable
from saga.messages import replies_channel
from saga.participant.service import ParticipantService
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.participant import SqlParticipantStore
from tests.coordinator.harness import Order, Receipt, Stack
from tests.plugins.features import Faults
from tests.proxy import BOTH, Direction, ProxyFactory

T = TypeVar("T")
OPTIONS = RabbitMQOptions(publish_seconds_max=2.0, late_seconds=1.0)
WAIT_SECONDS_MAX = 10.0
"""The bound that the row states for any wait for a broker."""
NOTICED_SECONDS_MAX = 15.0
SAGAS = 4
HOLES = (BOTH, (Direction.TO_SERVER,), (Direction.TO_CLIENT,))
"""Black holes, and halves of them: who is not answered cannot know which it is."""


class Timed:
    """A broker connection that keeps how long each wait of its port lasted."""

    def __init__(self, broker: RabbitMQBroker) -> None:
        self.broker = broker
        self.publishes: list[float] = []
        self.calls: list[float] = []
        self.pending: set[asyncio.Future[PublishOutcome]] = set()
        self._clock = SystemClock()

    @property
    def capabilities(self) -> Capabilities:
        return self.broker.capabilities

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        since = self._clock.monotonic()
        futures = self.broker.publish(messages)
        for future in futures:
            self.pending.add(future)
            future.add_done_callback(partial(self._known, since))
        return futures

    def _known(self, since: float, future: asyncio.Future[PublishOutcome]) -> None:
        self.pending.discard(future)
        self.publishes.append(self._clock.monotonic() - since)

    async def _timed(self, call: Awaitable[T]) -> T:
        since = self._clock.monotonic()
        try:
            return await call
        finally:
            self.calls.append(self._clock.monotonic() - since)

    async def start(self) -> None:
        await self._timed(self.broker.start())

    async def declare(self, channels: Sequence[Channel]) -> None:
        await self._timed(self.broker.declare(channels))

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        return await self._timed(self.broker.consume(channel, prefetch=prefetch))

    async def status(self, channel: str) -> ChannelStatus:
        return await self._timed(self.broker.status(channel))

    async def close(self) -> None:
        await self._timed(self.broker.close())


owner = Participant("work", start_to_close=timedelta(seconds=30))


@owner.activity(no_compensation="a test")
async def first(order: Order, session: AsyncSession) -> Receipt:
    return Receipt(reference="1")


@owner.activity(no_compensation="a test")
async def second(order: Order, session: AsyncSession) -> Receipt:
    return Receipt(reference="2")


TWO = Saga("two", Order).step(first).step(second)


@pytest.fixture
async def spawner() -> AsyncIterator[TaskSpawner]:
    made = TaskSpawner()
    yield made
    await made.close()


@pytest.mark.feature("G-10", acceptance=True, scale=0.1)
@pytest.mark.parametrize("stack", ["postgres-rabbitmq"], indirect=True)
@pytest.mark.slow
async def test_every_saga_ends_while_the_broker_is_a_black_hole_now_and_then(
    stack: Stack,
    real_broker: None,
    proxy: ProxyFactory,
    faults: Faults,
    spawner: TaskSpawner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G-10, F8, F28, I3: for coordinator and participant; no wait over the bound, and a start waits for none."""
    assert stack.rabbitmq_url is not None
    links = {
        name: await proxy(stack.rabbitmq_url) for name in ("coordinator's broker", "participant's broker")
    }
    brokers = {
        name: Timed(RabbitMQBroker(link.url, spawner=spawner, options=OPTIONS))
        for name, link in links.items()
    }
    faults.declare(*brokers)
    with monkeypatch.context() as patch:
        patch.setattr(stack, "broker", lambda _spawner: brokers["coordinator's broker"])
        await brokers["participant's broker"].start()
        service = serve(stack, brokers["participant's broker"], spawner)
        await service.start()
        node = await stack.node(TWO)
    handles: list[Handle[Any]] = []
    clock = SystemClock()
    for directions in HOLES:
        for name, link in links.items():
            dropped = link.fired["drop"]
            link.drop(*directions)
            since = clock.monotonic()
            handles += [
                await node.client.start(TWO, Order(), id=f"x{len(handles) + n}") for n in range(SAGAS)
            ]
            assert clock.monotonic() - since < OPTIONS.publish_seconds_max, "the database is all it takes"
            await stack.until(partial(is_down, brokers[name].broker), within=NOTICED_SECONDS_MAX)
            assert link.fired["drop"] > dropped
            faults.fired(name)
            with pytest.raises(BrokerUnavailable):
                await brokers[name].status(replies_channel(stack.namespace))
            link.heal()
            assert set((await stack.ended(handles, step=2)).values()) == {"completed"}
    assert len(await stack.rows(t.barrier.select())) == 2 * len(handles)
    assert await stack.count(t.incident) == 0
    await service.stop(timedelta(seconds=5))
    await node.stop()
    for broker in brokers.values():
        assert not [each for each in broker.pending if not each.done()]
        await broker.close()
        assert max(broker.calls) < WAIT_SECONDS_MAX
        assert max(broker.publishes) < OPTIONS.publish_seconds_max + 4.0  # and a starved loop


def is_down(broker: RabbitMQBroker) -> bool:
    return not broker.state.publish_up and not broker.state.consume_up


def serve(stack: Stack, broker: Any, spawner: TaskSpawner) -> ParticipantService:
    return ParticipantService(
        [owner],
        broker,
        SqlParticipantStore(stack.database(), stack.namespace),
        None,
        namespace=stack.namespace,
        clock=SystemClock(),
        ids=SystemIds(),
        spawner=spawner,
    )


@pytest.mark.feature("G-10")
@pytest.mark.stack("postgres-rabbitmq")
async def test_connecting_to_a_black_hole_ends_within_the_bound(
    rabbitmq_url: str, proxy: ProxyFactory, spawner: TaskSpawner
) -> None:
    """G-10: and what was never up is closed at once."""
    link = await proxy(rabbitmq_url)
    link.drop()
    broker = Timed(RabbitMQBroker(link.url, spawner=spawner))
    with pytest.raises(BrokerUnavailable):
        await broker.start()
    await broker.close()
    assert max(broker.calls) < WAIT_SECONDS_MAX


class Ended:
    """A consumer that was closed by somebody else."""

    def __init__(self) -> None:
        self.asked = 0

    async def receive(self) -> Sequence[Any]:
        self.asked += 1
        await asyncio.sleep(0)
        return ()

    async def stop(self) -> None: ...

    async def close(self) -> None: ...


async def test_a_coordinator_whose_consumer_was_closed_under_it_does_not_spin(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed consumer returns at once, always: asking it on and on would leave the loop to nobody else."""
    ended = Ended()

    async def consume(_channel: str, *, prefetch: int) -> Ended:
        return ended

    node = await stack.node(TWO, coordinator=False)
    monkeypatch.setattr(node.broker, "consume", consume)
    await node.coordinator.start()
    for _ in range(100):
        await asyncio.sleep(0)
    assert ended.asked == 1
