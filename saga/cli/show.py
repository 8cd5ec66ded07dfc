"""Draws one run: steps in order, the compensation lane beside them, what it waits for and what is in doubt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from saga.cli.output import moment, say, table, visible
from saga.storage.base import AuditEntry
from saga.views import Description, StepView, UndoView


def draw(seen: Description, audit: Sequence[AuditEntry]) -> None:
    """Print a run."""
    since = seen.closed_at or (seen.history[-1].at if seen.history else seen.created_at)
    say(f"{visible(seen.saga)} v{seen.version}  {visible(seen.id)}  {seen.status} since {moment(since)} UTC")
    say(
        f"run {seen.run_id} ({seen.run_number})  namespace {seen.namespace}  started {moment(seen.created_at)} UTC"
    )
    if seen.cause:
        say(f"turned back: {visible(seen.cause)}")
    say()
    lanes = ("", "step", "forward", "tries", "ended", "", "compensation", "tries", "ended")
    table(lanes, [_lane(number, step, seen) for number, step in enumerate(seen.steps, start=1)])
    say()
    for line in _facts(seen):
        say(line)
    for entry in audit:
        told = f"{moment(entry.at)}  {entry.verb} by {visible(entry.actor)}: {visible(entry.reason) or '(no reason)'}"
        say(f"{told}  [{entry.status_before} -> {entry.status_after}]")


def _lane(number: int, step: StepView, seen: Description) -> Sequence[object]:
    here = seen.waiting is not None and seen.waiting.step == step.name
    mark = ">" if here else " "
    forward = (f"{mark}{number}", step.name, step.state, step.attempts or "", moment(step.ended_at))
    return (*forward, *_undo(step.undo))


def _undo(undo: UndoView | None) -> Sequence[object]:
    if undo is None:
        return ("", "-", "", "")
    state = f"{undo.state} (in doubt)" if undo.in_doubt else undo.state
    return (f"#{undo.position}", state, undo.attempts or "", moment(undo.ended_at))


def _facts(seen: Description) -> Iterator[str]:
    waiting = seen.waiting
    if waiting is not None:
        when = f"sent {moment(waiting.sent_at)}"
        if waiting.retry_at is not None:
            when = f"next try {moment(waiting.retry_at)}"
        what = f"{visible(waiting.step)} {waiting.direction}, attempt {waiting.attempt}, {when} UTC"
        yield f"waits for:      {f'a person, about {visible(waiting.step)}' if waiting.asked else what}"
    doubtful = [step.name for step in seen.steps if step.state == "unknown"]
    if doubtful:
        yield f"in doubt:       {visible(', '.join(doubtful))}"
    coming = [
        name for name, state in seen.plan if state in ("pending", "compensating", "compensation_failed")
    ]
    if coming:
        yield f"undone next:    {visible(', '.join(coming))}"
    if seen.settlement is not None:
        yield f"by hand:        {seen.settlement}"
    for kind, step, error in seen.incidents:
        yield f"incident:       {kind} at {visible(step) or '-'}: {visible(error)}"
    if seen.verbs:
        yield f"you can:        {', '.join(seen.verbs)}"
