"""The outbox on its own: domain events in the caller's transaction, in order per key, delayed, revocable."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from saga import (
    ActivityContext,
    App,
    ConfigurationError,
    Participant,
    PayloadInvalid,
    PayloadTooLarge,
    Saga,
    WrongDatabase,
)
from saga.brokers.base import Consumer, PublishOutcome
from saga.clock import SystemClock
from saga.outbox.relay import waves
from saga.storage.base import StoredRow
from saga.storage.sqlalchemy.database import async_url
from tests.features_due import DUE
from tests.plugins.features import Faults
from tests.plugins.watch import CANARY
from tests.stacks import broker_of, every_stack

clock = SystemClock()


class OrderPlaced(BaseModel):
    number: int
    note: str = CANARY


class Place:
    """An app with a topic, the caller's own engine, and what a reader of the topic has seen."""

    def __init__(self, app: App, engine: AsyncEngine, consumer: Consumer) -> None:
        self.app = app
        self.engine = engine
        self.consumer = consumer
        self.seen: list[dict[str, Any]] = []

    async def place(self, *numbers: int, commit: bool = True, **how: Any) -> list[UUID]:
        """Publish in one transaction of the caller."""
        async with AsyncSession(self.engine) as session:
            ids = [
                await self.app.outbox.publish(
                    OrderPlaced(number=number), topic="orders", session=session, **how
                )
                for number in numbers
            ]
            await (session.commit() if commit else session.rollback())
        return ids

    async def read(self, count: int) -> list[int]:
        """Return the numbers of the first `count` events that were read, waiting for them."""
        async with asyncio.timeout(20):
            while len(self.seen) < count:
                deliveries = await self.consumer.receive()
                self.seen += [json.loads(delivery.body) for delivery in deliveries]
                self.consumer.ack(deliveries)
        return [each["data"]["number"] for each in self.seen]


@pytest.fixture
def broker_url(stack: str, request: pytest.FixtureRequest) -> str:
    return broker_of(stack, request) or "memory://"


@pytest.fixture
async def place(url: str, broker_url: str) -> AsyncIterator[Place]:
    engine = create_async_engine(async_url(url))
    app = App(url, broker=broker_url, namespace=f"events-{secrets.token_hex(4)}", topics=["orders"])
    async with app:
        yield Place(app, engine, await app.broker.consume("orders", prefetch=1_000))
    await engine.dispose()


