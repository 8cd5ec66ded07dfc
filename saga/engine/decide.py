"""`decide`: the one place where a saga moves. A literal table of transitions, and a page of code that they name.

Every pair of an open status and an event stands in the table. An answer that does not answer the outstanding command
changes nothing, whatever the status (P6); it is looked at before the table is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from saga.compensation.kinds import InDoubt
from saga.compensation.plan import UndoState, current, make_plan, mark, undo_again
from saga.engine import verbs
from saga.engine.effects import (
    Effect,
    Finish,
    IncidentKind,
    RaiseIncident,
    RecordStale,
    ResolveIncidents,
)
from saga.engine.events import (
    AbandonRequested,
    ActivityCompleted,
    ActivityFailed,
    ActivityRefused,
    Answer,
    CancelRequested,
    CompensationCompleted,
    CompensationFailed,
    CompensationRefused,
    Event,
    FenceFoundEffect,
    LateEffect,
    MarkDoneRequested,
    RetryRequested,
    SagaStarted,
    SkipRequested,
    TerminateRequested,
    TimerFired,
)
from saga.engine.model import Definition, Step
from saga.engine.sending import (
    Decision,
    attempt_ms,
    budget_ends_ms,
    budget_over,
    identify,
    incident_due,
    must_succeed,
    next_attempt,
    outstanding,
    past_pivot,
    policy_of,
    resend,
    retry_later,
    send,
    undoing,
)
from saga.engine.state import CLOSED, Cause, CauseKind, Outstanding, State, Status
from saga.errors import PastPivot
from saga.messages import NO_BARRIER, Direction

UNANSWERED_MS: Final = 900_000
"""A command that must succeed, an undo for one, and is not answered for so long needs a person."""
ASKED_MS: Final = 100 * 365 * 86_400_000
"""What waits for a person is due in a hundred years: only a verb moves it."""


def decide(definition: Definition, state: State, event: Event) -> Decision:
    """Return what follows from `event`.

    Total: every event is answered in every state. Raises PastPivot for a cancel that comes too late and VerbNotAllowed
    for another verb that does not fit the state, and nothing else.
    """
    if isinstance(event, Answer) and not _counts(definition, state, event):
        return Decision(state, (RecordStale(),))
    return TRANSITIONS[state.status, type(event)](definition, state, event)


def initial(namespace: str, run_id: str) -> State:
    """Return the state before `SagaStarted`."""
    return State(namespace, run_id, Status.RUNNING)


def _counts(definition: Definition, state: State, answer: Answer) -> bool:
    """P6: it answers the outstanding command; what is not final, only for the outstanding attempt of it."""
    waiting = state.outstanding
    if waiting is None or waiting.command_id != answer.command_id:
        return False
    if type(answer) not in ANSWERS[waiting.direction]:
        return False
    if isinstance(answer, ActivityCompleted | CompensationCompleted | FenceFoundEffect):
        return True
    if isinstance(answer, ActivityRefused) and not past_pivot(definition, waiting.step):
        return True
    return answer.attempt == waiting.attempt and waiting.retry_ms is None


# --- forward ----------------------------------------------------------------------------------


def begin(definition: Definition, state: State, event: Event) -> Decision:
    """Send the first step."""
    if state.outstanding is not None:
        return Decision(state)
    return _forward(definition, state, event)


def advance(definition: Definition, state: State, event: Event) -> Decision:
    """The step is done: send the next one, or complete. A cancel that waited for it turns back, save past the pivot."""
    step = outstanding(state).step
    healed = _healed(state)
    moved = State(state.namespace, state.run_id, Status.RUNNING, step + 1, plan=state.plan)
    cause = state.cause or _too_late(definition, state, event)
    if cause is not None and step != definition.pivot:
        return _turn_back(definition, moved, cause, None, event, healed)
    return _forward(definition, moved, event, healed)


def _forward(definition: Definition, state: State, event: Event, before: tuple[Effect, ...] = ()) -> Decision:
    if state.done == len(definition.steps):
        return Decision(state._replace(status=Status.COMPLETED), (*before, Finish()))
    return send(definition, state, state.done, Direction.FORWARD, event, before)


def refused(definition: Definition, state: State, event: Event) -> Decision:
    """The business said no: turn back without the refusing step. Past the pivot there is no way back: hold."""
    assert isinstance(event, ActivityRefused)
    step = outstanding(state).step
    if past_pivot(definition, step):
        return _hold(definition, state, event, event.code)
    cause = Cause(CauseKind.REFUSED, step, event.code, event.attempt)
    return _turn_back(definition, state, cause, None, event, _healed(state))


def failed(definition: Definition, state: State, event: Event) -> Decision:
    """An attempt failed: try again by the step's schedule, else turn back with the step in doubt (E-04)."""
    assert isinstance(event, ActivityFailed)
    waiting, step = outstanding(state), definition.steps[outstanding(state).step]
    if past_pivot(definition, waiting.step):
        if not event.retryable or incident_due(step.retry, waiting):
            return _hold(definition, state, event, event.error)
        return Decision(retry_later(state, step.retry, event))
    retrying = retry_later(state, step.retry, event)
    if state.cause is not None or not event.retryable or _spent(step, retrying):
        cause = state.cause or Cause(CauseKind.FAILED, waiting.step, event.error, event.attempt)
        return _give_up(definition, state, cause, event)
    return Decision(retrying)


