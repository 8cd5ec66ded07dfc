"""Row G-02: the database is the broker. What is promised beyond the port's contract, on both databases."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert
from sqlalchemy.ext.asyncio import AsyncSession

from devservices import LocalMariaDb, LocalMySql, LocalPostgres
from saga import Participant, Saga
from saga.adapters import database_broker, queues_in, queues_of
from saga.app import App
from saga.brokers.base import Channel, OutMessage, PublishOutcome
from saga.brokers.database import DatabaseOptions
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.errors import ConfigurationError
from saga.messages import commands_channel
from saga.storage.queue import QueueStore
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.tables import outbox_delayed
from tests.client.shop import Order, Place, Receipt, orders, purchase, shop
from tests.proxy import ProxyFactory
from tests.stacks import TWIN
from tests.upgraded import upgrade, upgraded

pytestmark = pytest.mark.feature("G-02")

IDLE_SCALE = 1 / 15
"""Of the 60 s over which an idle coordinator's statements are counted."""
WORK = Channel("work", "work.parking")


@pytest.fixture(params=["postgres", "sqlite-shared"])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def place(stack: str, url: str) -> AsyncIterator[Place]:
    place = Place(stack, url, "database://")
    async with place.engine.begin() as connection:
        await connection.run_sync(orders.metadata.create_all)
    yield place
    await place.engine.dispose()


class Processes:
    """Stores and databases as processes of their own have them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.spawner = TaskSpawner()
        self.ids = SystemIds()
        self.databases: list[Database] = []

    def store(self) -> QueueStore:
        database = Database(self._url, clock=SystemClock(), ids=self.ids, spawner=self.spawner)
        self.databases.append(database)
        return queues_of(database)[0]

    async def close(self) -> None:
        for database in self.databases:
            await database.dispose()
        await self.spawner.close()


@pytest.fixture
async def processes(url: str) -> AsyncIterator[Processes]:
    made = Processes(url)
    yield made
    await made.close()


async def put(store: QueueStore, *bodies: bytes) -> None:
    await store.declare([WORK, Channel("work.parking")])
    messages = [OutMessage("work", body, "text/plain", key="k") for body in bodies]
    assert set(await store.publish(messages, length_max=None)) == {PublishOutcome.CONFIRMED}


# --- claims -------------------------------------------------------------------------------------------------------


async def test_a_late_owner_changes_nothing(processes: Processes) -> None:
    """Its ack and its retry come after the claim ran out and another has the message."""
    slow, other = processes.store(), processes.store()
    await put(slow, b"a", b"b")
    late, now = processes.ids.uuid7(), processes.ids.uuid7()
    await slow.subscribe(late, "work", 0.05)
    claimed = await slow.claim(late, "work", above=0, limit=10, deliveries_max=10)
    await asyncio.sleep(0.1)
    await other.subscribe(now, "work", 30.0)
    assert now in (await other.look(["work"], [now], 30.0)).alive
    again = await other.claim(now, "work", above=0, limit=10, deliveries_max=10)
    assert [(row.body, row.deliveries) for row in again] == [(b"a", 2), (b"b", 2)]
    await slow.settle(late, [claimed[0].id], [claimed[1].id], 0.0)
    looked = await slow.look(["work"], [late], 30.0)
    assert late not in looked.alive, "and it is told so"
    assert not looked.waiting, "nothing was given back"
    await other.settle(now, [row.id for row in again], [], 0.0)
    assert (await other.status("work")) is not None


async def test_a_claim_that_is_renewed_stays(processes: Processes) -> None:
    mine, other = processes.store(), processes.store()
    await put(mine, b"a")
    token = processes.ids.uuid7()
    await mine.subscribe(token, "work", 0.3)
    await mine.claim(token, "work", above=0, limit=10, deliveries_max=10)
    for _ in range(4):
        await asyncio.sleep(0.1)
        assert token in (await mine.look(["work"], [token], 0.3)).alive
        assert not (await other.look(["work"], [processes.ids.uuid7()], 0.3)).waiting


async def test_a_claim_takes_a_batch_in_one_transaction_and_so_does_its_ack(
    processes: Processes, stack: str
) -> None:
    store, token = processes.store(), processes.ids.uuid7()
    await put(store, *(b"%d" % number for number in range(200)))
    await store.subscribe(token, "work", 30.0)
    counted = Statements(processes.databases[0])
    claimed = await store.claim(token, "work", above=0, limit=150, deliveries_max=10)
    assert [row.body for row in claimed] == [b"%d" % number for number in range(150)]
    assert len(counted.seen) <= (1 if stack == "postgres" else 6)
    counted.seen.clear()
    await store.settle(token, [row.id for row in claimed], [], 0.0)
    assert len(counted.seen) == 1
    assert await store.status("work") is not None


class Statements:
    """What an engine is asked, transaction control not."""

    def __init__(self, database: Database) -> None:
        self.seen: list[str] = []

        @event.listens_for(database.engine.sync_engine, "before_cursor_execute")
        def note(_connection: Connection, _c: Any, statement: str, _p: Any, _x: Any, _many: bool) -> None:
            if not statement.startswith(("BEGIN", "COMMIT", "ROLLBACK")):
                self.seen.append(statement)


# --- no relay hop -------------------------------------------------------------------------------------------------


@pytest.mark.feature("F-03")
async def test_the_commit_of_a_start_puts_its_command_into_the_queue_and_nothing_into_the_outbox(
    place: Place,
) -> None:
    app = place.app(participants=[])
    async with app.as_client() as client:
        await client.start(purchase, Order(), id="o-1")
    assert await place.rows("SELECT channel FROM saga_queue") == [(commands_channel("default", "shop"),)]
    assert await place.count("saga_outbox") == 0


@pytest.mark.feature("C-02")
async def test_what_is_not_committed_does_not_go_out_and_what_is_does_at_once(place: Place) -> None:
    """P19: the caller's session is of another process than the coordinator and the participants."""
    async with place.app() as elsewhere, place.app(participants=[]).as_client() as client:
        async with place.session() as session:
            await session.execute(insert(orders).values(id="o-1"))
            handle = await client.start(purchase, Order(), id="o-1", session=session)
            if place.stack == "postgres":  # SQLite has one writer: nobody else could take anything meanwhile
                await asyncio.sleep(0.1)
            assert await place.count("saga_queue") == 0
            since = SystemClock().monotonic()
            await session.commit()
        there = elsewhere.client.handle(purchase, handle.run_id)
        assert (await there.result(timeout=timedelta(seconds=10))) == Receipt(number="c-book")
        assert SystemClock().monotonic() - since < 2.0
    assert await place.count("saga_claim") == await place.count("saga_queue") == 0


