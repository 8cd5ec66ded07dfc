"""Starting a saga in the caller's transaction: it commits with the order or not at all (row C-02)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession

from saga import AlreadyOpen, Handle, Participant, Saga, StartConflict, WouldDeadlock, WrongDatabase
from saga.app import App
from saga.client import Client
from saga.clock import SystemClock
from tests.client.shop import Order, Place, Receipt, orders, purchase, shop
from tests.plugins.watch import CANARY

pytestmark = pytest.mark.feature("C-02")

ON_ITS_WAY_SECONDS = 2.0


@pytest.fixture
async def elsewhere(place: Place) -> AsyncIterator[App]:
    """A coordinator and the participants, in another app than the client's: nothing here wakes their relay."""
    async with place.app() as app:
        yield app


@pytest.fixture
async def client(place: Place) -> AsyncIterator[Client]:
    """A process that only starts sagas."""
    async with place.app().as_client() as client:
        yield client


async def there(place: Place) -> tuple[int, int, int]:
    """How many orders, instances and commands to send are committed."""
    return await place.count("orders"), await place.count("saga_instance"), await place.count("saga_outbox")


async def buy(client: Client, session: AsyncSession, id: str = "o-1") -> Handle[Receipt]:
    await session.execute(insert(orders).values(id=id))
    return await client.start(purchase, Order(), id=id, session=session)


async def test_the_commit_that_has_the_order_has_the_saga(place: Place, client: Client) -> None:
    async with place.session() as session:
        await buy(client, session)
        assert await there(place) == (0, 0, 0)
        await session.commit()
    assert await there(place) == (1, 1, 1)


async def test_nothing_is_left_after_a_rollback(place: Place, client: Client) -> None:
    async with place.session() as session:
        await buy(client, session)
        await session.rollback()
        assert await there(place) == (0, 0, 0)
        await buy(client, session)  # the same session is good for another try
        await session.commit()
    assert await there(place) == (1, 1, 1)


async def test_a_duplicate_id_never_aborts_the_callers_transaction(place: Place, client: Client) -> None:
    """SQL-10: three kinds of duplicate, one that raises even, and the transaction commits all the same."""
    first = await client.start(purchase, Order(), id="o-1")
    async with place.session() as session:
        await session.execute(insert(orders).values(id="before"))
        again = await client.start(purchase, Order(), id="o-1", session=session)
        with pytest.raises(StartConflict):
            await client.start(purchase, Order(item="pen"), id="o-1", session=session)
        with pytest.raises(AlreadyOpen):
            await client.start(purchase, Order(), id="o-1", session=session, if_open="fail")
        await session.execute(insert(orders).values(id="after"))
        await session.commit()
    assert again.run_id == first.run_id
    assert await place.count("orders") == 2
    assert await place.count("saga_instance") == 1


async def test_a_session_of_another_database_is_refused_before_anything_is_written(
    place: Place, client: Client, tmp_path: Path
) -> None:
    other = Place("sqlite", f"sqlite+aiosqlite:///{tmp_path / 'other.db'}", None)
    async with other.session() as session:
        with pytest.raises(WrongDatabase) as refused:
            await client.start(purchase, Order(), id="o-1", session=session)
        assert not session.in_transaction()
    assert CANARY not in refused.value.text, "the password of an address"
    await other.engine.dispose()
    assert await there(place) == (0, 0, 0)


@pytest.mark.parametrize("stack", ["sqlite"])
async def test_one_file_under_two_names_is_one_database(place: Place) -> None:
    path = Path(place.url.removeprefix("sqlite+aiosqlite:///"))
    alias = Place("sqlite", f"sqlite+aiosqlite:///{path.parent}/../{path.parent.name}/{path.name}", None)
    async with place.app().as_client() as client, alias.session() as session:
        await buy(client, session)
        await session.commit()
    await alias.engine.dispose()
    assert await there(place) == (1, 1, 1)


# --- P19: nothing uncommitted goes out ----------------------------------------------------------


@pytest.fixture
async def embedded(place: Place) -> AsyncIterator[App]:
    """Client and relay in one process: the case in which the session's event wakes the relay."""
    async with place.app() as app:
        yield app


async def nothing_went_out(place: Place, app: App) -> None:
    """The woken relay had its turn, and the saga that came after it is through: an earlier one would be too."""
    later = await app.client.start(purchase, Order(), id="later")
    await later.result()
    assert await place.count("saga_instance") == 1
    assert await place.rows("SELECT 1 FROM saga_instance WHERE saga_id = :id", id="later") == [(1,)]
    assert await place.rows("SELECT DISTINCT run_id FROM saga_barrier") == await place.rows(
        "SELECT run_id FROM saga_instance"
    )


async def test_a_savepoint_released_and_then_the_outer_transaction_rolled_back_sends_nothing(
    place: Place, embedded: App
) -> None:
    """P19, first case."""
    async with place.session() as session:
        async with session.begin_nested():
            await buy(embedded.client, session)
        await session.rollback()
    await nothing_went_out(place, embedded)


