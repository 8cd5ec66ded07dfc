"""G-02, G-07: the database broker keeps the whole contract on MariaDB, and on MySQL among the slow tests.

A file of its own, and so a worker: most behaviours wait for something.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from devservices import LocalMariaDb, LocalMySql, MySqlServer
from saga.testing.contract import BEHAVIOURS, run
from tests.contract.database_harness import ServerHarness
from tests.contract.test_brokers import DURABLE
from tests.upgraded import upgrade

pytestmark = [pytest.mark.feature("G-07", acceptance=True), pytest.mark.feature("G-02", acceptance=True)]


@pytest.fixture(scope="module", params=["mariadb", pytest.param("mysql", marks=pytest.mark.slow)])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def queues(stack: str, request: pytest.FixtureRequest) -> Iterator[str]:
    server: MySqlServer = request.getfixturevalue(f"{stack}_server")
    url = server.create_database()
    upgrade(url)  # once: the contract's tests share the tables, each with channels of its own
    yield url
    server.drop_database(url)


@pytest.mark.parametrize("name", [name for name in BEHAVIOURS if name not in DURABLE])
async def test_the_database_broker_keeps_the_contract(name: str, queues: str) -> None:
    harness = ServerHarness(queues)
    assert BEHAVIOURS[name].reason_to_skip(harness.capabilities) is None
    await run(BEHAVIOURS[name], harness)


@pytest.mark.parametrize("name", DURABLE)
async def test_the_database_broker_keeps_the_contract_when_the_server_is_killed(
    name: str, stack: str, request: pytest.FixtureRequest
) -> None:
    server: LocalMariaDb | LocalMySql = request.getfixturevalue(f"own_{stack}")
    url = server.create_database()
    upgrade(url)
    await run(BEHAVIOURS[name], ServerHarness(url, server))
    server.drop_database(url)
