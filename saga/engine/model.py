"""What the engine knows of a saga's definition: names, kinds, schedules. Payloads and code stay outside."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from saga.compensation.kinds import InDoubt, StepKind, StepShape
from saga.retry import COMPENSATION, FORWARD, RetryPolicy

MILLISECOND: Final = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a sequence. Durations are milliseconds; None is without limit."""

    name: str
    kind: StepKind = StepKind.COMPENSATABLE
    has_compensation: bool = False
    no_compensation: str | None = None
    retry: RetryPolicy = FORWARD
    undo_retry: RetryPolicy = COMPENSATION
    start_to_close_ms: int | None = 30_000
    undo_start_to_close_ms: int | None = 30_000
    in_doubt: InDoubt = InDoubt.UNDO
    budget_ms: int | None = field(init=False, repr=False, compare=False)
    """The `schedule_to_close` of `retry`: looked at several times in every transition, divided once."""

    def __post_init__(self) -> None:
        budget = self.retry.schedule_to_close
        object.__setattr__(self, "budget_ms", None if budget is None else budget // MILLISECOND)

    @property
    def shape(self) -> StepShape:
        """The part of the step that the pivot rule looks at."""
        return StepShape(self.name, self.kind, self.has_compensation, self.no_compensation)


@dataclass(frozen=True, slots=True)
class Redrive:
    """When a command without an answer is sent again (P4). Belongs to the process, not to the pinned definition."""

    first_ms: int = 30_000
    max_ms: int = 300_000
    long_ms: int = 30_000
    """An attempt that may run longer than this is sent again only when its `start_to_close` is missed."""

    def after_ms(self, resends: int, attempt_ms: int | None) -> int:
        """Return how long to wait after the latest sending."""
        backing_off = min(self.first_ms << min(resends, 16), self.max_ms)
        return (
            max(backing_off, attempt_ms)
            if attempt_ms is not None and attempt_ms > self.long_ms
            else backing_off
        )


@dataclass(frozen=True)
class Definition:
    """A saga as the engine runs it: a sequence of steps."""

    name: str
    version: int
    steps: tuple[Step, ...]
    redrive: Redrive = Redrive()
    deadline_ms: int | None = None
    """Since the start: then the way forward ends (E-07). None is without end."""

    def __post_init__(self) -> None:
        pivot = next((i for i, step in enumerate(self.steps) if step.kind is StepKind.PIVOT), None)
        object.__setattr__(self, "pivot", pivot)
        object.__setattr__(self, "shapes", tuple(step.shape for step in self.steps))

    pivot: int | None = None
    """Index of the pivot."""
    shapes: tuple[StepShape, ...] = ()
