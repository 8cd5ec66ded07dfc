"""Charges outside every database match the sagas, whatever is killed, cut or stopped (D-11)."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from saga.app import App
from saga.clock import SystemClock
from saga.errors import SagaCompensated
from saga.storage.base import Filter
from tests.crash import payments
from tests.crash.payments import SECONDS_MAX, Order
from tests.features_due import EVERYWHERE
from tests.plugins.features import Faults
from tests.stacks import AGAIN, broker_of

pytestmark = [pytest.mark.slow, pytest.mark.feature("D-11")]

ROOT: Final = Path(__file__).parents[2]
ORDERS: Final = 20
DEATHS: Final = ("W2:kill:n=2", "W3:kill:n=3", "W4:kill:n=2")
"""The row committed and nothing called; called and not on record; on record and not answered."""
CUT_EVERY: Final = 4

clock = SystemClock()


class Provider:
    """Charges and refunds by key, knows duplicates, and cuts the line after every fourth deed."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.charges: dict[str, tuple[str, int]] = {}
        """Key to order and amount."""
        self.refunded: dict[str, str] = {}
        """Refund key to the charge that it gave back, or ""."""
        self.asked: Counter[str] = Counter()
        self.charged_by: Counter[int] = Counter()
        """Process to the charges that it asked for."""
        self.cuts = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            asked = json.loads(await reader.readline())
            answer = self._answer(**asked)
            deeds = self.asked["charge"] + self.asked["refund"]
            if self.cuts and asked["verb"] != "look" and deeds % CUT_EVERY == 0:
                self.faults.fired("line cut after the deed")
            else:
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        writer.close()

    def _answer(
        self, verb: str, by: int, key: str, charge: str = "", order: str = "", amount: int = 0
    ) -> dict[str, Any]:
        self.asked[verb] += 1
        if verb == "charge":
            self.charges.setdefault(key, (order, amount))
            self.charged_by[by] += 1
        elif verb == "refund":
            standing = charge in self.charges and charge not in self.refunded.values()
            self.refunded.setdefault(key, charge if standing else "")
        standing = key in self.charges.keys() - self.refunded.values()
        return {"charge": key if standing or verb == "charge" else None}

    def standing(self, order: str) -> int:
        """Charges less refunds of an order."""
        back = set(self.refunded.values())
        return sum(amount for key, (of, amount) in self.charges.items() if of == order and key not in back)


class House:
    """The provider, the coordinator in this process save on SQLite alone, and payment services in theirs."""

    def __init__(self, stack: str, provider: Provider, environment: dict[str, str], place: Path) -> None:
        self.stack = stack
        self.provider = provider
        self.environment = environment
        self._place = place
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, fail: str = "") -> subprocess.Popen[bytes]:
        log = (self._place / f"payments-{len(self._running)}.log").open("wb")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.crash.payments"],
                cwd=ROOT,
                env={**os.environ, **self.environment, "SAGA_FAIL": fail},
                stdout=log,
                stderr=log,
            )
        self._running.append(process)
        return process

    async def until(self, holds: Any) -> None:
        until = clock.monotonic() + SECONDS_MAX
        while not holds():
            assert clock.monotonic() < until, self.logs()
            await clock.sleep(0.02)

    async def ready(self) -> None:
        """Wait until the service that was started last takes commands."""
        log = self._place / f"payments-{len(self._running) - 1}.log"
        await self.until(lambda: b"ready" in log.read_bytes())

    def logs(self) -> str:
        return "\n".join(each.read_text()[-2000:] for each in sorted(self._place.glob("payments-*.log")))

    def close(self) -> None:
        for process in self._running:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


