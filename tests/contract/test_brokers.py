"""G-01, G-03, G-07: every broker adapter keeps the whole contract; skips are by declared capability only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from devservices import LocalPostgres, Postgres, RabbitMq
from saga.testing.contract import BEHAVIOURS, run
from tests.contract.database_harness import ServerHarness, SqliteHarness
from tests.contract.memory_harness import DurableMemoryHarness, MemoryHarness
from tests.contract.rabbitmq_harness import RabbitMQHarness
from tests.upgraded import upgrade

DURABLE = [name for name, behaviour in BEHAVIOURS.items() if behaviour.needs == "durable"]


@pytest.mark.feature("G-07")
@pytest.mark.stack("sqlite")
@pytest.mark.parametrize("name", BEHAVIOURS)
async def test_the_memory_broker_keeps_the_contract(name: str) -> None:
    harness = MemoryHarness()
    if reason := BEHAVIOURS[name].reason_to_skip(harness.capabilities):
        pytest.skip(reason)
    await run(BEHAVIOURS[name], harness)


@pytest.mark.feature("G-07")
@pytest.mark.stack("sqlite")
@pytest.mark.parametrize("name", DURABLE)
async def test_the_memory_broker_keeps_the_contract_when_its_queues_outlive_it(name: str) -> None:
    await run(BEHAVIOURS[name], DurableMemoryHarness())


@pytest.mark.feature("G-07", acceptance=True)
@pytest.mark.feature("G-03")
@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.parametrize("name", [name for name in BEHAVIOURS if name not in DURABLE])
async def test_rabbitmq_keeps_the_contract(name: str, rabbitmq_server: RabbitMq) -> None:
    harness = RabbitMQHarness(rabbitmq_server)
    if reason := BEHAVIOURS[name].reason_to_skip(harness.capabilities):
        pytest.skip(reason)
    await run(BEHAVIOURS[name], harness)


@pytest.mark.feature("G-07", acceptance=True)
@pytest.mark.feature("G-03")
@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.parametrize("name", DURABLE)
async def test_rabbitmq_keeps_the_contract_when_it_is_killed(name: str, own_rabbitmq: RabbitMq) -> None:
    await run(BEHAVIOURS[name], RabbitMQHarness(own_rabbitmq))


@pytest.fixture(scope="module")
def queues_on_postgres(postgres_server: Postgres) -> Iterator[str]:
    url = postgres_server.create_database()
    upgrade(url)  # once: the contract's tests share the tables, each with channels of its own
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="module")
def queues_in_a_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("queues") / "queues.db"
    upgrade(f"sqlite:///{path}")
    return f"sqlite:///{path}"


@pytest.mark.feature("G-07", acceptance=True)
@pytest.mark.feature("G-02", acceptance=True)
@pytest.mark.stack("postgres")
@pytest.mark.parametrize("name", [name for name in BEHAVIOURS if name not in DURABLE])
async def test_the_database_broker_keeps_the_contract_on_postgresql(
    name: str, queues_on_postgres: str
) -> None:
    harness = ServerHarness(queues_on_postgres)
    assert BEHAVIOURS[name].reason_to_skip(harness.capabilities) is None
    await run(BEHAVIOURS[name], harness)


@pytest.mark.feature("G-07", acceptance=True)
@pytest.mark.feature("G-02", acceptance=True)
@pytest.mark.stack("postgres")
@pytest.mark.parametrize("name", DURABLE)
async def test_the_database_broker_keeps_the_contract_when_postgresql_is_killed(
    name: str, own_postgres: LocalPostgres
) -> None:
    url = own_postgres.create_database()
    upgrade(url)
    await run(BEHAVIOURS[name], ServerHarness(url, own_postgres))
    own_postgres.drop_database(url)


@pytest.mark.feature("G-07", acceptance=True)
@pytest.mark.feature("G-02", acceptance=True)
@pytest.mark.stack("sqlite-shared")
@pytest.mark.parametrize("name", BEHAVIOURS)
async def test_the_database_broker_keeps_the_contract_on_sqlite(name: str, queues_in_a_file: str) -> None:
    harness = SqliteHarness(queues_in_a_file)
    assert BEHAVIOURS[name].reason_to_skip(harness.capabilities) is None
    await run(BEHAVIOURS[name], harness)


@pytest.mark.feature("G-01", acceptance=True)
@pytest.mark.stack("sqlite")
async def test_the_memory_broker_keeps_the_whole_contract_that_applies_to_it() -> None:
    """One test, so that the row is open unless all of it passed."""
    for behaviour in BEHAVIOURS.values():
        if behaviour.reason_to_skip(MemoryHarness.declared) is None:
            await run(behaviour, MemoryHarness())


@pytest.mark.feature("G-07")
@pytest.mark.stack("sqlite")
def test_the_contract_has_at_least_forty_behaviours_and_skips_few_of_them() -> None:
    assert len(BEHAVIOURS) >= 40
    assert set(DURABLE) == {
        name for name, each in BEHAVIOURS.items() if each.reason_to_skip(MemoryHarness.declared)
    }
