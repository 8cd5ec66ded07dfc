"""`make chaos STACK=postgres-rabbitmq MINUTES=20`: money transfers while a process is killed every 3 seconds.

A coordinator or participant dies by SIGKILL, whatever it is doing, and is started again. With `--kill-broker 5` so does
the broker five times, and comes back on the same data. All the money there is is read in one snapshot every second. At
the end every saga is closed, each step has its one effect in its place, and nothing is left in outbox, queues, claims
and parking. What is asked of a run grows with the minutes that the broker was up: 300 kills with work in flight and
10,000 completed transfers in 20, at a quarter of the rate that the same machine has without faults, measured before.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from devservices import Origin, Service, Unavailable
from devservices.provide import PROVIDERS
from examples.money_transfer.apps import SCHEMAS
from examples.money_transfer.books import ends, snapshot, states
from examples.money_transfer.layouts import LAYOUTS, Layout, Servers
from examples.money_transfer.load import Load, Run, opening
from saga.adapters import make_broker
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.messages import commands_channel, parking_channel, replies_channel

KILL_SECONDS: Final = 3.0
ON_KAFKA: Final = ("postgres-kafka", "mariadb-kafka")
KILL_SECONDS_OF: Final[Mapping[str, float]] = dict.fromkeys(ON_KAFKA, 10.0)
"""A group of Kafka's stands still until the session of its dead member has run out, which takes 6 s."""
KILLS: Final = 0.75
"""Of the kills that there is time for so many must be made; an aim takes time, too."""
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
DOWN_SECONDS: Final = 1.0
"""How long a broker that was killed is left for dead."""
TWICE: Final[Mapping[str, tuple[str, ...]]] = dict.fromkeys(ON_KAFKA, ("savings-2", "coordinator-2"))
"""Where partitions move between the members of a group there are groups of two."""
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
    wrong: list[str] = field(default_factory=list)
    """Transfers whose effects are not those of their end."""
    broker_kills_wanted: int = 0
    broker_kills: int = 0
    """With work in flight."""
    outage_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Transfers a second while processes died and the broker was up."""
        return len(self.run.seconds) / max(self.run.took - self.outage_seconds, 1e-9)

    def findings(self) -> list[str]:
        """Return what was asked for and is not so."""
        kills = self.kills.total()
        minutes = self.minutes - self.outage_seconds / 60
        minutes *= 1 if self.minutes >= 5 else SHORT
        asked = {
            f"{kills} kills with work in flight": kills
            >= int(KILLS * minutes * 60 / _kill_seconds(self.stack)),
            f"{self.ended.get('completed', 0)} completed": self.ended.get("completed", 0)
            >= COMPLETED_PER_MINUTE * minutes,
            f"{self.rate:.0f}/s of {self.baseline:.0f}/s without faults": self.rate
            >= RATE_MIN * self.baseline,
            f"{self.run.conserved} of {self.run.snapshots} snapshots conserved": self.run.conserved
            == self.run.snapshots
            > 0,
            f"total before {self.before}, after {self.after}": self.before == self.after,
            f"{len(self.wrong)} transfers with other effects than their end's: {self.wrong[:3]}": not self.wrong,
            f"{self.broker_kills} kills of the broker with work in flight": self.broker_kills
            >= self.broker_kills_wanted,
            f"every saga closed: {dict(self.ended)}": set(self.ended) <= set(CLOSED),
            f"nothing left: {dict(self.left)}": not self.left,
        }
        return [text for text, holds in asked.items() if not holds]

    def told(self) -> str:
        """Return the summary for people."""
        kills = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        broker = (
            f"the broker {self.broker_kills} times, away for {self.outage_seconds:.0f} s; "
            if self.broker_kills_wanted
            else ""
        )
        return (
            f"{self.stack}, {self.minutes:g} minutes: {self.kills.total()} kills with work in flight ({kills}), "
            f"{self.idle_kills} without; {broker}{len(self.run.seconds)} transfers, {dict(self.ended)}; "
            f"{self.rate:.0f}/s, without faults {self.baseline:.0f}/s; "
            f"{self.run.conserved} of {self.run.snapshots} snapshots conserved; "
            f"{len(self.wrong)} with wrong effects; drained in {self.drain_seconds:.0f} s"
        )


class Chaos:
    """One run on one layout."""

    def __init__(
        self, stack: str, layout: Layout, minutes: float, seed: int, *, broker: Service | None, times: int
    ) -> None:
        """`broker` is the server to be killed so many times."""
        self._layout = layout
        self._victims = (*layout.services, *TWICE.get(stack, ()))
        self._broker = broker
        self._broker_up = asyncio.Lock()
        self._seed = seed
        self._random = random.Random(seed)
        self._clock = SystemClock()
        self._accounts = opening(8)
        self._dying = False
        self.summary = Summary(stack, minutes, broker_kills_wanted=times)

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
        killing = [asyncio.create_task(each) for each in (self._kill_on(), self._kill_broker_on())]
        load = self._load("chaos")
        done.run = await load.play_for(done.minutes * 60, done.before)
        self._dying = False
        await asyncio.gather(*killing)
        await self._drain()
        done.after = await asyncio.to_thread(self._total)
        books = await asyncio.to_thread(self._layout.auditor.read)
        done.wrong = books.wrong(await asyncio.to_thread(ends, self._layout.environment))
        return done

    def _load(self, name: str) -> Load:
        seed = f"{self._seed}-{name}"
        return Load(self._layout, self._accounts, concurrency=CONCURRENCY, seed=hash(seed) % 10**9)

    def _total(self) -> int:
        return self._layout.auditor.total()

    async def _kill_on(self) -> None:
        """Kill one after the other; one counts only if there was work in flight."""
        while self._dying:
            await self._clock.sleep(_kill_seconds(self.summary.stack))
            async with (
                self._broker_up
            ):  # without one nothing is in flight, and a process that starts ends at once
                await asyncio.to_thread(self._kill_one)

    async def _kill_broker_on(self) -> None:
        """Kill it in the middle of each of as many parts of the run."""
        if self._broker is None:
            return
        began = self._clock.monotonic()
        part = self.summary.minutes * 60 / self.summary.broker_kills_wanted
        for number in range(self.summary.broker_kills_wanted):
            due = began + part * (number + 0.5)
            await self._clock.sleep(max(due - self._clock.monotonic(), 0.0))
            async with self._broker_up:
                await asyncio.to_thread(self._kill_broker, self._broker)

    def _kill_broker(self, broker: Service) -> None:
        self.summary.broker_kills += bool(self._aim())
        began = self._clock.monotonic()
        broker.kill()
        time.sleep(DOWN_SECONDS)
        broker.start()
        self.summary.outage_seconds += self._clock.monotonic() - began
        self._layout.raise_the_dead()

    def _aim(self) -> int:
        """Return how many are in flight, having waited a moment for one."""
        open_ = self._in_flight()
        until = self._clock.monotonic() + AIM_SECONDS
        while not open_ and self._clock.monotonic() < until:
            open_ = self._in_flight()
        return open_

    def _kill_one(self) -> None:
        open_ = self._aim()
        victim = self._random.choice(self._victims)
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
            self._layout.raise_the_dead()
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
        if broker.startswith(("amqp", "kafka")):
            found.update(await self._queues(broker))
        return {name: count for name, count in found.items() if count}

    async def _queues(self, url: str) -> dict[str, int]:
        namespace = self._layout.environment["DEMO_NAMESPACE"]
        spawner = TaskSpawner()
        broker = make_broker(url, None, clock=self._clock, ids=SystemIds(), spawner=spawner)
        await broker.start()
        try:
            work = [replies_channel(namespace)]
            work += [commands_channel(namespace, service) for service in SCHEMAS if service != "coordinator"]
            names = [*work, *map(parking_channel, work)]
            return {name: (await broker.status(name)).messages for name in names}
        finally:
            await broker.close()
            await spawner.close()


def _kill_seconds(stack: str) -> float:
    return KILL_SECONDS_OF.get(stack, KILL_SECONDS)


async def _counts(url: str) -> dict[str, int]:
    names = (*LEFT, *KEPT)
    found = await snapshot(url, [f"SELECT count(*) FROM {name}" for name in names])
    return {name: rows[0][0] for name, rows in zip(names, found, strict=True)}


def _servers_of(layout: type[Layout], stack: ExitStack) -> dict[str, Service]:
    """Start the servers that a layout needs and the environment does not name; return those by name."""
    started: dict[str, Service] = {}
    parts = (layout.databases, layout.channels) if issubclass(layout, Servers) else ()
    for part in parts:
        if part is not None and part.variable not in os.environ:
            server = started[part.name] = stack.enter_context(PROVIDERS[part.name]())
            os.environ[part.variable] = server.url
            print(f"chaos: {server.description}", flush=True)
    return started


def _broker_of(layout: type[Layout], started: Mapping[str, Service]) -> Service:
    """Return the broker that may be killed. Raises Unavailable if there is none of our own."""
    channels = layout.channels if issubclass(layout, Servers) else None
    if channels is None:
        raise Unavailable("this stack has no broker beside its database")
    server = started.get(channels.name)
    if server is None or server.origin is not Origin.LOCAL:
        raise Unavailable(f"only a {channels.title} that was started from local programs is killed")
    return server


def _play(
    kind: type[Layout], options: argparse.Namespace, seed: int, stack: ExitStack
) -> tuple[Summary, float]:
    started = _servers_of(kind, stack)
    broker = _broker_of(kind, started) if options.kill_broker else None
    layout = kind(opening=opening(8))
    layout.supervised = broker is not None
    layout.environment["DEMO_REDRIVE_SECONDS"] = str(REDRIVE_SECONDS)
    with layout:
        for name in TWICE.get(options.stack, ()):
            layout.launch(name).wait_until_ready()
        print(f"chaos: {layout.title}\nseed {seed}", flush=True)
        began = time.monotonic()
        chaos = Chaos(options.stack, layout, options.minutes, seed, broker=broker, times=options.kill_broker)
        return chaos.play(), time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--stack", choices=[name for name in LAYOUTS if name != "sqlite"], required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument(
        "--kill-broker", type=int, default=0, metavar="TIMES", help="by SIGKILL, started again"
    )
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    for driver in ("aiormq", "aio_pika", "aiokafka"):  # a broker that is away is what is asked for
        logging.getLogger(driver).setLevel(logging.CRITICAL)
    seed = random.randrange(10**6) if options.seed is None else options.seed
    try:
        with ExitStack() as stack:
            summary, seconds = _play(LAYOUTS[options.stack], options, seed, stack)
    except Unavailable as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    print(summary.told())
    findings = summary.findings()
    for finding in findings:
        print(f"chaos: NOT SO: {finding}")
    print(f"chaos: {'failed' if findings else 'as asked'} after {seconds:.0f} s")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
