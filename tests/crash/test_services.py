"""The same on servers: coordinator and participant are services, killed and started again."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from saga.app import App
from saga.clock import SystemClock, TaskSpawner
from saga.storage.sqlalchemy import tables as t
from tests.crash import stage
from tests.crash.books import ACCOUNTS, TABLES, Books, accounts, metadata
from tests.features_due import POSTGRES_RABBITMQ
from tests.plugins.features import Faults
from tests.stacks import AGAIN, broker_of

ROOT: Final = Path(__file__).parents[2]
DEATHS: Final = ("C8", "R3", "K1")
"""Where the coordinator is killed, one after the other; while it dies at the first, the participant dies at W5."""
ENDS: Final = {"plain": "completed", "in session": "completed", "refused": "compensated"}

clock = SystemClock()


class Services:
    """Processes of `saga coordinator` and `saga participant`, by role."""

    def __init__(self, environment: dict[str, str], logs: Path) -> None:
        self._environment = environment
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, role: str, fail: str = "") -> None:
        with (self._logs / f"{role}.log").open("ab") as log:
            self._running[role] = subprocess.Popen(
                [sys.executable, "-m", "saga.cli", role, f"tests.crash.stage:{role}", "--grace", "5"],
                cwd=ROOT,
                env={**os.environ, **self._environment, "SAGA_FAIL": fail},
                stderr=log,
            )

    async def death(self, role: str) -> int:
        """Return the status of a process that ends by itself."""
        until = clock.monotonic() + stage.SECONDS_MAX
        while (status := self._running[role].poll()) is None:
            assert clock.monotonic() < until, f"the {role} lives"
            await clock.sleep(0.02)
        return status

    def close(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()


@pytest.fixture(params=[POSTGRES_RABBITMQ, *AGAIN])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def broker(stack: str, request: pytest.FixtureRequest) -> str:
    return str(broker_of(stack, request))


@pytest.fixture
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    """The bank's tables beside ours."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        rows = [{"id": id, "balance": balance} for id, balance in ACCOUNTS.items()]
        await connection.execute(insert(accounts), rows)
    yield engine
    await engine.dispose()


async def books(engine: AsyncEngine) -> Books:
    rows = {}
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="REPEATABLE READ")
        for name in TABLES:
            table = metadata.tables.get(name)
            found = await connection.execute(select(t.metadata.tables[name] if table is None else table))
            rows[name] = [dict(row) for row in found.mappings()]
    return Books(rows)


@pytest.mark.slow
async def test_services_that_are_killed_and_started_again_end_every_saga(
    engine: AsyncEngine, url: str, broker: str, tmp_path: Path, faults: Faults
) -> None:
    """I1 to I4, I6, I10; K1: the decision to undo is committed and nothing of it is sent."""
    namespace = f"crash-{secrets.token_hex(4)}"
    variables = {"DATABASE": url, "BROKER": broker, "NAMESPACE": namespace}
    spawner = TaskSpawner()
    services = Services({f"STAGE_{name}": value for name, value in variables.items()}, tmp_path)
    app = App(url, broker=broker, namespace=namespace, redrive=stage.REDRIVE, sagas=[stage.payment])

    async def dies(role: str, fail: str) -> None:
        """Wait for its death, look at the books, and start the next, which fails so."""
        assert await services.death(role) == -signal.SIGKILL, role
        faults.fired("kill")
        (await books(engine)).check_always()
        services.start(role, fail)

    expected: dict[str, str] = {}
    playing: list[asyncio.Task[None]] = []
    try:
        services.start("participant", "W5:kill:n=3")
        services.start("coordinator", f"{DEATHS[0]}:kill:n=2")
        async with app.as_client() as client:
            for turn, point in enumerate(DEATHS):
                expected |= {f"{point} {order}": end for order, end in ENDS.items()}
                orders = stage.every_order(client, url, f"{point} ")
                playing.append(spawner.spawn(orders, name=f"orders-{point}"))
                following = f"{DEATHS[turn + 1]}:kill:n=1" if turn + 1 < len(DEATHS) else ""
                # Side by side: a coordinator may need replies of the participant that follows the dead one to die.
                async with asyncio.TaskGroup() as deaths:
                    deaths.create_task(dies("coordinator", following))
                    if not turn:
                        deaths.create_task(dies("participant", ""))
            await asyncio.gather(*playing)
            while (await books(engine)).of("saga_outbox"):
                await clock.sleep(0.05)
    finally:
        services.close()
    (await books(engine)).check_rest(expected)
