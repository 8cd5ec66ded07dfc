"""Row I-05: activities in a FastStream service, beside its own subscribers and on its connection, on both brokers."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Final

import pytest
from faststream.kafka import KafkaBroker
from faststream.rabbit import RabbitBroker
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession

from devservices import Kafka, RabbitMq
from saga import App, Saga, SagaCompensated
from saga.adapters import make_broker
from saga.brokers.base import Broker, OutMessage
from saga.brokers.faststream import FastStreamBroker
from saga.clock import SystemClock, SystemIds, TaskSpawner
from tests.examples.parcels import SECONDS_MAX, Order, Parcel, Wire, parcels, purchase, ship, shop
from tests.upgraded import upgraded

pytestmark = [pytest.mark.slow, pytest.mark.feature("I-05")]

ROOT: Final = Path(__file__).parents[2]
PATIENCE: Final = timedelta(seconds=SECONDS_MAX)
clock = SystemClock()

label = parcels.contract("label", Order, str, no_compensation="a label is thrown away")
labelled = Saga("labelled", Order).step(ship).step(label).returns(label.out)
KAFKA: Final = pytest.param("kafka", marks=pytest.mark.stack("postgres-kafka"))
RABBITMQ: Final = pytest.param("rabbitmq", marks=pytest.mark.stack("postgres-rabbitmq"))


@pytest.fixture(params=[RABBITMQ, KAFKA])
def broker_url(request: pytest.FixtureRequest) -> str:
    """The address of the broker, on each of both."""
    server: RabbitMq | Kafka = request.getfixturevalue(f"{request.param}_server")
    return server.url


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    with upgraded("postgres-rabbitmq", request) as url:
        yield url


class Service:
    """The service's process, and its database."""

    def __init__(self, url: str, broker: str, folder: Path) -> None:
        self.namespace = f"stream-{secrets.token_hex(4)}"
        self._engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
        self._named = {"DATABASE_URL": url, "BROKER_URL": broker, "SAGA_NAMESPACE": self.namespace}
        self._folder = folder
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        with self._engine.begin() as connection:
            connection.execute(text("CREATE TABLE parcel (id text PRIMARY KEY, cancelled boolean NOT NULL)"))
            connection.execute(
                text(
                    "CREATE TABLE note (number serial PRIMARY KEY, handler text NOT NULL, text text NOT NULL)"
                )
            )

    async def start(self, fail: str = "") -> None:
        self._starts += 1
        log = self._folder / f"{self._starts}.log"
        with log.open("wb") as told:
            self._spawn({**self._named, "SAGA_FAIL": fail}, told)
        assert self._process is not None
        async with asyncio.timeout(SECONDS_MAX):
            while b"service is up" not in log.read_bytes():
                assert self._process.poll() is None, log.read_text()
                await clock.sleep(0.02)

    def _spawn(self, named: dict[str, str], told: IO[bytes]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.examples.faststream_parcels"],
            cwd=ROOT,
            env={**os.environ, **named},
            stdout=told,
            stderr=told,
        )

    async def died(self) -> int:
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait, SECONDS_MAX)

    async def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return await self.died()

    def rows(self, query: str) -> list[Any]:
        with self._engine.connect() as connection:
            return list(connection.execute(text(query)).all())

    async def until(self, query: str, count: int) -> None:
        async with asyncio.timeout(SECONDS_MAX):
            while len(self.rows(query)) < count:
                await clock.sleep(0.02)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._engine.dispose()


@pytest.fixture
def service(database: str, broker_url: str, tmp_path: Path) -> Iterator[Service]:
    made = Service(database, broker_url, tmp_path)
    yield made
    made.close()


@pytest.fixture
async def app(service: Service, database: str, broker_url: str) -> AsyncIterator[App]:
    """The coordinator, with another participant, over our own adapter."""
    running = App(
        database,
        broker=broker_url,
        namespace=service.namespace,
        sagas=[purchase, labelled],
        participants=[shop],
        redrive=timedelta(seconds=2),
    )
    async with running:
        yield running


@pytest.fixture
async def broker(broker_url: str) -> AsyncIterator[Broker]:
    spawner = TaskSpawner()
    made = make_broker(broker_url, None, clock=clock, ids=SystemIds(), spawner=spawner)
    await made.start()
    yield made
    await made.close()
    await spawner.close()


@pytest.fixture
async def wire(service: Service, broker: Broker) -> Wire:
    made = Wire(service.namespace, broker)
    await made.open()
    await service.start()
    return made


@pytest.mark.feature("I-05", acceptance=True)
async def test_its_activities_are_steps_beside_its_own_subscribers(
    app: App, service: Service, broker: Broker
) -> None:
    await service.start()
    good = await app.client.start(purchase, Order(id="o-1"))
    assert await good.result(timeout=PATIENCE) == Parcel(parcel="o-1")
    for id, order, reason in (
        ("o-2", Order(id="o-2", card="stolen"), "card_refused"),
        ("o-3", Order(id="o-3", grams=40_000), "too_heavy"),
    ):
        with pytest.raises(SagaCompensated) as ended:
            await app.client.execute(purchase, order, id=id, timeout=PATIENCE)
        assert ended.value.reason == reason
    told = await app.client.execute(labelled, Order(id="o-4"), timeout=PATIENCE)
    assert told == "7 Dovecote Lane (500 g)"
    assert service.rows("SELECT id, cancelled FROM parcel ORDER BY id") == [
        ("o-1", False),
        ("o-2", True),
        ("o-4", False),
    ]
    for channel in ("notes", "asked"):
        named = f"{service.namespace}.{channel}"
        (sent,) = broker.publish([OutMessage(named, b'"hello"', "application/json")])
        assert await sent == "confirmed"
    await service.until("SELECT 1 FROM note", 2)
    assert sorted(service.rows("SELECT handler, text FROM note")) == [("answer", "hello?"), ("note", "hello")]
    assert await service.stop() == 0