@pytest.mark.parametrize("stack", DUE["F-01"], indirect=True)
@pytest.mark.feature("F-01", acceptance=True)
async def test_what_was_committed_is_sent_and_nothing_else(place: Place, faults: Faults) -> None:
    """P19: rolled back, a savepoint rolled back inside a commit, a commit: the broker has the committed ones."""
    faults.declare("rolled back")
    for turn in range(5):
        await place.place(100 + turn, commit=False)
        faults.fired("rolled back")
        await place.place(turn)
        async with AsyncSession(place.engine) as session, session.begin():
            inner = await session.begin_nested()
            await place.app.outbox.publish(OrderPlaced(number=200 + turn), topic="orders", session=session)
            await inner.rollback()
            faults.fired("rolled back")
    assert sorted(await place.read(5)) == [0, 1, 2, 3, 4]
    await clock.sleep(0.1)
    await place.place(5)
    assert sorted(await place.read(6)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.feature("F-01")
async def test_an_event_is_a_cloud_event_of_its_own(place: Place) -> None:
    """Never packed with others: whoever reads it knows nothing of us."""
    first, _ = await place.place(1, 2, key="o-7", type="shop.order.placed", attributes={"tenant": "north"})
    await place.read(2)
    seen = place.seen[0]
    assert seen["id"] == str(first)
    assert (seen["specversion"], seen["type"], seen["subject"], seen["tenant"]) == (
        "1.0",
        "shop.order.placed",
        "o-7",
        "north",
    )
    assert seen["data"] == {"number": 1, "note": CANARY}
    assert datetime.fromisoformat(seen["time"]).tzinfo is not None


@pytest.mark.feature("F-01")
async def test_what_cannot_be_sent_is_refused_before_it_is_written(place: Place) -> None:
    async with AsyncSession(place.engine) as session:

        async def publish(event: OrderPlaced = OrderPlaced(number=1), **how: Any) -> None:
            await place.app.outbox.publish(event, **{"topic": "orders", "session": session, **how})

        broken = OrderPlaced.model_construct(number="no")  # type: ignore[arg-type]
        refused: list[tuple[type[Exception], Callable[[], Any]]] = [
            (ConfigurationError, lambda: publish(topic="other")),
            (PayloadTooLarge, lambda: publish(OrderPlaced(number=1, note="x" * 300_000))),
            (PayloadInvalid, lambda: publish(broken)),
            (PayloadInvalid, lambda: publish(attributes={"data": "ours"})),
            (PayloadInvalid, lambda: publish(attributes={"Capital": "no"})),
            (PayloadInvalid, lambda: publish(key="k" * 201)),
            (PayloadInvalid, lambda: publish(not_before=datetime(2030, 1, 1))),  # noqa: DTZ001
            (PayloadInvalid, lambda: publish(delay=timedelta(days=400))),
            (PayloadInvalid, lambda: publish(delay=timedelta(days=1), not_before=datetime.now(UTC))),
        ]
        for error, call in refused:
            with pytest.raises(error):
                await call()
        await session.commit()
    other = create_async_engine("sqlite+aiosqlite:///:memory:")
    async with AsyncSession(other) as session:
        with pytest.raises(WrongDatabase):
            await place.app.outbox.publish(OrderPlaced(number=1), topic="orders", session=session)
    await other.dispose()
    await place.place(42)
    assert await place.read(1) == [42]


@pytest.mark.feature("F-01")
async def test_a_handler_publishes_in_its_own_transaction(url: str, broker_url: str) -> None:
    """A participant's event is there exactly if its business write is."""
    bank = Participant("bank", start_to_close=timedelta(seconds=30))
    tries: list[int] = []

    @bank.activity(no_compensation="test")
    async def book(order: OrderPlaced, session: AsyncSession, context: ActivityContext) -> None:
        tries.append(order.number)
        await app.outbox.publish(order, topic="orders", session=session)
        if len(tries) == 1:
            raise RuntimeError("after the event was written")

    saga = Saga("booking", OrderPlaced).step(book)
    app = App(
        url,
        broker=broker_url,
        namespace=f"events-{secrets.token_hex(4)}",
        topics=["orders"],
        sagas=[saga],
        participants=[bank],
    )
    async with app:
        consumer = await app.broker.consume("orders", prefetch=10)
        engine = create_async_engine(async_url(url))
        place = Place(app, engine, consumer)
        await app.client.execute(saga, OrderPlaced(number=7), timeout=timedelta(seconds=20))
        assert await place.read(1) == [7]
        assert len(tries) == 2
        await engine.dispose()


# --- order ------------------------------------------------------------------------------------


@every_stack
@pytest.mark.feature("F-02", acceptance=True)
async def test_events_of_a_key_are_read_in_the_order_of_their_commits(place: Place) -> None:
    keys = ["a", "b", "c"]
    for number in range(30):
        await place.place(number, key=keys[number % 3])
    await place.read(30)
    for key in keys:
        numbers = [each["data"]["number"] for each in place.seen if each["subject"] == key]
        assert numbers == sorted(numbers)


@pytest.mark.feature("F-02")
async def test_what_follows_a_refused_event_of_its_key_waits_and_other_keys_do_not(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker refuses one event once: the next of its key is not sent before it."""
    refused: list[bytes] = []
    publish = place.app.broker.publish

    def refusing(messages: Any) -> Any:
        out = []
        for message in messages:
            if b'"number":1,' in message.body and len(refused) < 2:
                refused.append(message.body)
                future: asyncio.Future[PublishOutcome] = asyncio.get_running_loop().create_future()
                future.set_result(PublishOutcome.REFUSED)
                out.append(future)
            else:
                out += publish([message])
        return out

    monkeypatch.setattr(place.app.broker, "publish", refusing)
    async with AsyncSession(place.engine) as session, session.begin():
        for number, key in ((1, "a"), (2, "a"), (3, "b"), (4, "a")):
            await place.app.outbox.publish(
                OrderPlaced(number=number), topic="orders", key=key, session=session
            )
    numbers = await place.read(4)
    assert numbers[0] == 3
    assert [number for number in numbers if number != 3] == [1, 2, 4]
    assert len(refused) == 2


def test_a_wave_holds_one_row_of_a_key() -> None:
    def row(id: int, key: str) -> StoredRow:
        return StoredRow(id, UUID(int=id), "orders", key, b"")

    rows = [row(1, "a"), row(2, "b"), row(3, "a"), row(4, "a"), row(5, "c")]
    assert [[each.id for each in wave] for wave in waves(rows)] == [[1, 2, 5], [3], [4]]


# --- time -------------------------------------------------------------------------------------


@every_stack
@pytest.mark.feature("F-06", acceptance=True, scale=0.02)
async def test_a_delayed_event_is_sent_or_revoked_and_never_both(place: Place, faults: Faults) -> None:
    """F-06: 200 with delays up to a second, half of them revoked at random moments around their time."""
    faults.declare("revoked in time", "revoked too late")
    draw, count = random.Random(4711), 200
    ids: dict[int, UUID] = {}
    async with (
        AsyncSession(place.engine) as session,
        session.begin(),
    ):  # one commit: it is no test of the disk
        for number in range(count):
            delay = timedelta(milliseconds=draw.randrange(1, 1_500))
            ids[number] = await place.app.outbox.publish(
                OrderPlaced(number=number), topic="orders", session=session, delay=delay
            )
    revoked: set[int] = set()
    for number in draw.sample(range(count), count // 2):
        await clock.sleep(draw.random() * 0.03)
        if await place.app.outbox.revoke(ids[number]):
            revoked.add(number)
            faults.fired("revoked in time")
        else:
            faults.fired("revoked too late")
    sent = await place.read(count - len(revoked))
    assert sorted(sent) == sorted(set(range(count)) - revoked)
    await clock.sleep(0.2)
    await place.place(count)
    assert sorted(await place.read(count - len(revoked) + 1))[-1] == count, "nothing more came"


@pytest.mark.feature("F-06")
async def test_a_delayed_event_waits_for_its_time(place: Place) -> None:
    began = clock.monotonic()
    await place.place(1, delay=timedelta(seconds=0.8))
    await place.place(2, not_before=datetime.now(UTC) - timedelta(seconds=1))
    assert await place.read(1) == [2]
    assert await place.read(2) == [2, 1]
    assert clock.monotonic() - began >= 0.8


@pytest.mark.feature("F-06")
async def test_a_revocation_that_is_rolled_back_did_not_happen(place: Place) -> None:
    [id] = await place.place(1, delay=timedelta(seconds=0.5))
    async with AsyncSession(place.engine) as session:
        assert await place.app.outbox.revoke(id, session=session)
        await session.rollback()
    assert await place.read(1) == [1]
    assert not await place.app.outbox.revoke(id)
