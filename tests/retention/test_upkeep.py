"""F-11: who purges, and when: every hour, one process at a time, and whatever fails stops nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any
from uuid import UUID

import pytest

from saga.clock import SystemIds, TaskSpawner
from saga.errors import StorageUnavailable
from saga.retention.upkeep import EVERY_SECONDS, FIRST_SECONDS, LEASE_SECONDS, RENEW_SECONDS, Upkeep
from saga.storage.base import Found, Lease
from saga.testing.clock import VirtualClock

pytestmark = [pytest.mark.feature("F-11"), pytest.mark.stack("sqlite")]


class Leases:
    """The leases of one database, in memory, on the clock of the test."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.held: dict[str, tuple[UUID, float]] = {}
        self.asked = 0

    async def renew(self, names: Collection[str], owner: UUID, seconds: float) -> Sequence[Lease]:
        self.asked += 1
        now = self.clock.monotonic()
        mine = [
            name
            for name in names
            if self.held.get(name, (owner, 0.0))[0] == owner or self.held[name][1] < now
        ]
        self.held |= dict.fromkeys(mine, (owner, now + seconds))
        return [Lease(name, 1) for name in mine]

    async def release(self, owner: UUID) -> None:
        raise AssertionError("the lease is the schedule: it is never given back")


class Pages:
    """Some pages of rows to go; each look and each deletion may do something first."""

    name = "pages"

    def __init__(self, pages: int = 1) -> None:
        self.pages = pages
        self.passes = 0
        self.deleted = 0
        self.fails: Exception | None = None
        self.step: Any = lambda: None

    async def find(self, above: Any) -> Found:
        if self.fails is not None:
            raise self.fails
        self.passes += above is None
        page = 1 if above is None else above + 1
        return Found([page], page if page < self.pages else None)

    async def delete(self, keys: Sequence[Any]) -> int:
        self.deleted += 1
        self.step()
        return 1


class Bench:
    """Processes with an upkeep each, on one clock."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.spawner = TaskSpawner()
        self.leases = Leases(self.clock)

    def upkeep(self, pages: Pages, **more: Any) -> Upkeep:
        ports: dict[str, Any] = {"clock": self.clock, "ids": SystemIds(), "spawner": self.spawner}
        return Upkeep("bench", [pages], self.leases, **ports, **more)

    async def settle(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)

    async def pass_time(self, seconds: float, step: float = 30.0) -> None:
        while seconds > 0:
            self.clock.jump(min(step, seconds))
            seconds -= step
            await self.settle()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.spawner.close()


async def test_the_first_pass_comes_after_a_minute_and_then_one_an_hour(bench: Bench) -> None:
    pages = Pages()
    bench.upkeep(pages).start()
    await bench.settle()
    assert pages.passes == 0
    await bench.pass_time(2 * FIRST_SECONDS)
    assert pages.passes == 1
    await bench.pass_time(10 * EVERY_SECONDS)
    assert 10 <= pages.passes <= 11


async def test_of_several_processes_one_makes_the_pass_of_an_hour(bench: Bench) -> None:
    some = [Pages() for _ in range(5)]
    for pages in some:
        bench.upkeep(pages).start()
    await bench.pass_time(10 * EVERY_SECONDS)
    assert 9 <= sum(pages.passes for pages in some) <= 12


async def test_a_process_that_was_started_again_does_not_begin_again(bench: Bench) -> None:
    """However often a process is started: a lease of the one before still holds."""
    pages = Pages()
    for _ in range(10):
        upkeep = bench.upkeep(pages)
        upkeep.start()
        await bench.pass_time(4 * FIRST_SECONDS)
        await upkeep.stop()
    assert pages.passes == 1


async def test_the_lease_is_renewed_while_a_pass_lasts(bench: Bench) -> None:
    """Longer than a lease, and nobody else begins."""
    pages, other = Pages(pages=200), Pages()
    pages.step = lambda: bench.clock.jump(RENEW_SECONDS / 10)
    turn = bench.spawner.spawn(bench.upkeep(pages).turn(), name="turn")
    beside = bench.upkeep(other)
    while not turn.done():
        await bench.pass_time(1.0, step=0.1)
        await beside.turn()
    assert pages.deleted == 200
    assert 200 * RENEW_SECONDS / 10 > LEASE_SECONDS
    assert other.passes == 0


async def test_who_loses_the_lease_stops_after_the_batch(bench: Bench) -> None:
    """A process that was frozen for an hour meets who took over."""
    pages = Pages(pages=10)

    def freeze() -> None:
        if pages.deleted == 3:
            bench.clock.offset += 2 * LEASE_SECONDS
            bench.leases.held["upkeep-bench"] = (UUID(int=1), bench.clock.monotonic() + LEASE_SECONDS)

    pages.step = freeze
    turn = bench.spawner.spawn(bench.upkeep(pages).turn(), name="turn")
    while not turn.done():
        await bench.pass_time(1.0, step=0.1)
    assert pages.deleted == 3


@pytest.mark.parametrize("error", [StorageUnavailable("gone"), OSError(28, "canary-payload")])
async def test_what_fails_is_logged_without_its_text_and_tried_an_hour_later(
    bench: Bench, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    pages = Pages()
    pages.fails = error
    bench.upkeep(pages).start()
    with caplog.at_level(logging.WARNING, "saga.retention"):
        await bench.pass_time(2 * FIRST_SECONDS)
    (told,) = caplog.messages
    assert "SG501" in told or "OSError" in told
    assert "canary" not in told
    pages.fails = None
    await bench.pass_time(1.1 * EVERY_SECONDS)
    assert pages.passes == 1


async def test_what_is_to_be_looked_at_is_looked_at_by_every_process(bench: Bench) -> None:
    """How far another process has purged is told to all (P12)."""
    looks = 0

    async def look() -> None:
        nonlocal looks
        looks += 1

    some = [bench.upkeep(Pages(), before=look) for _ in range(3)]
    for upkeep in some:
        upkeep.start()
    await bench.pass_time(2 * FIRST_SECONDS)
    assert looks == 3


async def test_stopping_waits_for_the_batch_and_not_for_the_pass(bench: Bench) -> None:
    pages = Pages(pages=1_000)
    upkeep = bench.upkeep(pages)
    upkeep.start()
    await bench.pass_time(2 * FIRST_SECONDS)
    begun = pages.deleted
    assert 0 < begun < 1_000
    stopping = bench.spawner.spawn(upkeep.stop(), name="stop")
    await bench.pass_time(1.0, step=0.1)
    assert stopping.done()
    assert pages.deleted <= begun + 1


async def test_a_batch_that_does_not_end_is_left(bench: Bench) -> None:
    """It is found again: nothing of it was told to anybody."""
    reached = asyncio.Event()

    class Hanging(Pages):
        async def delete(self, keys: Sequence[Any]) -> int:
            reached.set()
            return int(await asyncio.get_running_loop().create_future())

    upkeep = bench.upkeep(Hanging())
    upkeep.start()
    await bench.pass_time(2 * FIRST_SECONDS)
    await reached.wait()
    async with asyncio.timeout(60):
        await upkeep.stop()


async def test_stopping_while_nothing_is_due_takes_no_time(bench: Bench) -> None:
    upkeep = bench.upkeep(Pages())
    upkeep.start()
    await bench.settle()
    async with asyncio.timeout(5):
        await upkeep.stop()
        await upkeep.stop()
