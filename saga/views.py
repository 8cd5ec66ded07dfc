"""What people see of an instance: steps, compensation plan, what it waits for; no payload. Pure, from stored rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from pydantic_core import from_json

from saga.definition.builder import SagaDefinition
from saga.engine.decide import initial
from saga.engine.state import CLOSED, CauseKind, State, Status, decode_state
from saga.engine.verbs import allowed
from saga.messages import FENCES, Direction
from saga.storage.base import Described, Listed

DIRECTIONS: Final = (str(Direction.COMPENSATE), str(Direction.CLOSE))
"""Directions whose history lines tell of the undo."""


@dataclass(frozen=True, slots=True)
class EventView:
    """One line of an instance's history."""

    at: datetime
    event: str
    step: str | None
    direction: str | None
    attempt: int | None
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class UndoView:
    """The undo of one step. `position` counts from 1 in the order of undoing."""

    position: int
    state: str
    in_doubt: bool
    """The step may have run, may run yet, or never."""
    attempts: int
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class StepView:
    """One step of the sequence: pending, sent, done, refused, failed or unknown, and its undo if there is one."""

    name: str
    state: str
    attempts: int
    sent_at: datetime | None
    """First sending."""
    ended_at: datetime | None
    undo: UndoView | None


@dataclass(frozen=True, slots=True)
class Waiting:
    """The one command that an open instance waits for; of a closed one, the fence that is not yet confirmed."""

    step: str
    direction: str
    attempt: int
    sent_at: datetime
    retry_at: datetime | None
    """When the next attempt goes out; None while an answer, or a person, is awaited."""
    asked: bool = False
    """Nothing goes out before a person orders it: the step is in doubt, and its policy is to ask (row E-04)."""


@dataclass(frozen=True, slots=True)
class Summary:
    """An instance in a list."""

    saga: str
    version: int
    id: str
    run_id: UUID
    run_number: int
    status: str
    step: str | None
    """Step of the outstanding command; None if there is none, or if this app lacks the version."""
    created_at: datetime
    closed_at: datetime | None


@dataclass(frozen=True, slots=True)
class Description:
    """An instance as people look at it: no payload."""

    namespace: str
    saga: str
    version: int
    id: str
    run_id: UUID
    run_number: int
    status: str
    steps: tuple[StepView, ...]
    waiting: Waiting | None
    cause: str | None
    """Why it turned back: kind, step and code, as in `refused: deposit: unknown_account`."""
    verbs: tuple[str, ...]
    """What an operator can order now."""
    plan: tuple[tuple[str, str], ...]
    """The compensation plan: step and state of its undo, in the order of undoing."""
    incidents: tuple[tuple[str, str, str], ...]
    """Open incidents: kind, step, error code or class."""
    created_at: datetime
    closed_at: datetime | None
    history: tuple[EventView, ...]

    @property
    def current_step(self) -> str | None:
        """Step of the outstanding command."""
        return self.waiting.step if self.waiting else None

    @property
    def settlement(self) -> str | None:
        """P26: what became of what was in flight when somebody settled it by hand; None if nobody did.

        `settled`, `had run already`, `cannot be confirmed` (no barrier there) or `not yet confirmed`.
        """
        found: str | None = None
        for past in self.history:
            if past.event in ("MarkDoneRequested", "SkipRequested", "TerminateRequested", "AbandonRequested"):
                found = "not yet confirmed"
            elif found is not None and past.direction in [str(each) for each in FENCES]:
                found = ANSWERED.get(past.event, found)
        return found


ANSWERED: Final[Mapping[str, str]] = {
    "CompensationCompleted": "settled",
    "FenceFoundEffect": "had run already",
    "CompensationFailed": "cannot be confirmed",
}


