"""The transition table: every pair of status and event stands in it, and every row does what its line says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import pytest

from saga.engine import events
from saga.engine.decide import ANSWERS, TRANSITIONS, decide
from saga.engine.effects import Dispatch, Finish, RaiseIncident, RecordStale, ResolveIncidents
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
from saga.engine.state import CLOSED, Status
from saga.errors import PastPivot, VerbNotAllowed
from saga.messages import Direction, command_id
from tests.engine.runs import RUN, SagaRun, sequence

pytestmark = pytest.mark.stack("pure")


def first_step() -> SagaRun:
    return SagaRun(sequence("CCPR"))


def fence() -> SagaRun:
    run = SagaRun(sequence("CPR"))
    run.done()
    run.failed(retryable=False)
    assert run.waiting.direction is Direction.FENCE
    return run


def undoing() -> SagaRun:
    run = SagaRun(sequence("CCC"))
    run.done()
    run.done()
    run.refused()
    return run


def stuck_past_pivot() -> SagaRun:
    run = SagaRun(sequence("PRR"))
    run.done()
    run.refused()
    return run


def stuck_undo() -> SagaRun:
    run = undoing()
    run.refused()
    return run


def stuck_fence() -> SagaRun:
    run = fence()
    run.refused()
    return run


def stuck_pivot() -> SagaRun:
    run = SagaRun(sequence("CPR"))
    run.done()
    run.run_out()
    assert run.waiting.direction is Direction.FORWARD
    return run


def completed() -> SagaRun:
    run = SagaRun(sequence("C"))
    run.done()
    return run


def compensated() -> SagaRun:
    run = SagaRun(sequence("C"))
    run.refused()
    return run


def terminated() -> SagaRun:
    run = first_step()
    run.order(TerminateRequested, force=True)
    return run


def abandoned() -> SagaRun:
    run = stuck_undo()
    run.order(AbandonRequested)
    return run


class Row(NamedTuple):
    """One row of the table: where the saga stands, what happens, where it stands then, with which effects."""

    status: Status
    event: type[Event]
    given: Callable[[], SagaRun]
    then: Status
    effects: tuple[type, ...]


R, C, N = Status.RUNNING, Status.COMPENSATING, Status.NEEDS_ATTENTION
T, A = Status.TERMINATED, Status.ABANDONED
STALE: Final = (RecordStale,)
REFUSED: Final = (VerbNotAllowed,)
VERBS: Final = (RetryRequested, MarkDoneRequested, SkipRequested, TerminateRequested, AbandonRequested)

ENDS: Final = (
    (Status.COMPLETED, completed),
    (Status.COMPENSATED, compensated),
    (T, terminated),
    (A, abandoned),
)

ROWS: Final = [
    Row(R, SagaStarted, first_step, R, ()),
    Row(R, ActivityCompleted, first_step, R, (Dispatch,)),
    Row(R, ActivityRefused, first_step, Status.COMPENSATED, (Finish,)),
    Row(R, ActivityFailed, first_step, R, ()),
    Row(R, CompensationCompleted, fence, C, (Dispatch,)),
    Row(R, CompensationRefused, fence, N, (RaiseIncident,)),
    Row(R, CompensationFailed, fence, R, ()),
    Row(R, FenceFoundEffect, fence, R, (Dispatch,)),
    Row(R, TimerFired, first_step, R, (Dispatch,)),
    Row(R, CancelRequested, first_step, R, ()),
    Row(C, SagaStarted, undoing, C, STALE),
    Row(C, ActivityCompleted, undoing, C, STALE),
    Row(C, ActivityRefused, undoing, C, STALE),
    Row(C, ActivityFailed, undoing, C, STALE),
    Row(C, CompensationCompleted, undoing, C, (Dispatch,)),
    Row(C, CompensationRefused, undoing, N, (RaiseIncident,)),
    Row(C, CompensationFailed, undoing, C, ()),
    Row(C, FenceFoundEffect, undoing, C, STALE),
    Row(C, TimerFired, undoing, C, (Dispatch,)),
    Row(C, CancelRequested, undoing, C, ()),
    Row(N, SagaStarted, stuck_undo, N, STALE),
    Row(N, ActivityCompleted, stuck_past_pivot, R, (ResolveIncidents, Dispatch)),
    Row(N, ActivityRefused, stuck_pivot, C, (ResolveIncidents, Dispatch)),
    Row(N, ActivityFailed, stuck_pivot, N, (Dispatch,)),
    Row(N, CompensationCompleted, stuck_undo, C, (ResolveIncidents, Dispatch)),
    Row(N, CompensationCompleted, stuck_fence, C, (ResolveIncidents, Dispatch)),
    Row(N, CompensationRefused, stuck_undo, N, (RaiseIncident,)),
    Row(N, CompensationFailed, stuck_undo, N, ()),
    Row(N, FenceFoundEffect, stuck_fence, R, (ResolveIncidents, Dispatch)),
    Row(N, TimerFired, stuck_undo, N, (Dispatch,)),
    Row(N, CancelRequested, stuck_pivot, N, ()),
    Row(R, LateEffect, first_step, R, (Dispatch,)),
    Row(R, LateEffect, fence, R, (Dispatch,)),
    Row(C, LateEffect, undoing, C, (RaiseIncident,)),
    Row(N, LateEffect, stuck_undo, N, (RaiseIncident,)),
    Row(N, LateEffect, stuck_fence, R, (ResolveIncidents, Dispatch)),
    Row(Status.COMPENSATED, LateEffect, compensated, C, (RaiseIncident, Dispatch)),
    Row(Status.COMPLETED, LateEffect, completed, Status.COMPLETED, STALE),
    Row(A, LateEffect, abandoned, A, (RaiseIncident,)),
    Row(T, LateEffect, terminated, T, (RaiseIncident,)),
    Row(R, RetryRequested, first_step, R, REFUSED),
    Row(R, MarkDoneRequested, first_step, R, REFUSED),
    Row(R, SkipRequested, first_step, R, REFUSED),
    Row(R, TerminateRequested, first_step, R, REFUSED),  # it may have run, so its effect may stand
    Row(R, AbandonRequested, first_step, R, REFUSED),
    Row(C, RetryRequested, undoing, C, REFUSED),
    Row(C, MarkDoneRequested, undoing, C, REFUSED),
    Row(C, SkipRequested, undoing, C, REFUSED),
    Row(C, TerminateRequested, undoing, C, REFUSED),
    Row(C, AbandonRequested, undoing, C, REFUSED),
    Row(N, RetryRequested, stuck_undo, N, (Dispatch,)),
    Row(N, MarkDoneRequested, stuck_undo, C, (ResolveIncidents, Dispatch)),
    Row(N, SkipRequested, stuck_undo, C, (ResolveIncidents, Dispatch)),
    Row(N, TerminateRequested, stuck_undo, N, REFUSED),
    Row(N, AbandonRequested, stuck_undo, A, (ResolveIncidents, Dispatch, Finish)),
    *(Row(end, verb, given, end, REFUSED) for end, given in ENDS for verb in VERBS),
    *(Row(end, CompensationCompleted, given, end, ()) for end, given in ((T, terminated), (A, abandoned))),
    *(
        Row(end, FenceFoundEffect, given, end, (RaiseIncident,))
        for end, given in ((T, terminated), (A, abandoned))
    ),
    *(
        Row(end, event, given, end, () if event in (TimerFired, CancelRequested) else STALE)
        for end, given in ((T, terminated), (A, abandoned))
        for event in (
            *(SagaStarted, ActivityCompleted, ActivityRefused, ActivityFailed),
            *(CompensationRefused, CompensationFailed, TimerFired, CancelRequested),
        )
    ),
    *(
        Row(end, event, given, end, () if event in (TimerFired, CancelRequested) else STALE)
        for end, given in ((Status.COMPLETED, completed), (Status.COMPENSATED, compensated))
        for event in (
            *(SagaStarted, ActivityCompleted, ActivityRefused, ActivityFailed, FenceFoundEffect),
            *(CompensationCompleted, CompensationRefused, CompensationFailed, TimerFired, CancelRequested),
        )
    ),
]


def event_classes() -> set[type[Event]]:
    classes = {each for each in vars(events).values() if isinstance(each, type) and issubclass(each, Event)}
    return classes - {Event, Answer}


def test_every_pair_of_status_and_event_stands_in_the_table() -> None:
    assert set(TRANSITIONS) == {(status, event) for status in Status for event in event_classes()}


def test_every_row_of_the_table_is_tried_below() -> None:
    assert {(row.status, row.event) for row in ROWS} == set(TRANSITIONS)


def test_every_kind_of_answer_can_answer_some_command() -> None:
    answers = {each for each in event_classes() if issubclass(each, Answer)}
    assert set(ANSWERS) == set(Direction)
    assert frozenset[type[Answer]]().union(*ANSWERS.values()) == answers


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row.status}-{row.event.__name__}-{row.given.__name__}"
)
def test_row(row: Row) -> None:
    run = row.given()
    if row.event is TimerFired and run.due_ms is not None:
        if run.waiting.retry_ms is None:
            run.now_ms = run.due_ms
        else:
            run.wake()
            run.now_ms = run.due_ms
    elif row.status is Status.NEEDS_ATTENTION and run.waiting.retry_ms is not None:
        run.wake()
    assert run.state.status is row.status
    before = run.state
    if row.effects == REFUSED:
        with pytest.raises(VerbNotAllowed):
            decide(run.definition, before, _event(row.event, run))
        return

    effects = run.feed(_event(row.event, run))

    assert run.state.status is row.then
    assert tuple(map(type, effects)) == row.effects
    moving = (ActivityFailed, CompensationFailed, CancelRequested, CompensationCompleted)
    if row.effects in ((), STALE) and row.event not in moving:
        assert run.state is before


def _event(event: type[Event], run: SagaRun) -> Event:
    known: dict[str, Any] = {"at_ms": run.now_ms}
    if issubclass(event, Answer):
        waiting = run.state.outstanding
        known |= {
            "command_id": waiting.command_id if waiting else "gone",
            "attempt": waiting.attempt if waiting else 1,
        }
    if event is LateEffect:
        step = f"s{waiting.step if (waiting := run.state.outstanding) else 0}"
        known |= {"step": step, "command_id": command_id("default", "transfer", RUN, step, 0, 0, "forward")}
    if event in (ActivityRefused, CompensationRefused):
        known["code"] = "no"
    if event in (ActivityFailed, CompensationFailed):
        known["error"] = "Boom"
    return event(**known)


@pytest.mark.parametrize("status", sorted(CLOSED))
def test_nothing_reopens_a_closed_saga_but_a_late_effect(status: Status) -> None:
    """What was in flight when a person closed it may be confirmed; verbs say that it has ended."""
    moves = {
        move.__name__ for (each, event), move in TRANSITIONS.items() if each is status and event not in VERBS
    }
    assert moves == {"ignore", "record_stale", "confirmed", "unconfirmed", "found", "late"}


def test_a_cancel_past_the_pivot_is_refused_and_changes_nothing() -> None:
    run = SagaRun(sequence("PR"))
    run.done()
    before = run.state

    with pytest.raises(PastPivot) as caught:
        decide(run.definition, run.state, CancelRequested(at_ms=run.now_ms))

    assert (caught.value.saga, caught.value.step) == ("transfer", "s1")
    assert run.state is before


@pytest.mark.parametrize(
    "answer", [CompensationCompleted, CompensationRefused, CompensationFailed, FenceFoundEffect]
)
def test_an_answer_of_another_direction_is_stale_even_under_the_right_id(answer: type[Event]) -> None:
    """P6: a participant that answers a forward command as if it were an undo moves nothing."""
    run = first_step()
    before = run.state

    effects = run.feed(_event(answer, run))

    assert effects == (RecordStale(),)
    assert run.state is before


def test_a_command_id_is_that_of_its_saga_run_step_and_direction_whenever_it_is_sent() -> None:
    """P2: the same instance, decided again by another process, sends under the same id."""
    run = SagaRun(sequence("CPR"), now_ms=12_345)
    run.done()
    run.now_ms += 999
    run.failed(retryable=False)
    run.done()

    assert [sent.command_id for sent in run.dispatches] == [
        command_id("default", "transfer", RUN, step, 0, 0, direction)
        for step, direction in (("s0", "forward"), ("s1", "forward"), ("s1", "fence"), ("s0", "compensate"))
    ]
