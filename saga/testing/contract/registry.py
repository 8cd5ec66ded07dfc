"""The list of behaviours: each a function, its one-line rule, and the capability without which it means nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from saga.brokers.base import Capabilities
from saga.testing.contract.harness import Harness

Run = Callable[[Harness], Awaitable[None]]

BEHAVIOURS: dict[str, Behaviour] = {}


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One thing that every adapter does."""

    name: str
    rule: str
    run: Run
    needs: str = ""
    """Name of the capability that must be declared; empty for none."""

    def reason_to_skip(self, capabilities: Capabilities) -> str | None:
        """Return why this does not apply to an adapter, or None."""
        if not self.needs or getattr(capabilities, self.needs):
            return None
        return f"{capabilities.name} declares no {self.needs}"


def behaviour(*, needs: str = "") -> Callable[[Run], Run]:
    """Register a behaviour under the function's name; its docstring is the rule."""

    def register(function: Run) -> Run:
        name: str = getattr(function, "__name__", "")
        if name in BEHAVIOURS:
            raise ValueError(f"two behaviours are named {name}")
        rule = (function.__doc__ or "").strip().splitlines()[0]
        BEHAVIOURS[name] = Behaviour(name=name, rule=rule, run=function, needs=needs)
        return function

    return register


async def run(behaviour: Behaviour, harness: Harness) -> None:
    """Run one behaviour on a new harness and clean up after it. Raises ContractBroken."""
    try:
        await behaviour.run(harness)
    finally:
        await harness.clean_up()