def _spent(step: Step, retrying: State) -> bool:
    waiting = outstanding(retrying)
    if step.retry.attempts is not None and waiting.attempt >= step.retry.attempts:
        return True
    return waiting.retry_ms is not None and budget_over(step, waiting, waiting.retry_ms)


def _give_up(definition: Definition, state: State, cause: Cause, event: Event) -> Decision:
    """The step will not be tried again, but a late copy of its command might still run.

    A compensation makes that harmless (its barrier row refuses the late copy). A pivot has none to rely on: a fence
    goes first, and there is no plan before it is answered, so that the saga never goes both ways (I5). The same where
    the step's policy is to inquire: a fence settles what the participant knows, and what its inquiry finds out.
    """
    step = outstanding(state).step
    policy = definition.steps[step].in_doubt
    if step == definition.pivot or policy is InDoubt.INQUIRE:
        return send(definition, state._replace(cause=cause), step, Direction.FENCE, event)
    if policy is InDoubt.ASK:
        return _ask(definition, state, cause, event)
    return _turn_back(definition, state, cause, step, event)


def _ask(definition: Definition, state: State, cause: Cause, event: Event) -> Decision:
    """Plan to undo the step in doubt first, and send nothing: a person decides, by `retry`, `mark-done` or `skip`."""
    step = outstanding(state).step
    identity = identify(definition, state, step, Direction.COMPENSATE)
    asked = event.at_ms + ASKED_MS
    waiting = Outstanding(step, Direction.COMPENSATE, identity, 0, event.at_ms, event.at_ms, retry_ms=asked)
    plan = make_plan(definition.shapes, state.done, step)
    held = state._replace(status=Status.NEEDS_ATTENTION, plan=plan, cause=cause, outstanding=waiting)
    return Decision(held, (RaiseIncident(IncidentKind.IN_DOUBT, step, cause.code),))


def fenced(definition: Definition, state: State, event: Event) -> Decision:
    """The step in doubt never ran and never will: now the way back is free."""
    assert state.cause is not None
    return _turn_back(definition, state, state.cause, None, event, _healed(state))


# --- backward ---------------------------------------------------------------------------------


