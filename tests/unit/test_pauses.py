"""A pause that may be ended: by an event, or by time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from saga.clock import woken
from saga.testing.clock import VirtualClock
from saga.testing.processes import MortalSpawner

HANG_SECONDS = 60.0


@pytest.fixture
async def spawner() -> AsyncIterator[MortalSpawner]:
    made = MortalSpawner()
    yield made
    await made.close()


async def passes() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_pause_ends_when_its_time_is_over_and_not_before(spawner: MortalSpawner) -> None:
    clock, bell = VirtualClock(), asyncio.Event()
    pause = asyncio.create_task(woken(bell, 10.0, clock=clock, spawner=spawner, name="test"))
    await passes()
    clock.jump(9.9)
    await passes()
    assert not pause.done()
    clock.jump(0.2)
    await asyncio.wait_for(pause, HANG_SECONDS)
    assert bell.is_set()


@pytest.mark.parametrize("early", [True, False], ids=["before it began", "meanwhile"])
async def test_a_pause_that_is_ended_leaves_no_timer_behind(spawner: MortalSpawner, early: bool) -> None:
    clock, bell = VirtualClock(), asyncio.Event()
    if early:
        bell.set()
    pause = asyncio.create_task(woken(bell, 10.0, clock=clock, spawner=spawner, name="test"))
    await passes()
    bell.set()
    await asyncio.wait_for(pause, HANG_SECONDS)
    await passes()
    assert spawner.tasks == []


async def test_a_pause_that_is_cancelled_leaves_no_timer_behind(spawner: MortalSpawner) -> None:
    pause = asyncio.create_task(
        woken(asyncio.Event(), 10.0, clock=VirtualClock(), spawner=spawner, name="test")
    )
    await passes()
    assert len(spawner.tasks) == 1
    pause.cancel()
    await asyncio.wait({pause}, timeout=HANG_SECONDS)
    await passes()
    assert spawner.tasks == []
