"""The pytest plugin: `saga_env` makes environments and ends them with the test, on `saga_clock` and with `saga_faults`.

    async def test_a_lost_reply_costs_time_and_no_money(saga_env):
        env = await saga_env(money_transfer, tables=metadata)
        env.faults.lose_reply("withdraw")
        ended = await env.run(money_transfer, ORDER)
        assert ended.status == "completed"

It needs no other plugin than the one that runs your asynchronous tests, such as pytest-asyncio. In a fixture of your
own say `async with saga_env(...) as env: yield env`, so that the environment lives as long as the fixture does.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Generator
from typing import Any, Final

import pytest

from saga.definition.builder import Saga
from saga.testing.clock import VirtualClock
from saga.testing.environment import Environment
from saga.testing.faults import Faults

_PASSES_TO_END: Final = 10
"""Turns of the loop that a cancelled task has to end in."""


class SagaEnv:
    """What the fixture `saga_env` gives: call it as `Environment`, and await what it returns, or enter it."""

    def __init__(self, clock: VirtualClock, faults: Faults) -> None:
        self._options: dict[str, Any] = {"clock": clock, "faults": faults}
        self._awaited: list[Environment] = []
        self._entered: list[Environment] = []

    def __call__(self, *sagas: Saga[Any, Any], **environment: Any) -> Opening:
        """Return an environment to be awaited (it ends with the test) or entered (it ends with its block)."""
        return Opening(Environment(*sagas, **{**self._options, **environment}), self._awaited, self._entered)

    @property
    def tasks(self) -> set[asyncio.Task[Any]]:
        """The tasks of the environments that fixtures have entered."""
        return {task for environment in self._entered for task in environment.tasks}

    async def close(self, error: BaseException | None) -> None:
        """End what was awaited, the latest first; after an error of the test nothing else is complained of."""
        while self._awaited:
            environment = self._awaited.pop()
            await environment.__aexit__(None if error is None else type(error), error, None)


class Opening:
    """An environment that is about to begin."""

    def __init__(
        self, environment: Environment, awaited: list[Environment], entered: list[Environment]
    ) -> None:
        self._environment = environment
        self._awaited = awaited
        self._entered = entered

    def __await__(self) -> Generator[Any, None, Environment]:
        return self._begin().__await__()

    async def _begin(self) -> Environment:
        await self._environment.__aenter__()
        self._awaited.append(self._environment)
        return self._environment

    async def __aenter__(self) -> Environment:
        self._entered.append(await self._environment.__aenter__())
        return self._environment

    async def __aexit__(self, *failure: Any) -> None:
        self._entered.remove(self._environment)
        await self._environment.__aexit__(*failure)


@pytest.fixture
def saga_clock() -> VirtualClock:
    """The clock of this test's environments."""
    return VirtualClock()


@pytest.fixture
def saga_faults() -> Faults:
    """What goes wrong in this test's environments."""
    return Faults()


@pytest.fixture
def saga_env(saga_clock: VirtualClock, saga_faults: Faults) -> SagaEnv:
    """Makes environments: `env = await saga_env(money_transfer, tables=metadata)`."""
    return SagaEnv(saga_clock, saga_faults)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Let a test with `saga_env` close its environments before its loop goes on to other things."""
    maker = getattr(item, "funcargs", {}).get("saga_env")
    if isinstance(item, pytest.Function) and isinstance(maker, SagaEnv):
        if not inspect.iscoroutinefunction(item.obj):
            raise pytest.UsageError(f"{item.name} takes saga_env and is not asynchronous: write async def.")
        item.obj = _closing(item.obj, maker)
    return (yield)


def _closing(test: Callable[..., Any], maker: SagaEnv) -> Callable[..., Any]:
    """Return the test with its end: environments closed, and no task of its own left running."""

    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        before = asyncio.all_tasks()
        try:
            await test(*args, **kwargs)
        except BaseException as error:
            await maker.close(error)
            raise
        await maker.close(None)
        await _no_task_left(before, maker)

    return run


async def _no_task_left(before: set[asyncio.Task[Any]], maker: SagaEnv) -> None:
    for _ in range(_PASSES_TO_END):
        if not asyncio.all_tasks() - before - maker.tasks:
            return
        # lint: allow sleep because this is the test's own loop, whose time nobody owns
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - before - maker.tasks
    names = sorted(f"{task.get_name()} ({getattr(task.get_coro(), '__qualname__', '?')})" for task in left)
    for task in left:
        task.cancel()
    pytest.fail(
        f"The test left tasks running: {', '.join(names)}. Await them, or cancel them.", pytrace=False
    )
