"""Engine outputs: instructions that a shell carries out in the commit of the transition."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from saga.messages import Direction


class Dispatch(NamedTuple):
    """Write the command of the state's outstanding step into the outbox."""

    step: int
    direction: Direction
    command_id: str
    attempt: int
    round: int
    resend: bool
    final: bool
    """A refusal of it is the business's last word (P20)."""
    remaining_ms: int | None


@dataclass(frozen=True, slots=True)
class Finish:
    """The instance is closed."""


class IncidentKind(StrEnum):
    """Why an instance stands still."""

    COMPENSATION_FAILED = "compensation_failed"
    STEP_FAILED_AFTER_PIVOT = "step_failed_after_pivot"
    PIVOT_UNKNOWN = "pivot_unknown"
    POISON = "poison"
    UNROUTABLE = "unroutable"
    HAD_RUN = "had_run"
    """What a person settled as not done, or by hand, had run already (P26)."""
    IN_DOUBT = "in_doubt"
    """Nobody can tell whether a step has run, and its policy is to ask a person (E-04)."""
    LATE_EFFECT = "late_effect"
    """An effect outside the database landed after its undo had begun, or after it was settled as never run (P27)."""


@dataclass(frozen=True, slots=True)
class RaiseIncident:
    """Open the incident of this kind and step, or count it once more."""

    kind: IncidentKind
    step: int
    error: str


@dataclass(frozen=True, slots=True)
class ResolveIncidents:
    """What held this step has gone: close its incidents."""

    step: int


@dataclass(frozen=True, slots=True)
class RecordStale:
    """Keep the answer beside the instance; it changes no state (P6)."""


Effect = Dispatch | Finish | RaiseIncident | ResolveIncidents | RecordStale
