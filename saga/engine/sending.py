"""Sending the one outstanding command: first, again, next attempt, later; and what is asked about it. Pure."""

from __future__ import annotations

from typing import Final, NamedTuple

from saga.compensation.plan import current
from saga.engine.effects import Dispatch, Effect
from saga.engine.events import Event
from saga.engine.model import Definition, Step
from saga.engine.state import Outstanding, State
from saga.messages import Direction, command_id
from saga.retry import COMPENSATION, RetryPolicy

RETRY_AFTER_MAX_MS: Final = 7 * 86_400_000


class Decision(NamedTuple):
    """The next state and what to do about it. The same `state` object means: nothing changed, write nothing."""

    state: State
    effects: tuple[Effect, ...] = ()


def send(
    definition: Definition,
    state: State,
    step: int,
    direction: Direction,
    event: Event,
    before: tuple[Effect, ...] = (),
    round: int = 0,
) -> Decision:
    """Send a new command of a step: its first attempt."""
    identity = identify(definition, state, step, direction, round)
    waiting = Outstanding(step, direction, identity, 1, event.at_ms, event.at_ms, round=round)
    return dispatch(definition, state, waiting, event, resend=False, before=before)


def next_attempt(definition: Definition, state: State, event: Event) -> Decision:
    """Send the outstanding command's next attempt."""
    waiting = outstanding(state)
    again = waiting._replace(attempt=waiting.attempt + 1, sent_ms=event.at_ms, resends=0, retry_ms=None)
    return dispatch(definition, state, again, event, resend=False)


def resend(definition: Definition, state: State, event: Event) -> Decision:
    """Send the outstanding attempt once more (P4)."""
    waiting = outstanding(state)
    again = waiting._replace(sent_ms=event.at_ms, resends=waiting.resends + 1)
    return dispatch(definition, state, again, event, resend=True)


def dispatch(
    definition: Definition,
    state: State,
    waiting: Outstanding,
    event: Event,
    *,
    resend: bool,
    before: tuple[Effect, ...] = (),
) -> Decision:
    """Make `waiting` the outstanding command and send it."""
    forward = waiting.direction is Direction.FORWARD
    ends = budget_ends_ms(definition.steps[waiting.step], waiting)
    remaining: int | None = None
    if forward and ends is not None and ends > event.at_ms and not past_pivot(definition, waiting.step):
        remaining = ends - event.at_ms
    sent = Dispatch(
        step=waiting.step,
        direction=waiting.direction,
        command_id=waiting.command_id,
        attempt=waiting.attempt,
        round=waiting.round,
        resend=resend,
        final=forward and not past_pivot(definition, waiting.step),
        remaining_ms=remaining,
    )
    return Decision(state._replace(outstanding=waiting), (*before, sent))


def retry_later(state: State, policy: RetryPolicy, event: Event) -> State:
    """Let the next attempt wait for its time: the participant's wish, else the schedule's."""
    waiting = outstanding(state)
    asked = getattr(event, "retry_after_ms", None)
    if asked is None:
        delay = policy.delay_ms(waiting.command_id, waiting.attempt)
    else:
        delay = min(max(asked, 0), RETRY_AFTER_MAX_MS)
    return state._replace(outstanding=waiting._replace(retry_ms=event.at_ms + delay))


def identify(definition: Definition, state: State, step: int, direction: Direction, round: int = 0) -> str:
    """Return the id of a step's command (P2)."""
    name = definition.steps[step].name
    return command_id(state.namespace, definition.name, state.run_id, name, 0, round, direction)


# --- looking ----------------------------------------------------------------------------------


def outstanding(state: State) -> Outstanding:
    """Return the outstanding command of an open instance."""
    assert state.outstanding is not None, "an open instance always has its one outstanding command"
    return state.outstanding


def undoing(state: State) -> int:
    """Return the position in the plan of the undo that is outstanding."""
    position = current(state.plan)
    assert position is not None, "an answered undo is the plan's current entry"
    return position


def must_succeed(definition: Definition, waiting: Outstanding) -> bool:
    """Whether giving up is no choice: an undo, a fence, a step past the pivot."""
    return waiting.direction is not Direction.FORWARD or past_pivot(definition, waiting.step)


def past_pivot(definition: Definition, step: int) -> bool:
    """Whether the step stands behind the point of no return."""
    return definition.pivot is not None and step > definition.pivot


def policy_of(definition: Definition, state: State) -> RetryPolicy:
    """Return the schedule of the outstanding command."""
    waiting = outstanding(state)
    step = definition.steps[waiting.step]
    match waiting.direction:
        case Direction.FORWARD:
            return step.retry
        case Direction.COMPENSATE:
            return step.undo_retry
        case Direction.FENCE | Direction.CLOSE:
            return COMPENSATION


def attempt_ms(definition: Definition, waiting: Outstanding) -> int | None:
    """Return how long one attempt of the outstanding command may take."""
    step = definition.steps[waiting.step]
    forward = waiting.direction is Direction.FORWARD
    return step.start_to_close_ms if forward else step.undo_start_to_close_ms


def incident_due(policy: RetryPolicy, waiting: Outstanding) -> bool:
    """Whether a failure of this attempt asks for a person."""
    return policy.incident_at is not None and waiting.attempt >= policy.incident_at


def budget_over(step: Step, waiting: Outstanding, at_ms: int) -> bool:
    """Whether the step's `schedule_to_close` has passed."""
    ends = budget_ends_ms(step, waiting)
    return ends is not None and at_ms >= ends


def budget_ends_ms(step: Step, waiting: Outstanding) -> int | None:
    """Return when the step's `schedule_to_close` passes; None if it has none."""
    return None if step.budget_ms is None else waiting.first_sent_ms + step.budget_ms
