"""The database broker's own logic over a store in memory, on a clock that stands still: marks, credit, links, rings."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any
from uuid import UUID

import pytest

from saga.brokers.base import Channel, ChannelStatus, Consumer, OutMessage, PublishOutcome
from saga.brokers.database import DatabaseBroker, DatabaseOptions
from saga.clock import SystemIds, TaskSpawner
from saga.errors import StorageUnavailable
from saga.storage.queue import Claimed, Looked
from tests.contract.memory_harness import VirtualClock, turn_the_loop

pytestmark = [pytest.mark.feature("G-02"), pytest.mark.stack("pure")]

OPTIONS = DatabaseOptions(poll_seconds=2.0, visibility_seconds=30.0)


class Store:
    """One channel. A row is visible once it is committed; `fails` names methods that lose the link once."""

    def __init__(self) -> None:
        self.rows: dict[int, bytes] = {}
        self.held: dict[int, UUID] = {}
        self.counts: Counter[int] = Counter()
        self.calls: Counter[str] = Counter()
        self.fails: set[str] = set()
        self.breaks: set[str] = set()
        self.in_claim: Callable[[], None] = lambda: None
        """Called once while a claim is under way."""

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        if name in self.fails:
            self.fails.remove(name)
            raise StorageUnavailable
        if name in self.breaks:
            self.breaks.remove(name)
            raise KeyError(name)

    async def declare(self, channels: Sequence[Channel]) -> Sequence[Channel]:
        return ()

    async def publish(
        self, messages: Sequence[OutMessage], *, length_max: int | None
    ) -> Sequence[PublishOutcome]:
        self._called("publish")
        for message in messages:
            self.rows[max(self.rows, default=0) + 1] = message.body
        return [PublishOutcome.CONFIRMED for _ in messages]

    async def status(self, channel: str) -> ChannelStatus | None:
        return ChannelStatus(len(self.rows) - len(self.held), 1)

    async def subscribe(
        self, token: UUID, channel: str, seconds: float, *, instead_of: Collection[UUID] = ()
    ) -> bool:
        self._called("subscribe")
        await self.leave(instead_of)
        return True

    async def claim(
        self, token: UUID, channel: str, *, above: int, limit: int, deliveries_max: int
    ) -> Sequence[Claimed]:
        self._called("claim")
        due = [id_ for id_ in sorted(self.rows) if id_ not in self.held and (id_ > above or self.counts[id_])]
        claimed = []
        for id_ in due[:limit]:
            self.held[id_] = token
            self.counts[id_] += 1
            claimed.append(Claimed(id_, self.counts[id_], "text/plain", "{}", self.rows[id_]))
        meanwhile, self.in_claim = self.in_claim, lambda: None
        meanwhile()
        return claimed

    async def settle(
        self, token: UUID, acked: Collection[int], returned: Collection[int], pause_seconds: float
    ) -> None:
        self._called("settle")
        for id_ in [id_ for id_ in (*acked, *returned) if self.held.get(id_) == token]:
            del self.held[id_]
            if id_ in acked:
                del self.rows[id_]

    async def leave(self, tokens: Collection[UUID]) -> None:
        self.held = {id_: token for id_, token in self.held.items() if token not in tokens}

    async def look(self, channels: Collection[str], renewed: Collection[UUID], seconds: float) -> Looked:
        self._called("look")
        return Looked(channels if len(self.rows) > len(self.held) else (), renewed)


class Bell:
    def __init__(self) -> None:
        self.rung: list[set[str]] = []

    async def listen(self, heard: Callable[[str], None], lost: Callable[[], None]) -> None:
        heard("")
        await asyncio.Event().wait()

    async def ring(self, channels: Collection[str]) -> None:
        self.rung.append(set(channels))


class Bench:
    """A broker on a store in memory and a clock that stands still."""

    def __init__(self) -> None:
        self.store = Store()
        self.bell = Bell()
        self.clock = VirtualClock()
        self.spawner = TaskSpawner()
        self.broker = DatabaseBroker(
            self.store, self.bell, clock=self.clock, ids=SystemIds(), spawner=self.spawner, options=OPTIONS
        )

    async def consumer(self, prefetch: int = 10) -> Consumer:
        await self.broker.start()
        consumer = await self.broker.consume("work", prefetch=prefetch)
        await turn_the_loop()
        return consumer

    def commit(self, *ids: int) -> None:
        """Rows of other transactions become visible, and their processes ring."""
        self.store.rows.update({id_: b"%d" % id_ for id_ in ids})
        self.broker.wake(["work"])

    async def bodies(self, consumer: Consumer, count: int) -> list[bytes]:
        taken: list[bytes] = []
        async with asyncio.timeout(60):
            while len(taken) < count:
                taken += [delivery.body for delivery in await consumer.receive()]
        return taken

    async def pass_time(self, seconds: float) -> None:
        until = self.clock.time + seconds
        while self.clock.wake_next(until):
            await turn_the_loop()
        self.clock.time = until


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_a_row_that_becomes_visible_behind_those_that_were_claimed_is_claimed_at_once(
    bench: Bench,
) -> None:
    """Ids are given before the commit: of two batches under way, the later may commit first."""
    consumer = await bench.consumer()
    for ids in ((1,), (5,), (3,), (4,), (2,)):
        bench.commit(*ids)
        assert await bench.bodies(consumer, 1) == [b"%d" % ids[0]]
        await bench.pass_time(0.05)


async def test_a_commit_that_took_long_is_found_by_the_next_look(bench: Bench) -> None:
    consumer = await bench.consumer()
    for id_ in range(10, 14):
        bench.commit(id_)
        await bench.bodies(consumer, 1)
        await bench.pass_time(0.3)
    bench.store.rows[1] = b"late"
    await bench.pass_time(2.1)
    assert await bench.bodies(consumer, 1) == [b"late"]


async def test_a_claim_does_not_begin_at_the_dead_rows_of_long_ago(bench: Bench) -> None:
    consumer: Any = await bench.consumer()
    for id_ in range(10, 16):
        bench.commit(id_)
        await bench.bodies(consumer, 1)
        await bench.pass_time(0.26)
    assert 10 < consumer._above < 15


async def test_room_that_an_ack_made_during_a_full_claim_is_used_at_once(bench: Bench) -> None:
    consumer = await bench.consumer(prefetch=2)
    bench.commit(1)
    held = await consumer.receive()
    bench.store.in_claim = lambda: consumer.ack(held)
    bench.commit(2, 3)
    assert await bench.bodies(consumer, 2) == [b"2", b"3"]


async def test_what_an_ack_could_not_tell_comes_again_under_another_token(bench: Bench) -> None:
    consumer = await bench.consumer()
    bench.commit(1)
    first = await consumer.receive()
    bench.store.fails.add("settle")
    consumer.ack(first)
    async with asyncio.timeout(60):
        (again,) = await consumer.receive()
    assert (again.body, again.delivery_count) == (b"1", 2)
    consumer.ack(first)
    await turn_the_loop()
    assert bench.store.rows, "the old token acks nothing"
    consumer.ack([again])
    await turn_the_loop()
    assert not bench.store.rows


@pytest.mark.parametrize("method", ["claim", "look", "subscribe"])
async def test_a_loop_survives_what_it_did_not_expect(bench: Bench, method: str) -> None:
    consumer: Any = await bench.consumer()
    bench.store.breaks.add(method)
    if method == "subscribe":
        consumer.lose()
    bench.commit(1)
    await bench.pass_time(5.0)
    assert not bench.store.breaks
    assert await bench.bodies(consumer, 1) == [b"1"]


async def test_a_publish_that_fails_goes_again_within_its_bound(bench: Bench) -> None:
    await bench.broker.start()
    bench.store.fails.add("publish")
    (outcome,) = bench.broker.publish([OutMessage("work", b"x", "text/plain")])
    await turn_the_loop()
    bench.store.breaks.add("publish")
    await bench.pass_time(5.0)
    assert outcome.result() is PublishOutcome.CONFIRMED
    assert bench.store.calls["publish"] == 3


async def test_others_are_told_at_once_and_then_of_all_that_came_meanwhile(bench: Bench) -> None:
    await bench.broker.start()
    for _ in range(100):
        bench.broker.wake(["a"])
        bench.broker.wake(["b"])
        await turn_the_loop()
    assert bench.bell.rung == [{"a", "b"}]
    await bench.pass_time(0.006)
    assert bench.bell.rung == [{"a", "b"}, {"a", "b"}]


async def test_who_is_no_more_known_begins_anew(bench: Bench) -> None:
    """Its claims ran out: what it held is with others, and what it is given next has another token."""
    consumer: Any = await bench.consumer()
    bench.commit(1)
    held = await consumer.receive()
    known = consumer.token

    async def forgotten(channels: Collection[str], renewed: Collection[UUID], seconds: float) -> Looked:
        return Looked((), ())

    bench.store.look = forgotten  # type: ignore[method-assign]
    await bench.pass_time(15.0)
    assert consumer.token != known
    consumer.ack(held)
    await turn_the_loop()
    assert bench.store.rows
