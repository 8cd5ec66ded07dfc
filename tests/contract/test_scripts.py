"""G-07: random scripts must give the same outcome on the model (memory) and on the real server (RabbitMQ).

A script is drawn from a printed seed: publishes, receives, acks, retries, closes, lost connections, declares. The
interpreter keeps its own small account of what must be waiting where, and asks the broker for exactly that much.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from devservices import RabbitMq
from saga.brokers.base import Broker, Channel, Consumer, Delivery, OutMessage
from saga.errors import TopologyMismatch
from saga.testing.contract import Harness
from tests.contract.memory_harness import DurableMemoryHarness
from tests.contract.rabbitmq_harness import RabbitMQHarness
from tests.plugins.features import Faults

SCRIPTS_FULL = 200
SCALE = 0.1
SCRIPTS = int(os.environ.get("SAGA_TEST_SCRIPTS", SCRIPTS_FULL * SCALE))
STEPS = 14
PREFETCH = 500


class _Lane:
    """One channel of a script: what waits, what a consumer holds, what the broker has parked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.consumer: Consumer | None = None
        self.held: list[Delivery] = []
        self.returns: Counter[bytes] = Counter()
        self.waiting = 0
        self.parked = 0

    def give_back(self, deliveries: list[Delivery], limit: int) -> None:
        for delivery in deliveries:
            self.returns[delivery.body] += 1
            if self.returns[delivery.body] > limit:
                self.parked += 1
            else:
                self.waiting += 1
        self.held = [delivery for delivery in self.held if delivery not in deliveries]


class Script:
    """Plays one seed on a harness and returns what could be observed."""

    def __init__(self, harness: Harness, seed: int) -> None:
        self.harness = harness
        self.random = random.Random(seed)
        self.trace: list[object] = []
        self.count = 0

    async def play(self) -> list[object]:
        h = self.harness
        try:
            self.broker: Broker = await h.connect()
            self.lanes = [_Lane(await h.channel(self.broker)) for _ in range(2)]
            verbs = [
                *(self.publish, self.publish, self.receive, self.ack, self.retry, self.poison),
                *(self.close, self.cut, self.declare, self.mismatch, self.depth),
            ]
            for _ in range(STEPS):
                await self.random.choice(verbs)(self.random.choice(self.lanes))
            await self.audit()
        finally:
            await h.clean_up()
        return self.trace

    async def publish(self, lane: _Lane) -> None:
        targets = [
            self.random.choice([lane.name, lane.name, "nowhere"]) for _ in range(self.random.randint(1, 4))
        ]
        messages = []
        for target in targets:
            self.count += 1
            body = f"{self.count:03d}".encode()
            messages.append(OutMessage(target, body, "text/plain", key="k", headers={"n": str(self.count)}))
        self.trace.append(["publish", *await self.harness.outcomes(self.broker.publish(messages))])
        lane.waiting += targets.count(lane.name)

    async def receive(self, lane: _Lane) -> None:
        if lane.consumer is None:
            lane.consumer = await self.harness.soon(self.broker.consume(lane.name, prefetch=PREFETCH))
        if lane.waiting:
            taken = await self.harness.take(lane.consumer, lane.waiting)
            self.note("receive", taken)
            lane.held += taken
            lane.waiting = 0

    async def ack(self, lane: _Lane) -> None:
        if lane.consumer is not None and (some := self.some_of(lane)):
            lane.consumer.ack(some)
            lane.held = [delivery for delivery in lane.held if delivery not in some]

    async def retry(self, lane: _Lane) -> None:
        if lane.consumer is not None and (some := self.some_of(lane)):
            lane.consumer.retry(some)
            lane.give_back(some, self.harness.delivery_limit)

    async def poison(self, lane: _Lane) -> None:
        """Retry one message until the broker parks it (P14)."""
        if not lane.held and not lane.waiting:
            await self.publish(lane)
        await self.receive(lane)
        if not lane.held or lane.consumer is None:
            return  # everything of that publish went nowhere
        body = min(delivery.body for delivery in lane.held)
        parked = lane.parked
        while lane.parked == parked:
            again = [delivery for delivery in lane.held if delivery.body == body]
            lane.consumer.retry(again)
            lane.give_back(again, self.harness.delivery_limit)
            await self.fetch_all(lane)
        self.trace.append("poisoned")

    async def close(self, lane: _Lane) -> None:
        if lane.consumer is None:
            return
        await self.fetch_all(lane)
        await self.harness.soon(lane.consumer.close())
        lane.consumer = None
        lane.give_back(list(lane.held), self.harness.delivery_limit)

    async def cut(self, lane: _Lane) -> None:
        for each in self.lanes:
            await self.fetch_all(each)
        await self.harness.settle()  # acks on their way may be lost with the connection, or not
        await self.harness.cut(self.broker)
        await self.harness.settle()
        self.trace.append("cut")
        for each in self.lanes:
            each.give_back(list(each.held), self.harness.delivery_limit)

    async def fetch_all(self, lane: _Lane) -> None:
        """What is on its way to a consumer counts as returned when it goes back: see it arrive first."""
        if lane.consumer is not None:
            await self.receive(lane)

    async def declare(self, lane: _Lane) -> None:
        await self.harness.soon(self.broker.declare([Channel(lane.name, f"{lane.name}.parking")]))

    async def mismatch(self, lane: _Lane) -> None:
        try:
            await self.harness.soon(self.broker.declare([Channel(lane.name, None)]))
        except TopologyMismatch:
            self.trace.append("mismatch")

    async def depth(self, lane: _Lane) -> None:
        if lane.consumer is None:
            await self.harness.settle()
            status = await self.harness.soon(self.broker.status(lane.name))
            self.trace.append(["depth", status.messages, status.consumers])

    async def audit(self) -> None:
        for lane in self.lanes:
            await self.close(lane)
            self.note("left", await self.harness.left(self.broker, lane.name, lane.waiting))
            self.note("parked", await self.harness.left(self.broker, f"{lane.name}.parking", lane.parked))

    def some_of(self, lane: _Lane) -> list[Delivery]:
        # sorted, so that the draw does not depend on the order of redeliveries, which no broker promises
        held = sorted(lane.held, key=lambda delivery: delivery.body)
        return self.random.sample(held, self.random.randint(1, len(held))) if held else []

    def note(self, verb: str, deliveries: list[Delivery]) -> None:
        seen = sorted(
            (d.body, d.redelivered, d.delivery_count, d.headers.get("n"), d.content_type) for d in deliveries
        )
        self.trace.append([verb, *seen])


@pytest.mark.feature("G-07", acceptance=True, scale=SCALE)
@pytest.mark.stack("postgres-rabbitmq", "sqlite")
@pytest.mark.slow
async def test_model_and_server_answer_alike(rabbitmq_server: RabbitMq, faults: Faults) -> None:
    faults.declare("connection cut", "poison")
    for seed in range(SCRIPTS):
        model = await Script(DurableMemoryHarness(), seed).play()
        server = await Script(RabbitMQHarness(rabbitmq_server), seed).play()
        assert server == model, f"seed {seed}"
        faults.fired("connection cut", model.count("cut"))
        faults.fired("poison", model.count("poisoned"))