def _turn_back(
    definition: Definition,
    state: State,
    cause: Cause,
    in_doubt: int | None,
    event: Event,
    before: tuple[Effect, ...] = (),
    round: int = 0,
) -> Decision:
    """Decide to compensate: cause, whole plan and first undo command are one transition (E-01)."""
    plan = make_plan(definition.shapes, state.done, in_doubt, round)
    turned = state._replace(status=Status.COMPENSATING, plan=plan, cause=cause, outstanding=None)
    return _undo(definition, turned, event, before)


def _undo(definition: Definition, state: State, event: Event, before: tuple[Effect, ...] = ()) -> Decision:
    position = current(state.plan)
    if position is None:
        return Decision(state._replace(status=Status.COMPENSATED, outstanding=None), (*before, Finish()))
    undo = state.plan[position]
    marked = state._replace(
        status=Status.COMPENSATING, plan=mark(state.plan, position, UndoState.COMPENSATING)
    )
    return send(definition, marked, undo.step, Direction.COMPENSATE, event, before, undo.round)


def undone(definition: Definition, state: State, event: Event) -> Decision:
    """One undo is settled: go on with the next, or end compensated."""
    assert isinstance(event, CompensationCompleted)
    if outstanding(state).direction is Direction.FENCE:
        return fenced(definition, state, event)
    if outstanding(state).direction is Direction.CLOSE:
        return _undo(definition, state, event, _healed(state))
    settled = UndoState.NOTHING_TO_UNDO if event.nothing else UndoState.COMPENSATED
    moved = state._replace(plan=mark(state.plan, undoing(state), settled), outstanding=None)
    late = (ResolveIncidents(outstanding(state).step),) if outstanding(state).round else ()
    return _undo(definition, moved, event, _healed(state) or late)


def undo_refused(definition: Definition, state: State, event: Event) -> Decision:
    """An undo that says it cannot be done needs a person at once; slow retries go on (E-06)."""
    assert isinstance(event, CompensationRefused)
    return _hold(definition, state, event, event.code)


def undo_failed(definition: Definition, state: State, event: Event) -> Decision:
    """An attempt to undo failed: try again without end, from the tenth on under an incident (P15)."""
    assert isinstance(event, CompensationFailed)
    if outstanding(state).direction is Direction.CLOSE and event.error == NO_BARRIER:
        # its participant keeps no barrier that could be closed: there is nothing to wait for
        return _undo(definition, state, event, _healed(state))
    policy = policy_of(definition, state)
    if _inquires(definition, state):
        return _unsettled(definition, state, event)
    if incident_due(policy, outstanding(state)):
        return _hold(definition, state, event, event.error)
    return Decision(retry_later(state, policy, event))


def _inquires(definition: Definition, state: State) -> bool:
    """Whether a fence is out for a step in doubt that can be undone on suspicion: any but the pivot."""
    waiting = outstanding(state)
    return waiting.direction is Direction.FENCE and waiting.step != definition.pivot


def _unsettled(definition: Definition, state: State, event: CompensationFailed) -> Decision:
    """The inquiry could not tell: ask again, the tenth time a person; without a barrier there is nobody to ask."""
    assert state.cause is not None
    waiting = outstanding(state)
    if event.error == NO_BARRIER:
        return _turn_back(definition, state, state.cause, waiting.step, event, _healed(state))
    policy = policy_of(definition, state)
    if incident_due(policy, waiting):
        return _ask(definition, state, state.cause, event)
    return Decision(retry_later(state, policy, event))


