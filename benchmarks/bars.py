"""The bars: what saga must reach beside the naive form in the same run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks.results import Result

Key = tuple[str, str, str, int]
"""System, workload, participants, in flight."""

THROUGHPUT: Final = {
    "postgres-rabbitmq": {"stateless": 12.0, "business": 1.3, "business-batch": 5.0},
    "postgres": {"stateless": 5.0},
}
COMMITS_MAX: Final = {"stateless": 0.25, "business": 0.5}
LATENCY_MAX: Final = {"stateless": 1.1, "business": 1.3}
VARIANT_MAX: Final = 1.2
LATENCY_PAIRS_MIN: Final = 5


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar and what was measured."""

    name: str
    value: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.name:<64} {self.value:>7.2f} {sign} {self.limit:<5g} {'met' if self.met else 'MISSED'}"


def by_key(results: Sequence[Result]) -> dict[Key, Result]:
    return {(each.system, each.workload, each.participants, each.in_flight): each for each in results}


def check(results: Sequence[Result], stack: str) -> Iterator[Bar]:
    """Yield every bar of a stack whose cells were measured."""
    known = by_key(results)
    for participants, limit in THROUGHPUT[stack].items():
        if pair := _pair(known, participants, 500):
            ours, naive = pair
            beside = "naive business" if participants == "business-batch" else "naive"
            name = f"500 in flight, {participants}: sagas/s, times {beside}"
            yield Bar(name, ours.sagas_per_s / naive.sagas_per_s, limit, at_least=True)
    if stack == "postgres":
        return  # there the queue's own work is in the same database, and a broker of its own is what the others have
    for participants, limit in COMMITS_MAX.items():
        if pair := _pair(known, participants, 500):
            name = f"500 in flight, {participants}: coordinator commits per step"
            yield Bar(name, pair[0].commits_per_step("coordinator"), limit, at_least=False)
    for participants, limit in LATENCY_MAX.items():
        if pair := _pair(known, participants, 1):
            ours, naive = pair
            assert len(ours.runs) >= LATENCY_PAIRS_MIN
            ratios = [
                mine.measured.p50_ms / theirs.measured.p50_ms
                for mine, theirs in zip(ours.runs, naive.runs, strict=True)
            ]
            name = f"1 in flight, {participants}: p50, times naive (median of {len(ratios)} pairs)"
            yield Bar(name, median(ratios), limit, at_least=False)


def check_variant(name: str, plain: Result, variant: Result) -> Bar:
    """The naive form must not gain much by more of what it was given: then it was given enough."""
    gain = variant.sagas_per_s / plain.sagas_per_s
    return Bar(
        f"naive {plain.participants} with twice the {name}: sagas/s, times naive",
        gain,
        VARIANT_MAX,
        at_least=False,
    )


def _pair(known: Mapping[Key, Result], participants: str, in_flight: int) -> tuple[Result, Result] | None:
    ours = known.get(("saga", "transfer", participants, in_flight))
    naive = known.get(("naive", "transfer", participants, in_flight))
    return (ours, naive) if ours is not None and naive is not None else None
