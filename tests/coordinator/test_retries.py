"""Retries are durable state of the coordinator: a schedule that outlives it, and no redelivery by the broker (D-03)."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from pydantic_core import from_json
from sqlalchemy.ext.asyncio import AsyncSession

from saga.brokers.base import Broker, Channel, ChannelStatus, Consumer, Delivery, OutMessage
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.definition.activity import Participant
from saga.definition.builder import Saga
from saga.messages import decode_commands
from saga.outcomes import ActivityContext
from saga.participant.service import ParticipantService
from saga.retry import FORWARD, RetryPolicy
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.participant import SqlParticipantStore
from tests.coordinator.harness import Node, Order, Receipt, Stack
from tests.plugins.features import Faults

SAGAS = 200
STEP_SECONDS = 20.0
POLICIES = {
    "patient": FORWARD,
    "tight": RetryPolicy(schedule_to_close=timedelta(seconds=20)),
    "brief": RetryPolicy(attempts=2),
}


class Watched:
    """A broker connection that keeps how every delivery came, and counts what was given back."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.deliveries: list[Delivery] = []
        self.given_back = 0

    @property
    def capabilities(self) -> Any:
        return self.broker.capabilities

    def publish(self, messages: Sequence[OutMessage]) -> Any:
        return self.broker.publish(messages)

    async def start(self) -> None:
        await self.broker.start()

    async def declare(self, channels: Sequence[Channel]) -> None:
        await self.broker.declare(channels)

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        return WatchedConsumer(self, await self.broker.consume(channel, prefetch=prefetch))

    async def status(self, channel: str) -> ChannelStatus:
        return await self.broker.status(channel)

    async def close(self) -> None:
        await self.broker.close()


class WatchedConsumer:
    def __init__(self, watch: Watched, consumer: Consumer) -> None:
        self._watch = watch
        self._consumer = consumer

    async def receive(self) -> Sequence[Delivery]:
        deliveries = await self._consumer.receive()
        self._watch.deliveries += deliveries
        return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        self._consumer.ack(deliveries)

    def retry(self, deliveries: Sequence[Delivery]) -> None:
        self._watch.given_back += len(deliveries)
        self._consumer.retry(deliveries)

    async def stop(self) -> None:
        await self._consumer.stop()

    async def close(self) -> None:
        await self._consumer.close()


class Moment(NamedTuple):
    """The test's time, and the part of it that was jumped over: what a busy machine adds is no delay of ours."""

    at: float
    jumped: float


class Failing:
    """A participant of ours whose activity always raises; it keeps when each attempt came, in the test's time."""

    def __init__(self, stack: Stack) -> None:
        self.came: dict[str, list[tuple[int, Moment | None]]] = defaultdict(list)
        """By command id: attempt and when; None while a jump is made, which moves one clock after the other."""
        self.jumping = False
        self.saga_of: dict[str, str] = {}
        self.sagas: dict[str, Saga[Order, None]] = {}
        owner = Participant("work", start_to_close=timedelta(seconds=30))
        for name, policy in POLICIES.items():
            activity = owner.activity(name=name, retry=policy)(self._attempt)
            activity.compensation(self._undo)
            self.sagas[name] = Saga(name, Order).step(activity)
        self._stack = stack
        self._spawner = TaskSpawner()
        self.broker = Watched(stack.broker(self._spawner))
        self.service = ParticipantService(
            [owner],
            self.broker,
            SqlParticipantStore(stack.database(), stack.namespace),
            None,
            namespace=stack.namespace,
            clock=SystemClock(),
            ids=SystemIds(),
            spawner=self._spawner,
        )

    async def _attempt(self, order: Order, session: AsyncSession, context: ActivityContext) -> Receipt:
        offset = self._stack.clock.offset
        now = None if self.jumping else Moment(time.monotonic() + offset, offset)
        self.came[context.operation_key].append((context.attempt, now))
        self.saga_of[context.operation_key] = context.saga
        raise LookupError("no such account")

    async def _undo(self, order: Order, session: AsyncSession) -> None:
        raise AssertionError("there is no effect to undo")

    async def start(self) -> None:
        await self.broker.start()
        await self.service.start()

    async def close(self) -> None:
        await self.service.stop(timedelta(seconds=5))
        await self.broker.close()
        await self._spawner.close()


