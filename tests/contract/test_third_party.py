"""Row G-07: an adapter that shares no code with ours keeps the contract and serves two processes."""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import create_async_engine

from saga.testing.contract import BEHAVIOURS, run
from tests.contract.maildrop_harness import MaildropHarness
from tests.plugins.canary import python_path

pytestmark = [pytest.mark.feature("G-07"), pytest.mark.stack("pure")]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", BEHAVIOURS)
async def test_a_third_partys_adapter_keeps_the_contract(name: str, tmp_path: Path) -> None:
    harness = MaildropHarness(tmp_path)
    if reason := BEHAVIOURS[name].reason_to_skip(harness.capabilities):
        pytest.skip(reason)
    await run(BEHAVIOURS[name], harness)


SHOP = """
import os
from datetime import timedelta
from pydantic import BaseModel
from sqlalchemy import Column, MetaData, Table, Text, insert
from sqlalchemy.ext.asyncio import AsyncSession
from saga import App, Participant, Saga

class Order(BaseModel):
    number: int

metadata = MetaData()
done = Table("done", metadata, Column("what", Text, primary_key=True))
shop = Participant("shop", start_to_close=timedelta(seconds=10))

@shop.activity
async def reserve(order: Order, session: AsyncSession) -> None:
    await session.execute(insert(done).values(what=f"reserve {order.number}"))

@reserve.compensation
async def release(order: Order, session: AsyncSession) -> None:
    await session.execute(insert(done).values(what=f"release {order.number}"))

@shop.activity
async def send(order: Order, session: AsyncSession) -> None:
    await session.execute(insert(done).values(what=f"send {order.number}"))

purchase = Saga("purchase", Order).step(reserve).step(send, no_compensation="what is sent is sent")
app = App(os.environ["DATABASE"], broker=os.environ["DROP"], sagas=[purchase], participants=[shop])
"""
ORDERS = 60
SECONDS_MAX = 120.0


@pytest.mark.slow
async def test_two_processes_and_a_client_work_over_it_while_they_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by its entry point in each of them; what a killed one held, the next one gets."""
    (tmp_path / "folder_shop.py").write_text(SHOP)
    (tmp_path / "drop").mkdir()
    named = {"DATABASE": f"sqlite:///{tmp_path / 'shop.db'}", "DROP": f"maildrop://{tmp_path / 'drop'}"}
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(tmp_path))
    shop: Any = importlib.import_module("folder_shop")
    engine = create_async_engine(named["DATABASE"].replace("sqlite:", "sqlite+aiosqlite:"))
    processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(role: str) -> None:
        processes[role] = subprocess.Popen(
            [sys.executable, "-m", "saga.cli", role, "folder_shop:app"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": python_path(ROOT, ROOT / "tests" / "thirdparty")},
        )

    async def effects() -> list[str]:
        async with engine.connect() as connection:
            return sorted((await connection.execute(select(shop.done.c.what))).scalars())

    async with shop.app.as_client() as client:
        async with engine.begin() as connection:
            await connection.run_sync(shop.metadata.create_all)
        try:
            for role in ("coordinator", "participant"):
                start(role)
            handles = [
                await client.start(shop.purchase, shop.Order(number=number)) for number in range(ORDERS)
            ]
            for part in (1, 2, 3):
                async with asyncio.timeout(SECONDS_MAX):
                    while len(await effects()) < part * ORDERS // 3:  # noqa: ASYNC110 - nobody tells
                        await asyncio.sleep(0.02)
                for role in ("coordinator", "participant"):
                    processes[role].kill()
                    processes[role].wait()
                    start(role)
            for handle in handles:
                await handle.result(timeout=timedelta(seconds=SECONDS_MAX))
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
    assert await effects() == sorted(f"{what} {n}" for what in ("reserve", "send") for n in range(ORDERS))
    await engine.dispose()
