"""The pytest plugin as a user meets it: its fixtures, what it fails by default, and how quick it is."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path

import pytest

from saga.testing import plugin
from saga.testing.environment import prepared

ROOT = Path(__file__).parents[2]
SECONDS_MAX = 10.0
TESTS = 200
SCALE = 0.1
FIRST = 3.0
"""In the small form the first tests, which compile what all of them run, weigh more, and so does every disturbance."""
WORK_SECONDS = 0.45
"""The row's seconds are counted as those of a machine on which `work` takes so long. It is a guard's unit: the two are
not slowed down alike, so the row's own bar is judged by the plain seconds that are printed."""

pytestmark = [pytest.mark.feature("I-06"), pytest.mark.stack("sqlite")]

INI = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""

BANK = """
from saga.testing import ALWAYS
from tests.testing.bank import ORDER, metadata, money_transfer, open_accounts
"""


@pytest.fixture
def user(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A user's project: our plugin and the one that runs asynchronous tests, and no other."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p pytest_asyncio.plugin")
    pytester.makeini(INI)
    return pytester


def run(user: pytest.Pytester, code: str) -> pytest.RunResult:
    user.makepyfile(BANK + textwrap.dedent(code))
    return user.runpytest_inprocess(plugins=[plugin])


def test_the_entry_point_is_the_plugin() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert declared == {"saga": "saga.testing.plugin"}
    assert hasattr(importlib.import_module(declared["saga"]), "saga_env")


def test_saga_testing_needs_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; from saga.testing import Environment, try_all"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr


def test_a_test_awaits_its_environment_and_it_ends_with_the_test(user: pytest.Pytester) -> None:
    result = run(
        user,
        """
        async def test_it(saga_env, saga_clock, saga_faults):
            env = await saga_env(money_transfer, tables=metadata)
            await open_accounts(env)
            before = saga_clock.monotonic()
            lost = saga_faults.lose_reply("withdraw")
            ended = await env.run(money_transfer, ORDER)
            assert (ended.status, lost.fired) == ("completed", 1)
            assert saga_clock.monotonic() - before >= 30
        """,
    )
    result.assert_outcomes(passed=1)


def test_a_fixture_enters_an_environment_and_it_ends_with_the_fixture(user: pytest.Pytester) -> None:
    result = run(
        user,
        """
        import pytest

        @pytest.fixture
        async def env(saga_env):
            async with saga_env(money_transfer, tables=metadata) as env:
                await open_accounts(env)
                yield env
                assert await env.still_open() == []

        async def test_it(env):
            assert (await env.run(money_transfer, ORDER)).status == "completed"

        class TestInAClass:
            async def test_it(self, env, saga_faults):
                saga_faults.refuse("deposit")
                assert (await env.run(money_transfer, ORDER)).status == "compensated"
        """,
    )
    result.assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("env.faults.crash('deposit')", "*The fault crash(deposit) never fired.*"),
        (
            "env.faults.lose_command('withdraw'); await env.client.start(money_transfer, ORDER, id='t-9')",
            "*A saga money-transfer 't-9' is running: it waits for withdraw, attempt 1*",
        ),
        ("kept.append(await env.engine.connect())", "*1 connection of env.engine was left open*"),
        (
            "import asyncio; left = asyncio.create_task(asyncio.sleep(60), name='mine')",
            "*The test left tasks running: mine (sleep)*",
        ),
    ],
    ids=["fault", "saga", "connection", "task"],
)
def test_what_a_test_leaves_behind_fails_it_and_is_named(user: pytest.Pytester, body: str, told: str) -> None:
    result = run(
        user,
        f"""
        import pytest

        @pytest.fixture
        async def kept():
            kept = []
            yield kept
            for connection in kept:
                await connection.invalidate()

        async def test_it(saga_env, kept):
            env = await saga_env(money_transfer, tables=metadata)
            {body}
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([told])


def test_strict_can_be_switched_off(user: pytest.Pytester) -> None:
    result = run(
        user,
        """
        async def test_it(saga_env):
            env = await saga_env(money_transfer, tables=metadata, strict=False)
            env.faults.lose_command("withdraw", times=ALWAYS)
            await env.client.start(money_transfer, ORDER)
        """,
    )
    result.assert_outcomes(passed=1)


def test_a_failing_test_tells_its_own_error_only(user: pytest.Pytester) -> None:
    result = run(
        user,
        """
        async def test_it(saga_env):
            env = await saga_env(money_transfer, tables=metadata)
            env.faults.crash("deposit")
            assert 1 == 2
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert 1 == 2*"])
    result.stdout.no_fnmatch_line("*never fired*")


def test_a_test_that_is_not_asynchronous_is_told_so(user: pytest.Pytester) -> None:
    result = run(user, "def test_it(saga_env): ...")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*test_it takes saga_env and is not asynchronous*"])


@pytest.mark.feature("I-06", acceptance=True, scale=SCALE)
def test_many_tests_of_a_user_are_quick(user: pytest.Pytester) -> None:
    """A guard against slowness, each with an environment of its own, every other one with 30 s of waiting on its clock.

    The row wants 200 in less than 10 s; with SAGA_TEST_SCALE=1 this asks for that. How much a second of this machine
    is worth just now is measured beside it.
    """
    scale = float(os.environ.get("SAGA_TEST_SCALE", SCALE))
    count = int(TESTS * scale)
    user.makepyfile(
        BANK
        + f"""
import pytest

@pytest.mark.parametrize("number", range({count}))
async def test_it(saga_env, number):
    env = await saga_env(money_transfer, tables=metadata)
    await open_accounts(env)
    if number % 2:
        env.faults.lose_reply("withdraw")
    assert (await env.run(money_transfer, ORDER)).done == ("withdraw", "deposit", "notify")
"""
    )
    prepared()  # once in a run, however many tests there are
    listening, level = logging.getLogger().handlers[:], logging.getLogger().level
    logging.getLogger().handlers.clear()  # a user has nobody who listens at DEBUG
    logging.getLogger().setLevel(logging.WARNING)
    before = work()
    began = time.process_time()  # of this process: other workers share the cores
    result = user.runpytest_inprocess(plugins=[plugin])
    took = time.process_time() - began
    worth = (before + work()) / 2 / WORK_SECONDS
    logging.getLogger().handlers[:] = listening
    logging.getLogger().setLevel(level)
    result.assert_outcomes(passed=count)
    print(f"{count} tests in {took:.2f} s, {took / worth:.2f} s of a core by itself")
    assert took / worth < SECONDS_MAX * scale * (1.0 if scale == 1.0 else FIRST)


def work() -> float:
    """Return the seconds of processor time that a fixed amount of work takes now: calls, dictionaries and text."""

    def turn(known: dict[int, int], number: int) -> dict[int, int]:
        known[number % 97] = known.get(number % 89, 0) + len(f"{number}")
        return known

    began = time.process_time()
    known: dict[int, int] = {}
    for number in range(1_500_000):
        known = turn(known, number)
    return time.process_time() - began
