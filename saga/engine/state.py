"""The state of an instance: a small snapshot whose size does not grow with the steps behind it (row A-01).

Named tuples rather than dataclasses: every transition makes several of them, and they are made in a fifth of the time.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, NamedTuple

from pydantic_core import from_json, to_json

from saga.compensation.plan import Plan, Undo, UndoState
from saga.messages import Direction

FORMAT: Final = 1


class Status(StrEnum):
    """Instance states; the same words in code, SQL and documents."""

    RUNNING = "running"
    COMPENSATING = "compensating"
    NEEDS_ATTENTION = "needs_attention"
    COMPLETED = "completed"
    COMPENSATED = "compensated"
    TERMINATED = "terminated"
    """Stopped by a person, without undo."""
    ABANDONED = "abandoned"
    """Given up by a person while it needed attention."""


CLOSED: Final = frozenset({Status.COMPLETED, Status.COMPENSATED, Status.TERMINATED, Status.ABANDONED})


class CauseKind(StrEnum):
    """Why a saga turned back."""

    REFUSED = "refused"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"


class Cause(NamedTuple):
    """Why a saga turned back: the step (by index) and a code or class name, never a text."""

    kind: CauseKind
    step: int | None
    code: str
    attempt: int = 0
    """The attempt whose answer it was; what it said is kept under that number."""


class Outstanding(NamedTuple):
    """The one command that awaits its answer, or its next attempt if `retry_ms` is set.

    In an instance that a person closed: the fence that is not yet confirmed (P26).

    Times are milliseconds of database time since the instance was created.
    """

    step: int
    direction: Direction
    command_id: str
    attempt: int
    first_sent_ms: int
    """First sending of attempt 1: the budget `schedule_to_close` counts from here."""
    sent_ms: int
    """Latest sending, resends included."""
    resends: int = 0
    """Resends of this attempt; the interval doubles with each."""
    retry_ms: int | None = None
    """When the next attempt goes out; None while an answer is awaited."""
    round: int = 0

    @property
    def asked(self) -> bool:
        """Whether it was never sent, and only a person's order sends it (row E-04)."""
        return self.attempt == 0


class State(NamedTuple):
    """Everything `decide` needs to know of an instance. Identity is not stored in the snapshot, the row has it."""

    namespace: str
    run_id: str
    status: Status
    done: int = 0
    """Steps done, from the front of the sequence."""
    outstanding: Outstanding | None = None
    plan: Plan = ()
    cause: Cause | None = None
    """Set while running: a cancel waits for the outstanding answer. Set otherwise: why the saga turned back."""

    def encode(self) -> str:
        """Return the snapshot as JSON text."""
        known = self.outstanding
        # plain strings: serialising an enum member takes five times as long
        out = known and (known.step, str(known.direction), *(known[2:] if known.round else known[2:-1]))
        body: dict[str, Any] = {"f": FORMAT, "s": str(self.status), "d": self.done, "o": out}
        if self.plan:
            body["p"] = [
                (undo.step, undo.in_doubt, undo.state, *((undo.round,) if undo.round else ()))
                for undo in self.plan
            ]
        if self.cause:
            body["c"] = (self.cause.kind, self.cause.step, self.cause.code, self.cause.attempt)
        return to_json(body).decode()


def decode_state(namespace: str, run_id: str, text: str) -> State:
    """Return the state in a snapshot. Raises ValueError for a format of a newer release."""
    body: dict[str, Any] = from_json(text)
    if body["f"] != FORMAT:
        raise ValueError(f"state format {body['f']}")
    out, cause = body["o"], body.get("c")
    return State(
        namespace=namespace,
        run_id=run_id,
        status=Status(body["s"]),
        done=body["d"],
        outstanding=out and Outstanding(out[0], Direction(out[1]), *out[2:]),
        plan=tuple(
            Undo(step, doubt, UndoState(state), *round) for step, doubt, state, *round in body.get("p", ())
        ),
        cause=cause and Cause(CauseKind(cause[0]), *cause[1:]),
    )
