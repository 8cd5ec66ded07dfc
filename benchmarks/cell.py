"""Contenders side by side, each as two processes, measured in alternating runs."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from operator import sub
from pathlib import Path
from typing import Any, Final

from benchmarks import counters, systems
from benchmarks.load import SAGA_SECONDS_MAX, Measured
from benchmarks.stack import Place, Stack

_START_SECONDS_MAX: Final = 60.0
_STOP_SECONDS_MAX: Final = 45.0
_DRAIN_SECONDS_MAX: Final = SAGA_SECONDS_MAX + 30.0
_BETWEEN_SECONDS: Final = 0.4


class Worker:
    """A process of ours; it ends when its standard input is closed, and is killed if it does not."""

    def __init__(self, spec: systems.Spec, process: asyncio.subprocess.Process) -> None:
        self.spec = spec
        self.pid = process.pid
        self._process = process

    @classmethod
    @asynccontextmanager
    async def start(cls, spec: systems.Spec) -> AsyncIterator[Worker]:
        """Start it and wait until it is ready."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "benchmarks.worker",
            json.dumps(asdict(spec)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            limit=16 * 1024 * 1024,
        )
        worker = cls(spec, process)
        try:
            await worker.hear("ready", _START_SECONDS_MAX)
            yield worker
        finally:
            await worker._end()

    def tell(self, do: str, **words: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **words}).encode() + b"\n")

    async def hear(self, said: str, seconds_max: float) -> dict[str, Any]:
        """Return the next line, which must be `said`."""
        assert self._process.stdout is not None
        async with asyncio.timeout(seconds_max):
            line = await self._process.stdout.readline()
        words: dict[str, Any] = json.loads(line or '{"said": "failed", "text": "it has ended"}')
        if words.pop("said") != said:
            raise RuntimeError(f"{self.spec.system} {self.spec.role}: {words.get('text', words)}")
        return words

    async def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_SECONDS_MAX)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one system."""

    measured: Measured
    sagas_per_s: float
    commits: dict[str, int]
    statements: dict[str, int]
    cpu_ms_per_saga: dict[str, float]
    others: float
    """Processor time used by anything else on this machine, as a share of one processor."""

    def __str__(self) -> str:
        return (
            f"{self.sagas_per_s:.1f} sagas/s in {self.measured.seconds:.1f} s, p50 {self.measured.p50_ms:.1f} ms, "
            f"p99 {self.measured.p99_ms:.1f} ms, cpu {sum(self.cpu_ms_per_saga.values()):.2f} ms/saga, "
            f"others {self.others:.2f} processors"
        )


@dataclass(frozen=True, slots=True)
class Timing:
    """How long and how often."""

    warm_seconds: float
    seconds: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Contender:
    """A system with a form of participants, or a variant of the naive form."""

    system: str
    participants: str
    pool_factor: int = 1
    prefetch_factor: int = 1

    def __str__(self) -> str:
        return f"{self.system} {self.participants}"


class Side:
    """One contender, running."""

    def __init__(self, stack: Stack, place: Place, coordinator: Worker, participant: Worker) -> None:
        self._stack = stack
        self._place = place
        self.workers = {"coordinator": coordinator, "participant": participant}
        self._pids = {"coordinator": coordinator.pid, "participant": participant.pid, **stack.server_pids}
        self._total = 0
        self._runs = 0

    @classmethod
    @asynccontextmanager
    async def start(
        cls, stack: Stack, contender: Contender, *, workload: str, in_flight: int
    ) -> AsyncIterator[Side]:
        """Make its databases and start its processes; check the books at the end."""

        def spec(role: str) -> systems.Spec:
            return systems.Spec(
                system=contender.system,
                role=role,
                workload=workload,
                participants=contender.participants,
                name=place.name,
                database=place.urls.get(role),
                broker=stack.broker_url(place),
                in_flight=in_flight,
                pool_factor=contender.pool_factor,
                prefetch_factor=contender.prefetch_factor,
                tally=place.tallies.get(role),
            )

        async with stack.place(contender.system, contender.participants) as place:
            async with (
                Worker.start(spec("participant")) as participant,
                Worker.start(spec("coordinator")) as coordinator,
            ):
                side = cls(stack, place, coordinator, participant)
                yield side
            await stack.check_books(place, workload, side._total)

    async def run(self, timing: Timing, in_flight: int) -> Run:
        """One run, from an idle system to an idle system."""
        self._runs += 1
        coordinator = self.workers["coordinator"]
        coordinator.tell(
            "load",
            in_flight=in_flight,
            warm_seconds=timing.warm_seconds,
            seconds=timing.seconds,
            seed=self._runs,
        )
        await coordinator.hear("begin", timing.warm_seconds + _DRAIN_SECONDS_MAX)
        cpu, counts = await self._look()
        await coordinator.hear("end", timing.seconds + _DRAIN_SECONDS_MAX)
        cpu_after, counts_after = await self._look()
        measured = Measured(**await coordinator.hear("measured", _DRAIN_SECONDS_MAX))
        self._total += measured.total
        await asyncio.sleep(_BETWEEN_SECONDS)  # what is left behind (acks, deletions) belongs to this run
        used, others = cpu_after.since(cpu)
        counted = {role: counters.Counts(*map(sub, counts_after[role], counts[role])) for role in counts}
        return Run(
            measured=measured,
            sagas_per_s=measured.sagas / measured.seconds,
            commits={role: each.commits for role, each in counted.items()},
            statements={role: each.statements for role, each in counted.items()},
            cpu_ms_per_saga={name: 1000 * seconds / measured.sagas for name, seconds in used.items()},
            others=others / measured.seconds,
        )

    async def _look(self) -> tuple[counters.Processors, dict[str, counters.Counts]]:
        return counters.read_processors(self._pids), await self._stack.count(self._place)


async def alternate(
    stack: Stack,
    contenders: Sequence[Contender],
    *,
    workload: str,
    in_flight: int,
    timing: Timing,
) -> list[list[Run]]:
    """Return the runs of each contender: they take turns, and each round begins with another one."""
    async with AsyncExitStack() as running:
        sides = [
            await running.enter_async_context(Side.start(stack, each, workload=workload, in_flight=in_flight))
            for each in contenders
        ]
        runs: list[list[Run]] = [[] for _ in contenders]
        await stack.settle()
        for turn in range(timing.pairs):
            order = list(range(len(sides)))
            for place in order[turn % len(order) :] + order[: turn % len(order)]:
                run = await sides[place].run(timing, in_flight)
                runs[place].append(run)
                print(f"  {contenders[place]} {turn + 1}: {run}", file=sys.stderr, flush=True)
        return runs