@pytest.mark.feature("I-05", acceptance=True)
async def test_killed_between_commit_and_reply_it_answers_from_its_barrier(
    app: App, service: Service
) -> None:
    for point in ("W5", "W6"):
        await service.start(f"{point}:kill")
        handle = await app.client.start(purchase, Order(id=point))
        assert await service.died() == -9
        assert service.rows(f"SELECT id FROM parcel WHERE id = '{point}'") == [(point,)]
        await service.start()
        assert await handle.result(timeout=PATIENCE) == Parcel(parcel=point)
        assert await service.stop() == 0
    assert len(service.rows("SELECT 1 FROM parcel")) == 2


@pytest.mark.feature("I-05", acceptance=True)
async def test_copies_are_answered_alike_and_have_one_effect(wire: Wire, service: Service) -> None:
    action = wire.command("0198c0de-0000-4000-8000-000000000002", "forward", _order("o-2"))
    for number in range(3):
        copy = replace(action, id=f"copy-{number}", resend=number > 0)
        await wire.send(copy, copy)  # who comes while the other runs shares its answer
        (first, *_) = await wire.answers(1)
        assert (first.outcome, first.data["output"]["parcel"]) == ("done", "o-2")
    assert len(service.rows("SELECT * FROM parcel")) == 1


async def test_an_undo_before_its_action_has_nothing_to_undo_and_the_action_never_runs(
    wire: Wire, service: Service
) -> None:
    run = "0198c0de-0000-4000-8000-000000000001"
    undo = wire.command(run, "compensate", {"input": None, "output": None, "undo": None})
    for copy in (undo, replace(undo, id="again", resend=True)):
        await wire.send(copy)
        assert [reply.outcome for reply in await wire.answers(1)] == ["nothing_to_undo"]
    await wire.send(wire.command(run, "forward", _order("o-1")))
    (late,) = await wire.answers(1)
    assert (late.outcome, late.data["code"]) == ("refused", "cancelled")
    assert service.rows("SELECT * FROM parcel") == []


async def test_what_is_no_command_of_ours_is_parked(wire: Wire, service: Service) -> None:
    await wire.spoil(b"no json at all")
    await service.until("SELECT 1 FROM saga_parked", 1)
    await wire.send(wire.command("0198c0de-0000-4000-8000-000000000003", "forward", _order("o-3")))
    assert [reply.outcome for reply in await wire.answers(1)] == ["done"]


async def test_many_sagas_go_through_it(app: App, service: Service) -> None:
    await service.start()
    handles = [await app.client.start(purchase, Order(id=f"o-{number}")) for number in range(200)]
    results = await asyncio.gather(*[handle.result(timeout=PATIENCE) for handle in handles])
    assert results == [Parcel(parcel=f"o-{number}") for number in range(200)]
    assert len(service.rows("SELECT 1 FROM parcel")) == 200
    assert await service.stop() == 0


async def test_an_app_that_stops_lets_running_activities_finish_and_can_start_again(
    database: str, broker_url: str
) -> None:
    """In this process, and beside a broker of FastStream's that runs already and goes on."""
    stream: Any = (
        KafkaBroker(broker_url.removeprefix("kafka://"), enable_idempotence=True)
        if broker_url.startswith("kafka")
        else RabbitBroker(broker_url)
    )
    reached, gate = asyncio.Event(), asyncio.Event()
    sagas = FastStreamBroker(stream)
    slow = sagas.participant("slow", start_to_close=PATIENCE)

    @slow.activity(no_compensation="nothing is done")
    async def wait(number: int, session: AsyncSession) -> int:
        reached.set()
        await gate.wait()
        return number

    patience = Saga("patience", int).step(slow.activities["wait"]).returns(slow.activities["wait"].out)
    namespace, spawner = f"stream-{secrets.token_hex(4)}", TaskSpawner()
    there = App(database, broker=sagas, namespace=namespace, participants=[slow])
    async with stream, App(database, broker=broker_url, namespace=namespace, sagas=[patience]) as app:
        await stream.start()
        await there.start(coordinator=False, participants=True)
        assert (await there.health()).ready
        handle = await app.client.start(patience, 7)
        async with asyncio.timeout(SECONDS_MAX):
            await reached.wait()
            stopping = spawner.spawn(there.stop(), name="stopping")
            while there.loop is not None:
                await clock.sleep(0.01)
            assert not stopping.done()
            gate.set()
            await stopping
        assert await handle.result(timeout=PATIENCE) == 7
        assert stream.running
        await there.start(coordinator=False, participants=True)
        assert await app.client.execute(patience, 8, timeout=PATIENCE) == 8
        await there.stop()
    await spawner.close()


def _order(id: str) -> dict[str, Any]:
    return {"id": id, "address": "x", "grams": 1, "card": "good"}
