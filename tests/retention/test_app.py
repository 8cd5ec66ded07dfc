"""F-11, F-10: what an app purges, on whose word, and what it refuses to start with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from typer.testing import CliRunner

from saga import App, DefinitionError, Description, FileArchive, Participant, Saga
from saga.brokers.kafka import KafkaBroker
from saga.brokers.kafka.options import KafkaOptions
from saga.brokers.memory import MEMORY
from saga.cli import build
from saga.errors import ConfigurationError, RetentionTooShort
from saga.participant.service import ParticipantService
from saga.retention.ages import PARKED_AGE, check_barrier_age
from saga.testing import Environment
from saga.testing.clock import VirtualClock
from tests.coordinator.harness import Order, Receipt
from tests.retention.rows import DAY, Kept
from tests.upgraded import upgraded

pytestmark = [pytest.mark.feature("F-11"), pytest.mark.stack("sqlite")]

bank = Participant("bank", start_to_close=timedelta(seconds=30))


@bank.activity
async def withdraw(order: Order, session: AsyncSession) -> Receipt:
    await session.execute(text("SELECT 1"))
    return Receipt()


@withdraw.compensation
async def refund(order: Order, session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))


purchase = Saga("purchase", Order).step(withdraw)
PLACE: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    """`app` is what the program loads, made anew for each command."""
    if name == "app":
        return App(**PLACE)
    raise AttributeError(name)


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with upgraded("sqlite", request) as url:
        yield url


async def fill(url: str, clock: VirtualClock, count: int = 3) -> None:
    """Some runs that are over, with their decisions."""
    async with App(url, sagas=[purchase], participants=[bank], clock=clock) as app:
        for number in range(count):
            await app.client.execute(purchase, Order(), id=f"o-{number}", timeout=timedelta(seconds=60))


async def scalar(url: str, query: str) -> Any:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        found = (await connection.execute(text(query))).scalar_one()
    await engine.dispose()
    return found


async def test_a_coordinator_purges_runs_and_a_participant_decisions(url: str) -> None:
    """Each what is its own; messages that were parked are of both."""
    clock = VirtualClock(ticking=True)
    await fill(url, clock)
    clock.jump(92 * DAY.total_seconds())
    async with App(url, sagas=[purchase], clock=clock) as app:
        assert await app.purge(preview=True) == {"saga_instance": 3, "saga_parked": 0}
        assert await app.purge() == {"saga_instance": 3, "saga_parked": 0}
    assert await scalar(url, "SELECT count(*) FROM saga_barrier") == 3
    async with App(url, participants=[bank], clock=clock) as app:
        assert await app.purge() == {"saga_barrier": 3, "saga_lone_run": 0, "saga_parked": 0}
    assert await scalar(url, "SELECT count(*) FROM saga_barrier") == 0


async def test_an_app_purges_by_itself_within_two_hours(url: str) -> None:
    clock = VirtualClock(ticking=True)
    await fill(url, clock)
    clock.jump(31 * DAY.total_seconds())
    archive = Kept()
    async with App(url, sagas=[purchase], clock=clock, archive=archive), asyncio.timeout(60):
        while await scalar(url, "SELECT count(*) FROM saga_instance"):
            clock.jump(30.0)
            await asyncio.sleep(0.02)
    assert len(archive.ids) == 3


async def test_a_process_learns_at_its_start_how_far_decisions_were_purged(url: str) -> None:
    """P12: with a longer age its commands are refused all the same."""
    clock = VirtualClock(ticking=True)
    async with App(url, sagas=[purchase], participants=[bank], clock=clock) as app:
        handle = await app.client.start(purchase, Order(), id="long ago")
        await handle.result(timeout=timedelta(seconds=60))
        clock.jump(50 * DAY.total_seconds())
    async with App(url, participants=[bank], clock=clock, barrier_retention=40 * DAY) as app:
        assert (await app.purge())["saga_barrier"] == 1
    async with App(url, participants=[bank], clock=clock, barrier_retention=365 * DAY) as app:
        running = app._running
        assert running is not None
        (service,) = running.services
        assert isinstance(service, ParticipantService)
        horizon = service._commands._horizon
        assert horizon is not None
        assert horizon.is_behind(handle.run_id)


async def test_a_run_that_is_open_at_that_age_needs_attention_and_never_counts_as_undone(url: str) -> None:
    """Its step is in doubt, and nobody can tell any more whether there is something to undo."""
    clock = VirtualClock(ticking=True)
    async with App(url, sagas=[purchase], clock=clock) as app:
        handle = await app.client.start(purchase, Order(), id="left alone")
    clock.jump(100 * DAY.total_seconds())
    async with App(url, sagas=[purchase], participants=[bank], clock=clock) as app, asyncio.timeout(60):
        while not (seen := await handle_of(app, handle.id)).incidents:
            clock.jump(30.0)
            await asyncio.sleep(0.02)
    assert (seen.status, seen.incidents) == (
        "needs_attention",
        (("compensation_failed", "withdraw", "too_old"),),
    )
    assert await scalar(url, "SELECT count(*) FROM saga_barrier") == 0
    assert await scalar(url, "SELECT count(DISTINCT reason) FROM saga_parked WHERE reason = 'too_old'") == 1


async def handle_of(app: App, id: str) -> Description:
    found = await app.client.look_up(id)
    return await app.client.describe_run(found)


async def test_an_app_that_does_not_run_purges_nothing(url: str) -> None:
    with pytest.raises(ConfigurationError):
        await App(url, sagas=[purchase]).purge()


async def test_an_age_that_is_too_short_stops_the_start_of_a_participant_only(url: str) -> None:
    short = PARKED_AGE - DAY
    with pytest.raises(RetentionTooShort) as caught:
        await App(url, participants=[bank], barrier_retention=short).start(
            coordinator=False, participants=True
        )
    assert caught.value.code == "SG208"
    async with App(url, sagas=[purchase], barrier_retention=short):
        """A coordinator has no barrier."""


@pytest.mark.parametrize(
    ("kept_seconds", "days", "fits"),
    [(None, 30.0, False), (None, 30.1, True), (14 * 86_400.0, 44.0, False), (14 * 86_400.0, 44.1, True)],
)
def test_the_age_exceeds_what_broker_parking_and_redrive_need(
    kept_seconds: float | None, days: float, fits: bool
) -> None:
    """P12: F-10's formula."""
    kept = KafkaBroker(
        "kafka://nowhere:9092", options=KafkaOptions(retention_seconds=kept_seconds or -1)
    ).capabilities
    assert kept.retention_seconds == kept_seconds
    if fits:
        check_barrier_age(days * DAY, kept, timedelta(seconds=30))
    else:
        with pytest.raises(RetentionTooShort) as caught:
            check_barrier_age(days * DAY, kept, timedelta(seconds=30))
        assert "kafka" in caught.value.text
    with pytest.raises(RetentionTooShort):
        check_barrier_age(days * DAY, MEMORY, timedelta(days=2))


