"""The compensation plan: decided once, stored whole, worked off from its first entry (rows E-01, E-02, E-04)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from saga.compensation.kinds import StepShape


class UndoState(StrEnum):
    """Where the undo of one step stands; the same words as step states elsewhere."""

    PENDING = "pending"
    COMPENSATING = "compensating"
    COMPENSATED = "compensated"
    NOTHING_TO_UNDO = "nothing_to_undo"
    COMPENSATION_FAILED = "compensation_failed"
    SKIPPED = "skipped"
    """A person decided that its effect stands."""


SETTLED = frozenset({UndoState.COMPENSATED, UndoState.NOTHING_TO_UNDO, UndoState.SKIPPED})


@dataclass(frozen=True, slots=True)
class Undo:
    """One entry of the plan. `step` is the index of the step in its definition."""

    step: int
    in_doubt: bool = False
    """The step was sent and gave no trustworthy answer: it may have run, may run yet, or never."""
    state: UndoState = UndoState.PENDING
    round: int = 0
    """Above 0 where an effect landed after an undo had begun: it is undone once more, under another key (P27)."""


Plan = tuple[Undo, ...]


def make_plan(steps: Sequence[StepShape], done: int, in_doubt: int | None, round: int = 0) -> Plan:
    """Return what must be undone, latest first.

    `done` steps from the front have run; `in_doubt` is the index of a step that was sent without a trustworthy answer,
    and is undone under `round`. Steps without effect, and those that said why they need no compensation, are left out.
    A pivot is never in a plan: done, it closes the way back; in doubt, it is fenced before there is a plan (row E-05).
    """
    doubtful = [Undo(in_doubt, in_doubt=True, round=round)] if in_doubt is not None else []
    ran = [Undo(index) for index in reversed(range(done))]
    return tuple(undo for undo in doubtful + ran if steps[undo.step].has_compensation)


def current(plan: Plan) -> int | None:
    """Return the position in the plan of the undo that is due, or None when all are settled.

    In a sequence every step depended on the one before it, so one undo at a time, and a failed one holds back
    those behind it.
    """
    for position, undo in enumerate(plan):
        if undo.state not in SETTLED:
            return position
    return None


def undo_again(plan: Plan, step: int, round: int) -> Plan:
    """Return the plan with one more undo of a step, due next after the one that is due now (P27)."""
    due = current(plan)
    place = len(plan) if due is None else due + 1
    return (*plan[:place], Undo(step, round=round), *plan[place:])


def mark(plan: Plan, position: int, state: UndoState) -> Plan:
    """Return the plan with one entry moved on."""
    return (*plan[:position], replace(plan[position], state=state), *plan[position + 1 :])