def late(definition: Definition, state: State, event: Event) -> Decision:
    """P27: the effect is there although its undo had begun: open the incident, and undo it again under a new round.

    What still waits for the action or its fence has its answer with it. What can have no undo, or was ended by a
    person, is told and stays.
    """
    assert isinstance(event, LateEffect)
    step = next((i for i, each in enumerate(definition.steps) if each.name == event.step), None)
    waiting = state.outstanding
    if step is None or not _tells_of(definition, state, step, event):
        return record_stale(definition, state, event)
    if waiting is not None and waiting.step == step and waiting.direction in STILL_OPEN:
        if not event.certain:
            return _suspected(definition, state, event, step)
        return (found if waiting.direction is Direction.FENCE else advance)(definition, state, event)
    if state.status in (Status.RUNNING, Status.COMPLETED):
        return record_stale(definition, state, event)
    plan = state.plan
    answered = waiting is not None and waiting.command_id == event.command_id
    noted = any(undo.step == step and undo.round > event.round for undo in plan)
    if noted and not answered:
        return record_stale(definition, state, event)
    told = () if noted else (RaiseIncident(IncidentKind.LATE_EFFECT, step, "late_effect"),)
    ended = state.status in (Status.TERMINATED, Status.ABANDONED)
    if ended or not definition.steps[step].has_compensation:
        return Decision(state._replace(), told)
    if not noted:
        plan = undo_again(plan, step, event.round + 1)
    if waiting is not None and not answered:
        return Decision(state._replace(plan=plan), told)
    if answered:
        plan = mark(plan, undoing(state), UndoState.NOTHING_TO_UNDO)
    return _undo(definition, state._replace(plan=plan, outstanding=None), event, told)


def _suspected(definition: Definition, state: State, event: LateEffect, step: int) -> Decision:
    """A call failed after its inquiry was answered, or while it is asked: what can be undone on suspicion, is."""
    told = RaiseIncident(IncidentKind.LATE_EFFECT, step, "late_effect")
    waits = outstanding(state).direction is Direction.FENCE and state.status not in CLOSED
    if not waits or not definition.steps[step].has_compensation:
        return Decision(state._replace(), (told,))
    assert state.cause is not None
    return _turn_back(
        definition, state, state.cause, step, event, (*_healed(state), told), round=event.round + 1
    )


def _tells_of(definition: Definition, state: State, step: int, event: LateEffect) -> bool:
    """P6: it answers a command that this run sent for the step: the action, or its undo of that round."""
    return event.command_id in (
        identify(definition, state, step, Direction.FORWARD),
        identify(definition, state, step, Direction.COMPENSATE, event.round),
    )


def found(definition: Definition, state: State, event: Event) -> Decision:
    """A fence found that what it closes had run: the pivot goes forward; what was settled by hand is told (P26)."""
    waiting = outstanding(state)
    if waiting.direction is Direction.FENCE and state.status not in CLOSED:
        return advance(definition, state, event)
    told = RaiseIncident(IncidentKind.HAD_RUN, waiting.step, "had_run")
    if state.status in CLOSED:
        return Decision(state._replace(outstanding=None), (told,))
    return _undo(definition, state, event, (*_healed(state), told))


def confirmed(definition: Definition, state: State, event: Event) -> Decision:
    """What was in flight when the instance was closed by hand will never run (P26)."""
    return Decision(state._replace(outstanding=None))


def unconfirmed(definition: Definition, state: State, event: Event) -> Decision:
    """A participant without a barrier cannot tell what became of what was in flight; any other failure says nothing."""
    assert isinstance(event, CompensationFailed)
    if event.error == NO_BARRIER:
        return Decision(state._replace(outstanding=None))
    return record_stale(definition, state, event)


# --- standing still ---------------------------------------------------------------------------


def _hold(definition: Definition, state: State, event: Event, error: str) -> Decision:
    """Ask for a person and keep retrying slowly: never an end, never silent."""
    waiting = outstanding(state)
    held = retry_later(state, policy_of(definition, state), event)._replace(status=Status.NEEDS_ATTENTION)
    if waiting.direction is Direction.COMPENSATE:
        plan = mark(state.plan, undoing(state), UndoState.COMPENSATION_FAILED)
        held = held._replace(plan=plan)
    return Decision(held, (RaiseIncident(_standstill(definition, waiting), waiting.step, error),))


