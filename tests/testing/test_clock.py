"""A clock that stands still and jumps: who sleeps is woken when his time has come, and not before."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from saga.testing import VirtualClock

pytestmark = [pytest.mark.feature("I-06"), pytest.mark.stack("pure")]


async def passes() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_it_stands_still_until_it_jumps() -> None:
    clock = VirtualClock()
    before, at = clock.monotonic(), clock.now()
    await asyncio.sleep(0.01)
    assert (clock.monotonic(), clock.now()) == (before, at)
    clock.jump(90.0)
    assert clock.monotonic() == pytest.approx(before + 90)
    assert clock.now() == at + timedelta(seconds=90)


async def test_a_sleeper_wakes_when_his_time_has_come_and_not_before() -> None:
    clock = VirtualClock()
    short, long = (asyncio.create_task(clock.sleep(seconds)) for seconds in (10.0, 60.0))
    await passes()
    assert clock.next_wake_seconds == pytest.approx(10.0)
    clock.jump(11.0)
    await passes()
    assert (short.done(), long.done()) == (True, False)
    assert clock.next_wake_seconds == pytest.approx(49.0)
    clock.jump(50.0)
    await passes()
    assert long.done()
    assert clock.next_wake_seconds is None


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = VirtualClock()
    task = asyncio.create_task(clock.sleep(1.0))
    await passes()
    task.cancel()
    await asyncio.wait({task})
    assert clock.next_wake_seconds is None


async def test_a_ticking_one_goes_on_by_itself_until_it_is_frozen() -> None:
    clock = VirtualClock(ticking=True)
    before = clock.monotonic()
    await clock.sleep(0.01)
    assert clock.monotonic() >= before + 0.01
    clock.freeze()
    frozen = clock.monotonic()
    await asyncio.sleep(0.01)
    assert clock.monotonic() == frozen
