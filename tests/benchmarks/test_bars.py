"""What a stack must reach is computed from runs side by side."""

from __future__ import annotations

import pytest

from benchmarks import bars
from benchmarks.cell import Run
from benchmarks.load import Measured
from benchmarks.results import Result

pytestmark = pytest.mark.stack("pure")


def one_in_flight(system: str, *p50_ms: float) -> Result:
    runs = tuple(Run(Measured(10, 1.0, each, each, 10), 10.0, {}, {}, {}, 0.0) for each in p50_ms)
    return Result(system, "transfer", "stateless", 1, runs)


@pytest.mark.parametrize(("p50_ms", "met"), [(20.0, True), (30.0, False)])
def test_a_step_is_measured_by_the_round_trip_of_a_bare_message(p50_ms: float, met: bool) -> None:
    """A transfer has two steps, each of which may take two and a half round trips of 5 ms."""
    measured = [one_in_flight("saga", p50_ms, p50_ms, 99.0), one_in_flight("bare", 5.0, 5.0, 5.0)]
    (bar,) = bars.check(measured, bars.LIMITS["postgres-kafka"])
    assert isinstance(bar, bars.Bar)
    assert (bar.value, bar.met) == (p50_ms / 2 / 5.0, met)


def test_where_no_round_trip_is_asked_for_none_is_told() -> None:
    measured = [one_in_flight("saga", 30.0), one_in_flight("bare", 5.0)]
    assert not list(bars.check(measured, bars.LIMITS["postgres"]))
