"""Command line of the benchmarks: the matrix with its bars, and `profile` for one cell of it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import bars, results, stack
from benchmarks.cell import Contender, Side, Timing, alternate
from benchmarks.profiling import HOW
from benchmarks.results import Result
from benchmarks.systems import SYSTEMS
from benchmarks.workloads import PARTICIPANTS, WORKLOADS
from devservices import Unavailable

STACKS: Final = ("postgres-rabbitmq",)
LATEST: Final = Path(__file__).parent / "results" / "latest.jsonl"
NAIVE, SAGA = Contender("naive"), Contender("saga")
VARIANTS: Final = {
    "pool": Contender("naive", pool_factor=2),
    "prefetch": Contender("naive", prefetch_factor=2),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the matrix."""

    workload: str
    participants: str
    in_flight: int

    def __str__(self) -> str:
        return f"{self.workload}/{self.participants}/{self.in_flight}"

    @property
    def timing(self) -> Timing:
        if self.in_flight == 1:
            # the bars ask for the median of at least five pairs, where three will do for the batches
            return Timing(0.5, 2.0, 3 if self.participants == "business-batch" else 7)
        return Timing(1.5, 4.0, 3)


def cells(*, quick: bool, only: Sequence[str]) -> Iterator[Cell]:
    """Yield the matrix, or what of it matches `only` (a part of the name, e.g. `business/500`)."""
    for workload in WORKLOADS[:1] if quick else WORKLOADS:
        for in_flight in (500, 1) if quick else (500, 64, 1):
            for participants in PARTICIPANTS:
                cell = Cell(workload, participants, in_flight)
                if not only or any(part in str(cell) for part in only):
                    yield cell


async def measure(options: argparse.Namespace) -> int:
    """Run the matrix, write the results, print table and bars. Returns the exit status."""
    begun = time.monotonic()
    found: list[Result] = []
    variants: list[bars.Bar] = []
    contenders = [Contender(name) for name in SYSTEMS if options.system in (None, name)]
    async with stack.start() as servers:
        print(f"{servers.postgres.description}, {servers.rabbitmq.description}, {os.cpu_count()} processors")
        for cell in cells(quick=options.quick, only=options.only):
            found += await _measure(servers, cell, contenders)
            results.write(options.output, found, servers.versions)
            print(results.table(found[-len(contenders) :]), flush=True)
        if not options.quick and not options.only and options.system is None:
            variants = await _measure_variants(servers)
    print(f"\n{results.table(found)}\n")
    reached = [*bars.check(found), *variants]
    for bar in reached:
        print(bar)
    missed = sum(not bar.met for bar in reached)
    print(
        f"bench: {len(reached) - missed} of {len(reached)} bars met; {len(found)} measurements in {options.output}, "
        f"{time.monotonic() - begun:.0f} s"
    )
    return 1 if missed else 0


async def _measure(servers: stack.Stack, cell: Cell, contenders: Sequence[Contender]) -> list[Result]:
    runs = await alternate(
        servers,
        contenders,
        workload=cell.workload,
        participants=cell.participants,
        in_flight=cell.in_flight,
        timing=cell.timing,
    )
    return [
        Result(contender.system, cell.workload, cell.participants, cell.in_flight, tuple(its))
        for contender, its in zip(contenders, runs, strict=True)
    ]


async def _measure_variants(servers: stack.Stack) -> list[bars.Bar]:
    """See whether the naive form is held back by what it was given."""
    reached = []
    for participants in ("stateless", "business"):
        cell = Cell("transfer", participants, 500)
        plain, *others = await _measure(servers, cell, [NAIVE, *VARIANTS.values()])
        reached += [
            bars.check_variant(name, plain, other) for name, other in zip(VARIANTS, others, strict=True)
        ]
    return reached


async def profile(options: argparse.Namespace) -> int:
    """Profile one process of one system under load and print where its time goes."""
    async with stack.start() as servers:
        starting = Side.start(
            servers,
            Contender(options.system or "saga"),
            workload=options.workload,
            participants=options.participants,
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
    parser.add_argument("--stack", choices=STACKS, default=STACKS[0])
    parser.add_argument("--system", choices=SYSTEMS, help="one system only: no bars then")
    parser.add_argument("--quick", action="store_true", help="transfer only, with 1 and 500 in flight")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART", help="cells like transfer/stateless/500"
    )
    parser.add_argument("--output", type=Path, default=LATEST, help="where the JSON lines go")
    verbs = parser.add_subparsers(dest="verb")
    verb = verbs.add_parser("profile", help="where the time of one process goes")
    verb.add_argument("--process", choices=stack.ROLES, default="coordinator")
    verb.add_argument("--how", choices=HOW, default="calls")
    verb.add_argument("--system", choices=SYSTEMS)
    verb.add_argument("--workload", choices=WORKLOADS, default=WORKLOADS[0])
    verb.add_argument("--participants", choices=PARTICIPANTS, default=PARTICIPANTS[0])
    verb.add_argument("--in-flight", type=int, default=500)
    verb.add_argument("--seconds", type=float, default=4.0)
    verb.add_argument("--top", type=int, default=25)
    options = parser.parse_args(arguments)
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
