"""I-08: where a setting comes from, what a typo does, and for each setting a behaviour that it changes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from typer.testing import CliRunner

from saga import App, Participant, Saga, settings
from saga.brokers.base import Channel
from saga.brokers.memory import MemoryBroker, MemoryQueues
from saga.cli import build
from saga.clock import SystemClock, TaskSpawner
from saga.errors import ConfigurationError, InsecureLink, RetentionTooShort
from saga.messages import commands_channel, decode_commands, parking_channel
from saga.testing.clock import VirtualClock
from tests.plugins.canary import python_path
from tests.plugins.watch import CANARY as SECRET
from tests.upgraded import upgraded

SECONDS_MAX = 20.0


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the surroundings gets in."""
    for name in os.environ:
        if name.startswith(settings.PREFIX) and not settings.OURS.fullmatch(name):
            monkeypatch.delenv(name)


# --- where from -----------------------------------------------------------------------------------


@pytest.mark.feature("I-08")
@pytest.mark.stack("pure")
def test_code_wins_over_the_environment_and_the_environment_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "saga.env"
    file.write_text("SAGA_CONCURRENCY=1\nSAGA_POOL_SIZE=2\nSAGA_GRACE=3\nSHOP_COLOUR=red\n")
    monkeypatch.setenv(settings.FILE, str(file))
    monkeypatch.setenv("SAGA_POOL_SIZE", "20")
    monkeypatch.setenv("saga_grace", "30.5")

    known = App(grace=timedelta(minutes=5)).settings

    assert (known.concurrency, known.pool_size, known.grace) == (1, 20, timedelta(minutes=5))
    origins = {row.name: row.origin for row in settings.rows(known)}
    assert origins["concurrency"] == str(file)
    assert (origins["pool_size"], origins["grace"], origins["redrive"]) == ("environment", "code", "default")


@pytest.mark.feature("I-08", acceptance=True)
@pytest.mark.stack("pure")
@pytest.mark.parametrize(
    ("name", "near"),
    [("SAGA_DATABSE", "SAGA_DATABASE"), ("SAGA_POOLSIZE", "SAGA_POOL_SIZE"), ("saga_brokr", "SAGA_BROKER")],
)
def test_a_typo_stops_the_start_with_a_suggestion(
    name: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, SECRET)
    with pytest.raises(ConfigurationError) as caught:
        App()
    assert f"{name.upper()} in the environment is no setting; did you mean {near}?" == caught.value.text

    monkeypatch.delenv(name)
    file = tmp_path / "saga.env"
    file.write_text(f"{name}={SECRET}\n")
    monkeypatch.setenv(settings.FILE, str(file))
    with pytest.raises(ConfigurationError, match="SG201") as caught:
        App()
    assert f"in {file} is no setting; did you mean {near}?" in caught.value.text
    assert SECRET not in caught.value.text


@pytest.mark.feature("I-08")
@pytest.mark.stack("pure")
def test_a_name_that_is_near_nothing_gets_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGA_XYZZY", "1")
    with pytest.raises(ConfigurationError) as caught:
        App()
    assert "known are SAGA_DATABASE" in caught.value.text


@pytest.mark.feature("I-08")
@pytest.mark.stack("pure")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SAGA_POOL_SIZE", "0"),
        ("SAGA_POOL_SIZE", SECRET),
        ("SAGA_CONCURRENCY", "1.5"),
        ("SAGA_REDRIVE", "0"),
        ("SAGA_REDRIVE", SECRET),
        ("SAGA_GRACE", "-1"),
        ("SAGA_LOG_LEVEL", SECRET),
    ],
)
def test_a_value_that_does_not_fit_stops_the_start_and_is_not_shown(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        App()
    assert caught.value.text.startswith(f"{name} (environment) does not fit: ")
    assert SECRET not in f"{caught.value!r}{caught.value.text}{caught.value.__notes__}"


@pytest.mark.feature("I-08")
@pytest.mark.stack("pure")
def test_a_file_that_is_not_there_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.FILE, "/nowhere/saga.env")
    with pytest.raises(ConfigurationError) as caught:
        App()
    assert "/nowhere/saga.env" in caught.value.text