def _standstill(definition: Definition, waiting: Outstanding) -> IncidentKind:
    if waiting.direction in (Direction.COMPENSATE, Direction.CLOSE):
        return IncidentKind.COMPENSATION_FAILED
    if waiting.step == definition.pivot:
        return IncidentKind.PIVOT_UNKNOWN
    if waiting.direction is Direction.FENCE:
        return IncidentKind.IN_DOUBT
    return IncidentKind.STEP_FAILED_AFTER_PIVOT


def _healed(state: State) -> tuple[Effect, ...]:
    if state.status is not Status.NEEDS_ATTENTION:
        return ()
    return (ResolveIncidents(outstanding(state).step),)


# --- time -------------------------------------------------------------------------------------


def wake(definition: Definition, state: State, event: Event) -> Decision:
    """Do what is due: the next attempt, the end of the budget, or the same command once more (P4)."""
    assert isinstance(event, TimerFired)
    waiting = outstanding(state)
    if (cause := _too_late(definition, state, event)) is not None:
        return _stop(definition, state, cause, event)
    if waiting.retry_ms is not None:
        return _retry_due(definition, state, event) if event.at_ms >= waiting.retry_ms else Decision(state)
    last = _last_send_ms(definition, state)
    closes = _closes_ms(definition, waiting, last)
    if closes is not None and event.at_ms >= closes:
        return _timed_out(definition, state, event)
    resend_ms = _resend_ms(definition, waiting, last)
    due = resend_ms is not None and event.at_ms >= resend_ms
    again = (event.may_resend and due) or event.broker_forgot
    sendable = last is None or event.at_ms < last
    sent = resend(definition, state, event) if again and sendable else Decision(state)
    overdue = due and event.at_ms >= waiting.first_sent_ms + UNANSWERED_MS
    if overdue and must_succeed(definition, waiting) and state.status is not Status.NEEDS_ATTENTION:
        return _flag(definition, sent, "no_answer")
    return sent


def _deadline_ms(definition: Definition, state: State) -> int | None:
    """When the way forward ends; None if nothing ends it, or if it has ended or is past the pivot."""
    if definition.deadline_ms is None or state.plan or state.cause is not None:
        return None
    return None if past_pivot(definition, outstanding(state).step) else definition.deadline_ms


def _too_late(definition: Definition, state: State, event: Event) -> Cause | None:
    """Return the cause to turn back if the deadline has passed and the saga can still turn back."""
    deadline = _deadline_ms(definition, state)
    over = deadline is not None and event.at_ms >= deadline
    return Cause(CauseKind.TIMED_OUT, None, "deadline") if over else None


def _stop(definition: Definition, state: State, cause: Cause, event: Event) -> Decision:
    """Turn back: at once where no attempt runs, else once the running one has answered or cannot run any more (P5)."""
    if outstanding(state).retry_ms is not None:
        return _give_up(definition, state, cause, event)
    return Decision(state._replace(cause=cause))


def _retry_due(definition: Definition, state: State, event: Event) -> Decision:
    waiting = outstanding(state)
    over = budget_over(definition.steps[waiting.step], waiting, event.at_ms)
    if over and not must_succeed(definition, waiting):  # nobody was there to send the attempt in time
        cause = state.cause or Cause(CauseKind.TIMED_OUT, waiting.step, "schedule_to_close")
        return _give_up(definition, state, cause, event)
    return next_attempt(definition, state, event)


def _timed_out(definition: Definition, state: State, event: Event) -> Decision:
    """A timeout means unknown (P5). Only a pivot cannot be undone on suspicion: it is asked for on and on."""
    waiting = outstanding(state)
    if waiting.step != definition.pivot:
        cause = state.cause or Cause(CauseKind.TIMED_OUT, waiting.step, "schedule_to_close")
        return _give_up(definition, state, cause, event)
    return _flag(definition, resend(definition, state, event), "schedule_to_close")