def test_retention_is_no_part_of_the_definition() -> None:
    """It may change without another version of the saga."""
    kept = Saga("purchase", Order, retention=DAY).step(withdraw)
    assert kept.compile().fingerprint == purchase.compile().fingerprint
    assert (kept.compile().retention, purchase.compile().retention) == (DAY, None)
    with pytest.raises(DefinitionError):
        Saga("purchase", Order, retention=timedelta(0))


def test_saga_db_purge_shows_what_would_go_and_asks(url: str, tmp_path: Path) -> None:
    clock = VirtualClock(ticking=True)
    asyncio.run(fill(url, clock, count=2))
    clock.jump(92 * DAY.total_seconds())
    path = tmp_path / "runs.jsonl"
    PLACE.update(database=url, sagas=[purchase], participants=[bank], clock=clock, archive=FileArchive(path))

    def program(*arguments: str, input: str = "") -> tuple[int, str]:
        command = ["db", "purge", "--app", "tests.retention.test_app:app", *arguments]
        result = CliRunner().invoke(build(), command, input=input)
        return result.exit_code, result.output

    status, output = program(input="n\n")
    assert status == 1
    assert "saga_instance: 2\n" in output
    assert "purge these?" in output
    assert asyncio.run(scalar(url, "SELECT count(*) FROM saga_instance")) == 2
    assert not path.exists()

    status, output = program("--yes", "--json")
    assert (status, json.loads(output)) == (
        0,
        {"purged": {"saga_instance": 2, "saga_parked": 0, "saga_barrier": 2, "saga_lone_run": 0}},
    )
    assert len(path.read_text().splitlines()) == 2
    status, output = program()
    assert (status, output.count("saga_instance: 0\n")) == (0, 2), "nothing to ask about"


async def test_in_an_environment_a_run_begins_on_its_clock() -> None:
    """Time that was jumped over does not make what starts then too old."""
    async with Environment(purchase) as env:
        await env.advance(timedelta(days=400))
        ended = await env.run(purchase, Order())
        assert ended.status == "completed"
