"""The acceptance checks of the client's rows: what callers get while processes are killed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import DBAPIError

from saga import Handle, SagaCompensated
from saga.client import Client
from tests.client.callers import Forge
from tests.client.shop import LIMIT, Order, Place, Receipt, orders, purchase
from tests.features_due import DUE
from tests.plugins.features import Faults
from tests.proxy import ProxyFactory
from tests.stacks import in_file

CALLERS = 5
STARTS = 10
WAITERS = 50


@pytest.fixture(scope="module")
def one_forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture
def forge(one_forge: Forge) -> Iterator[Forge]:
    yield one_forge
    one_forge.end_all()


@pytest.mark.feature("C-01", acceptance=True, scale=0.1)
async def test_one_id_started_from_everywhere_under_crashes_is_one_instance(
    place: Place, forge: Forge, tmp_path: Path, faults: Faults
) -> None:
    """I11, P3, P31: each caller gets the one run, or StartConflict if he asked for something else."""
    faults.declare("caller killed")
    said = tmp_path / "said"
    deaths = ["C1:kill:n=2", "C2:kill:n=1", "C3:kill:n=1", "C4:kill:n=2", "C3:kill:n=3"]
    callers = [
        forge.fork(place, "one id", fail=fail, starts=STARTS, said=str(said)) for fail in deaths[:CALLERS]
    ]
    for pid in callers:
        assert await forge.end(pid) == -signal.SIGKILL
        faults.fired("caller killed")
    again = [forge.fork(place, "one id", starts=STARTS, said=str(said)) for _ in deaths[:CALLERS]]
    assert [await forge.end(pid) for pid in again] == [0] * CALLERS

    ((run_id, input),) = await place.rows("SELECT run_id, input FROM saga_instance")
    item = "pen" if "pen" in (input if isinstance(input, str) else bytes(input).decode()) else "book"
    answers = set(said.read_text().splitlines())
    other = "book" if item == "pen" else "pen"
    assert answers == {f"{item} {UUID(str(run_id))}", f"{other} StartConflict"}
    assert len(said.read_text().splitlines()) >= CALLERS * STARTS
    assert [tuple(row) for row in await place.rows("SELECT version FROM saga_history")] == [(1,)]
    async with place.app() as app:
        assert (await (await app.client.find(purchase, "one")).result()).number == f"c-{item}"


@pytest.mark.parametrize("stack", DUE["C-02"], indirect=True)
@pytest.mark.feature("C-02", acceptance=True)
async def test_an_order_and_its_saga_exist_together_or_not_at_all(
    place: Place, forge: Forge, faults: Faults, proxy: ProxyFactory
) -> None:
    """I7, I11: whatever became of the process, or of the answer to its COMMIT."""
    expected: set[str] = set()
    for dies in ("before begin", "after the insert", "after commit"):
        faults.declare(f"killed {dies}")
        ids = [f"{dies} {n}" for n in range(3)]
        for pid in [forge.fork(place, "order", id=id, dies=dies) for id in ids]:
            assert await forge.end(pid) == -signal.SIGKILL
            faults.fired(f"killed {dies}")
        expected |= set(ids) if dies == "after commit" else set()
    if not in_file(place.stack):  # SQLite's commit has no answer that could be lost
        expected |= await with_the_answer_lost(place, faults, proxy)

    found = {row.id for row in await place.rows("SELECT id FROM orders")}
    assert found == {row.saga_id for row in await place.rows("SELECT saga_id FROM saga_instance")}
    assert found == expected
    async with place.app() as app:
        for id in sorted(expected):
            assert (await (await app.client.find(purchase, id)).result()).number == "c-book"


async def with_the_answer_lost(place: Place, faults: Faults, proxy: ProxyFactory) -> set[str]:
    """Commit orders whose callers never hear of it, and do what such a caller does: the same again."""
    faults.declare("commit answer lost")
    link = await proxy(place.url)
    through = Place(place.stack, link.url, place.broker_url)
    ids = [f"lost {n}" for n in range(3)]
    # the app has a connection of its own: only the caller's session goes through the link, to the same database
    async with place.app(url=link.url).as_client() as client:
        for id in ids:
            async with through.session() as session:
                await session.execute(insert(orders).values(id=id))
                handle = await client.start(purchase, Order(), id=id, session=session)
                link.cut_at_commit()
                with pytest.raises((DBAPIError, OSError)):
                    await session.commit()
                await session.invalidate()
            faults.fired("commit answer lost")
            assert (await client.start(purchase, Order(), id=id)).run_id == handle.run_id
    await through.engine.dispose()
    return set(ids)


@pytest.mark.feature("C-10", acceptance=True, scale=0.05)
async def test_waiters_over_coordinator_kills_all_get_the_right_answer_soon(
    place: Place, forge: Forge, faults: Faults
) -> None:
    """I3, I12: each learns the end of his own saga within two seconds of it."""
    faults.declare("coordinator killed")
    delays: list[float] = []

    async def wait(client: Client, n: int) -> None:
        fails = n % 5 == 0
        order = Order(item=str(n), cents=LIMIT + n + 1 if fails else 1)
        handle = await client.start(purchase, order, id=f"o-{n}")
        if fails:
            with pytest.raises(SagaCompensated) as ended:
                await handle.result()
            assert ended.value.details == {"missing": n + 1}
        else:
            assert (await handle.result()).number == f"c-{n}"
        delays.append(await since_the_end(handle))

    async with place.app(redrive=timedelta(milliseconds=500)).as_client() as client:
        waiting = [asyncio.ensure_future(wait(client, n)) for n in range(WAITERS)]
        for _ in range(3):
            assert await forge.end(forge.fork(place, "serve", fail="C8:kill:n=1")) == -signal.SIGKILL
            faults.fired("coordinator killed")
        forge.fork(place, "serve")
        await asyncio.gather(*waiting)
    assert len(delays) == WAITERS
    assert sorted(delays)[int(WAITERS * 0.99) - 1] <= 2.0


async def since_the_end(handle: Handle[Receipt]) -> float:
    now = datetime.now(UTC)
    closed_at = (await handle.describe()).closed_at
    assert closed_at is not None
    return (now - closed_at).total_seconds()