def _flag(definition: Definition, sent: Decision, error: str) -> Decision:
    """Ask for a person; what was sent stays outstanding and may yet be answered."""
    waiting = outstanding(sent.state)
    incident = RaiseIncident(_standstill(definition, waiting), waiting.step, error)
    return Decision(sent.state._replace(status=Status.NEEDS_ATTENTION), (*sent.effects, incident))


def _last_send_ms(definition: Definition, state: State) -> int | None:
    """From when on the outstanding command is not sent again; None if it is asked for on and on.

    What is cancelled is not sent again; else the step's budget ends it. A pivot flagged as unknown has no end.
    """
    waiting = outstanding(state)
    step = definition.steps[waiting.step]
    is_pivot = waiting.step == definition.pivot
    if must_succeed(definition, waiting) or (is_pivot and state.status is Status.NEEDS_ATTENTION):
        return None
    if state.cause is not None and step.start_to_close_ms is not None and not is_pivot:
        return waiting.sent_ms
    return budget_ends_ms(step, waiting)


def _closes_ms(definition: Definition, waiting: Outstanding, last: int | None) -> int | None:
    """When the outstanding command is given up as unknown; None if never. `last`: from when on it is not sent again.

    Not before the latest sending could have run its full attempt, so that an undo does not race the action (P5).
    """
    if last is None:
        return None
    return max(last, waiting.sent_ms + (definition.steps[waiting.step].start_to_close_ms or 0))


def _resend_ms(definition: Definition, waiting: Outstanding, last: int | None) -> int | None:
    at_ms = waiting.sent_ms + definition.redrive.after_ms(waiting.resends, attempt_ms(definition, waiting))
    return at_ms if last is None or at_ms < last else None


def next_due_ms(definition: Definition, state: State, now_ms: int) -> int | None:
    """Return when an open instance must be woken at the latest, in database time; None for a closed one.

    After a wake-up at `now_ms` that is later than `now_ms`, save where a resend waits for its turn.
    """
    waiting = state.outstanding
    if waiting is None or state.status in CLOSED:
        return None
    deadline = _deadline_ms(definition, state)
    due = _command_due_ms(definition, state, waiting, now_ms)
    if deadline is None or due is None:
        return due if deadline is None else deadline
    return min(due, deadline)


def _command_due_ms(definition: Definition, state: State, waiting: Outstanding, now_ms: int) -> int | None:
    if waiting.retry_ms is not None:
        return waiting.retry_ms
    last = _last_send_ms(definition, state)
    closes = _closes_ms(definition, waiting, last)
    resend = None if last is not None and now_ms >= last else _resend_ms(definition, waiting, last)
    if closes is None or resend is None:
        return resend if closes is None else closes
    return min(closes, resend)


def cancel(definition: Definition, state: State, event: Event) -> Decision:
    """Stop and undo; a running action is waited for (P5). Too late past the pivot, nothing new while compensating."""
    assert isinstance(event, CancelRequested)
    waiting = outstanding(state)
    if past_pivot(definition, waiting.step):
        raise PastPivot(saga=definition.name, step=definition.steps[waiting.step].name)
    if state.plan or state.cause is not None:
        return Decision(state)
    return _stop(definition, state, Cause(CauseKind.CANCELLED, None, "cancelled"), event)


def ignore(definition: Definition, state: State, event: Event) -> Decision:
    """It asks for what is already so."""
    return Decision(state)


def record_stale(definition: Definition, state: State, event: Event) -> Decision:
    """It answers nothing that this status waits for (P6)."""
    return Decision(state, (RecordStale(),))


STILL_OPEN: Final = (Direction.FORWARD, Direction.FENCE)
"""Directions whose outstanding command is answered by the action's own late outcome."""

