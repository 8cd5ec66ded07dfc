"""Operators' verbs as transitions: what a person may order, where, and what is fenced when they settle it (P16, P26).

| Verb        | Allowed                                             | Leads to                                        |
|-------------|-----------------------------------------------------|-------------------------------------------------|
| cancel      | up to and including the pivot, until turning back   | `compensating` (in decide.py)                   |
| retry       | an attempt waits for its time, or attention needed  | the next attempt now, else the same once more   |
| mark-done   | a failed undo                                       | counts as undone; its undo closed; goes on      |
| skip        | a failed undo                                       | its effect stands; its undo closed; goes on     |
| terminate   | open; with `force` where effects stand              | `terminated`; what is in flight closed          |
| abandon     | attention needed                                    | `abandoned`; what is in flight closed           |
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple, NoReturn

from saga.compensation.kinds import StepKind
from saga.compensation.plan import UndoState, mark
from saga.engine.effects import Effect, Finish, ResolveIncidents
from saga.engine.events import (
    AbandonRequested,
    Event,
    MarkDoneRequested,
    RetryRequested,
    SkipRequested,
    TerminateRequested,
)
from saga.engine.model import Definition
from saga.engine.sending import Decision, next_attempt, outstanding, past_pivot, resend, send, undoing
from saga.engine.state import CLOSED, State, Status
from saga.errors import VerbNotAllowed
from saga.messages import FENCES, Direction


class Verb(StrEnum):
    """What a person can order; the same words in code, audit and program."""

    CANCEL = "cancel"
    RETRY = "retry"
    MARK_DONE = "mark-done"
    SKIP = "skip"
    TERMINATE = "terminate"
    ABANDON = "abandon"


UNEXPLAINED: Final = frozenset({Verb.CANCEL, Verb.RETRY})
"""Verbs that need no reason: what they do, the saga might have done by itself."""


class Moved(NamedTuple):
    """What was decided for an instance: its status before and after, and the command that it sends."""

    before: str
    after: str
    sends: str | None
    """Step and direction, as in `withdraw compensate`; None if it sends nothing."""


class Standing(NamedTuple):
    """A step whose effect stands. `in_doubt`: it may have run, may run yet, or never."""

    step: int
    in_doubt: bool


def standing(definition: Definition, state: State) -> tuple[Standing, ...]:
    """Return the steps whose effects stand, in order of the sequence; what was skipped stands."""
    # by step: where an effect landed late, the undo that comes after decides
    settled = {
        step
        for step, undo in {undo.step: undo for undo in state.plan}.items()
        if undo.state in (UndoState.COMPENSATED, UndoState.NOTHING_TO_UNDO)
    }
    doubtful = {undo.step for undo in state.plan if undo.in_doubt}
    waiting = state.outstanding
    if waiting is not None and waiting.direction in (Direction.FORWARD, Direction.FENCE):
        doubtful.add(waiting.step)
    return tuple(
        Standing(index, index in doubtful)
        for index, step in enumerate(definition.steps)
        if (index < state.done or index in doubtful)
        and index not in settled
        and step.kind is not StepKind.READ_ONLY
    )


def allowed(definition: Definition, state: State, *, set_apart: bool = False) -> tuple[Verb, ...]:
    """Return the verbs that an instance in this state takes."""
    waiting = state.outstanding
    if state.status in CLOSED or waiting is None:
        return ()
    attention = set_apart or state.status is Status.NEEDS_ATTENTION
    verbs = []
    if not state.plan and state.cause is None and not past_pivot(definition, waiting.step):
        verbs.append(Verb.CANCEL)
    if attention or waiting.retry_ms is not None:
        verbs.append(Verb.RETRY)
    if state.status is Status.NEEDS_ATTENTION and waiting.direction is Direction.COMPENSATE:
        verbs += [Verb.MARK_DONE, Verb.SKIP]
    verbs.append(Verb.TERMINATE)
    if attention:
        verbs.append(Verb.ABANDON)
    return tuple(verbs)


def retry(definition: Definition, state: State, event: Event) -> Decision:
    """Send the next attempt without waiting for its time; if none waits, ask for the answer once more."""
    assert isinstance(event, RetryRequested)
    _check(
        Verb.RETRY,
        definition,
        state,
        event.set_apart,
        "no attempt waits for its time and nothing stands still",
    )
    waits = outstanding(state).retry_ms is not None
    return (next_attempt if waits else resend)(definition, state, event)


def mark_done(definition: Definition, state: State, event: Event) -> Decision:
    """The undo was done by hand: it counts as done, and what of it is in flight is closed first."""
    assert isinstance(event, MarkDoneRequested)
    return _settle(Verb.MARK_DONE, UndoState.COMPENSATED, definition, state, event)


def skip(definition: Definition, state: State, event: Event) -> Decision:
    """The effect stays: its undo is not asked for any more, and what of it is in flight is closed first."""
    assert isinstance(event, SkipRequested)
    return _settle(Verb.SKIP, UndoState.SKIPPED, definition, state, event)


def _settle(verb: Verb, settled: UndoState, definition: Definition, state: State, event: Event) -> Decision:
    _check(verb, definition, state, False, "no undo has failed")
    waiting = outstanding(state)
    plan = mark(state.plan, undoing(state), settled)
    moved = state._replace(status=Status.COMPENSATING, plan=plan)
    healed = (ResolveIncidents(waiting.step),)
    return send(definition, moved, waiting.step, Direction.CLOSE, event, healed, waiting.round)


def terminate(definition: Definition, state: State, event: Event) -> Decision:
    """Stop now, without undo."""
    assert isinstance(event, TerminateRequested)
    _check(Verb.TERMINATE, definition, state, False, "")
    stands = standing(definition, state)
    if stands and not event.force:
        names = ", ".join(definition.steps[each.step].name for each in stands)
        why = f"effects stand ({names}); cancel undoes them, force leaves them as they are"
        _refuse(Verb.TERMINATE, definition, state, False, why)
    return _end(definition, state, Status.TERMINATED, event)


def abandon(definition: Definition, state: State, event: Event) -> Decision:
    """Give up an instance that needs attention."""
    assert isinstance(event, AbandonRequested)
    _check(Verb.ABANDON, definition, state, event.set_apart, "it does not need attention")
    return _end(definition, state, Status.ABANDONED, event)


def _end(definition: Definition, state: State, status: Status, event: Event) -> Decision:
    """Close the instance; its last command, a fence, is kept as outstanding until it is confirmed."""
    waiting = outstanding(state)
    ended = state._replace(status=status)
    held = state.status is Status.NEEDS_ATTENTION
    effects: tuple[Effect, ...] = (ResolveIncidents(waiting.step),) if held else ()
    if waiting.direction not in FENCES:
        fence = Direction.FENCE if waiting.direction is Direction.FORWARD else Direction.CLOSE
        ended, effects = send(definition, ended, waiting.step, fence, event, effects, waiting.round)
    return Decision(ended, (*effects, Finish()))


def _check(verb: Verb, definition: Definition, state: State, set_apart: bool, otherwise: str) -> None:
    if verb not in allowed(definition, state, set_apart=set_apart):
        why = f"it has ended as {state.status}" if state.status in CLOSED else otherwise
        _refuse(verb, definition, state, set_apart, why)


def _refuse(verb: Verb, definition: Definition, state: State, set_apart: bool, why: str) -> NoReturn:
    others = tuple(str(each) for each in allowed(definition, state, set_apart=set_apart))
    instead = f"Allowed now: {', '.join(others)}." if others else "Nothing is left to do."
    raise VerbNotAllowed(f"{verb} is not allowed: {why}. {instead}", saga=definition.name, allowed=others)