async def at_rest(stack: Stack, node: Node) -> bool:
    """Whether every open saga waits for its next attempt, so that time may pass without a command on its way."""
    if await node.store.read_due(1, node.registry.served()):
        return False
    i = t.instance.c
    rows = await stack.rows(t.instance.select().with_only_columns(i.state).where(i.closed_at.is_(None)))
    return all(from_json(row.state)["o"][-1] is not None for row in rows)


@pytest.mark.usefixtures("real_broker")
@pytest.mark.feature("D-03", acceptance=True, scale=SAGAS / 10_000)
@pytest.mark.slow
async def test_failing_steps_keep_their_schedule_across_coordinators_and_the_broker_redelivers_nothing(
    stack: Stack, faults: Faults
) -> None:
    """D-03, P2: each attempt comes once, under one command id, when its delay is over and not before.

    The coordinator is killed between attempts: what it knew is in the database, and the next one goes on from there.
    """
    faults.declare("coordinator killed between attempts")
    failing = Failing(stack)
    await failing.start()
    try:
        node = await stack.node(*failing.sagas.values())
        handles = [
            await node.client.start(failing.sagas[name_of(number)], Order()) for number in range(SAGAS)
        ]
        ends, rests = set[str](), 0
        while ends != {"compensated"}:
            await stack.until(partial(at_rest, stack, node), within=60)
            rests += 1
            if rests in (1, 3, 5):
                node.kill()
                node = await stack.node(*failing.sagas.values())
                faults.fired("coordinator killed between attempts")
            failing.jumping = True
            await stack.pass_time(STEP_SECONDS)
            failing.jumping = False
            ends = set((await stack.statuses(handles)).values())
        check_attempts(failing)
        assert await stop_reasons(stack) == {
            ("patient", "attempts"): SAGAS // 10,
            ("tight", "schedule_to_close"): SAGAS // 10,
            ("brief", "attempts"): SAGAS * 8 // 10,
        }
        assert failing.broker.given_back == 0
        sent = [decode_commands(each.body)[0] for each in failing.broker.deliveries]
        assert set(Counter((each.commandid, each.attempt) for each in sent).values()) == {1}
        assert {(each.redelivered, each.delivery_count) for each in failing.broker.deliveries} == {(False, 1)}
    finally:
        await failing.close()


def name_of(number: int) -> str:
    """One in ten is patient, one in ten tight, the others are brief."""
    return {0: "patient", 1: "tight"}.get(number % 10, "brief")


def check_attempts(failing: Failing) -> None:
    assert len(failing.came) == SAGAS
    for command_id, came in failing.came.items():
        policy = POLICIES[failing.saga_of[command_id]]
        assert [attempt for attempt, _ in came] == list(range(1, len(came) + 1)), "each once, in order"
        for (attempt, before), (_, after) in pairwise(came):
            if before is None or after is None:
                continue
            delay = policy.delay_ms(command_id, attempt) / 1000
            assert delay <= after.at - before.at + 0.05
            assert after.jumped - before.jumped <= delay + STEP_SECONDS
        budget = policy.schedule_to_close
        assert budget is not None
        first, last = came[0][1], came[-1][1]
        # an attempt that is sent just before a jump comes after it
        longest = budget.total_seconds() + STEP_SECONDS
        assert first is None or last is None or last.jumped - first.jumped < longest
        if failing.saga_of[command_id] != "tight":
            assert len(came) == policy.attempts


async def stop_reasons(stack: Stack) -> Counter[tuple[str, str]]:
    """Count why the retries ended, by saga."""
    h, i = t.history.c, t.instance.c
    rows = await stack.rows(
        t.history.join(t.instance, h.run_id == i.run_id).select().with_only_columns(i.saga, h.detail)
    )
    reasons = [(row.saga, from_json(row.detail).get("retry_stop")) for row in rows]
    return Counter((saga, reason) for saga, reason in reasons if reason is not None)
