"""The demo as a user runs it: exit status, last line, and which scenario misses a protection that was taken away."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import pytest
from aio_pika.exceptions import ChannelNotFoundEntity

from devservices import Kafka, MariaDb, Postgres, RabbitMq
from examples.money_transfer.__main__ import main
from examples.money_transfer.apps import SCHEMAS
from examples.money_transfer.scenarios import SCENARIOS
from saga.messages import commands_channel, parking_channel, replies_channel
from tests.plugins.watch import CANARY

ROOT = Path(__file__).parents[2]
SECONDS_MAX = 300
LAST_LINE = re.compile(r"demo: (\d) of (\d) scenarios as expected; total before (\d+), after (\d+)")


class Demo:
    """One run of the demo."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        ran = subprocess.run(
            [sys.executable, "-m", "examples.money_transfer", "demo", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=SECONDS_MAX,
            check=False,
        )
        self.status = ran.returncode
        self.text = ran.stdout + ran.stderr
        assert CANARY not in self.text, "the password of an address"
        self.last_line = ran.stdout.rstrip().rpartition("\n")[2]
        found = LAST_LINE.fullmatch(self.last_line)
        assert found is not None, self.text
        self.good, self.of, self.before, self.after = map(int, found.groups())

    @property
    def failed(self) -> set[str]:
        """Names of the scenarios that did not go as expected."""
        parts = re.split(r"\n\n\d  ([a-z ]+): ", self.text)
        return {
            name for name, told in zip(parts[1::2], parts[2::2], strict=True) if "NOT AS EXPECTED" in told
        }


@pytest.fixture
def servers(postgres_server: Postgres, rabbitmq_server: RabbitMq) -> dict[str, str]:
    """The environment that `python -m devservices run` gives to a demo on servers."""
    return {"SAGA_DEMO_POSTGRES_URL": postgres_server.url, "SAGA_DEMO_RABBITMQ_URL": rabbitmq_server.url}


@pytest.mark.slow
@pytest.mark.feature("I-11")
@pytest.mark.stack("sqlite")
def test_embedded_demo_ends_with_every_scenario_as_expected_and_no_cent_lost() -> None:
    demo = Demo("--stack", "sqlite")
    assert (demo.status, demo.failed) == (0, set()), demo.text
    assert demo.good == demo.of == len(SCENARIOS) == 8
    assert demo.before == demo.after > 0


@pytest.mark.slow
@pytest.mark.feature("I-11")
@pytest.mark.stack("postgres-rabbitmq")
def test_demo_on_servers_ends_with_scenarios_as_expected_and_no_cent_lost(
    servers: dict[str, str],
) -> None:
    """The one in which processes die; CI plays all eight by `make demo`."""
    chosen = ["--scenario", "crash"]
    demo = Demo("--stack", "postgres-rabbitmq", *chosen, **servers)
    assert (demo.status, demo.failed) == (0, set()), demo.text
    assert demo.good == demo.of == 1
    assert demo.before == demo.after > 0


@pytest.mark.slow
@pytest.mark.feature("I-11")
@pytest.mark.feature("G-04")
@pytest.mark.stack("postgres-kafka")
def test_a_transfer_over_kafka_goes_forward_and_back(postgres_server: Postgres, kafka_server: Kafka) -> None:
    """Order, redelivery and offsets of a log are the services' own business; CI plays all eight by `make demo`."""
    chosen = ["--scenario", "success", "--scenario", "unknown target", "--scenario", "copies"]
    servers = {"SAGA_DEMO_POSTGRES_URL": postgres_server.url, "SAGA_DEMO_KAFKA_URL": kafka_server.url}
    demo = Demo("--stack", "postgres-kafka", *chosen, **servers)
    assert (demo.status, demo.failed) == (0, set()), demo.text
    assert demo.good == demo.of == 3
    assert demo.before == demo.after > 0


@pytest.mark.slow
@pytest.mark.feature("I-11")
@pytest.mark.feature("G-02", acceptance=True)
@pytest.mark.parametrize("stack", ["postgres", "mariadb", "sqlite-shared"])
def test_a_transfer_over_separate_processes_needs_nothing_but_a_database(
    stack: str, postgres_server: Postgres, mariadb_server: MariaDb
) -> None:
    """Forward and back; CI plays all eight by `make demo`."""
    chosen = ["--scenario", "unknown target"]
    servers = {"SAGA_DEMO_POSTGRES_URL": postgres_server.url, "SAGA_DEMO_MARIADB_URL": mariadb_server.url}
    demo = Demo("--stack", stack, *chosen, **servers)
    assert (demo.status, demo.failed) == (0, set()), demo.text
    assert demo.good == demo.of == 1
    assert demo.before == demo.after > 0


@pytest.mark.slow
@pytest.mark.feature("I-11")
@pytest.mark.feature("G-08")
@pytest.mark.parametrize("stack", ["mariadb-rabbitmq", "mariadb-kafka"])
def test_a_transfer_on_mariadb_goes_forward_and_back(
    stack: str, mariadb_server: MariaDb, request: pytest.FixtureRequest
) -> None:
    """`make demo STACK=all` plays all eight."""
    broker = stack.partition("-")[2]
    servers = {
        "SAGA_DEMO_MARIADB_URL": mariadb_server.url,
        f"SAGA_DEMO_{broker.upper()}_URL": request.getfixturevalue(f"{broker}_server").url,
    }
    demo = Demo("--stack", stack, "--scenario", "unknown target", "--scenario", "copies", **servers)
    assert (demo.status, demo.failed) == (0, set()), demo.text
    assert demo.good == demo.of == 2
    assert demo.before == demo.after > 0


