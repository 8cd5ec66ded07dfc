"""A process that cannot start says within 15 s what it cannot reach, without its password, and exits with status 1."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from saga.app import ROLE_START_SECONDS
from tests.plugins.canary import python_path
from tests.proxy import ProxyFactory

ROOT: Final = Path(__file__).parents[2]
SECONDS_MAX: Final = 15.0
STARTS: Final = 3
"""A process beside others takes a while to begin: as many times what one takes that only prints its settings."""
SECRET: Final = "s3cr3t-canary"

APP: Final = """
import os
from datetime import timedelta

from saga import App, Participant, Saga

bank = Participant("bank", start_to_close=timedelta(seconds=5))


@bank.activity(no_compensation="it does nothing")
async def wait(seconds: int) -> None: ...


waiting = Saga("waiting", int).step(wait)
app = App(os.environ["START_DATABASE"], broker=os.environ["START_BROKER"], sagas=[waiting], participants=[bank])
"""

pytestmark = [pytest.mark.feature("H-01")]


@pytest.fixture
def closed() -> Iterator[str]:
    """Host and port at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and never listening, so that nobody else gets it
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """Host and port at which connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def timed(
    folder: Path, environment: dict[str, str], *arguments: str
) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run the program; return how many seconds it took, and what became of it."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "saga.cli", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return time.monotonic() - began, done


def upgrade(url: str) -> None:
    done = subprocess.run([sys.executable, "-m", "saga.cli", "db", "upgrade", "--database", url], check=False)
    assert done.returncode == 0


def fails(folder: Path, role: str, database: str, broker: str) -> str:
    """Start a process that is to fail in time; return what it said, in one line."""
    (folder / "service.py").write_text(APP)
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(ROOT),
        "START_DATABASE": database,
        "START_BROKER": broker,
    }
    start, _ = timed(folder, environment, "config")
    took, process = timed(folder, environment, role, "service:app")
    assert took < SECONDS_MAX + STARTS * start
    said = process.stdout + process.stderr
    assert process.returncode == 1, said
    assert SECRET not in said
    assert "Traceback" not in said
    return " ".join(said.split())


@pytest.mark.stack("sqlite", "postgres-rabbitmq", "postgres")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "what", "how"),
    [
        ("coordinator", "database", "closed"),
        ("participant", "database", "closed"),
        ("coordinator", "broker", "closed"),
        ("participant", "broker", "closed"),
        ("participant", "database as broker", "closed"),
        # each of these takes its ten seconds
        ("coordinator", "database", "silent"),
        ("participant", "broker", "silent"),
        ("participant", "database as broker", "silent"),
    ],
)
def test_what_cannot_be_reached_is_named(
    role: str, what: str, how: str, sqlite_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place: str = request.getfixturevalue(how)
    address = f"postgresql://saga:{SECRET}@{place}/shop"
    database, broker, said = {
        "database": (address, "database://", f"StorageUnavailable [SG501] The database at {place}/shop"),
        "broker": (
            sqlite_url,
            f"amqp://saga:{SECRET}@{place}/",
            f"BrokerUnavailable [SG503] RabbitMQ at {place}",
        ),
        "database as broker": (
            sqlite_url,
            address,
            f"BrokerUnavailable [SG503] The database at {place}/shop",
        ),
    }[what]
    assert f"saga: {said} was not reached: " in fails(tmp_path, role, database, broker)


@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.slow
async def test_two_slow_servers_in_a_row_have_one_bound(
    postgres_url: str, silent: str, tmp_path: Path, proxy: ProxyFactory
) -> None:
    """The database takes its seconds and answers; what is left for the broker is less than it would have alone."""
    await asyncio.to_thread(upgrade, postgres_url)
    link = await proxy(postgres_url)
    link.delay(timedelta(seconds=0.08))
    began = time.monotonic()
    said = await asyncio.to_thread(
        fails, tmp_path, "coordinator", link.url, f"amqp://saga:{SECRET}@{silent}/"
    )
    assert (
        "saga: BrokerUnavailable [SG503] The broker rabbitmq answers too slowly to start on; try again."
        in said
    )
    assert time.monotonic() - began > ROLE_START_SECONDS


@pytest.mark.stack("sqlite")
@pytest.mark.parametrize("role", ["coordinator", "participant"])
def test_a_file_that_cannot_be_opened_is_named(role: str, tmp_path: Path) -> None:
    file = tmp_path / "nowhere" / "saga.db"
    said = fails(tmp_path, role, f"sqlite:///{file}", "memory://")
    assert f"saga: ConfigurationError [SG201] The file {file} cannot be opened as a database: " in said


@pytest.mark.stack("postgres")
@pytest.mark.parametrize("role", ["coordinator", "participant"])
def test_a_database_without_our_tables_says_how_they_get_there(
    role: str, postgres_url: str, tmp_path: Path
) -> None:
    said = fails(tmp_path, role, postgres_url, "database://")
    assert "saga: SchemaMismatch [SG204]" in said
    assert "saga db upgrade" in said


@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.slow
@pytest.mark.parametrize("role", ["coordinator", "participant"])
def test_a_refused_log_in_is_named(role: str, rabbitmq_url: str, sqlite_url: str, tmp_path: Path) -> None:
    parts = urlsplit(rabbitmq_url)
    said = fails(tmp_path, role, sqlite_url, f"amqp://nobody:{SECRET}@{parts.hostname}:{parts.port}/")
    assert (
        f"ConfigurationError [SG201] RabbitMQ at {parts.hostname}:{parts.port}: it refuses the log-in" in said
    )
