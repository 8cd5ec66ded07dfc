"""Sums up the runs of a cell: medians, one JSON line per system, and the table that people read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.cell import Run
from benchmarks.stack import Stack
from benchmarks.workloads import STEPS


@dataclass(frozen=True, slots=True)
class Result:
    """What the runs of one system in one cell gave."""

    system: str
    workload: str
    participants: str
    in_flight: int
    runs: tuple[Run, ...]

    @property
    def sagas_per_s(self) -> float:
        return median(run.sagas_per_s for run in self.runs)

    @property
    def p50_ms(self) -> float:
        return median(run.measured.p50_ms for run in self.runs)

    @property
    def p99_ms(self) -> float:
        return median(run.measured.p99_ms for run in self.runs)

    def commits_per_step(self, role: str) -> float:
        """Return the commits of one role per step; for the coordinator those of the starts are among them."""
        steps = len(STEPS[self.workload])
        return median(run.commits.get(role, 0) / run.measured.sagas / steps for run in self.runs)

    @property
    def statements_per_saga(self) -> float:
        """Of both roles, without BEGIN, COMMIT and ROLLBACK."""
        return median(sum(run.statements.values()) / run.measured.sagas for run in self.runs)

    @property
    def cpu_ms_per_saga(self) -> dict[str, float]:
        return {
            name: median(run.cpu_ms_per_saga[name] for run in self.runs)
            for name in self.runs[0].cpu_ms_per_saga
        }

    @property
    def others(self) -> float:
        """The busiest that the rest of the machine was, in processors."""
        return max(run.others for run in self.runs)

    def line(self, stack: Stack) -> dict[str, Any]:
        """Return the line of the results file."""
        return {
            "system": self.system,
            "workload": self.workload,
            "participants": self.participants,
            "database": stack.database,
            "broker": stack.broker,
            "in_flight": self.in_flight,
            "sagas_per_s": round(self.sagas_per_s, 1),
            "p50_ms": round(self.p50_ms, 2),
            "p99_ms": round(self.p99_ms, 2),
            "coordinator_commits_per_step": round(self.commits_per_step("coordinator"), 4),
            "statements_per_saga": round(self.statements_per_saga, 3),
            "cpu_ms_per_saga": {name: round(value, 3) for name, value in self.cpu_ms_per_saga.items()},
            "versions": stack.versions,
            "runs": [round(run.sagas_per_s, 1) for run in self.runs],
        }


def write(path: Path, results: Iterable[Result], stack: Stack) -> None:
    """Replace the results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(result.line(stack)) + "\n" for result in results))
    temporary.replace(path)


_COLUMNS: Final = (
    f"{'workload':<10} {'participants':<15} {'in flight':>9}  {'system':<6} {'sagas/s':>8} {'p50 ms':>8} {'p99 ms':>8}"
    f" {'commits/step':>13} {'stmts':>6}"
)
_PROCESSES: Final = {
    "coordinator": "coord",
    "participant": "part",
    "postgresql": "pg",
    "mariadb": "maria",
    "rabbitmq": "rabbit",
    "kafka": "kafka",
}


def table(results: Sequence[Result]) -> str:
    """Return one line per result; `commits/step` are the coordinator's and the participant's."""
    processes = results[0].runs[0].cpu_ms_per_saga if results else ()
    names = f"cpu ms/saga: {' '.join(_PROCESSES[each] for each in processes)}"
    lines = [f"{_COLUMNS}  {names:<34} others"]
    for result in results:
        commits = " + ".join(
            f"{result.commits_per_step(role):.2f}" for role in ("coordinator", "participant")
        )
        cpu = " ".join(f"{value:.2f}" for value in result.cpu_ms_per_saga.values())
        lines.append(
            f"{result.workload:<10} {result.participants:<15} {result.in_flight:>9}  {result.system:<6}"
            f" {result.sagas_per_s:>8.1f} {result.p50_ms:>8.2f} {result.p99_ms:>8.2f} {commits:>13}"
            f" {result.statements_per_saga:>6.2f}  {cpu:<34} {result.others:>6.2f}"
        )
    return "\n".join(lines)