def plain(value: Any) -> Any:
    """Return a value as JSON types: named tuples and dataclasses by field, times as ISO 8601, bytes left out."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(item) for name, item in asdict(value).items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    return str(value) if isinstance(value, UUID) else value


def describe(row: Described, definition: SagaDefinition | None, namespace: str) -> Description:
    """Return an instance for people.

    One whose state this release cannot read, or of a version that this process does not know, comes without step and
    plan.
    """
    state = initial(namespace, str(row.run_id))
    names: list[str] = []
    if definition is not None:
        names = [step.name for step in definition.steps]
        with suppress(Exception):  # whatever is wrong with it, its incident is what is looked for
            state = decode_state(namespace, str(row.run_id), row.state)
    history = tuple(
        EventView(at, past.event, past.step, past.direction, past.attempt, from_json(past.detail or "{}"))
        for past, at in row.history
    )
    apart = row.status == Status.NEEDS_ATTENTION and state.status is not Status.NEEDS_ATTENTION
    return Description(
        namespace=namespace,
        saga=row.saga,
        version=row.saga_version,
        id=row.saga_id,
        run_id=row.run_id,
        run_number=row.run_number,
        status=row.status,
        steps=tuple(_step(index, name, state, history) for index, name in enumerate(names)),
        waiting=_waiting(state, names, row.created_at),
        cause=_cause(state, names),
        verbs=()
        if definition is None
        else tuple(str(verb) for verb in allowed(definition.engine, state, set_apart=apart)),
        plan=tuple((names[undo.step], undo.state.value) for undo in state.plan),
        incidents=tuple((each.kind, each.step, each.error) for each in row.incidents),
        created_at=row.created_at,
        closed_at=row.closed_at,
        history=history,
    )


def summary(row: Listed, definition: SagaDefinition | None, namespace: str) -> Summary:
    """Return one line of a list."""
    step = None
    if definition is not None and row.status not in CLOSED:
        try:
            waiting = decode_state(namespace, str(row.run_id), row.state).outstanding
        except Exception:  # its incident tells; a list goes on
            waiting = None
        step = definition.steps[waiting.step].name if waiting else None
    return Summary(
        row.saga,
        row.saga_version,
        row.saga_id,
        row.run_id,
        row.run_number,
        row.status,
        step,
        row.created_at,
        row.closed_at,
    )


def _step(index: int, name: str, state: State, history: Sequence[EventView]) -> StepView:
    sent = _sendings(history, name, str(Direction.FORWARD))
    ends = [
        past for past in history if past.step == name and past.direction == "forward" and past.event in ENDS
    ]
    return StepView(
        name=name,
        state=_forward_state(index, state),
        attempts=max((attempt for _, attempt in sent), default=0),
        sent_at=sent[0][0] if sent else None,
        ended_at=ends[-1].at if ends else None,
        undo=_undo(index, name, state, history),
    )


ENDS: Final = ("ActivityCompleted", "ActivityRefused", "ActivityFailed")


def _sendings(history: Sequence[EventView], step: str, direction: str) -> list[tuple[datetime, int]]:
    """Return when a command of the step was sent, and which attempt it was."""
    lines = [(past.at, past.detail.get("sent")) for past in history]
    return [(at, sent[2]) for at, sent in lines if sent and sent[:2] == [step, direction]]


def _forward_state(index: int, state: State) -> str:
    if index < state.done:
        return "done"
    if any(undo.step == index and undo.in_doubt for undo in state.plan):
        return "unknown"
    cause, waiting = state.cause, state.outstanding
    if cause is not None and cause.step == index:
        return "unknown" if cause.kind is CauseKind.TIMED_OUT else str(cause.kind)
    if waiting is None or waiting.step != index:
        return "pending"
    if waiting.direction is Direction.FENCE:
        return "unknown"
    return "sent" if waiting.retry_ms is None else "failed"


def _undo(index: int, name: str, state: State, history: Sequence[EventView]) -> UndoView | None:
    # backwards: where an effect landed late, its second undo is the one to look at
    for position, undo in reversed(list(enumerate(state.plan, start=1))):
        if undo.step == index:
            sent = _sendings(history, name, str(Direction.COMPENSATE))
            ends = [
                past.at
                for past in history
                if past.step == name
                and past.direction in DIRECTIONS
                and past.event == "CompensationCompleted"
            ]
            attempts = max((attempt for _, attempt in sent), default=0)
            return UndoView(position, undo.state.value, undo.in_doubt, attempts, ends[-1] if ends else None)
    return None


def _waiting(state: State, names: Sequence[str], created_at: datetime) -> Waiting | None:
    waiting = state.outstanding
    if waiting is None:
        return None
    timed = waiting.retry_ms is not None and not waiting.asked
    return Waiting(
        names[waiting.step],
        str(waiting.direction),
        waiting.attempt,
        created_at + timedelta(milliseconds=waiting.sent_ms),
        created_at + timedelta(milliseconds=waiting.retry_ms or 0) if timed else None,
        waiting.asked,
    )


def _cause(state: State, names: Sequence[str]) -> str | None:
    cause = state.cause
    if cause is None:
        return None
    parts = [str(cause.kind), *([names[cause.step]] if cause.step is not None else []), cause.code]
    return ": ".join(part for part in dict.fromkeys(parts) if part)
