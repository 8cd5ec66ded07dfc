"""One line of history per transition, for people: names, numbers and codes, never a payload or a text."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from pydantic_core import to_json

from saga.engine.effects import Dispatch, Effect
from saga.engine.events import (
    AbandonRequested,
    ActivityFailed,
    ActivityRefused,
    CancelRequested,
    CompensationFailed,
    CompensationRefused,
    Event,
    LateEffect,
    TerminateRequested,
    TimerFired,
)
from saga.engine.model import Definition
from saga.engine.state import CauseKind, State
from saga.engine.verbs import standing
from saga.messages import Direction


class HistoryEntry(NamedTuple):
    """What happened to which command, and what followed."""

    event: str
    step: str | None
    direction: str | None
    attempt: int | None
    detail: str
    """JSON: status, code or error class, the command sent, when the next attempt is due, else why there is none."""


def entry(
    event: Event,
    definition: Definition,
    before: State,
    after: State,
    effects: tuple[Effect, ...],
) -> HistoryEntry:
    """Return the line: what happened to which command, the status it led to, and the command that followed."""
    waiting = before.outstanding
    if isinstance(event, LateEffect):
        detail = _detail(event, definition, before, after, effects)
        return HistoryEntry(type(event).__name__, event.step, str(Direction.FORWARD), None, detail)
    return HistoryEntry(
        event=type(event).__name__,
        step=definition.steps[waiting.step].name if waiting else None,
        direction=waiting.direction if waiting else None,
        attempt=waiting.attempt if waiting else None,
        detail=_detail(event, definition, before, after, effects),
    )


def _detail(
    event: Event, definition: Definition, before: State, after: State, effects: tuple[Effect, ...]
) -> str:
    detail: dict[str, Any] = {"status": str(after.status)}
    if isinstance(event, ActivityRefused | CompensationRefused):
        detail["code"] = event.code
    elif isinstance(event, ActivityFailed | CompensationFailed):
        detail["error"] = event.error
    for effect in effects:
        if isinstance(effect, Dispatch):
            name = definition.steps[effect.step].name
            detail["sent"] = [
                name,
                str(effect.direction),
                effect.attempt,
                "resend" if effect.resend else "new",
            ]
    if after.outstanding is not None and after.outstanding.retry_ms is not None:
        detail["retry_ms"] = after.outstanding.retry_ms
    if isinstance(event, ActivityFailed | TimerFired | CancelRequested):
        stop = _retry_stop(event, definition, before, after)
        if stop is not None:
            detail["retry_stop"] = stop
    if isinstance(event, TerminateRequested | AbandonRequested):
        detail["standing"] = [definition.steps[each.step].name for each in standing(definition, before)]
    return to_json(detail).decode()


DEADLINE: Final = (CauseKind.TIMED_OUT, None)
"""Kind and step of a cause: not one step ran out of time but the saga."""


def _retry_stop(event: Event, definition: Definition, before: State, after: State) -> str | None:
    """Return why the step that was outstanding is not tried again; None while it is (row D-03)."""
    ended, goes_on = before.outstanding, after.outstanding
    if ended is None or ended.direction is not Direction.FORWARD:
        return None
    if goes_on is not None and goes_on.direction is Direction.FORWARD:
        return None
    cause = after.cause
    if cause is not None and (cause.kind is CauseKind.CANCELLED or (cause.kind, cause.step) == DEADLINE):
        return cause.code
    if isinstance(event, ActivityFailed):
        if not event.retryable:
            return "not_retryable"
        attempts = definition.steps[ended.step].retry.attempts
        if attempts is not None and ended.attempt >= attempts:
            return "attempts"
    return "schedule_to_close"
