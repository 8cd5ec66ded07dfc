"""Command line of the benchmarks: the matrix with its bars, and `profile` for one cell of it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import bars, costs, mariadb_stack, postgres_stack, results, sqlite_stack
from benchmarks.cell import Contender, Side, Timing, alternate
from benchmarks.profiling import HOW
from benchmarks.results import Result
from benchmarks.stack import ROLES, Stack
from benchmarks.systems import BARE, SYSTEMS
from benchmarks.workloads import PARTICIPANTS, WORKLOADS
from devservices import Unavailable

STACKS: Final[dict[str, Callable[[], AbstractAsyncContextManager[Stack]]]] = {
    "postgres-rabbitmq": partial(postgres_stack.start, broker="rabbitmq"),
    "postgres-kafka": partial(postgres_stack.start, broker="kafka"),
    "postgres": partial(postgres_stack.start, broker=None),
    "mariadb-rabbitmq": partial(mariadb_stack.start, broker="rabbitmq"),
    "sqlite": sqlite_stack.start,
}


@dataclass(frozen=True, slots=True)
class Group:
    """What is measured side by side. The naive form knows no batches: its `business` stands beside both forms."""

    workload: str
    in_flight: int
    contenders: tuple[Contender, ...]

    @property
    def timing(self) -> Timing:
        if self.in_flight == 1:
            return Timing(0.4, 1.8, 7)  # the bars ask for the median of at least five pairs
        return Timing(1.0, 4.0, 3)


STATELESS: Final = (Contender("naive", "stateless"), Contender("saga", "stateless"))
ROUND_TRIP: Final = Contender(BARE, "stateless")
BUSINESS: Final = (
    Contender("naive", "business"),
    Contender("saga", "business"),
    Contender("saga", "business-batch"),
)


def groups(options: argparse.Namespace) -> Iterator[Group]:
    """Yield the matrix, or what of it was asked for."""
    bare = bars.LIMITS[options.stack].round_trip_max is not None
    for workload in WORKLOADS[:1] if options.quick else WORKLOADS:
        for in_flight in (500, 1) if options.quick else (500, 64, 1):
            for contenders in (STATELESS, BUSINESS):
                beside = (ROUND_TRIP,) if contenders is STATELESS and in_flight == 1 and bare else ()
                wanted = tuple(
                    each
                    for each in (*contenders, *beside)
                    if options.system in (None, each.system)
                    and _matches(options.only, each.participants, f"{workload}/{{}}/{in_flight}")
                )
                if any(each.system != "naive" for each in wanted) or options.system == "naive":
                    yield Group(workload, in_flight, wanted)


def _matches(only: Sequence[str], participants: str, name: str) -> bool:
    forms = ("business", "business-batch") if participants == "business" else (participants,)
    return not only or any(part in name.format(form) for part in only for form in forms)


async def measure(options: argparse.Namespace) -> int:
    """Run the matrix, write the results, print table and bars. Returns the exit status."""
    begun = time.monotonic()
    limits = bars.LIMITS[options.stack]
    found: list[Result] = []
    variants: list[bars.Bar] = []
    async with STACKS[options.stack]() as stack:
        print(f"{stack.description}, {os.cpu_count()} processors")
        for group in groups(options):
            found += await _measure(stack, group)
            results.write(options.output, found, stack)
        whole = not options.quick and not options.only and options.system is None
        if whole and limits.variant_max is not None:
            variants = await _measure_variants(stack, limits.variant_max)
    print(f"\n{results.table(found)}\n")
    figures = [*bars.check(found, limits), *variants]
    for figure in figures:
        print(figure)
    reached = [figure.met for figure in figures if isinstance(figure, bars.Bar)]
    summary = f"{sum(reached)} of {len(reached)} bars met" if reached else "no bars here"
    print(
        f"bench: {summary}; {len(found)} measurements in {options.output}, {time.monotonic() - begun:.0f} s"
    )
    return 0 if all(reached) else 1


async def _measure(stack: Stack, group: Group) -> list[Result]:
    runs = await alternate(
        stack, group.contenders, workload=group.workload, in_flight=group.in_flight, timing=group.timing
    )
    found = [
        Result(each.system, group.workload, each.participants, group.in_flight, tuple(its))
        for each, its in zip(group.contenders, runs, strict=True)
    ]
    if {"business", "business-batch"} <= {each.participants for each in group.contenders}:
        found += [
            replace(each, participants="business-batch")
            for each in found
            if (each.system, each.participants) == ("naive", "business")
        ]
    return found


async def _measure_variants(stack: Stack, limit: float) -> list[bars.Bar]:
    """See whether the naive form is held back by what it was given."""
    reached = []
    for plain, *_ in (STATELESS, BUSINESS):
        variants = (replace(plain, pool_factor=2), replace(plain, prefetch_factor=2))
        first, *others = await _measure(stack, Group("transfer", 500, (plain, *variants)))
        for name, other in zip(("pool", "prefetch"), others, strict=True):
            reached.append(bars.check_variant(name, first, other, limit))
    return reached


async def profile(options: argparse.Namespace) -> int:
    """Profile one process of one system under load and print where its time goes."""
    async with STACKS[options.stack]() as stack:
        starting = Side.start(
            stack,
            Contender(options.system or "saga", options.participants),
            workload=options.workload,
            in_flight=options.in_flight,
        )
        async with starting as side:
            await side.run(Timing(0.5, 1.5, 1), options.in_flight)
            worker = side.workers[options.process]
            worker.tell("profile", how=options.how)
            run = await side.run(Timing(0.1, options.seconds, 1), options.in_flight)
            worker.tell("report", top=options.top)
            text = (await worker.hear("profile", 60))["text"]
    print(text)
    cpu = ", ".join(f"{name} {value:.3f}" for name, value in run.cpu_ms_per_saga.items())
    print(f"{run.sagas_per_s:.0f} sagas/s while profiled; cpu ms/saga: {cpu}; others {run.others:.2f}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--stack", choices=STACKS, default="postgres-rabbitmq")
    parser.add_argument("--system", choices=SYSTEMS, help="one system only: no bars then")
    parser.add_argument("--quick", action="store_true", help="transfer only, with 1 and 500 in flight")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART", help="part of transfer/stateless/500"
    )
    parser.add_argument("--output", type=Path, help="where the JSON lines go, else results/STACK.jsonl")
    verbs = parser.add_subparsers(dest="verb")
    verbs.add_parser("costs", help="what the stacks cost beside each other: the table of docs/stacks.md")
    verb = verbs.add_parser("profile", help="where the time of one process goes")
    verb.add_argument("--process", choices=ROLES, default="coordinator")
    verb.add_argument("--how", choices=HOW, default="calls")
    verb.add_argument("--system", choices=SYSTEMS)
    verb.add_argument("--workload", choices=WORKLOADS, default=WORKLOADS[0])
    verb.add_argument("--participants", choices=PARTICIPANTS, default=PARTICIPANTS[0])
    verb.add_argument("--in-flight", type=int, default=500)
    verb.add_argument("--seconds", type=float, default=4.0)
    verb.add_argument("--top", type=int, default=25)
    options = parser.parse_args(arguments)
    if options.verb == "costs":
        print(costs.table(costs.read()), end="")
        return 0
    options.output = options.output or costs.RESULTS / f"{options.stack}.jsonl"
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return asyncio.run(profile(options) if options.verb == "profile" else measure(options))
    except Unavailable as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