@pytest.mark.slow
@pytest.mark.feature("I-11")
@pytest.mark.stack("postgres-rabbitmq")
def test_money_is_conserved_at_rest_with_a_database_for_every_service(servers: dict[str, str]) -> None:
    """Without one database there is no snapshot of all books, so only the ends are compared."""
    chosen = ["--scenario", "success", "--scenario", "unknown target"]
    demo = Demo("--stack", "postgres-rabbitmq", "--database-each", *chosen, **servers)
    assert (demo.status, demo.failed) == (0, set()), demo.text
    assert demo.good == demo.of == 2
    assert demo.before == demo.after > 0


@pytest.fixture
def owner(postgres_server: Postgres) -> Iterator[str]:
    """The address of the server as somebody who is no superuser, and may make databases and roles."""
    name, password = postgres_server.create_role()
    postgres_server.execute(f"ALTER ROLE {name} CREATEDB CREATEROLE")
    yield postgres_server.database_url("postgres", role=name, password=password).replace("+asyncpg", "")
    postgres_server.drop_role(name)


@pytest.mark.slow
@pytest.mark.feature("I-11")
@pytest.mark.parametrize("form", ["a broker", "no broker", "the database as broker"])
def test_demo_on_given_servers_leaves_nothing_behind_and_tells_no_password(
    form: str, owner: str, postgres_server: Postgres, request: pytest.FixtureRequest
) -> None:
    rabbitmq: RabbitMq | None = request.getfixturevalue("rabbitmq_server") if form == "a broker" else None
    broker = rabbitmq.url if rabbitmq else owner if form == "the database as broker" else ""
    chosen = ["success", "lost reply"] if rabbitmq else ["unknown target"]
    arguments = [word for name in chosen for word in ("--scenario", name)]
    demo = Demo(*arguments, DEMO_ON_DATABASE=owner, DEMO_ON_BROKER=broker)
    assert (demo.status, demo.failed) == (0, set()), demo.text
    assert demo.good == demo.of == len(chosen)
    assert str(urlsplit(owner).password) not in demo.text
    (name,) = set(re.findall(r"saga_demo_\w+", demo.text))
    made = "SELECT datname FROM pg_database UNION ALL SELECT rolname FROM pg_roles"
    assert not [row for row in postgres_server.execute(made)[0] if row[0].startswith(name)]
    if rabbitmq:
        namespace = name.replace("saga_demo_", "demo-")
        assert f"saga.{namespace}.*" in demo.text
        queues = [replies_channel(namespace), *(commands_channel(namespace, each) for each in SCHEMAS)]
        assert not asyncio.run(there(rabbitmq.url, [*queues, *map(parking_channel, queues)]))


async def there(url: str, queues: Sequence[str]) -> list[str]:
    """Return those of the queues that exist."""
    found = []
    async with await aio_pika.connect(url, timeout=10) as connection:
        for name in queues:
            channel = await connection.channel()  # asking for one that is missing closes the channel
            with suppress(ChannelNotFoundEntity):
                await channel.declare_queue(name, passive=True, timeout=10)
                found.append(name)
    return found


@pytest.mark.feature("I-11")
@pytest.mark.stack("pure")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--broker", "amqp://u:canary@h/"], "the database's address must be of the form postgresql://"),
        (["--database", "oracle://u:canary@h/x"], "the database's address must be of the form postgresql://"),
        (["--database", "mariadb://u:canary@127.0.0.1:1/x"], "MariaDB does not answer"),
        (["--database", "postgresql://u:p/canary@h/x"], "the database's address must be of the form"),
        (
            ["--database", "postgresql://u:canary@h/x", "--broker", "redis://u:canary@h"],
            "the broker's address",
        ),
        (["--database", "postgresql://u:canary@127.0.0.1:1/x"], "PostgreSQL does not answer"),
    ],
)
def test_servers_that_cannot_be_used_end_the_demo_with_2_and_no_password(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr("examples.money_transfer.__main__.signal.signal", lambda *_: None)
    assert main(["demo", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("demo: ")
    assert said in told
    assert "canary" not in told


@pytest.mark.slow
@pytest.mark.feature("I-11")
@pytest.mark.stack("sqlite")
@pytest.mark.parametrize(
    ("sabotage", "caught_by", "may_notice_too"),
    [
        # A crash between two commits repeats a command as well; whether it does depends on the point drawn.
        ("barrier", "lost reply", {"crash"}),
        ("redrive", "lost reply", set()),
        ("compensation", "unknown target", set()),
    ],
)
def test_demo_misses_a_protection_in_the_scenario_that_is_there_for_it(
    sabotage: str, caught_by: str, may_notice_too: set[str]
) -> None:
    chosen = [word for scenario in SCENARIOS[:5] for word in ("--scenario", scenario.name)]
    demo = Demo("--stack", "sqlite", "--sabotage", sabotage, *chosen)
    assert demo.status != 0
    assert caught_by in demo.failed, demo.text
    assert demo.failed <= {caught_by} | may_notice_too, demo.text
    assert demo.good == demo.of - len(demo.failed)
