"""Kills between any two steps of the inbox, every event three times: each effect once (F-08)."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import create_async_engine

from saga import App
from saga.brokers.base import OutMessage, PublishOutcome
from saga.storage.sqlalchemy.database import async_url
from tests.features_due import DUE
from tests.inbox.rig import JSON, clock, envelope, mail, own
from tests.plugins.features import Faults
from tests.stacks import broker_of

pytestmark = pytest.mark.slow

ROOT: Final = Path(__file__).parents[2]
POINTS: Final = ("W1", "W3", "W2", "W4", "N2", "N3", "N4")
EVENTS: Final = 12
SECONDS_MAX: Final = 90.0


@pytest.fixture(params=DUE["F-08"])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Service:
    """One consumer at a time, and what the topic that it publishes to was told."""

    def __init__(self, app: App, environment: dict[str, str], log: Path) -> None:
        self.app = app
        self.topic = environment["INBOX_TOPIC"]
        self.told: Counter[int] = Counter()
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, fail: str = "") -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "saga.cli", "participant", "tests.inbox.stage:app", "--grace", "5"],
                cwd=ROOT,
                env={**os.environ, **self._environment, "SAGA_FAIL": fail},
                stderr=log,
            )

    async def death(self) -> None:
        """Wait until the process has killed itself."""
        assert self._process is not None
        until = clock.monotonic() + SECONDS_MAX
        while (status := self._process.poll()) is None:
            assert clock.monotonic() < until, "the service lives"
            await clock.sleep(0.02)
        assert status == -9

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def send(self, bodies: list[bytes]) -> None:
        for outcome in self.app.broker.publish([OutMessage(self.topic, body, JSON) for body in bodies]):
            assert await outcome is PublishOutcome.CONFIRMED

    async def listen(self) -> None:
        """Count the events that the service publishes, by message id once."""
        known = set()
        consumer = await self.app.broker.consume(f"{self.topic}-done", prefetch=100)
        while deliveries := await consumer.receive():
            for delivery in deliveries:
                event = json.loads(delivery.body)
                if event["id"] not in known:
                    known.add(event["id"])
                    self.told[event["data"]["number"]] += 1
            consumer.ack(deliveries)


@pytest.fixture
async def service(
    stack: str, url: str, request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Service]:
    broker = broker_of(stack, request)
    assert broker is not None
    address = url if broker == "database://" else broker
    name = secrets.token_hex(4)
    topic = f"orders-{name}"
    environment = {
        "INBOX_DATABASE": url,
        "INBOX_BROKER": broker,
        "INBOX_NAMESPACE": f"inbox-{name}",
        "INBOX_TOPIC": topic,
    }
    app = App(url, broker=address, namespace=f"other-{name}", topics=[topic, f"{topic}-done"])
    await app.start(coordinator=False, participants=False)
    service = Service(app, environment, tmp_path / "service.log")
    yield service
    service.close()
    await app.stop()


@pytest.mark.feature("F-08", acceptance=True)
async def test_f08_every_event_three_times_with_kills_between_any_two_steps(
    service: Service, url: str, faults: Faults
) -> None:
    """A row in our own table for each, once; one event published for each row, and no other; nothing parked."""
    faults.declare("kill", "copy")
    engine = create_async_engine(async_url(url))
    async with engine.begin() as connection:
        await connection.run_sync(own.create_all)
    bodies = [envelope(number) for number in range(EVENTS * len(POINTS))]
    listening = asyncio.ensure_future(service.listen())
    for turn, point in enumerate(POINTS):
        await service.send(bodies[turn * EVENTS : (turn + 1) * EVENTS] * 3)
        faults.fired("copy", 2 * EVENTS)
        service.start(f"{point}:kill:n=2")
        await service.death()
        faults.fired("kill")
    service.start()
    until = clock.monotonic() + SECONDS_MAX

    async def numbers() -> list[int]:
        async with engine.connect() as connection:
            return [row[0] for row in await connection.execute(select(mail.c.number))]

    while len(set(await numbers())) < len(bodies) or len(service.told) < len(bodies):
        assert clock.monotonic() < until, f"{len(await numbers())} of {len(bodies)}, told {len(service.told)}"
        await clock.sleep(0.1)
    await _settled(service, until)
    assert sorted(await numbers()) == list(range(len(bodies)))
    assert service.told == Counter(range(len(bodies)))
    listening.cancel()
    await engine.dispose()


async def _settled(service: Service, until: float) -> None:
    """Wait until the topic holds nothing: every copy has been looked at."""
    while (await service.app.broker.status(service.topic)).messages:
        assert clock.monotonic() < until
        await clock.sleep(0.1)
