"""Row D-17: a participant in Node, written from the wire page alone, does its step under duplicates and kills."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from devservices import Kafka, RabbitMq
from saga import App, SagaCompensated
from saga.brokers.base import Broker
from saga.brokers.kafka import KafkaBroker
from saga.brokers.rabbitmq import RabbitMQBroker
from saga.clock import TaskSpawner
from saga.storage.sqlalchemy import schema
from tests.examples.parcels import SECONDS_MAX, Order, Parcel, Wire, purchase, shop
from tests.kafka_proxy import KafkaProxy
from tests.proxy import Direction, Proxy

pytestmark = [pytest.mark.slow, pytest.mark.feature("D-17", acceptance=True)]

SOURCE: Final = Path(__file__).parents[2] / "examples" / "participant_node"
WAITING: Final = (
    "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' "
    "AND query LIKE 'INSERT INTO parcel%'"
)
PATIENCE: Final = timedelta(seconds=SECONDS_MAX)


@pytest.fixture(
    params=[
        pytest.param("rabbitmq", marks=pytest.mark.stack("postgres-rabbitmq")),
        pytest.param("kafka", marks=pytest.mark.stack("postgres-kafka")),
    ]
)
def broker_url(request: pytest.FixtureRequest) -> str:
    """The address of the broker, on each of both."""
    server: RabbitMq | Kafka = request.getfixturevalue(f"{request.param}_server")
    return server.url


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The participant with its packages, in a folder of its own."""
    npm = shutil.which("npm")
    if npm is None:
        told = pytest.fail if os.environ.get("CI") else pytest.skip
        told("npm is not there: install Node.js 18 or later")
    folder = tmp_path_factory.mktemp("node") / "participant"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run([str(npm), "ci", "--no-audit", "--no-fund"], cwd=folder, check=True, timeout=300)
    return folder


class Node:
    """The participant's process, and its database."""

    def __init__(self, program: Path, url: str, namespace: str) -> None:
        self.namespace = namespace
        self._program = program
        self._url = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
        self._process: subprocess.Popen[str] | None = None

    async def start(self, broker: str) -> None:
        self._spawn({"SAGA_NAMESPACE": self.namespace, "DATABASE_URL": self._url, "BROKER_URL": broker})
        assert self._process is not None
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        assert line.strip() == "participant is up"

    def _spawn(self, named: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["node", "participant.js"],
            cwd=self._program,
            env={**os.environ, **named},
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def rows(self, query: str) -> list[Any]:
        with self._engine.connect() as connection:
            return list(connection.execute(text(query)).all())

    @contextmanager
    def table_locked(self, table: str) -> Iterator[None]:
        """Let whoever writes to the table wait inside his transaction."""
        with self._engine.begin() as connection:
            connection.execute(text(f"LOCK TABLE {table} IN EXCLUSIVE MODE"))
            yield

    async def until(self, query: str, count: int) -> None:
        async with asyncio.timeout(SECONDS_MAX):
            while len(self.rows(query)) < count:  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.02)

    def close(self) -> None:
        self.kill()
        self._engine.dispose()


@pytest.fixture
def node(program: Path, postgres_url: str) -> Iterator[Node]:
    made = Node(program, postgres_url, f"node-{secrets.token_hex(4)}")
    yield made
    made.close()


@pytest.fixture
async def app(node: Node, postgres_url: str, broker_url: str) -> AsyncIterator[App]:
    engine = create_async_engine(postgres_url)
    async with engine.begin() as connection:
        await connection.run_sync(schema.upgrade)
    await engine.dispose()
    running = App(
        postgres_url,
        broker=broker_url,
        namespace=node.namespace,
        sagas=[purchase],
        participants=[shop],
        redrive=timedelta(seconds=2),
    )
    async with running:
        yield running


async def test_it_does_its_step_and_takes_it_back(app: App, node: Node, broker_url: str) -> None:
    await node.start(broker_url)
    good = await app.client.start(purchase, Order(id="o-1"))
    assert await good.result(timeout=PATIENCE) == Parcel(parcel="o-1")
    bad_card = await app.client.start(purchase, Order(id="o-2", card="stolen"))
    with pytest.raises(SagaCompensated):
        await bad_card.result(timeout=PATIENCE)
    heavy = await app.client.start(purchase, Order(id="o-3", grams=40_000))
    with pytest.raises(SagaCompensated):
        await heavy.result(timeout=PATIENCE)
    assert node.rows("SELECT id, cancelled FROM parcel ORDER BY id") == [("o-1", False), ("o-2", True)]