ANSWERS: Final[Mapping[Direction, frozenset[type[Answer]]]] = {
    Direction.FORWARD: frozenset({ActivityCompleted, ActivityRefused, ActivityFailed}),
    Direction.COMPENSATE: frozenset({CompensationCompleted, CompensationRefused, CompensationFailed}),
    Direction.FENCE: frozenset(
        {CompensationCompleted, CompensationRefused, CompensationFailed, FenceFoundEffect}
    ),
    Direction.CLOSE: frozenset(
        {CompensationCompleted, CompensationRefused, CompensationFailed, FenceFoundEffect}
    ),
}
"""What can answer a command of each direction; anything else that bears its id is no answer."""

ANSWER_EVENTS: Final = (
    SagaStarted,
    ActivityCompleted,
    ActivityRefused,
    ActivityFailed,
    CompensationRefused,
    CompensationFailed,
)

Transition = Callable[[Definition, State, Event], Decision]

TRANSITIONS: Final[Mapping[tuple[Status, type[Event]], Transition]] = {
    (Status.RUNNING, SagaStarted): begin,
    (Status.RUNNING, ActivityCompleted): advance,
    (Status.RUNNING, ActivityRefused): refused,
    (Status.RUNNING, ActivityFailed): failed,
    (Status.RUNNING, CompensationCompleted): fenced,  # the pivot's fence; there is no plan yet
    (Status.RUNNING, CompensationRefused): undo_refused,
    (Status.RUNNING, CompensationFailed): undo_failed,
    (Status.RUNNING, FenceFoundEffect): found,
    (Status.RUNNING, TimerFired): wake,
    (Status.RUNNING, CancelRequested): cancel,
    (Status.COMPENSATING, SagaStarted): record_stale,
    # A late answer never reopens the way forward (E-01).
    (Status.COMPENSATING, ActivityCompleted): record_stale,
    (Status.COMPENSATING, ActivityRefused): record_stale,
    (Status.COMPENSATING, ActivityFailed): record_stale,
    (Status.COMPENSATING, CompensationCompleted): undone,
    (Status.COMPENSATING, CompensationRefused): undo_refused,
    (Status.COMPENSATING, CompensationFailed): undo_failed,
    (Status.COMPENSATING, FenceFoundEffect): found,
    (Status.COMPENSATING, TimerFired): wake,
    (Status.COMPENSATING, CancelRequested): ignore,
    (Status.NEEDS_ATTENTION, SagaStarted): record_stale,
    # A slow retry past the pivot, or the pivot itself, healed.
    (Status.NEEDS_ATTENTION, ActivityCompleted): advance,
    (Status.NEEDS_ATTENTION, ActivityRefused): refused,
    (Status.NEEDS_ATTENTION, ActivityFailed): failed,
    (Status.NEEDS_ATTENTION, CompensationCompleted): undone,
    (Status.NEEDS_ATTENTION, CompensationRefused): undo_refused,
    (Status.NEEDS_ATTENTION, CompensationFailed): undo_failed,
    (Status.NEEDS_ATTENTION, FenceFoundEffect): found,
    (Status.NEEDS_ATTENTION, TimerFired): wake,
    (Status.NEEDS_ATTENTION, CancelRequested): cancel,
    # What is closed stays so; only what was in flight when a person closed it may still be confirmed (P26).
    **{(closed, answer): record_stale for closed in CLOSED for answer in ANSWER_EVENTS},
    **{(closed, CompensationCompleted): confirmed for closed in CLOSED},
    **{(closed, FenceFoundEffect): found for closed in CLOSED},
    **{(closed, CompensationFailed): unconfirmed for closed in CLOSED},
    **{(closed, asked): ignore for closed in CLOSED for asked in (TimerFired, CancelRequested)},
    **{(status, LateEffect): late for status in Status},
    # The operators' verbs say themselves where they are allowed.
    **{(status, RetryRequested): verbs.retry for status in Status},
    **{(status, MarkDoneRequested): verbs.mark_done for status in Status},
    **{(status, SkipRequested): verbs.skip for status in Status},
    **{(status, TerminateRequested): verbs.terminate for status in Status},
    **{(status, AbandonRequested): verbs.abandon for status in Status},
}
