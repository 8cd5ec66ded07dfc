"""What the stacks cost beside each other, from the results that are kept: the table of the page `docs/stacks.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path(__file__).parent / "results"
STACKS: Final = ("postgres-rabbitmq", "postgres-kafka", "postgres", "mariadb-rabbitmq")
"""Those of which results are kept, as the page lists them."""
_HEAD: Final = (
    "Stack",
    "Sagas/s, times naive: stateless",
    "business",
    "business-batch",
    "Coordinator's commits per step",
    "Statements per saga",
    "CPU ms per saga",
    "One in flight: p50 of a saga, ms",
)

Line = Mapping[str, Any]


def read(folder: Path = RESULTS) -> dict[str, list[Line]]:
    """Return the lines of each stack's results."""
    return {
        stack: [json.loads(line) for line in (folder / f"{stack}.jsonl").read_text().splitlines()]
        for stack in STACKS
        if (folder / f"{stack}.jsonl").exists()
    }


def table(stacks: Mapping[str, Sequence[Line]]) -> str:
    """Return a table in Markdown; 500 sagas in flight unless a column says otherwise."""
    rows = [_HEAD, ("---",) * len(_HEAD), *(_row(stack, lines) for stack, lines in stacks.items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(stack: str, lines: Sequence[Line]) -> tuple[str, ...]:
    batch = _find(lines, "saga", "business-batch", 500)
    alone = _find(lines, "saga", "stateless", 1)
    return (
        f"`{stack}`",
        *(_ratio(lines, participants) for participants in ("stateless", "business", "business-batch")),
        "-" if batch is None else f"{batch['coordinator_commits_per_step']:.2f}",
        "-" if batch is None else f"{batch['statements_per_saga']:.1f}",
        "-" if batch is None else f"{sum(batch['cpu_ms_per_saga'].values()):.1f}",
        "-" if alone is None else f"{alone['p50_ms']:.0f}",
    )


def _ratio(lines: Sequence[Line], participants: str) -> str:
    ours, naive = (_find(lines, system, participants, 500) for system in ("saga", "naive"))
    if ours is None or naive is None:
        return "-"
    return f"{ours['sagas_per_s'] / naive['sagas_per_s']:.1f}"


def _find(lines: Sequence[Line], system: str, participants: str, in_flight: int) -> Line | None:
    return next(
        (
            line
            for line in lines
            if (line["system"], line["workload"], line["participants"], line["in_flight"])
            == (system, "transfer", participants, in_flight)
        ),
        None,
    )
