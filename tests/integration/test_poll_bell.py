"""MySQL and MariaDB tell nobody of anything: a look finds what others put there, and a lock shows who lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection

import pytest
from sqlalchemy import text

from saga.adapters import queues_of
from saga.brokers.base import Channel, OutMessage
from saga.brokers.database import DatabaseBroker, DatabaseOptions
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy.bells import POLL_SECONDS, PollBell
from saga.storage.sqlalchemy.database import Database
from tests.stacks import TWIN

pytestmark = pytest.mark.feature("G-02")

WORK = Channel("work")


class CountedPauses(SystemClock):
    """Real time; knows which pauses were asked for."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await super().sleep(seconds)


class Process:
    """A database as a process of its own has it, with its bell and what it has heard."""

    def __init__(self, url: str) -> None:
        self.clock = CountedPauses()
        self.spawner = TaskSpawner()
        self.ids = SystemIds()
        self.database = Database(url, clock=self.clock, ids=self.ids, spawner=self.spawner)
        self.store, self.bell = queues_of(self.database)
        self.heard = asyncio.Queue[str]()
        self.lost = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None

    async def listen(self) -> PollBell:
        assert isinstance(self.bell, PollBell)
        listening = self.bell.listen(self.heard.put_nowait, self.lost.set)
        self._listening = asyncio.create_task(listening)
        assert await self.hears() == ""
        return self.bell

    async def hears(self) -> str:
        async with asyncio.timeout(60):
            return await self.heard.get()

    async def put(self, body: bytes) -> None:
        await self.store.publish([OutMessage("work", body, "text/plain")], length_max=None)

    async def close(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})
        await self.database.dispose()
        await self.spawner.close()


@pytest.fixture(params=["mariadb", *TWIN])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def url(stack: str, request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{stack}_url"))


@pytest.fixture
async def processes(url: str) -> AsyncIterator[list[Process]]:
    made = [Process(url) for _ in range(2)]
    await made[0].database.run(schema.upgrade)
    await made[0].store.declare([WORK])
    yield made
    for each in made:
        await each.close()


async def test_what_another_process_put_there_is_heard_by_the_next_look(processes: list[Process]) -> None:
    mine, other = processes
    await mine.listen()
    await other.put(b"x")
    assert await mine.hears() == ""
    await other.put(b"y")
    assert await mine.hears() == ""
    assert set(mine.clock.pauses) == {POLL_SECONDS}, "one look in a tenth of a second, and no more"


async def test_a_queue_in_which_nothing_changes_is_no_news(processes: list[Process]) -> None:
    mine, other = processes
    await other.put(b"x")
    await mine.listen()
    assert await mine.hears() == ""
    looks = len(mine.clock.pauses)
    async with asyncio.timeout(60):
        while len(mine.clock.pauses) < looks + 3:  # noqa: ASYNC110 - it counts what others do
            await asyncio.sleep(POLL_SECONDS)
    assert mine.heard.empty()


async def test_a_listener_that_is_cut_off_says_so_and_listens_again_with_another_lock(
    processes: list[Process],
) -> None:
    mine, other = processes
    bell = await mine.listen()
    before = bell.presence()
    assert before is not None
    assert await is_held(other, before)
    await cut_off(other, before)
    async with asyncio.timeout(60):
        await mine.lost.wait()
    assert await mine.hears() == "", "it listens again"
    after = bell.presence()
    assert after not in (None, before)
    assert not await is_held(other, before)
    await other.put(b"x")
    assert await mine.hears() == ""


async def is_held(process: Process, presence: int) -> bool:
    query = text("SELECT IS_USED_LOCK(:name)")
    name = {"name": f"saga-queue-{presence}"}
    return await process.database.run(lambda c: c.execute(query, name).scalar()) is not None


async def cut_off(process: Process, presence: int) -> None:
    """End the connection that holds the lock, as the death of its process does."""
    find = text("SELECT IS_USED_LOCK(:name)")
    name = {"name": f"saga-queue-{presence}"}
    number = await process.database.run(lambda c: c.execute(find, name).scalar())
    await process.database.run(lambda c: c.exec_driver_sql(f"KILL {number}"))


async def test_whoever_dies_gives_back_what_it_held_at_the_next_renewal_of_another(
    processes: list[Process],
) -> None:
    """Long before its time of 60 s has run out; whoever lives keeps what it has, however he is looked at."""
    mine, other = processes
    bell = await mine.listen()
    await other.listen()
    await other.put(b"x")
    victim, successor = mine.ids.uuid7(), mine.ids.uuid7()
    await mine.store.subscribe(victim, "work", 60.0)
    await other.store.subscribe(successor, "work", 60.0)
    assert len(await mine.store.claim(victim, "work", above=0, limit=1, deliveries_max=9)) == 1
    assert not (await other.store.look(["work"], [successor], 60.0)).waiting
    presence = bell.presence()
    assert presence is not None
    await cut_off(other, presence)
    looked = await other.store.look(["work"], [successor], 60.0)
    assert looked.waiting == {"work"}
    assert looked.alive == {successor}
    (again,) = await other.store.claim(successor, "work", above=0, limit=1, deliveries_max=9)
    assert again.deliveries == 2
    assert victim not in (await mine.store.look(["work"], [victim], 60.0)).alive, "and it is told so"


async def test_who_holds_no_lock_is_believed_until_its_time_has_run_out(processes: list[Process]) -> None:
    """On Galera a lock is a node's own, so nobody takes one there."""
    mine, other = processes
    await other.put(b"x")
    silent, token = mine.ids.uuid7(), mine.ids.uuid7()
    await mine.store.subscribe(silent, "work", 60.0)
    await mine.store.claim(silent, "work", above=0, limit=1, deliveries_max=9)
    await other.store.subscribe(token, "work", 60.0)
    assert not (await other.store.look(["work"], [token], 60.0)).waiting


class Never:
    """A bell that nobody hears."""

    async def listen(self, heard: object, lost: object) -> None:
        await asyncio.Event().wait()

    async def ring(self, channels: Collection[str]) -> None: ...


async def test_consumers_of_the_same_process_are_woken_without_a_look(processes: list[Process]) -> None:
    """Nothing of the database is asked to find out: the bell is silent, and a look is a minute away."""
    mine = processes[0]
    options = DatabaseOptions(poll_seconds=60.0, visibility_seconds=600.0)
    broker = DatabaseBroker(
        mine.store, Never(), clock=mine.clock, ids=mine.ids, spawner=mine.spawner, options=options
    )
    await broker.start()
    consumer = await broker.consume("work", prefetch=10)
    await asyncio.sleep(0.3)  # its first claim found nothing
    await broker.publish([OutMessage("work", b"x", "text/plain")])[0]
    async with asyncio.timeout(50):
        (delivery,) = await consumer.receive()
    assert delivery.body == b"x"
    await broker.close()
