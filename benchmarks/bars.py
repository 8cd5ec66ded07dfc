"""What saga reaches beside the naive form in the same run, and the bars: what it must reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from benchmarks.results import Result
from benchmarks.systems import BARE
from benchmarks.workloads import PARTICIPANTS, STEPS

Key = tuple[str, str, str, int]
"""System, workload, participants, in flight."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one stack must reach, by participants. What is not in here is reported without a bar."""

    throughput_min: Mapping[str, float] = field(default_factory=dict)
    commits_max: Mapping[str, float] = field(default_factory=dict)
    latency_max: Mapping[str, float] = field(default_factory=dict)
    round_trip_max: float | None = None
    """Of a step with one saga in flight, in round trips of a bare message; without it that is not measured."""
    variant_max: float | None = None
    """Whether more of a pool or a prefetch helps the naive form is asked where it has them."""


LIMITS: Final = {
    "postgres-rabbitmq": Limits(
        throughput_min={"stateless": 12.0, "business": 1.3, "business-batch": 5.0},
        commits_max={"stateless": 0.25, "business": 0.5},
        latency_max={"stateless": 1.1, "business": 1.3},
        variant_max=1.2,
    ),
    # the queue's own work is in the same database there, so only the throughput has a bar
    "postgres": Limits(throughput_min={"stateless": 5.0}, variant_max=1.2),
    # one handler per partition is all that its naive form has, so there is nothing to vary
    "postgres-kafka": Limits(throughput_min={"stateless": 8.0, "business-batch": 4.0}, round_trip_max=2.5),
    "mariadb-rabbitmq": Limits(throughput_min={"stateless": 8.0, "business-batch": 4.0}),
    "sqlite": Limits(),
}
LATENCY_PAIRS_MIN: Final = 5


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured beside the naive form."""

    name: str
    value: float

    def __str__(self) -> str:
        return f"{self.name:<64} {self.value:>7.2f}"


@dataclass(frozen=True, slots=True)
class Bar(Figure):
    """A figure that has a limit."""

    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{Figure.__str__(self)} {sign} {self.limit:<5g} {'met' if self.met else 'MISSED'}"


def by_key(results: Sequence[Result]) -> dict[Key, Result]:
    return {(each.system, each.workload, each.participants, each.in_flight): each for each in results}


def check(results: Sequence[Result], limits: Limits) -> Iterator[Figure]:
    """Yield the figures of the cells that were measured, with the bars among them."""
    known = by_key(results)
    for participants in PARTICIPANTS:
        if pair := _pair(known, participants, 500):
            ours, naive = pair
            beside = "naive business" if participants == "business-batch" else "naive"
            name = f"500 in flight, {participants}: sagas/s, times {beside}"
            value = ours.sagas_per_s / naive.sagas_per_s
            yield _figure(name, value, limits.throughput_min.get(participants), at_least=True)
    for participants, limit in limits.commits_max.items():
        if pair := _pair(known, participants, 500):
            name = f"500 in flight, {participants}: coordinator commits per step"
            yield Bar(name, pair[0].commits_per_step("coordinator"), limit, at_least=False)
    for participants in PARTICIPANTS[:2]:
        if pair := _pair(known, participants, 1):
            ours, naive = pair
            assert len(ours.runs) >= LATENCY_PAIRS_MIN
            ratios = [
                mine.measured.p50_ms / theirs.measured.p50_ms
                for mine, theirs in zip(ours.runs, naive.runs, strict=True)
            ]
            name = f"1 in flight, {participants}: p50, times naive (median of {len(ratios)} pairs)"
            yield _figure(name, median(ratios), limits.latency_max.get(participants), at_least=False)
    bare, step = (known.get((system, "transfer", "stateless", 1)) for system in (BARE, "saga"))
    if limits.round_trip_max is not None and bare is not None and step is not None:
        steps = len(STEPS["transfer"])
        ratios = [
            mine.measured.p50_ms / steps / theirs.measured.p50_ms
            for mine, theirs in zip(step.runs, bare.runs, strict=True)
        ]
        name = f"1 in flight, stateless: p50 of a step, times a bare round trip ({len(ratios)} pairs)"
        yield Bar(name, median(ratios), limits.round_trip_max, at_least=False)


def check_variant(name: str, plain: Result, variant: Result, limit: float) -> Bar:
    """The naive form must not gain much by more of what it was given: then it was given enough."""
    gain = variant.sagas_per_s / plain.sagas_per_s
    return Bar(
        f"naive {plain.participants} with twice the {name}: sagas/s, times naive", gain, limit, at_least=False
    )


def _figure(name: str, value: float, limit: float | None, *, at_least: bool) -> Figure:
    return Figure(name, value) if limit is None else Bar(name, value, limit, at_least)


def _pair(known: Mapping[Key, Result], participants: str, in_flight: int) -> tuple[Result, Result] | None:
    ours = known.get(("saga", "transfer", participants, in_flight))
    naive = known.get(("naive", "transfer", participants, in_flight))
    return (ours, naive) if ours is not None and naive is not None else None