@pytest.mark.feature("C-02")
@pytest.mark.feature("F-03")
async def test_a_start_that_nobody_tells_of_is_on_its_way_within_two_seconds(place: Place) -> None:
    """The process that started it is gone before it could ring."""
    async with place.app() as elsewhere:
        async with place.app(participants=[]).as_client() as client:
            session = place.session()
            handle = await client.start(purchase, Order(), id="o-1", session=session)
        since = SystemClock().monotonic()
        await session.commit()
        await session.close()
        there = elsewhere.client.handle(purchase, handle.run_id)
        await there.result(timeout=timedelta(seconds=10))
        assert SystemClock().monotonic() - since < 2.0 + 1.0, "the poll, and the run itself"


async def test_services_with_databases_of_their_own_share_the_coordinators_queues(
    place: Place, tmp_path: Any, request: pytest.FixtureRequest
) -> None:
    """The participant's effects are in its own database; only its queues are elsewhere."""
    with upgraded(place.stack, request) as own:
        if place.stack == "sqlite-shared":
            own = f"sqlite:///{tmp_path / 'shop.db'}"
        async with (
            App(own, broker=place.url, participants=[shop]),
            place.app(participants=[]) as coordinating,
        ):
            assert await coordinating.client.execute(
                purchase, Order(), timeout=timedelta(seconds=10)
            ) == Receipt(number="c-book")
        assert await place.count("saga_barrier") == 0


async def test_a_delayed_row_goes_into_the_queue_when_it_is_due(place: Place) -> None:
    """There is no relay that would move it."""
    channel = commands_channel("default", "shop")
    async with place.app() as app:
        running: Any = app._running
        row = {
            "namespace": "default",
            "part": 0,
            "channel": channel,
            "ordering_key": "k",
            "body": b"not a command",
        }
        now = SystemClock().now()
        rows = [
            {**row, "message_id": SystemIds().uuid7(), "due_at": now + timedelta(seconds=each)}
            for each in (0, 60)
        ]
        await running.database.run(
            lambda connection: connection.execute(insert(outbox_delayed), rows).rowcount
        )

        async def parked() -> bool:
            return await place.count("saga_parked") == 1

        await place.until(parked, seconds=5.0)
        assert await place.count("saga_outbox_delayed") == 1


# --- what is idle -------------------------------------------------------------------------------------------------


@pytest.mark.feature("G-02", acceptance=True, scale=IDLE_SCALE)
async def test_an_idle_coordinator_asks_at_most_two_statements_a_second_of_its_database(place: Place) -> None:
    app = place.app(participants=[])
    async with app:
        running: Any = app._running
        await asyncio.sleep(0.5)
        counted = Statements(running.database)
        seconds = 60 * IDLE_SCALE
        await asyncio.sleep(seconds)
        kinds = Counter(
            statement.split("\n")[1 if statement[0] == "\n" else 0][:60] for statement in counted.seen
        )
    # one more for the turn that the counting may have cut into
    assert len(counted.seen) <= 2 * seconds + 1, kinds
    assert counted.seen, "it looks at all"


# --- one writer ---------------------------------------------------------------------------------------------------

booking = Participant("booking", start_to_close=timedelta(seconds=10))


@booking.activity(no_compensation="the test ends first")
async def book(order: Order, session: AsyncSession) -> Receipt:
    await session.execute(insert(orders).values(id=order.item))
    await asyncio.sleep(0.02)  # holding SQLite's one writer, while the queues of the same file are in use
    return Receipt(number=order.item)


