"""Rows I-04, C-02, F-01: code without an event loop starts, waits, orders and publishes, in its own transactions."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import pytest
from pydantic import BaseModel
from sqlalchemy import Connection, Engine, create_engine, event, insert, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from saga import (
    AlreadyOpen,
    App,
    ConfigurationError,
    Filter,
    ResultTimeout,
    SagaCompensated,
    StartConflict,
    SyncClient,
    WrongDatabase,
)
from tests.client.shop import Order, Place, gates, orders, purchase

pytestmark = [pytest.mark.feature("I-04"), pytest.mark.feature("C-02")]

PATIENCE = timedelta(seconds=30)
DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}
T = TypeVar("T")


class Sold(BaseModel):
    order: str


@pytest.fixture
def engine(place: Place) -> Iterator[Engine]:
    """The caller's own engine, on the plain driver."""
    url = make_url(place.url)
    options: dict[str, Any] = (
        {"isolation_level": None, "timeout": 30.0} if url.get_backend_name() == "sqlite" else {}
    )
    engine = create_engine(url.set(drivername=DRIVERS[url.get_backend_name()]), connect_args=options)
    if options:
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    yield engine
    engine.dispose()


@pytest.fixture
async def client(place: Place) -> Any:
    """A process that coordinates and takes part; its threads have no loop."""
    client = SyncClient(
        place.app(topics=["sales"], grace=timedelta(seconds=1)), coordinator=True, participants=True
    )
    # SQLite has one writer: an app that starts inside a transaction would wait for that
    await asyncio.to_thread(client.open)
    yield client
    await asyncio.to_thread(client.close)


async def in_thread(function: Callable[[], T]) -> T:
    """Run what a view of Flask would do, in a thread such as its server has."""
    return await asyncio.to_thread(function)


async def there(place: Place) -> tuple[int, int]:
    return await place.count("orders"), await place.count("saga_instance")


def instances(connection: Connection) -> int:
    return int(connection.scalar(text("SELECT count(*) FROM saga_instance")) or 0)


Opened = Callable[[Engine], Any]
SESSIONS: dict[str, Opened] = {
    "session": Session,
    "scoped session": lambda engine: scoped_session(sessionmaker(engine)),
    "connection": lambda engine: engine.connect(),
}


@pytest.mark.parametrize("kind", SESSIONS)
async def test_the_commit_that_has_the_order_has_the_saga(
    place: Place, engine: Engine, client: SyncClient, kind: str
) -> None:
    def buy() -> Any:
        session = SESSIONS[kind](engine)
        try:
            session.execute(insert(orders).values(id="o-1"))
            handle = client.start(purchase, Order(), id="o-1", session=session)
            with engine.connect() as other:
                assert instances(other) == 0
            session.commit()
            return client.result(handle, timeout=PATIENCE)
        finally:
            session.close()

    assert (await in_thread(buy)).number == "c-book"
    assert await there(place) == (1, 1)


@pytest.mark.parametrize("kind", SESSIONS)
async def test_nothing_is_left_after_a_rollback(
    place: Place, engine: Engine, client: SyncClient, kind: str
) -> None:
    def regret() -> None:
        session = SESSIONS[kind](engine)
        session.execute(insert(orders).values(id="o-1"))
        client.start(purchase, Order(), id="o-1", session=session)
        client.publish(Sold(order="o-1"), topic="sales", session=session)
        session.rollback()
        session.close()

    await in_thread(regret)
    assert await there(place) == (0, 0)
    assert await place.count("saga_outbox") == 0


async def test_a_duplicate_id_never_aborts_the_callers_transaction(
    place: Place, engine: Engine, client: SyncClient
) -> None:
    def buy_again() -> None:
        first = client.start(purchase, Order(), id="o-1")
        with Session(engine) as session, session.begin():
            session.execute(insert(orders).values(id="before"))
            again = client.start(purchase, Order(), id="o-1", session=session)
            assert again.run_id == first.run_id
            with pytest.raises(StartConflict):
                client.start(purchase, Order(item="pen"), id="o-1", session=session)
            session.execute(insert(orders).values(id="after"))

    await in_thread(buy_again)
    assert await there(place) == (2, 1)


