"""Participant processes that are killed, asked to stop or frozen inside their handlers, while another one is there."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from saga.app import App
from saga.brokers.rabbitmq import RabbitMQBroker
from saga.client import Handle
from saga.clock import SystemClock, TaskSpawner
from saga.messages import commands_channel
from tests.crash import workers
from tests.crash.books import ACCOUNTS, accounts, bookings, metadata
from tests.crash.workers import Job
from tests.plugins.features import Faults
from tests.proxy import ProxyFactory
from tests.upgraded import upgraded

pytestmark = pytest.mark.stack("postgres-rabbitmq")

ROOT: Final = Path(__file__).parents[2]
SECONDS_MAX: Final = 60.0
"""Generous: a loaded machine is no failure."""
REDELIVERED_SECONDS_MAX: Final = 2.0
LIMIT_SECONDS: Final = 5.0
JOBS: Final = 20

clock = SystemClock()


class Workshop:
    """The coordinator in this process, and workers in processes of their own."""

    def __init__(self, url: str, broker: str, place: Path) -> None:
        self.namespace = f"work-{secrets.token_hex(4)}"
        self.place = place
        self.limit = 30.0
        self.app = App(url, broker=broker, namespace=self.namespace, sagas=[workers.jobs])
        self.handles: list[Handle[Any]] = []
        self._broker = broker
        self._running: list[subprocess.Popen[bytes]] = []
        self._environment = {"DATABASE": url, "NAMESPACE": self.namespace, "PLACE": str(place)}

    async def worker(
        self, name: str, *, grace: float = 30.0, broker: str | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a worker and wait until it takes commands."""
        own = {**self._environment, "NAME": name, "LIMIT": str(self.limit)}
        own["BROKER"] = broker or self._broker
        count = await self._consumers()
        with (self.place / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(  # noqa: ASYNC220 - it returns as soon as the process is there
                [
                    sys.executable,
                    "-m",
                    "saga.cli",
                    "participant",
                    "tests.crash.workers:app",
                    "--grace",
                    str(grace),
                ],
                cwd=ROOT,
                env={**os.environ, **{f"WORKERS_{key}": value for key, value in own.items()}},
                stderr=log,
            )
        self._running.append(process)
        while await self._consumers() == count:
            assert process.poll() is None, self.log_of(name)
            await clock.sleep(0.05)
        return process

    async def _consumers(self) -> int:
        spawner = TaskSpawner()
        broker = RabbitMQBroker(self._broker, spawner=spawner)
        await broker.start()
        try:
            return (await broker.status(commands_channel(self.namespace, workers.works.name))).consumers
        finally:
            await broker.close()
            await spawner.close()

    async def start(self, count: int) -> None:
        for _ in range(count):
            job = Job(id=f"job-{len(self.handles)}")
            self.handles.append(await self.app.client.start(workers.jobs, job, id=job.id))

    def entered(self) -> list[tuple[str, str]]:
        """Return who entered a handler, for which job, in order."""
        notes = self.place / workers.NOTES
        lines = notes.read_text().splitlines() if notes.exists() else []
        return [(name, job) for name, _, job in (line.partition(" ") for line in lines)]

    def log_of(self, name: str) -> str:
        return (self.place / f"{name}.log").read_text()

    def jobs_of(self, name: str) -> set[str]:
        return {job for who, job in self.entered() if who == name}

    async def until(self, holds: Callable[[], Any]) -> float:
        """Poll until `holds()`; return how many seconds that took."""
        since = clock.monotonic()
        while not holds():
            assert clock.monotonic() - since < SECONDS_MAX, self.entered()
            await clock.sleep(0.005)
        return clock.monotonic() - since

    async def held_by(self, name: str, *, beside: str) -> set[str]:
        """Start jobs; return those that one worker holds while the other one has done the rest."""
        before = len(self.handles)
        await self.start(JOBS)
        mine = {handle.id for handle in self.handles[before:]}
        await self.until(lambda: self.jobs_of(name) | self.jobs_of(beside) >= mine)
        held = self.jobs_of(name) & mine
        assert held, "the queue is shared"
        return held

    async def ended(self) -> None:
        for handle in self.handles:
            await handle.result(timeout=timedelta(seconds=SECONDS_MAX))

    async def exit(self, process: subprocess.Popen[bytes]) -> int:
        await self.until(lambda: process.poll() is not None)
        return process.returncode

    def close(self) -> None:
        for process in self._running:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with upgraded("postgres-rabbitmq", request) as url:
        yield url


@pytest.fixture
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        rows = [{"id": id, "balance": balance} for id, balance in ACCOUNTS.items()]
        await connection.execute(insert(accounts), rows)
    yield engine
    await engine.dispose()


@pytest.fixture
async def workshop(
    engine: AsyncEngine, url: str, rabbitmq_url: str, tmp_path: Path
) -> AsyncIterator[Workshop]:
    made = Workshop(url, rabbitmq_url, tmp_path)
    try:
        async with made.app:
            yield made
    finally:
        made.close()


async def check_books(engine: AsyncEngine, workshop: Workshop) -> None:
    """I2: every job has its effect, and has it once."""
    async with engine.connect() as connection:
        effects = Counter((await connection.execute(select(bookings.c.run))).scalars())
    assert set(effects) == {str(handle.run_id) for handle in workshop.handles}
    assert set(effects.values()) == {1}


@pytest.mark.feature("D-16", acceptance=True, scale=0.1)
@pytest.mark.slow
async def test_what_a_killed_participant_held_is_with_another_one_within_two_seconds(
    workshop: Workshop, engine: AsyncEngine, faults: Faults
) -> None:
    """D-16, F1, I2: by the broker's redelivery: the coordinator would send again after 30 s only."""
    faults.declare("kill -9 in handlers")
    await workshop.worker("survivor")
    for number in range(3):
        name = f"holds-{number}"
        process = await workshop.worker(name)
        held = await workshop.held_by(name, beside="survivor")
        process.kill()
        faults.fired("kill -9 in handlers")
        seconds = await workshop.until(lambda held=held: workshop.jobs_of("survivor") >= held)  # type: ignore[misc]
        assert seconds < REDELIVERED_SECONDS_MAX
    await workshop.ended()
    await check_books(engine, workshop)
    assert len(workshop.entered()) == len(workshop.handles) + sum(
        len(workshop.jobs_of(f"holds-{number}")) for number in range(3)
    ), "no handler ran but those that were killed, and each job's once more"


@pytest.mark.feature("D-16")
@pytest.mark.slow
async def test_a_participant_past_its_grace_and_one_told_twice_hand_back_what_they_hold(
    workshop: Workshop, engine: AsyncEngine
) -> None:
    """D-16, P17, F3: SIGTERM ends by itself after the grace, a second one at once; nothing is answered or committed."""
    await workshop.worker("survivor")
    patient = await workshop.worker("holds-patient", grace=0.5)
    held = await workshop.held_by("holds-patient", beside="survivor")
    patient.terminate()
    assert await workshop.exit(patient) == 0
    assert await workshop.until(lambda: workshop.jobs_of("survivor") >= held) < REDELIVERED_SECONDS_MAX

    hurried = await workshop.worker("holds-hurried", grace=SECONDS_MAX)
    held = await workshop.held_by("holds-hurried", beside="survivor")
    hurried.terminate()
    await workshop.until(lambda: "SIGTERM: stopping" in workshop.log_of("holds-hurried"))
    hurried.terminate()
    assert await workshop.exit(hurried) == 128 + signal.SIGTERM
    assert await workshop.until(lambda: workshop.jobs_of("survivor") >= held) < REDELIVERED_SECONDS_MAX

    await workshop.ended()
    await check_books(engine, workshop)


@pytest.mark.feature("D-16")
@pytest.mark.slow
async def test_a_participant_that_is_told_to_stop_ends_what_it_runs_and_takes_no_more(
    workshop: Workshop, engine: AsyncEngine
) -> None:
    """D-16, P17: what could end within the grace is not run again by anybody."""
    leaving = await workshop.worker("holds-leaving")
    await workshop.start(JOBS)
    await workshop.until(lambda: len(workshop.jobs_of("holds-leaving")) == JOBS)
    leaving.terminate()
    await workshop.until(lambda: "SIGTERM: stopping" in workshop.log_of("holds-leaving"))
    await workshop.start(JOBS)
    (workshop.place / workers.RELEASE).touch()
    assert await workshop.exit(leaving) == 0
    assert len(workshop.entered()) == JOBS

    await workshop.worker("next")
    await workshop.ended()
    assert len(workshop.jobs_of("next")) == JOBS
    assert len(workshop.entered()) == 2 * JOBS
    await check_books(engine, workshop)


@pytest.mark.feature("D-05")
@pytest.mark.slow
async def test_p28_a_participant_frozen_in_its_handler_past_the_limit_commits_nothing_when_it_wakes(
    workshop: Workshop, engine: AsyncEngine, rabbitmq_url: str, proxy: ProxyFactory
) -> None:
    """P28, F2, F27: another one finishes meanwhile; the frozen one's open transaction stays without effect."""
    workshop.limit = LIMIT_SECONDS
    link = await proxy(rabbitmq_url)
    frozen = await workshop.worker("holds-frozen", broker=link.url)
    await workshop.start(1)
    await workshop.until(lambda: workshop.jobs_of("holds-frozen"))
    frozen.send_signal(signal.SIGSTOP)
    since = clock.monotonic()
    assert await open_transactions(engine) == 1, "it was stopped inside its handler"
    await workshop.worker("other")
    link.reset()  # the broker takes it for dead, as it does by itself after a while, and delivers again
    await workshop.ended()
    assert workshop.jobs_of("other") == {"job-0"}
    await workshop.until(lambda: clock.monotonic() - since > LIMIT_SECONDS)
    assert await open_transactions(engine) == 1, "that it stays without effect is not the database's doing"
    (workshop.place / workers.RELEASE).touch()
    frozen.send_signal(signal.SIGCONT)

    until = clock.monotonic() + SECONDS_MAX
    while len(workshop.jobs_of("holds-frozen")) == 1:  # it has to find its way back to the broker first
        assert clock.monotonic() < until, "it works on"
        await workshop.start(JOBS)
        await workshop.ended()
    assert await open_transactions(engine) == 0
    await check_books(engine, workshop)


async def open_transactions(engine: AsyncEngine) -> int:
    """Return how many transactions of others stand open with a handler's write in them."""
    mine = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND state = 'idle in transaction' AND query LIKE 'INSERT INTO booking%'"
    )
    async with engine.connect() as connection:
        return int((await connection.execute(text(mine))).scalar_one())
