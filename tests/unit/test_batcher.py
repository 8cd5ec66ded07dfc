"""The one batcher: bounded, in order, never waiting for company, never stopped by one bad batch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from saga.batcher import Batcher, Lane
from saga.clock import TaskSpawner


@pytest.fixture
async def spawner() -> AsyncIterator[TaskSpawner]:
    made = TaskSpawner()
    yield made
    await made.close()


async def test_what_was_offered_in_one_pass_travels_together_in_order(spawner: TaskSpawner) -> None:
    batches: list[list[int]] = []

    async def work(batch: Sequence[int]) -> None:
        batches.append(list(batch))

    batcher: Batcher[int] = Batcher(work, spawner=spawner, name="test", batch_max=4)
    assert batcher.offer_all(range(10)) == 10
    await batcher.join()
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batcher.idle


async def test_what_arrives_during_a_batch_makes_the_next_one(spawner: TaskSpawner) -> None:
    batches: list[list[int]] = []
    gate = asyncio.Event()

    async def work(batch: Sequence[int]) -> None:
        batches.append(list(batch))
        await gate.wait()

    batcher: Batcher[int] = Batcher(work, spawner=spawner, name="test", batch_max=100)
    batcher.offer(1)
    await asyncio.sleep(0)
    batcher.offer_all([2, 3, 4])
    gate.set()
    await batcher.join()
    assert batches == [[1], [2, 3, 4]]


async def test_the_bound_refuses_and_the_caller_is_told(spawner: TaskSpawner) -> None:
    async def work(batch: Sequence[int]) -> None: ...

    batcher: Batcher[int] = Batcher(work, spawner=spawner, name="test", batch_max=10, held_max=3)
    assert batcher.offer_all(range(5)) == 3
    assert not batcher.offer(9)
    await batcher.join()
    assert batcher.offer(9)


async def test_several_workers_share_what_is_there(spawner: TaskSpawner) -> None:
    running, most = 0, 0

    async def work(batch: Sequence[int]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(3):
            await asyncio.sleep(0)
        running -= 1

    batcher: Batcher[int] = Batcher(work, spawner=spawner, name="test", batch_max=1, workers=3)
    batcher.offer_all(range(10))
    await batcher.join()
    assert most == 3


async def test_a_batch_begins_beside_another_only_when_enough_items_wait(spawner: TaskSpawner) -> None:
    batches: list[int] = []
    gate = asyncio.Event()

    async def work(batch: Sequence[int]) -> None:
        batches.append(len(batch))
        await gate.wait()

    batcher: Batcher[int] = Batcher(
        work, spawner=spawner, name="test", batch_max=100, workers=2, beside_min=4
    )
    batcher.offer(1)
    await asyncio.sleep(0)
    batcher.offer_all([2, 3, 4])
    await asyncio.sleep(0)
    assert batches == [1], "three wait for company"
    batcher.offer(5)
    await asyncio.sleep(0)
    assert batches == [1, 4]
    batcher.offer_all(range(10))
    await asyncio.sleep(0)
    assert batches == [1, 4], "both workers are busy"
    gate.set()
    await batcher.join()
    assert batches == [1, 4, 10]


async def test_batchers_of_one_lane_take_turns(spawner: TaskSpawner) -> None:
    """However much keeps coming for one of them, the other is next."""
    order: list[str] = []
    lane = Lane()

    async def many(batch: Sequence[int]) -> None:
        order.append("many")
        if len(order) < 10:
            busy.offer(0)
        await asyncio.sleep(0)

    async def few(batch: Sequence[int]) -> None:
        order.append("few")

    busy: Batcher[int] = Batcher(many, spawner=spawner, name="many", batch_max=1, beside_min=64, lane=lane)
    calm: Batcher[int] = Batcher(few, spawner=spawner, name="few", batch_max=1, beside_min=64, lane=lane)
    busy.offer(0)
    await asyncio.sleep(0)
    calm.offer(1)
    await busy.join()
    await calm.join()
    assert order[:3] == ["many", "few", "many"]


async def test_a_batch_that_only_waits_lets_others_of_its_lane_pass(spawner: TaskSpawner) -> None:
    lane, back, passed = Lane(), asyncio.Event(), asyncio.Event()

    async def away(batch: Sequence[int]) -> None:
        with lane.aside():
            await back.wait()

    async def quick(batch: Sequence[int]) -> None:
        passed.set()

    waiting: Batcher[int] = Batcher(away, spawner=spawner, name="a", batch_max=1, beside_min=64, lane=lane)
    other: Batcher[int] = Batcher(quick, spawner=spawner, name="b", batch_max=1, beside_min=64, lane=lane)
    waiting.offer(0)
    other.offer(1)
    async with asyncio.timeout(60):
        await passed.wait()
    back.set()
    await waiting.join()
    assert lane.running == 0


async def test_a_bad_batch_does_not_stop_the_next(spawner: TaskSpawner) -> None:
    done: list[int] = []
    failures: list[tuple[list[int], str]] = []

    async def work(batch: Sequence[int]) -> None:
        if batch[0] == 1:
            raise ValueError
        done.extend(batch)

    batcher: Batcher[int] = Batcher(
        work,
        spawner=spawner,
        name="test",
        batch_max=1,
        failed=lambda batch, error: failures.append((list(batch), type(error).__name__)),
    )
    batcher.offer_all([0, 1, 2])
    await batcher.join()
    assert done == [0, 2]
    assert failures == [([1], "ValueError")]