bookings = Saga("bookings", Order).step(book).returns(book.out)


@pytest.mark.feature("D-10")
async def test_handlers_and_queues_share_one_database_and_every_effect_happens_once(place: Place) -> None:
    app = place.app(sagas=[bookings], participants=[booking])
    async with app:
        wanted = [f"b-{number}" for number in range(20)]
        running = [app.client.execute(bookings, Order(item=item)) for item in wanted]
        async with asyncio.timeout(20):
            results = await asyncio.gather(*running)
    assert [result.number for result in results] == wanted
    assert await place.count("orders") == await place.count("saga_barrier") == 20
    assert await place.count("saga_queue") == await place.count("saga_claim") == 0


# --- losses -------------------------------------------------------------------------------------------------------

slow = Participant("slow", start_to_close=timedelta(seconds=10))


@slow.activity(no_compensation="it does nothing")
async def work(order: Order) -> Receipt:
    await asyncio.sleep(0.01)
    return Receipt(number=order.item)


twice = Saga("twice", Order).step(work).step(work, name="again").returns(work.at("again").out)


@pytest.mark.feature("G-02", acceptance=True)
@pytest.mark.parametrize("stack", ["postgres", "mariadb", *TWIN])
async def test_a_restart_of_the_database_under_load_is_recovered_from_without_a_restart_of_the_process(
    stack: str, request: pytest.FixtureRequest
) -> None:
    server: LocalPostgres | LocalMariaDb | LocalMySql = request.getfixturevalue(f"own_{stack}")
    url = server.create_database()
    upgrade(url)
    async with App(
        url, broker="database://", sagas=[twice], participants=[slow], redrive=timedelta(seconds=2)
    ) as app:
        orders = [Order(item=str(number)) for number in range(300)]
        handles = await asyncio.gather(*(app.client.start(twice, order) for order in orders))
        server.kill()
        await asyncio.to_thread(server.start)
        results = await asyncio.gather(*(each.result(timeout=timedelta(seconds=20)) for each in handles))
        assert [result.number for result in results] == [str(number) for number in range(300)]
        assert (await app.client.execute(twice, Order(item="new"))).number == "new"
    server.drop_database(url)


@pytest.mark.parametrize("stack", ["postgres", "mariadb", *TWIN])
async def test_what_a_dead_process_held_is_given_to_others_long_before_its_claim_runs_out(
    stack: str, request: pytest.FixtureRequest, proxy: ProxyFactory
) -> None:
    """Its connections are closed by the operating system, and with them the lock by which the others knew it."""
    options = DatabaseOptions(visibility_seconds=60.0, poll_seconds=0.05)
    with upgraded(stack, request) as url:
        link = await proxy(url)
        spawner, clock, ids = TaskSpawner(), SystemClock(), SystemIds()
        ports: dict[str, Any] = {"clock": clock, "ids": ids, "spawner": spawner, "options": options}
        victim = database_broker(link.url, **ports)
        await victim.start()
        await victim.declare([WORK])
        await victim.publish([OutMessage("work", b"x", "text/plain")])[0]
        assert await (await victim.consume("work", prefetch=1)).receive()
        link.refuse()
        link.reset()
        successor = database_broker(url, **ports)
        await successor.start()
        async with asyncio.timeout(10):
            (again,) = await (await successor.consume("work", prefetch=1)).receive()
        assert again.delivery_count == 2
        await asyncio.gather(victim.close(), successor.close())
        await spawner.close()


# --- what an address means ----------------------------------------------------------------------------------------


@pytest.mark.stack("pure")
@pytest.mark.parametrize(
    ("broker", "database", "schema", "here"),
    [
        ("database://", "postgresql://h/d", None, True),
        ("postgresql://h/d", "postgresql+asyncpg://u@h:5432/d", None, True),
        ("postgresql://h/d?schema=s", "postgresql://h/d", "s", True),
        ("postgresql://h/d?schema=s", "postgresql://h/d", "t", False),
        ("postgresql://h/d", "postgresql://h/d", "s", False),
        ("postgresql://h/e", "postgresql://h/d", None, False),
        ("sqlite:///d", "sqlite+aiosqlite:///d", "s", True),
        ("sqlite:///e", "sqlite:///d", None, False),
        ("amqp://h", "postgresql://h/d", None, False),
        ("memory://", "sqlite:///d", None, False),
    ],
)
def test_the_queues_are_in_the_own_database_if_both_addresses_mean_the_same_tables(
    broker: str, database: str, schema: str | None, here: bool
) -> None:
    assert queues_in(broker, database, schema) is here


@pytest.mark.stack("pure")
async def test_an_app_without_a_database_has_none_that_could_be_its_broker() -> None:
    with pytest.raises(ConfigurationError, match="SG201"):
        await App(None, broker="database://", participants=[slow]).start(coordinator=False, participants=True)


@pytest.mark.stack("pure")
def test_bounds_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError):
        DatabaseOptions(visibility_seconds=5.0, poll_seconds=2.0)
