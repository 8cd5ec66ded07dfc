"""`make chaos STACK=postgres-rabbitmq MINUTES=20`: money transfers while a process is killed every 3 seconds.

A coordinator or participant dies by SIGKILL, whatever it is doing, and is started again. All the money there is is read
in one snapshot every second. At the end every saga is closed and nothing is left in outbox, queues, claims and parking.
What is asked of a run grows with its minutes: 300 kills with work in flight and 10,000 completed transfers in 20, at a
quarter of the rate that the same machine has without faults, measured before.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from examples.money_transfer.apps import SCHEMAS
from examples.money_transfer.books import states
from examples.money_transfer.layouts import LAYOUTS, Layout
from examples.money_transfer.load import Load, Run, opening
from saga.brokers.rabbitmq import RabbitMQBroker
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.messages import commands_channel, parking_channel, replies_channel

KILL_SECONDS: Final = 3.0
KILLS_PER_MINUTE: Final = 300 / 20
COMPLETED_PER_MINUTE: Final = 10_000 / 20
SHORT: Final = 0.7
"""Of a run of less than five minutes less is asked: the first processes only just stand when the first is killed."""
RATE_MIN: Final = 0.25
DRAIN_SECONDS: Final = 360.0
BASELINE_SECONDS: Final = 20.0
CONCURRENCY: Final = 64
"""Callers learn of an end by a look every second, so each begins less than one transfer a second."""
AIM_SECONDS: Final = 1.0
REDRIVE_SECONDS: Final = 10
CLOSED: Final = ("completed", "compensated")
LEFT: Final = ("saga_outbox", "saga_outbox_delayed", "saga_outbox_blocked", "saga_queue", "saga_claim")
KEPT: Final = ("saga_parked", "saga_pending_reply")


@dataclass
class Summary:
    """What a run came to, and what is wrong with it."""

    stack: str
    minutes: float
    kills: Counter[str] = field(default_factory=Counter)
    idle_kills: int = 0
    baseline: float = 0.0
    run: Run = field(default_factory=Run)
    ended: Mapping[str, int] = field(default_factory=dict)
    drain_seconds: float = 0.0
    left: Mapping[str, int] = field(default_factory=dict)
    before: int = 0
    after: int = 0

    @property
    def rate(self) -> float:
        """Transfers a second while processes died."""
        return len(self.run.seconds) / max(self.run.took, 1e-9)

    def findings(self) -> list[str]:
        """Return what was asked for and is not so."""
        kills = self.kills.total()
        minutes = self.minutes if self.minutes >= 5 else self.minutes * SHORT
        asked = {
            f"{kills} kills with work in flight": kills >= int(KILLS_PER_MINUTE * minutes),
            f"{self.ended.get('completed', 0)} completed": self.ended.get("completed", 0)
            >= COMPLETED_PER_MINUTE * minutes,
            f"{self.rate:.0f}/s of {self.baseline:.0f}/s without faults": self.rate
            >= RATE_MIN * self.baseline,
            f"{self.run.conserved} of {self.run.snapshots} snapshots conserved": self.run.conserved
            == self.run.snapshots
            > 0,
            f"total before {self.before}, after {self.after}": self.before == self.after,
            f"every saga closed: {dict(self.ended)}": set(self.ended) <= set(CLOSED),
            f"nothing left: {dict(self.left)}": not self.left,
        }
        return [text for text, holds in asked.items() if not holds]

    def told(self) -> str:
        """Return the summary for people."""
        kills = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        return (
            f"{self.stack}, {self.minutes:g} minutes: {self.kills.total()} kills with work in flight ({kills}), "
            f"{self.idle_kills} without; {len(self.run.seconds)} transfers, {dict(self.ended)}; {self.rate:.0f}/s, "
            f"without faults {self.baseline:.0f}/s; {self.run.conserved} of {self.run.snapshots} snapshots conserved; "
            f"drained in {self.drain_seconds:.0f} s"
        )


class Chaos:
    """One run on one layout."""

    def __init__(self, stack: str, layout: Layout, minutes: float, seed: int) -> None:
        self._layout = layout
        self._seed = seed
        self._random = random.Random(seed)
        self._clock = SystemClock()
        self._accounts = opening(8)
        self._dying = False
        self.summary = Summary(stack, minutes)

    def play(self) -> Summary:
        """Run it."""
        return asyncio.run(self._play())

    async def _play(self) -> Summary:
        done = self.summary
        done.before = await asyncio.to_thread(self._total)
        baseline = await self._load("baseline").play_for(BASELINE_SECONDS, done.before)
        done.baseline = len(baseline.seconds) / baseline.took
        print(f"without faults: {done.baseline:.0f} transfers/s", flush=True)
        self._dying = True
        killing = asyncio.create_task(self._kill_on())
        load = self._load("chaos")
        done.run = await load.play_for(done.minutes * 60, done.before)
        self._dying = False
        await killing
        await self._drain()
        done.after = await asyncio.to_thread(self._total)
        return done

    def _load(self, name: str) -> Load:
        seed = f"{self._seed}-{name}"
        return Load(self._layout, self._accounts, concurrency=CONCURRENCY, seed=hash(seed) % 10**9)

    def _total(self) -> int:
        return self._layout.auditor.total()

    async def _kill_on(self) -> None:
        """Kill one after the other; one counts only if there was work in flight."""
        while self._dying:
            await self._clock.sleep(KILL_SECONDS)
            await asyncio.to_thread(self._kill_one)

    def _kill_one(self) -> None:
        open_ = self._in_flight()
        until = self._clock.monotonic() + AIM_SECONDS
        while not open_ and self._clock.monotonic() < until:
            open_ = self._in_flight()
        victim = self._random.choice(list(self._layout.services))
        self._layout.kill(victim)
        self._layout.raise_the_dead()
        if open_:
            self.summary.kills[victim] += 1
        else:
            self.summary.idle_kills += 1

    def _in_flight(self) -> int:
        return sum(count for state, count in states(self._layout.environment).items() if state not in CLOSED)

    async def _drain(self) -> None:
        """Wait until all is closed and nothing is on its way any more."""
        began = self._clock.monotonic()
        while True:
            self.summary.ended = await asyncio.to_thread(states, self._layout.environment)
            self.summary.left = await self._left_behind()
            closed = set(self.summary.ended) <= set(CLOSED)
            self.summary.drain_seconds = self._clock.monotonic() - began
            if (closed and not self.summary.left) or self.summary.drain_seconds > DRAIN_SECONDS:
                return
            await self._clock.sleep(1.0)

    async def _left_behind(self) -> dict[str, int]:
        """Return what is left in tables and queues, by name."""
        found: Counter[str] = Counter()
        urls = {
            self._layout.environment[f"MONEY_TRANSFER_{service.upper()}_DATABASE"]: service
            for service in SCHEMAS
        }
        for url, service in urls.items():
            found.update({f"{service}.{table}": count for table, count in (await _counts(url)).items()})
        broker = self._layout.environment["MONEY_TRANSFER_BROKER"]
        if broker.startswith("amqp"):
            found.update(await self._queues(broker))
        return {name: count for name, count in found.items() if count}

    async def _queues(self, url: str) -> dict[str, int]:
        namespace = self._layout.environment["DEMO_NAMESPACE"]
        spawner = TaskSpawner()
        broker = RabbitMQBroker(url, clock=self._clock, ids=SystemIds(), spawner=spawner)
        await broker.start()
        try:
            work = [replies_channel(namespace)]
            work += [commands_channel(namespace, service) for service in SCHEMAS if service != "coordinator"]
            names = [*work, *map(parking_channel, work)]
            return {name: (await broker.status(name)).messages for name in names}
        finally:
            await broker.close()
            await spawner.close()


async def _counts(url: str) -> dict[str, int]:
    query = "SELECT count(*) FROM {}"
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.partition(":///")[2], timeout=10.0)
        try:
            return {name: connection.execute(query.format(name)).fetchone()[0] for name in (*LEFT, *KEPT)}
        finally:
            connection.close()
    import asyncpg

    server: Any = await asyncpg.connect(url.replace("+asyncpg", ""), timeout=10.0)
    try:
        return {name: await server.fetchval(query.format(name)) for name in (*LEFT, *KEPT)}
    finally:
        await server.close(timeout=10.0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--stack", choices=[name for name in LAYOUTS if name != "sqlite"], required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    layout = LAYOUTS[options.stack](opening=opening(8))
    layout.environment["DEMO_REDRIVE_SECONDS"] = str(REDRIVE_SECONDS)
    with layout:
        print(f"chaos: {layout.title}\nseed {seed}", flush=True)
        began = time.monotonic()
        summary = Chaos(options.stack, layout, options.minutes, seed).play()
    print(summary.told())
    findings = summary.findings()
    for finding in findings:
        print(f"chaos: NOT SO: {finding}")
    print(f"chaos: {'failed' if findings else 'as asked'} after {time.monotonic() - began:.0f} s")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