async def test_a_savepoint_rolled_back_and_then_the_outer_transaction_committed_sends_nothing(
    place: Place, embedded: App
) -> None:
    """P19, second case."""
    async with place.session() as session:
        savepoint = await session.begin_nested()
        await buy(embedded.client, session)
        await savepoint.rollback()
        await session.commit()
    await nothing_went_out(place, embedded)


async def test_a_session_joined_to_a_transaction_that_is_rolled_back_sends_nothing(
    place: Place, embedded: App
) -> None:
    """P19, third case: the session's own commit ends a savepoint only."""
    async with place.engine.connect() as connection:
        outer = await connection.begin()
        joined = AsyncSession(connection, join_transaction_mode="create_savepoint")
        await buy(embedded.client, joined)
        await joined.commit()
        await joined.close()
        await outer.rollback()
    await nothing_went_out(place, embedded)


async def test_a_session_joined_to_a_transaction_goes_out_when_that_is_committed(
    place: Place, embedded: App
) -> None:
    """P19: the event came before the commit, so the sweep alone finds it."""
    async with place.engine.connect() as connection:
        outer = await connection.begin()
        joined = AsyncSession(connection, join_transaction_mode="create_savepoint")
        handle = await buy(embedded.client, joined)
        await joined.commit()
        await joined.close()
        await outer.commit()
    await handle.result()


# --- on its way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("savepoint", [False, True], ids=["plain", "in-a-savepoint"])
async def test_a_start_in_a_session_wakes_the_relay_of_its_process(
    place: Place, embedded: App, savepoint: bool
) -> None:
    """P19: at once, without waiting for the sweep, which leaves rows alone that are younger than 0.9 s."""
    clock = SystemClock()
    await (await embedded.client.start(purchase, Order(), id="warm")).result()
    quickest = ON_ITS_WAY_SECONDS
    for n in range(3):
        async with place.session() as session:
            async with session.begin_nested() if savepoint else nullcontext():
                await buy(embedded.client, session, f"o-{n}")
            await session.commit()
            since = clock.monotonic()
        await place.until(partial(arrived, place, f"o-{n}"))
        quickest = min(quickest, clock.monotonic() - since)
    assert quickest < 0.9


async def arrived(place: Place, id: str) -> bool:
    """Whether a participant has served the first command of this saga."""
    found = await place.rows(
        "SELECT 1 FROM saga_barrier b JOIN saga_instance i ON b.run_id = i.run_id WHERE i.saga_id = :id",
        id=id,
    )
    return bool(found)


async def test_a_start_in_a_session_of_a_process_without_relay_is_on_its_way_within_two_seconds(
    place: Place, elsewhere: App, client: Client
) -> None:
    await (await client.start(purchase, Order(), id="warm")).result()
    async with place.session() as session:
        await buy(client, session)
        await session.commit()
    assert await place.until(lambda: arrived(place, "o-1")) < ON_ITS_WAY_SECONDS + 1.0


@pytest.mark.parametrize(
    "stack", ["postgres-rabbitmq"]
)  # SQLite has one writer: no id is committed after a higher one
async def test_a_start_whose_commit_came_late_is_on_its_way_within_two_seconds(
    place: Place, elsewhere: App, client: Client
) -> None:
    """F-04: the relay has seen and sent higher ids meanwhile."""
    async with place.session() as late:
        await buy(client, late, "late")
        for n in range(3):
            async with place.session() as session:
                await buy(client, session, f"o-{n}")
                await session.commit()
        for n in range(3):
            await place.until(partial(arrived, place, f"o-{n}"))
        await late.commit()
    assert await place.until(lambda: arrived(place, "late")) < ON_ITS_WAY_SECONDS + 1.0


# --- inside a handler ---------------------------------------------------------------------------


async def test_a_start_inside_a_handler_joins_its_session_or_is_refused_where_it_would_wait_for_itself(
    place: Place,
) -> None:
    """P36: on one SQLite file the handler holds the writer; on a server a start of its own is fine."""
    clerk = Participant("clerk", start_to_close=shop.activities["charge"].start_to_close)
    raised: asyncio.Queue[str] = asyncio.Queue()

    @clerk.activity(no_compensation="the other saga has its own")
    async def order_more(order: Order, session: AsyncSession) -> None:
        await session.execute(insert(orders).values(id="more"))
        try:
            await app.client.start(purchase, order, id="without")
            raised.put_nowait("started")
        except WouldDeadlock as error:
            raised.put_nowait(error.code)
        await app.client.start(purchase, order, id="within", session=session)

    restock = Saga("restock", Order).step(order_more)
    app = place.app(sagas=[purchase, restock], participants=[shop, clerk])
    async with app:
        await app.client.execute(restock, Order(), id="r-1")
        assert raised.get_nowait() == ("SG310" if place.stack == "sqlite" else "started")
        within = await app.client.find(purchase, "within")
        assert (await within.result()).number == "c-book"
        assert await place.count("orders") == 1
