"""G-07: the contract notices. Rules over the matrix of behaviours and deliberately weak adapters."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from saga.testing.contract import BEHAVIOURS, run
from tests.contract.weak_adapters import WEAK

ACCOUNTED_MAX = 10

pytestmark = [pytest.mark.feature("G-07"), pytest.mark.stack("sqlite"), pytest.mark.slow]


@pytest.fixture(scope="module")
def failures() -> dict[str, set[str]]:
    """Names of the behaviours that each weak adapter fails; filled by the tests' first user."""
    return {}


async def _fill(failures: dict[str, set[str]]) -> Mapping[str, set[str]]:
    if not failures:
        for name, harness_class in WEAK.items():
            failures[name] = set()
            for behaviour in BEHAVIOURS.values():
                try:
                    await run(behaviour, harness_class())
                except Exception:  # a defect may show as a broken rule or as any exception of the adapter
                    failures[name].add(behaviour.name)
    return failures


async def test_each_weak_adapter_fails(failures: dict[str, set[str]]) -> None:
    harmless = [name for name, failed in (await _fill(failures)).items() if not failed]
    assert not harmless, f"these defects are not noticed: {harmless}"


async def test_each_behaviour_fails_on_a_weak_adapter(failures: dict[str, set[str]]) -> None:
    caught = set().union(*(await _fill(failures)).values())
    assert not set(BEHAVIOURS) - caught, f"no weak adapter fails these: {sorted(set(BEHAVIOURS) - caught)}"


async def test_no_weak_adapter_accounts_for_more_than_ten_behaviours(failures: dict[str, set[str]]) -> None:
    too_weak = {
        name: sorted(failed)
        for name, failed in (await _fill(failures)).items()
        if len(failed) > ACCOUNTED_MAX
    }
    assert not too_weak, f"each of these hides more than ten behaviours: {too_weak}"


@pytest.mark.feature("G-07", acceptance=True)
async def test_weak_adapters_fail_at_least_ten_named_behaviours(failures: dict[str, set[str]]) -> None:
    """The row's own words, on all of them together; and there are at least ten distinct defects."""
    assert len(WEAK) >= 10
    assert len(set().union(*(await _fill(failures)).values())) >= 10
