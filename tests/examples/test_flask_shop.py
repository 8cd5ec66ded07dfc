"""Row I-04: the Flask shop under gunicorn's threads, its workers killed under load: each sale has its saga, once."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import Session

from examples.flask_shop.sagas import Base, Stock
from saga.clock import SystemClock
from tests.upgraded import upgraded

ROOT: Final = Path(__file__).parents[2]
SECONDS_MAX: Final = 60.0
KILLS: Final = 4
ORDERS_MIN: Final = 60
clock = SystemClock()


class Shop:
    """Gunicorn, a coordinator and a participant on one database, and what is sold there."""

    def __init__(self, url: str, broker: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
        self._environment = {
            **os.environ,
            "SHOP_DATABASE": url,
            "SHOP_BROKER": broker,
            "SHOP_NAMESPACE": f"flask-{secrets.token_hex(4)}",
        }
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []
        Base.metadata.create_all(self.engine)
        with Session(self.engine) as session, session.begin():
            session.add_all([Stock(item="book", pieces=100_000), Stock(item="lamp", pieces=0)])

    def start(self) -> None:
        self._spawn("-m", "saga.cli", "coordinator", "examples.flask_shop.sagas:app", "--grace", "2")
        self._spawn("-m", "saga.cli", "participant", "examples.flask_shop.sagas:app", "--grace", "2")
        place = ("--bind", f"127.0.0.1:{self._port}", "--workers", "2", "--threads", "4")
        self.web = self._spawn(
            "-m", "gunicorn", *place, "--graceful-timeout", "3", "examples.flask_shop.web:shop"
        )

    def _spawn(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{arguments[1]}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )
        self._running.append(process)
        return process

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Return status and answer; status 0 if there was none."""
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(asked, timeout=20) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error) if error.code < 500 else {}
        except OSError:
            return 0, {}

    def until(self, path: str, status: int) -> dict[str, Any]:
        until = clock.monotonic() + SECONDS_MAX
        while True:
            found, answer = self.ask(path)
            if found == status:
                return answer
            assert clock.monotonic() < until, f"{path} says {found}: {answer}"

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.web.pid}/task/{self.web.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def rows(self, query: str) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(query)))

    def close(self) -> None:
        for process in reversed(self._running):
            process.terminate()
        for process in self._running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.engine.dispose()


@pytest.fixture
def shop(request: pytest.FixtureRequest, rabbitmq_url: str, tmp_path: Path) -> Iterator[Shop]:
    with ExitStack() as stack:
        shop = Shop(stack.enter_context(upgraded("postgres-rabbitmq", request)), rabbitmq_url, tmp_path)
        stack.callback(shop.close)
        shop.start()
        yield shop


@pytest.mark.slow
@pytest.mark.feature("I-04", acceptance=True)
@pytest.mark.stack("postgres-rabbitmq")
def test_workers_that_are_killed_leave_each_sale_with_one_saga(shop: Shop) -> None:
    shop.until("/orders/none", 404)
    taken: list[str] = []
    numbers = count()
    stopping = False

    def buy() -> None:
        while not stopping:
            order = {"id": f"o-{next(numbers)}", "item": "book", "cents": 100}
            if shop.ask("/orders", order)[0] == 201:
                taken.append(order["id"])  # type: ignore[arg-type]  # it is the text above

    with ThreadPoolExecutor(4) as buyers:
        for _ in range(4):
            buyers.submit(buy)
        try:
            for kill in range(1, KILLS + 1):
                wanted, until = len(taken) + ORDERS_MIN // KILLS, clock.monotonic() + SECONDS_MAX
                while len(taken) < wanted:
                    assert clock.monotonic() < until, f"{len(taken)} orders after {kill - 1} kills"
                os.kill(shop.workers()[0], signal.SIGKILL)
        finally:
            stopping = True

    for _ in range(4):  # a connection that the last victim had taken is no answer
        shop.until("/orders/none", 404)
    assert shop.ask("/orders", {"id": "dear", "item": "book", "cents": 20_000})[0] == 201
    assert shop.until("/orders/dear", 409) == {"refused": "no_credit"}
    assert shop.ask("/orders", {"id": "lamp", "item": "lamp", "cents": 1})[0] == 201
    assert shop.until("/orders/lamp", 409) == {"refused": "sold_out"}
    for id in taken:
        assert shop.until(f"/orders/{id}", 200) == {"receipt": f"receipt of {id}"}

    sales = {row.id for row in shop.rows("SELECT id FROM sale")}
    assert sales >= set(taken)
    assert len(taken) >= ORDERS_MIN
    for id in sales - set(taken) - {"dear", "lamp"}:  # committed, and its answer was lost with the worker
        shop.until(f"/orders/{id}", 200)
    instances = shop.rows("SELECT saga_id, status FROM saga_instance")
    assert sorted(row.saga_id for row in instances) == sorted(sales)
    assert {row.status for row in instances} == {"completed", "compensated"}
    assert shop.rows("SELECT pieces FROM stock WHERE item = 'book'")[0].pieces == 100_000 - len(sales) + 2
    assert len(shop.rows("SELECT 1 FROM payment")) == len(sales) - 2
