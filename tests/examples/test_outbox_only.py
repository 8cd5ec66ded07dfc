"""Two services and no saga: what was committed is told, recorded once, and sent at least once under the event's id."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import create_async_engine

from examples.outbox_only import events, mailer, orders
from saga.clock import SystemClock
from saga.storage.sqlalchemy.database import async_url
from tests.plugins.features import Faults
from tests.stacks import broker_of
from tests.upgraded import upgraded

ROOT: Final = Path(__file__).parents[2]
KILLS: Final = 5
SECONDS_MAX: Final = 90.0
clock = SystemClock()


def test_the_program_sends_a_letter_for_each_order_that_was_placed() -> None:
    command = [sys.executable, "-m", "examples.outbox_only"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    lines = ran.stdout.splitlines()
    assert lines[1] == "not placed: order o-2 is worth nothing"
    assert sorted(line for line in lines if line.startswith("  to ")) == [
        "  to reader1@example.com: Your order o-1 over 12.50 is on its way.",
        "  to reader3@example.com: Your order o-3 over 8.00 is on its way.",
        "  to reader4@example.com: Your order o-4 over 49.99 is on its way.",
    ]
    assert lines[-1] == "3 letters for 3 orders that were placed"


@pytest.fixture(params=["postgres-rabbitmq", "postgres-kafka"])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.slow
@pytest.mark.feature("F-01")
@pytest.mark.feature("F-08")
async def test_orders_and_letters_agree_when_the_mailer_is_killed_again_and_again(
    stack: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each with a database of its own; every third order is rolled back."""
    faults.declare("kill", "rolled back")
    broker = broker_of(stack, request)
    assert broker is not None
    topic = f"orders-{secrets.token_hex(4)}"  # on a broker that other tests use as well
    letters = tmp_path / "letters"
    with upgraded(stack, request) as shop_url, upgraded(stack, request) as mailer_url:
        shop_engine = create_async_engine(async_url(shop_url))
        mailer_engine = create_async_engine(async_url(mailer_url))
        for engine, base in ((shop_engine, orders.Base), (mailer_engine, mailer.Base)):
            async with engine.begin() as connection:
                await connection.run_sync(base.metadata.create_all)
        shop = orders.Shop(shop_engine, shop_url, broker, f"shop-{secrets.token_hex(4)}", topic)
        environment = {
            **os.environ,
            "MAILER_DATABASE": mailer_url,
            "MAILER_BROKER": broker,
            "MAILER_NAMESPACE": f"mailer-{secrets.token_hex(4)}",
            "MAILER_LETTERS": str(letters),
            "MAILER_TOPIC": topic,
        }

        def start() -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "tests.examples.mailer_process"]
            return subprocess.Popen(command, cwd=ROOT, env=environment)

        def sent() -> list[str]:
            return letters.read_text().split() if letters.exists() else []

        placed: set[str] = set()
        async with shop.app:
            process = start()
            try:
                for kill in range(KILLS + 1):
                    for number in range(12):
                        id, cents = f"o-{kill}-{number}", 0 if number % 3 == 2 else 100
                        try:
                            await shop.place(id, f"{id}@example.com", cents)
                            placed.add(f"{id}@example.com")
                        except ValueError:
                            faults.fired("rolled back")
                    wanted = len(placed) - 4 if kill < KILLS else len(placed)
                    until = clock.monotonic() + SECONDS_MAX
                    while len(set(sent()[1::2])) < wanted:
                        assert clock.monotonic() < until, f"{len(set(sent()[1::2]))} of {len(placed)}"
                        assert process.poll() is None
                        await clock.sleep(0.05)
                    process.kill()
                    process.wait()
                    if kill < KILLS:
                        faults.fired("kill")
                        process = start()
            finally:
                process.kill()
                process.wait()
        async with mailer_engine.connect() as connection:
            recorded = (await connection.execute(select(mailer.Letter.id, mailer.Letter.email))).all()
        assert sorted(email for _, email in recorded) == sorted(placed)
        lines = [line.split() for line in letters.read_text().splitlines()]
        assert {tuple(line) for line in lines} == {(id, email) for id, email in recorded}
        await shop_engine.dispose()
        await mailer_engine.dispose()


def test_both_services_speak_of_one_topic() -> None:
    assert {topic for topic, _ in mailer.inbox.consumers} == {events.ORDERS}
