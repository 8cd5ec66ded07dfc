"""The scenarios on every stack of separate processes, one stack after the other, and one table of what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from examples.money_transfer.layouts import LAYOUTS, Layout
from examples.money_transfer.processes import DemoError
from examples.money_transfer.runner import Runner, Tell
from examples.money_transfer.scenarios import Scenario

STACKS: Final = tuple(name for name in LAYOUTS if name != "sqlite")

Seen = Mapping[str, Mapping[str, bool]]
"""Stack and scenario to whether it went as expected; what is missing did not run."""


def play(
    layouts: Mapping[str, type[Layout]], scenarios: Sequence[Scenario], *, seed: int, tell: Tell
) -> bool:
    """Play the scenarios on each stack, tell the table; return whether all of them went as expected.

    A stack that breaks down is told of, and the next one begins.
    """
    seen: dict[str, Mapping[str, bool]] = {}
    good = True
    for stack, layout_type in layouts.items():
        tell(f"\n=== {stack} ===")
        runner = None
        try:
            with layout_type() as layout:
                tell(f"money transfer, {layout.title}")
                runner = Runner(layout, seed=seed, tell=tell)
                good &= runner.run(scenarios)
        except DemoError as error:
            tell(f"   BROKE DOWN: {error}")
            good = False
        seen[stack] = runner.seen if runner else {}
    tell("")
    for line in table(seen, [scenario.name for scenario in scenarios]):
        tell(line)
    went = sum(ok for its in seen.values() for ok in its.values())
    tell(
        f"\ndemo: {went} of {len(seen) * len(scenarios)} scenarios as expected on {len(seen)} stacks, seed {seed}"
    )
    return good


def table(seen: Seen, scenarios: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the table: a scenario each, with a column for each stack."""
    first = max(map(len, scenarios))
    yield " " * first + "".join(f"  {stack}" for stack in seen)
    for scenario in scenarios:
        words = {True: "ok", False: "FAILED", None: "not run"}
        cells = (f"  {words[its.get(scenario)]:<{len(stack)}}" for stack, its in seen.items())
        yield f"{scenario:<{first}}{''.join(cells)}".rstrip()