@pytest.fixture(params=[*EVERYWHERE, *AGAIN])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def house(
    stack: str,
    url: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[House]:
    provider = Provider(faults)
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
    broker = broker_of(stack, request)
    environment = {
        "DATABASE": url,
        "NAMESPACE": f"pay-{secrets.token_hex(4)}",
        "PROVIDER": str(server.sockets[0].getsockname()[1]),
        **({"BROKER": broker} if broker else {"EMBEDDED": str(ORDERS)}),
    }
    named = {f"PAYMENTS_{key}": value for key, value in environment.items()}
    for key, value in named.items():
        monkeypatch.setenv(key, value)
    house = House(stack, provider, named, tmp_path)
    yield house
    house.close()
    server.close()


@pytest.mark.feature("D-11", acceptance=True, scale=ORDERS / 1000)
async def test_charges_less_refunds_match_the_sagas_whatever_is_killed_and_cut(
    house: House, faults: Faults
) -> None:
    faults.declare("line cut after the deed", "kill -9 around a call")
    if house.stack == "sqlite":
        for fail in DEATHS:
            await deaths([house.start(fail)], house, faults)
        assert await asyncio.to_thread(house.start().wait, SECONDS_MAX) == 0, house.logs()
        app = payments.make_app(sagas=[payments.sale])
        async with app.as_operator() as client:
            ended = {each.id: each.status for each in (await client.list(Filter(), limit=100)).instances}
    else:
        app = payments.make_app(sagas=[payments.sale])
        async with app:
            # all at once: what each of them held comes back when the database broker takes them for dead
            dying = []
            for fail in DEATHS:
                dying.append(house.start(fail))
                await house.ready()
            handles = []
            for number in range(ORDERS):
                order = Order(id=f"order-{number}", shipped=number % 2 == 0)
                handles.append(await app.client.start(payments.sale, order, id=order.id))
            await deaths(dying, house, faults)
            house.start()
            for handle in handles:
                with suppress(SagaCompensated):
                    await handle.result(timeout=timedelta(seconds=SECONDS_MAX))
            ended = {each.id: each.status for each in (await app.client.list(Filter(), limit=100)).instances}
    assert Counter(ended.values()) == {"completed": ORDERS // 2, "compensated": ORDERS // 2}
    for id, status in ended.items():
        assert house.provider.standing(id) == (10 if status == "completed" else 0), id
    assert len(house.provider.charges) == ORDERS, "one charge for each order, however often it was asked for"


async def deaths(dying: list[subprocess.Popen[bytes]], house: House, faults: Faults) -> None:
    for process in dying:
        await house.until(lambda process=process: process.poll() is not None)
        assert process.returncode == -signal.SIGKILL, house.logs()
        faults.fired("kill -9 around a call")


@pytest.mark.parametrize(("point", "charged"), [("W2:stop", 0), ("W3:stop", 1)])
@pytest.mark.parametrize("stack", ["postgres-rabbitmq", "postgres", "sqlite-shared"], indirect=True)
async def test_a_participant_that_is_stopped_around_its_call_leaves_nothing_charged(
    house: House, point: str, charged: int
) -> None:
    """P27, SIGSTOP: before the call it finds its time over; after it, what it did is told as late and undone once."""
    house.provider.cuts = False
    # the charge is not sent again before it is given up: another participant would see to it
    app = payments.make_app(sagas=[payments.hasty, payments.sale], redrive=timedelta(seconds=15))
    async with app:
        frozen = house.start(point)
        await house.ready()
        handle = await app.client.start(payments.hasty, Order(id="one"), id="one")
        await house.until(lambda: stopped(frozen))
        assert house.provider.charged_by[frozen.pid] == charged
        other = house.start()
        with pytest.raises(SagaCompensated):
            await handle.result(timeout=timedelta(seconds=SECONDS_MAX))
        assert house.provider.standing("one") == 0
        other.kill()
        frozen.send_signal(signal.SIGCONT)
        # RabbitMQ takes who is stopped for dead after a while, and the other one's inquiry may have settled the charge
        if charged and house.stack != "postgres-rabbitmq":
            await late_effect_undone(app)
        second = await app.client.start(payments.sale, Order(id="two"), id="two")
        await second.result(timeout=timedelta(seconds=SECONDS_MAX))
        assert house.provider.charged_by[frozen.pid] == charged + 1, "what was given up is not called"
        assert (house.provider.standing("one"), house.provider.standing("two")) == (0, 10)


def stopped(process: subprocess.Popen[bytes]) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def late_effect_undone(app: App) -> None:
    """Wait until the saga was opened again, and its second undo is done."""
    until = clock.monotonic() + SECONDS_MAX
    handle = await app.client.find(payments.hasty, "one")
    while len((seen := await handle.describe()).plan) < 2 or seen.status != "compensated":
        assert clock.monotonic() < until, seen
        await clock.sleep(0.05)
    assert seen.plan == (("charge", "compensated"), ("charge", "compensated"))
    assert any(past.event == "LateEffect" for past in seen.history)
    assert not seen.incidents, "it is resolved by the undo"