@pytest.mark.feature("I-08")
@pytest.mark.stack("pure")
def test_crash_points_and_the_tools_of_the_tests_are_no_typos(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*settings.FAILPOINTS, "SAGA_TEST_POSTGRES_URL", "SAGA_DEVSERVICES_TOKEN"):
        monkeypatch.setenv(name, "")
        monkeypatch.setenv(name, "x")
    App()


# --- who may see it -------------------------------------------------------------------------------


@pytest.mark.feature("L-11")
@pytest.mark.stack("pure")
@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"postgresql://me:{SECRET}@db/shop", "postgresql://me:***@db/shop"),
        (f"postgresql://me:{SECRET}@x@y/z@db/shop", "postgresql://me:***@db/shop"),
        (f"postgresql://db/shop?password={SECRET}&ssl=on", "postgresql://db/shop?password=***&ssl=***"),
        (f"amqp://:{SECRET}@mq", "amqp://:***@mq"),
        ("sqlite:///saga.db", "sqlite:///saga.db"),
        ("memory://", "memory://"),
        (SECRET, "***"),
    ],
)
def test_an_address_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert settings.masked(url) == shown
    known = settings.load(database=url, broker=url)
    assert SECRET not in f"{known!r} {known} {settings.rows(known)}"


@pytest.mark.feature("I-08")
@pytest.mark.stack("pure")
def test_saga_config_lists_value_origin_and_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGA_DATABASE", f"postgresql://me:{SECRET}@db/shop")
    monkeypatch.setenv("SAGA_REDRIVE", "5")
    (tmp_path / "config_app.py").write_text("from saga import App\napp = App(pool_size=7)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    plain = CliRunner().invoke(build(), ["config"])
    with_app = CliRunner().invoke(build(), ["config", "config_app:app", "--json"])

    sys.modules.pop("config_app", None)
    assert (plain.exit_code, with_app.exit_code) == (0, 0), plain.output + with_app.output
    lines = [re.split(r"\s{2,}", line) for line in plain.output.splitlines()]
    assert lines[0] == ["setting", "value", "origin", "default"]
    assert ["database", "postgresql://me:***@db/shop", "environment", "-"] in lines
    assert ["redrive", "5", "environment", "30"] in lines
    assert ["pool_size", "10", "default", "10"] in lines
    found = {row["name"]: row for row in json.loads(with_app.output)}
    assert found["pool_size"] == {
        "name": "pool_size",
        "variable": "SAGA_POOL_SIZE",
        "value": 7,
        "origin": "code",
        "default": 10,
    }
    assert SECRET not in plain.output + with_app.output


@pytest.mark.feature("I-08")
@pytest.mark.stack("pure")
def test_saga_config_names_a_typo_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGA_BROKR", "x")
    done = CliRunner().invoke(build(), ["config"])
    assert done.exit_code == 2
    assert "did you mean SAGA_BROKER?" in done.output


@pytest.mark.feature("I-08", acceptance=True)
@pytest.mark.stack("pure")
def test_the_reference_page_is_what_the_code_says() -> None:
    """Made by `python -m devservices.settings_page`."""
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == settings.reference()


@pytest.mark.feature("I-08")
@pytest.mark.stack("pure")
def test_there_are_few_settings_and_each_has_a_test_of_what_it_changes() -> None:
    names = {row.name for row in settings.rows(settings.load())}
    assert len(names) <= 20
    assert names == set(CHANGES), "CHANGES below names a test for each"
    for test in CHANGES.values():
        assert test.__name__.startswith("test_"), test


@pytest.mark.feature("I-08")
@pytest.mark.stack("pure")
def test_importing_the_library_does_not_import_what_reads_settings() -> None:
    code = "import sys, saga; print('pydantic_settings' in sys.modules, 'dotenv' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# --- what each changes ----------------------------------------------------------------------------


class Job(BaseModel):
    seconds: float = 0.0


class Bench:
    """A participant whose handler tells how many of its kind ran at once."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.participant = Participant("bench", start_to_close=timedelta(seconds=30))

        @self.participant.activity(no_compensation="nothing stays", name="work")
        async def work(job: Job) -> None:
            await self._count(job)

        @self.participant.activity(no_compensation="nothing stays", name="write")
        async def write(job: Job, session: AsyncSession) -> None:
            await session.execute(text("SELECT 1"))
            await self._count(job)

        self.saga = Saga("bench", Job).step(work)
        self.writing = Saga("bench-writing", Job).step(write)

    async def _count(self, job: Job) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await SystemClock().sleep(job.seconds)
        finally:
            self.running -= 1


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def sqlite(request: pytest.FixtureRequest) -> Iterator[str]:
    with upgraded("sqlite", request) as url:
        yield url


async def together(app: App, saga: Saga[Job, Any], count: int, seconds: float) -> None:
    async with app, asyncio.timeout(SECONDS_MAX):
        await asyncio.gather(*(app.client.execute(saga, Job(seconds=seconds)) for _ in range(count)))


async def test_database_is_where_the_sagas_are(
    bench: Bench, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGA_DATABASE", sqlite)
    await together(App(sagas=[bench.saga], participants=[bench.participant]), bench.saga, 1, 0)
    assert await scalar(sqlite, "SELECT count(*) FROM saga_instance") == 1

    monkeypatch.delenv("SAGA_DATABASE")
    with pytest.raises(ConfigurationError, match="SG201"):
        App(sagas=[bench.saga])


async def test_broker_is_what_carries_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    spawner = TaskSpawner()
    names = []
    for url in ("memory://", "amqp://nobody:nothing@127.0.0.1:1/"):
        monkeypatch.setenv("SAGA_BROKER", url)
        names.append(App().make_broker(spawner, None).capabilities.name)
    assert names == ["memory", "rabbitmq"]
    monkeypatch.setenv("SAGA_BROKER", "carrier-pigeon://loft")
    with pytest.raises(ConfigurationError, match="SG201"):
        App().make_broker(spawner, None)
    await spawner.close()


async def test_namespace_is_in_every_row(bench: Bench, sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGA_NAMESPACE", "blue")
    app = App(sqlite, sagas=[bench.saga], participants=[bench.participant])
    await together(app, bench.saga, 1, 0)
    assert await scalar(sqlite, "SELECT DISTINCT namespace FROM saga_instance") == "blue"


async def test_schema_is_where_our_tables_are(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGA_SCHEMA", "elsewhere")
    spawner = TaskSpawner()
    database = App(postgres_url).make_database(spawner)
    assert database is not None
    found = await database.run(lambda connection: connection.execute(text("SHOW search_path")).scalar_one())
    await database.dispose()
    await spawner.close()
    assert found == '"elsewhere"'


async def test_concurrency_bounds_the_commands_at_once(
    bench: Bench, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGA_CONCURRENCY", "2")
    app = App(sqlite, sagas=[bench.saga], participants=[bench.participant])
    await together(app, bench.saga, 6, 0.05)
    assert bench.most == 2


async def test_pool_size_bounds_the_transactions_at_once(
    bench: Bench, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGA_POOL_SIZE", "3")
    with upgraded("postgres-rabbitmq", request) as url:
        app = App(url, sagas=[bench.writing], participants=[bench.participant])
        await together(app, bench.writing, 8, 0.05)
    assert bench.most == 3


async def test_redrive_is_when_a_command_is_sent_again(
    bench: Bench, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGA_REDRIVE", "0.2")
    queues = MemoryQueues()
    wire = MemoryBroker(queues)
    channel = commands_channel("default", "bench")
    await wire.declare([Channel(channel, parking_channel(channel))])
    consumer = await wire.consume(channel, prefetch=10)
    resent: list[bool] = []
    async with App(sqlite, sagas=[bench.saga], broker=MemoryBroker(queues)) as app:
        await app.client.start(bench.saga, Job())
        async with asyncio.timeout(SECONDS_MAX):
            while len(resent) < 2:
                for delivery in await consumer.receive():
                    resent += [command.resend for command in decode_commands(delivery.body)]
    await wire.close()
    assert resent == [False, True]


async def test_grace_is_what_a_stop_gives_to_what_runs(
    bench: Bench, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGA_GRACE", "0.1")
    clock = SystemClock()
    app = App(sqlite, sagas=[bench.saga], participants=[bench.participant])
    async with app:
        await app.client.start(bench.saga, Job(seconds=30))
        async with asyncio.timeout(SECONDS_MAX):
            while not bench.running:
                await clock.sleep(0.01)
        since = clock.monotonic()
    assert clock.monotonic() - since < 15, "and not the 30 s of the default, nor the handler's"
    assert bench.running == 0


async def test_retention_is_how_long_ended_runs_are_kept(
    bench: Bench, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []
    clock = VirtualClock(ticking=True)
    app = App(sqlite, sagas=[bench.saga], participants=[bench.participant], clock=clock)
    await together(app, bench.saga, 1, 0)
    clock.jump(timedelta(days=2).total_seconds())
    for retention in ("259200", "86400"):
        monkeypatch.setenv("SAGA_RETENTION", retention)
        async with App(sqlite, sagas=[bench.saga], clock=clock) as app:
            await app.purge()
        left.append(await scalar(sqlite, "SELECT count(*) FROM saga_instance"))
    assert left == [1, 0]


async def test_barrier_retention_is_how_old_a_run_may_be_for_its_commands_to_be_run(
    bench: Bench, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a day later its rows go."""
    left = []
    clock = VirtualClock(ticking=True)
    app = App(sqlite, sagas=[bench.writing], participants=[bench.participant], clock=clock)
    await together(app, bench.writing, 1, 0)
    clock.jump(timedelta(days=50).total_seconds())
    for days in (50, 48):
        monkeypatch.setenv("SAGA_BARRIER_RETENTION", str(days * 86_400))
        async with App(sqlite, participants=[bench.participant], clock=clock) as app:
            await app.purge()
        left.append(await scalar(sqlite, "SELECT count(*) FROM saga_barrier"))
    assert left == [1, 0]

    monkeypatch.setenv("SAGA_BARRIER_RETENTION", str(30 * 86_400))
    with pytest.raises(RetentionTooShort) as caught:
        await App(sqlite, participants=[bench.participant]).start(coordinator=False, participants=True)
    assert "SAGA_BARRIER_RETENTION to more than 2592300 seconds" in caught.value.text


def test_log_level_is_that_of_the_program(tmp_path: Path) -> None:
    (tmp_path / "quiet.py").write_text(
        "import logging\n"
        "class App:\n"
        "    async def run_coordinator(self, stop, grace):\n"
        "        logging.getLogger('saga.x').debug('a detail')\n"
        "app = App()\n"
    )
    told = []
    for level in ("info", "debug"):
        done = subprocess.run(
            [sys.executable, "-m", "saga.cli", "coordinator", "quiet:app"],
            cwd=tmp_path,
            env={**os.environ, "SAGA_LOG_LEVEL": level, "PYTHONPATH": python_path(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        told.append("a detail" in done.stderr)
    assert told == [False, True]


async def test_production_is_when_plain_links_to_other_hosts_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SAGA_BROKER", "amqp://mq.invalid/")
    App().check_links()
    assert "may be in plain text" in caplog.text

    monkeypatch.setenv("SAGA_PRODUCTION", "true")
    with pytest.raises(InsecureLink, match="SG207"):
        await App().start(coordinator=False, participants=False)


CHANGES: dict[str, Callable[..., Any]] = {
    "database": test_database_is_where_the_sagas_are,
    "broker": test_broker_is_what_carries_the_commands,
    "namespace": test_namespace_is_in_every_row,
    "schema": test_schema_is_where_our_tables_are,
    "concurrency": test_concurrency_bounds_the_commands_at_once,
    "pool_size": test_pool_size_bounds_the_transactions_at_once,
    "redrive": test_redrive_is_when_a_command_is_sent_again,
    "grace": test_grace_is_what_a_stop_gives_to_what_runs,
    "production": test_production_is_when_plain_links_to_other_hosts_are_refused,
    "retention": test_retention_is_how_long_ended_runs_are_kept,
    "barrier_retention": test_barrier_retention_is_how_old_a_run_may_be_for_its_commands_to_be_run,
    "log_level": test_log_level_is_that_of_the_program,
}


async def scalar(url: str, query: str) -> Any:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        found = (await connection.execute(text(query))).scalar_one()
    await engine.dispose()
    return found
