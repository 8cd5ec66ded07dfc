"""Row I-02: the FastAPI shop's workers are killed under load: every order has one closed saga, and no saga no order."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from sqlalchemy import create_engine, make_url, text

from saga.clock import SystemClock
from tests.stacks import broker_of
from tests.upgraded import upgraded

ROOT: Final = Path(__file__).parents[2]
SECONDS_MAX: Final = 120.0
LOAD_SECONDS_MAX: Final = 300.0
"""Of all kills together: each waits for a worker that starts, on a machine that has other things to do."""
KILLS: Final = 20
ORDERS_MIN: Final = 1_000
BUYERS: Final = 6
PIECES: Final = 100_000
OPEN: Final = "SELECT count(*) AS open FROM saga_instance WHERE status NOT IN ('completed', 'compensated')"
clock = SystemClock()


class Shop:
    """Uvicorn with two workers, each with everything that the app has, and what is sold there."""

    def __init__(self, url: str, broker: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._port}"
        self._engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
        self._environment = {
            **os.environ,
            "SHOP_DATABASE": url,
            "SHOP_BROKER": broker,
            "SHOP_NAMESPACE": f"fastapi-{secrets.token_hex(4)}",
        }
        self._log = folder / "uvicorn.log"

    def open(self) -> None:
        subprocess.run(
            [sys.executable, "-m", "examples.fastapi_shop", str(PIECES)],
            cwd=ROOT,
            env=self._environment,
            check=True,
            timeout=SECONDS_MAX,
        )
        place = ("--port", str(self._port), "--workers", "2", "--no-access-log")
        with self._log.open("ab") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", *place, "examples.fastapi_shop.web:shop"],
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def workers(self) -> list[int]:
        """Return the workers that serve: one that is only coming up has said nothing yet."""
        ready = self._log.read_text().split()
        pids = Path(f"/proc/{self._server.pid}/task/{self._server.pid}/children").read_text().split()
        return [int(pid) for pid in pids if f"[{pid}]" in ready]

    def rows(self, query: str) -> list[Any]:
        with self._engine.connect() as connection:
            return list(connection.execute(text(query)))

    def close(self) -> None:
        self._server.terminate()
        try:
            self._server.wait(60)
        except subprocess.TimeoutExpired:
            self._server.kill()
            raise
        finally:
            self._engine.dispose()


@pytest.fixture
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    stack = "postgres-rabbitmq"
    with ExitStack() as cleaned:
        broker = broker_of(stack, request)
        assert broker is not None
        shop = Shop(cleaned.enter_context(upgraded(stack, request)), broker, tmp_path)
        shop.open()
        cleaned.callback(shop.close)
        yield shop


async def ask(http: httpx.AsyncClient, method: str, path: str, **body: Any) -> httpx.Response | None:
    """Return the answer, None if the worker has died over it."""
    try:
        return await http.request(method, path, **body)
    except httpx.TransportError:
        return None


async def until(http: httpx.AsyncClient, path: str, **seen: Any) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while True:
            answer = await ask(http, "GET", path)
            if answer is not None and seen.items() <= {**answer.json(), "code": answer.status_code}.items():
                return
            await clock.sleep(0.05)


@pytest.mark.slow
@pytest.mark.feature("I-02", acceptance=True)
@pytest.mark.stack("postgres-rabbitmq")
async def test_workers_that_are_killed_leave_each_order_with_one_closed_saga(shop: Shop) -> None:
    taken: list[str] = []
    numbers = count()
    killed = 0

    async with connected(shop) as http:
        await until(http, "/orders/none", code=404)

        async def buy() -> None:
            while killed < KILLS or len(taken) < ORDERS_MIN:
                order = {"id": f"o-{next(numbers)}", "item": "book", "cents": 100}
                answer = await ask(http, "POST", "/orders", json=order)
                if answer is not None and answer.status_code == 201:
                    taken.append(str(order["id"]))

        async with asyncio.timeout(LOAD_SECONDS_MAX), asyncio.TaskGroup() as buyers:
            for _ in range(BUYERS):
                buyers.create_task(buy())
            while killed < KILLS:
                wanted = len(taken) + 10
                while len(taken) < wanted or not (serving := shop.workers()):
                    await clock.sleep(0.05)
                os.kill(serving[0], signal.SIGKILL)
                killed += 1

        for id, item, cents in (("dear", "book", 20_000), ("lamp", "lamp", 1)):
            while (await ask(http, "POST", "/orders", json={"id": id, "item": item, "cents": cents})) is None:
                pass
        await until(http, "/orders/dear", status="compensated", cause="refused: charge: no_credit")
        await until(http, "/orders/lamp", status="compensated", cause="refused: reserve: sold_out")
        async with asyncio.timeout(SECONDS_MAX):
            while shop.rows(OPEN)[0].open:
                await clock.sleep(0.1)
        cancelled = await ask(http, "DELETE", f"/orders/{taken[0]}")
        assert cancelled is not None
        assert (cancelled.status_code, cancelled.json()) == (202, {"status": "completed"})

    sales = {row.id for row in shop.rows("SELECT id FROM sale")}
    assert len(taken) >= ORDERS_MIN
    assert sales >= set(taken)
    assert sorted(row.saga_id for row in shop.rows("SELECT saga_id FROM saga_instance")) == sorted(sales)
    turned_back = shop.rows("SELECT saga_id FROM saga_instance WHERE status = 'compensated'")
    assert {row.saga_id for row in turned_back} == {"dear", "lamp"}
    sold = sales - {"dear", "lamp"}
    assert sorted(row.sale for row in shop.rows("SELECT sale FROM payment")) == sorted(sold)
    assert shop.rows("SELECT pieces FROM stock WHERE item = 'book'")[0].pieces == PIECES - len(sold)


@asynccontextmanager
async def connected(shop: Shop) -> Any:
    """A client whose requests each have a connection of their own, so that both workers get some."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=shop.address, timeout=20, limits=limits) as http:
        yield http
