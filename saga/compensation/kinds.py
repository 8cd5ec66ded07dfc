"""Step kinds and the pivot rule: which steps may stand where (P8, row A-11); what becomes of a step in doubt (E-04)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple


class StepKind(StrEnum):
    """What can happen to a step after it is done."""

    COMPENSATABLE = "compensatable"
    """Can be undone, or says why it need not be."""
    PIVOT = "pivot"
    """The point of no return: once done, the saga goes forward only."""
    RETRIABLE = "retriable"
    """Stands after the pivot and is retried until it succeeds."""
    READ_ONLY = "read_only"
    """Has no effect, so there is nothing to undo."""


class InDoubt(StrEnum):
    """What is done about a step that was sent and gave no trustworthy answer (row E-04); a pivot is always fenced."""

    UNDO = "undo"
    """Undo it as if it had run: an undo that finds nothing to undo is cheap."""
    INQUIRE = "inquire"
    """Ask its participant first, and undo it only if it had run."""
    ASK = "ask"
    """Open an incident and wait for a person: `retry` undoes it, `mark-done` and `skip` settle it without."""


class StepShape(NamedTuple):
    """What the rule needs to know of one step."""

    name: str
    kind: StepKind
    has_compensation: bool
    no_compensation: str | None


def check_kinds(steps: Sequence[StepShape]) -> str | None:
    """Return what is wrong with the order of kinds and how to mend it, or None.

    At most one pivot; before it only compensatable and read-only steps, each compensatable one with a
    compensation or a reason for having none; after it only retriable and read-only steps.
    """
    pivot: str | None = None
    for step in steps:
        match step.kind:
            case StepKind.PIVOT:
                if pivot is not None:
                    return f"Step {step.name!r} is a second pivot after {pivot!r}; a saga has at most one."
                pivot = step.name
            case StepKind.RETRIABLE:
                if pivot is None:
                    return (
                        f"Step {step.name!r} is retriable but stands before the pivot; "
                        "only what follows the pivot is retried without end."
                    )
            case StepKind.COMPENSATABLE:
                if pivot is not None:
                    return (
                        f"Step {step.name!r} is compensatable but stands after the pivot {pivot!r}, "
                        "where nothing is undone; make it retriable or read_only."
                    )
                if not step.has_compensation and not step.no_compensation:
                    return (
                        f"Step {step.name!r} has no compensation; "
                        "declare one, or say why with no_compensation='reason'."
                    )
            case StepKind.READ_ONLY:
                pass
        if step.has_compensation and step.no_compensation:
            return f"Step {step.name!r} has both a compensation and no_compensation; drop one of them."
    return None