async def test_the_commit_in_another_thread_wakes_the_relay(
    place: Place, engine: Engine, client: SyncClient
) -> None:
    """P19. The relay's sweep comes every 2 s and is not waited for."""

    def buy() -> None:
        client.open()
        with Session(engine) as session, session.begin():
            handle = client.start(purchase, Order(), id="o-1", session=session)
        client.result(handle, timeout=timedelta(seconds=1.5))

    await in_thread(buy)


async def test_verbs_and_views_are_those_of_the_client(
    place: Place, engine: Engine, client: SyncClient
) -> None:
    def operate() -> None:
        handle = client.start(purchase, Order(cents=5_000), id="dear")
        with pytest.raises(SagaCompensated) as rolled_back:
            client.result(handle, timeout=PATIENCE)
        assert rolled_back.value.reason == "too_expensive"
        assert client.describe(handle).status == "compensated"
        assert client.count(Filter(saga="purchase")) == 1
        assert [each.id for each in client.list().instances] == ["dear"]
        assert client.look_up("dear").run_id == handle.run_id
        assert client.cancel(handle, reason="late").after == "compensated"
        assert not client.dead_letters()
        assert not client.incidents()
        assert list(client.redrive_all()) == []

    await in_thread(operate)


async def test_a_cancel_joins_the_callers_transaction(
    place: Place, engine: Engine, client: SyncClient
) -> None:
    gates["book"] = asyncio.Event()  # belongs to the loop of the app, which nobody sets: the step waits

    def cancel() -> None:
        handle = client.start(purchase, Order(), id="o-1")
        for end in ("rollback", "commit"):
            with Session(engine) as session:
                session.execute(
                    insert(orders).values(id="o-1")
                )  # a write first: SQLite's one writer is waited for
                client.cancel(handle, reason="changed my mind", session=session)
                getattr(session, end)()
            assert len(client.audit(handle)) == (end == "commit")

    await in_thread(cancel)


async def test_an_event_leaves_with_the_commit(place: Place, engine: Engine, client: SyncClient) -> None:
    def publish() -> None:
        with Session(engine) as session, session.begin():
            client.publish(Sold(order="o-1"), topic="sales", key="o-1", session=session)
            later = client.publish(
                Sold(order="o-2"), topic="sales", session=session, delay=timedelta(hours=1)
            )
        assert client.revoke(later)
        assert not client.revoke(later)

    await in_thread(publish)
    assert await place.count("saga_outbox_delayed") == 0
    await place.until(lambda: _empty(place))


async def _empty(place: Place) -> bool:
    return await place.count("saga_outbox") == 0


async def test_many_threads_share_one_client(place: Place, engine: Engine, client: SyncClient) -> None:
    def buy(number: int) -> str:
        with Session(engine) as session, session.begin():
            handle = client.start(purchase, Order(), id=f"o-{number}", session=session)
        return client.result(handle, timeout=PATIENCE).number

    def all_of_them() -> list[str]:
        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(buy, range(24)))

    assert await in_thread(all_of_them) == ["c-book"] * 24
    assert threading.active_count() < 24


async def test_a_running_app_is_used_where_it_runs(place: Place, engine: Engine) -> None:
    async with place.app() as app:
        client = SyncClient(app)

        def buy() -> Any:
            with Session(engine) as session, session.begin():
                handle = client.start(purchase, Order(), id="o-1", session=session)
            return client.result(handle, timeout=PATIENCE)

        assert (await in_thread(buy)).number == "c-book"
        await in_thread(client.close)
        assert app.loop is asyncio.get_running_loop()


@pytest.mark.parametrize("stack", ["postgres-rabbitmq"], indirect=True)
async def test_it_opens_again_after_a_close(place: Place, client: SyncClient) -> None:
    def twice() -> None:
        with client:
            client.start(purchase, Order(), id="o-1")
        client.close()
        assert client.result(client.find(purchase, "o-1"), timeout=PATIENCE).number == "c-book"

    await in_thread(twice)