async def test_killed_between_commit_and_reply_it_answers_from_its_row(
    app: App, node: Node, broker_url: str
) -> None:
    """Rule 3: each of the kills leaves a commit whose reply and ack were swallowed on the way."""
    handles = []
    async with (KafkaProxy if broker_url.startswith("kafka:") else Proxy)(broker_url) as link:
        for number in range(1, 4):
            await node.start(link.url)
            with node.table_locked("parcel"):
                handles.append(await app.client.start(purchase, Order(id=f"o-{number}")))
                await node.until(WAITING, 1)
                link.drop(Direction.TO_SERVER)
            await node.until("SELECT 1 FROM barrier", number)
            node.kill()
            link.heal()
    await node.start(broker_url)
    for handle in handles:
        await handle.result(timeout=PATIENCE)
    assert len(node.rows("SELECT 1 FROM parcel")) == 3
    assert node.rows("SELECT DISTINCT outcome FROM barrier") == [("done",)]


@pytest.fixture
async def wire(node: Node, broker_url: str) -> AsyncIterator[Wire]:
    spawner = TaskSpawner()
    kind = KafkaBroker if broker_url.startswith("kafka:") else RabbitMQBroker
    broker: Broker = kind(broker_url, spawner=spawner)
    made = Wire(node.namespace, broker)
    await made.open()
    await node.start(broker_url)
    yield made
    await broker.close()
    await spawner.close()


async def test_an_undo_before_its_action_has_nothing_to_undo_and_the_action_never_runs(
    wire: Wire, node: Node
) -> None:
    """Rules 4 and 5."""
    undo = wire.command("r-1", "compensate", {"input": None, "output": None, "undo": None})
    await wire.send(undo, replace(undo, id="again", resend=True))
    assert [reply.outcome for reply in await wire.answers(2)] == ["nothing_to_undo"] * 2
    await wire.send(wire.command("r-1", "forward", {"id": "o-1", "address": "x", "grams": 1, "card": "good"}))
    (late,) = await wire.answers(1)
    assert (late.outcome, late.data["code"]) == ("refused", "cancelled")
    assert node.rows("SELECT * FROM parcel") == []


async def test_copies_are_answered_alike_and_have_one_effect(wire: Wire, node: Node) -> None:
    """Rules 1, 2 and 12: at once, and later."""
    action = wire.command("r-2", "forward", {"id": "o-2", "address": "x", "grams": 1, "card": "good"})
    await wire.send(*[replace(action, id=f"copy-{number}", resend=number > 0) for number in range(5)])
    first = await wire.answers(5)
    await wire.send(replace(action, id="late", resend=True))
    assert {(each.outcome, each.data["output"]["parcel"]) for each in [*first, *await wire.answers(1)]} == {
        ("done", "o-2")
    }
    assert len(node.rows("SELECT * FROM parcel")) == 1


async def test_a_final_refusal_is_kept_and_a_fence_tells_what_stands(wire: Wire, node: Node) -> None:
    """Rules 7 and 8."""
    heavy = wire.command("r-3", "forward", {"id": "o-3", "address": "x", "grams": 40_000, "card": "good"})
    await wire.send(heavy, replace(heavy, id="again", attempt=2))
    assert [(each.outcome, each.data["code"]) for each in await wire.answers(2)] == [
        ("refused", "too_heavy")
    ] * 2
    await wire.send(wire.command("r-3", "fence", {"input": None}))
    assert (await wire.answers(1))[0].outcome == "nothing_to_undo"
    done = wire.command("r-4", "forward", {"id": "o-4", "address": "x", "grams": 1, "card": "good"})
    await wire.send(done)
    await wire.answers(1)
    await wire.send(wire.command("r-4", "fence", {"input": None}))
    (fenced,) = await wire.answers(1)
    assert (fenced.outcome, fenced.data["output"]) == ("had_run", {"parcel": "o-4"})


async def test_what_is_no_command_of_ours_is_parked(wire: Wire) -> None:
    await wire.spoil(b"no json at all")
    assert await wire.parked() == b"no json at all"
