"""F-02 as chaos: three processes send one outbox while they are killed and frozen at random."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from saga import App
from saga.clock import SystemClock
from saga.storage.sqlalchemy.database import async_url
from tests.plugins.features import Faults

ROOT: Final = Path(__file__).parents[2]
SCALE: Final = 0.02
SECONDS: Final = 600 * SCALE
KEYS: Final = 8
PAUSE: Final = 0.01
FROZEN_SECONDS: Final = 6.5
"""Longer than a lease, so that another one takes over before the frozen one wakes and sends what it had read."""

clock = SystemClock()


class Event(BaseModel):
    key: str
    number: int


class Senders:
    """Three processes; one that dies is started again."""

    def __init__(self, *arguments: str) -> None:
        self._command = [sys.executable, "-m", "tests.outbox.sender", *arguments]
        self._processes = [self._start() for _ in range(3)]
        self._frozen: set[int] = set()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, cwd=ROOT)

    def kill(self, place: int) -> None:
        self._processes[place].kill()
        self._processes[place].wait()
        self._processes[place] = self._start()

    async def freeze(self, place: int) -> None:
        """Stop one for longer than a lease."""
        process = self._processes[place]
        process.send_signal(signal.SIGSTOP)
        try:
            await clock.sleep(FROZEN_SECONDS)
        finally:
            process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.feature("F-02", acceptance=True, scale=SCALE)
@pytest.mark.parametrize("stack", ["postgres-rabbitmq"])
async def test_no_event_is_lost_and_each_key_keeps_its_order_while_relays_die_and_freeze(
    stack: str, url: str, rabbitmq_url: str, faults: Faults
) -> None:
    faults.declare("killed", "frozen")
    namespace = f"relays-{secrets.token_hex(4)}"
    engine = create_async_engine(async_url(url))
    app = App(url, broker=rabbitmq_url, namespace=namespace, topics=["orders"])
    seen: list[Event] = []
    await app.start(coordinator=False, participants=False)  # sends nothing: the processes do
    senders = Senders(url, rabbitmq_url, namespace)
    try:
        consumer = await _consumer(app)
        reading = asyncio.create_task(_read(consumer, seen))
        breaking = asyncio.create_task(_break(senders, faults))
        written = await _write(app, engine)
        await breaking
        async with asyncio.timeout(60):
            while len({(each.key, each.number) for each in seen}) < written:
                await clock.sleep(0.1)
        reading.cancel()
    finally:
        senders.close()
        await app.stop()
    await engine.dispose()
    _check(seen, written)
    print(f"{written} events, {len(seen) - written} of them twice, {dict(faults.counts)}")


async def _consumer(app: App) -> Any:
    """Subscribe, as soon as one of the processes has declared the topic."""
    async with asyncio.timeout(30):
        while True:
            with suppress(Exception):
                return await app.broker.consume("orders", prefetch=1_000)
            await clock.sleep(0.1)


async def _read(consumer: Any, seen: list[Event]) -> None:
    while True:
        deliveries = await consumer.receive()
        seen += [Event.model_validate(json.loads(delivery.body)["data"]) for delivery in deliveries]
        consumer.ack(deliveries)


async def _write(app: App, engine: Any) -> int:
    """Publish for as long as the test lasts; writers of one key take turns, as F-02 asks."""
    until, number = clock.monotonic() + SECONDS, 0
    while clock.monotonic() < until:
        async with AsyncSession(engine) as session, session.begin():
            for key in range(KEYS):
                event = Event(key=f"k{key}", number=number)
                await app.outbox.publish(event, topic="orders", key=event.key, session=session)
        number += 1
        await clock.sleep(PAUSE)
    return number * KEYS


async def _break(senders: Senders, faults: Faults) -> None:
    """Freeze each of the three once, one beside the other, and kill one now and then."""
    draw = random.Random()
    freezing = []
    for place in range(3):
        freezing.append(asyncio.create_task(senders.freeze(place)))
        faults.fired("frozen")
        await clock.sleep(SECONDS / 6)
        senders.kill((place + draw.randint(1, 2)) % 3)
        faults.fired("killed")
        await clock.sleep(SECONDS / 6)
    await asyncio.gather(*freezing)


def _check(seen: list[Event], written: int) -> None:
    first: dict[str, list[int]] = {}
    for event in seen:
        numbers = first.setdefault(event.key, [])
        if event.number not in numbers:
            numbers.append(event.number)
    assert sum(map(len, first.values())) == written, "lost"
    for key, numbers in first.items():
        assert numbers == sorted(numbers), f"{key}: first deliveries out of order"