async def test_a_result_that_takes_too_long_is_told_and_the_saga_goes_on(
    place: Place, client: SyncClient
) -> None:
    gates["book"] = asyncio.Event()

    def wait() -> None:
        handle = client.start(purchase, Order(), id="o-1")
        with pytest.raises(ResultTimeout):
            client.result(handle, timeout=timedelta(milliseconds=50))
        assert client.describe(handle).status == "running"

    await in_thread(wait)


async def test_in_a_running_loop_it_refuses_to_block(client: SyncClient) -> None:
    with pytest.raises(ConfigurationError, match="would block this event loop"):
        client.count()


async def test_what_is_no_plain_session_is_refused_before_anything_is_written(
    place: Place, client: SyncClient, tmp_path: Any
) -> None:
    def refuse() -> None:
        with pytest.raises(ConfigurationError, match="not an asynchronous one"):
            client.start(purchase, Order(), session=AsyncSession(place.engine))
        with pytest.raises(WrongDatabase, match="got a str"):
            client.start(purchase, Order(), session="session")  # type: ignore[arg-type]
        other = create_engine(f"sqlite:///{tmp_path / 'other.db'}")
        with Session(other) as session, pytest.raises(WrongDatabase):
            client.start(purchase, Order(), session=session)
        with Session(other) as session, pytest.raises(WrongDatabase):
            client.cancel(client.start(purchase, Order(), id="x"), session=session)
        other.dispose()

    await in_thread(refuse)
    assert await place.count("saga_instance") == 1


async def test_errors_are_those_of_the_client(place: Place, client: SyncClient) -> None:
    def fail() -> None:
        client.start(purchase, Order(), id="o-1", if_open="fail")
        with pytest.raises(AlreadyOpen):
            client.start(purchase, Order(), id="o-1", if_open="fail", if_closed="fail")

    gates["book"] = asyncio.Event()
    await in_thread(fail)


async def test_an_app_that_cannot_start_says_so_and_leaves_no_thread() -> None:
    client = SyncClient(App("postgresql://nobody@127.0.0.1:1/none", sagas=[purchase]))
    for _ in range(2):
        with pytest.raises(Exception, match="StorageUnavailable"):
            await in_thread(client.count)
    assert "saga-client" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("stack", ["postgres-rabbitmq"], indirect=True)
async def test_a_forked_process_opens_a_client_of_its_own(place: Place, client: SyncClient) -> None:
    """Servers such as gunicorn load the application, fork, and serve."""
    await in_thread(lambda: client.start(purchase, Order(), id="parent"))

    def fork() -> int:
        # a thread in the midst of a line would leave the stream's lock taken in the child, where nobody gives it back
        writing = logging.getLogger().handlers[:]
        for handler in writing:
            handler.acquire()
        child = os.fork()
        if child:
            for handler in writing:
                handler.release()
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.alarm(60)
        status = 1
        try:
            client.start(purchase, Order(), id="child")
            status = 0
        finally:
            os._exit(status)

    assert await in_thread(fork) == 0
    assert await in_thread(lambda: client.find(purchase, "child").id) == "child"


@pytest.mark.feature("C-02")
async def test_an_asynchronous_connection_is_a_transaction_too(place: Place) -> None:
    async with place.app().as_client() as client, place.engine.connect() as connection:
        await client.start(purchase, Order(), id="o-1", session=connection)
        await connection.rollback()
        await client.start(purchase, Order(), id="o-2", session=connection)
        await connection.commit()
    found = await place.rows("SELECT saga_id FROM saga_instance")
    assert [row.saga_id for row in found] == ["o-2"]


async def test_a_plain_session_works_beside_a_loop_as_well(place: Place, engine: Engine) -> None:
    """It blocks the loop for as long as its statements take, as the caller's own statements do."""
    async with place.app().as_client() as client:
        with Session(engine) as session:
            await client.start(purchase, Order(), id="o-1", session=session)
            assert instances(session.connection()) == 1
            session.commit()
    assert await place.count("saga_instance") == 1
