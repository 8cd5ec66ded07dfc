"""Steps in doubt: undone, inquired about or asked about by policy (E-04), and effects that land late (P27)."""

from __future__ import annotations

import pytest

from saga.compensation.kinds import InDoubt
from saga.compensation.plan import UndoState
from saga.engine.effects import IncidentKind, RecordStale
from saga.engine.events import (
    CompensationFailed,
    LateEffect,
    MarkDoneRequested,
    RetryRequested,
    SkipRequested,
    TerminateRequested,
)
from saga.engine.state import Status
from saga.messages import NO_BARRIER, OUTCOME_UNKNOWN, Direction
from tests.engine.runs import SagaRun, sequence

pytestmark = pytest.mark.stack("pure")


def in_doubt(policy: InDoubt) -> SagaRun:
    """Two steps are done, and nobody knows of the third."""
    run = SagaRun(sequence("CCC", in_doubt=policy))
    run.done()
    run.done()
    run.run_out()
    return run


def plan(run: SagaRun) -> list[tuple[int, UndoState]]:
    return [(undo.step, undo.state) for undo in run.state.plan]


# --- undo, the default ------------------------------------------------------------------------


@pytest.mark.feature("E-04")
def test_a_step_in_doubt_is_undone_by_default() -> None:
    run = in_doubt(InDoubt.UNDO)
    assert (run.waiting.step, run.waiting.direction) == (2, Direction.COMPENSATE)
    run.finish()
    assert run.undone == [2, 1, 0]


# --- inquire ----------------------------------------------------------------------------------


@pytest.mark.feature("E-04")
@pytest.mark.parametrize(("had_run", "undone"), [(True, [2, 1, 0]), (False, [1, 0])])
def test_a_step_that_is_inquired_about_is_undone_only_if_it_had_run(had_run: bool, undone: list[int]) -> None:
    run = in_doubt(InDoubt.INQUIRE)
    assert (run.waiting.step, run.waiting.direction) == (2, Direction.FENCE)
    assert not run.state.plan, "there is no plan before it is known"
    run.had_run() if had_run else run.done()
    run.finish()
    assert run.undone == undone
    assert run.stands(Status.COMPENSATED)


@pytest.mark.feature("E-04")
def test_an_inquiry_that_cannot_tell_is_repeated_and_then_a_person_decides() -> None:
    run = in_doubt(InDoubt.INQUIRE)
    for _ in range(10):
        assert run.asks_to(Direction.FENCE)
        run.feed(CompensationFailed(**run.address, error=OUTCOME_UNKNOWN))
        if run.stands(Status.RUNNING):
            run.wake()
    assert [each.kind for each in run.incidents] == [IncidentKind.IN_DOUBT]
    assert run.stands(Status.NEEDS_ATTENTION)
    run.order(RetryRequested)
    run.finish()
    assert run.undone == [2, 1, 0]


@pytest.mark.feature("E-04")
def test_where_no_barrier_can_be_asked_the_step_in_doubt_is_undone() -> None:
    run = in_doubt(InDoubt.INQUIRE)
    run.feed(CompensationFailed(**run.address, error=NO_BARRIER))
    assert (run.waiting.step, run.waiting.direction) == (2, Direction.COMPENSATE)


@pytest.mark.feature("E-04")
def test_an_inquiry_that_nobody_answers_is_flagged_and_healed_by_its_answer() -> None:
    run = in_doubt(InDoubt.INQUIRE)
    run.run_out()
    assert [each.kind for each in run.incidents] == [IncidentKind.IN_DOUBT]
    run.done()
    run.finish()
    assert run.undone == [1, 0]


# --- ask --------------------------------------------------------------------------------------


@pytest.mark.feature("E-04")
def test_a_step_that_a_person_is_asked_about_is_not_touched_before_they_decide() -> None:
    run = in_doubt(InDoubt.ASK)
    sent = len(run.dispatches)
    assert [(each.kind, each.step) for each in run.incidents] == [(IncidentKind.IN_DOUBT, 2)]
    year_ms = 365 * 86_400_000
    assert run.due_ms is not None
    assert run.due_ms > run.now_ms + 99 * year_ms
    assert len(run.dispatches) == sent
    assert plan(run)[0] == (2, UndoState.PENDING)


@pytest.mark.feature("E-04")
def test_a_person_who_orders_the_undo_of_a_step_in_doubt_gets_it() -> None:
    run = in_doubt(InDoubt.ASK)
    run.order(RetryRequested)
    assert (run.waiting.step, run.waiting.direction, run.waiting.attempt) == (2, Direction.COMPENSATE, 1)
    run.finish()
    assert run.undone == [2, 1, 0]


@pytest.mark.feature("E-04")
@pytest.mark.parametrize("verb", [MarkDoneRequested, SkipRequested])
def test_a_person_who_settles_a_step_in_doubt_has_its_undo_closed(
    verb: type[MarkDoneRequested | SkipRequested],
) -> None:
    run = in_doubt(InDoubt.ASK)
    run.order(verb)
    assert (run.waiting.step, run.waiting.direction) == (2, Direction.CLOSE)
    run.finish()
    assert run.undone == [1, 0]


@pytest.mark.feature("E-05")
@pytest.mark.parametrize("policy", list(InDoubt))
def test_a_pivot_is_fenced_whatever_the_policy_of_the_others(policy: InDoubt) -> None:
    run = SagaRun(sequence("CPR", in_doubt=policy))
    run.done()
    run.failed(retryable=False)
    assert (run.waiting.step, run.waiting.direction) == (1, Direction.FENCE)
    run.finish()
    assert run.undone == [0]


# --- late effects -----------------------------------------------------------------------------


@pytest.mark.feature("D-11")
def test_an_effect_that_lands_while_others_are_undone_is_undone_next_under_a_new_round() -> None:
    run = in_doubt(InDoubt.UNDO)
    first = run.waiting.command_id
    run.done()
    assert run.waiting.step == 1
    run.late(2)
    assert [each.kind for each in run.incidents] == [IncidentKind.LATE_EFFECT]
    assert run.waiting.step == 1, "what is under way is not interrupted"
    run.done()
    assert (run.waiting.step, run.waiting.round) == (2, 1)
    assert run.waiting.command_id != first, "another key, for the provider"
    run.finish()
    assert run.stands(Status.COMPENSATED)
    assert [undo.step for undo in run.state.plan] == [2, 1, 2, 0]


@pytest.mark.feature("D-11")
def test_an_effect_that_lands_after_the_saga_was_compensated_opens_it_again() -> None:
    run = in_doubt(InDoubt.UNDO)
    run.finish()
    run.late(2)
    assert run.stands(Status.COMPENSATING)
    assert (run.waiting.step, run.waiting.round) == (2, 1)
    run.done()
    assert run.stands(Status.COMPENSATED)


@pytest.mark.feature("D-11")
def test_an_undo_that_meets_the_late_effect_itself_is_followed_by_another() -> None:
    run = in_doubt(InDoubt.UNDO)
    run.late(2, Direction.COMPENSATE)
    assert (run.waiting.step, run.waiting.round) == (2, 1)
    assert plan(run)[0] == (2, UndoState.NOTHING_TO_UNDO)
    run.finish()
    assert run.stands(Status.COMPENSATED)


@pytest.mark.feature("D-11")
def test_a_late_effect_is_undone_once_more_however_often_it_is_told() -> None:
    run = in_doubt(InDoubt.UNDO)
    run.late(2)
    before = run.state
    assert run.late(2) == (RecordStale(),)
    assert run.state is before
    run.late(2, Direction.COMPENSATE)
    assert (run.waiting.step, run.waiting.round) == (2, 1)
    assert run.late(2, Direction.COMPENSATE) == (RecordStale(),)
    run.finish()
    assert run.late(2) == (RecordStale(),)
    assert [undo.step for undo in run.state.plan] == [2, 2, 1, 0]
    assert [each.kind for each in run.incidents] == [IncidentKind.LATE_EFFECT]


@pytest.mark.feature("D-11")
def test_a_pivot_that_lands_before_its_fence_is_answered_goes_forward() -> None:
    """I5: with the fence still open, the late effect is its answer."""
    run = SagaRun(sequence("CPR"))
    run.done()
    run.failed(retryable=False)
    run.late(1)
    run.finish()
    assert run.stands(Status.COMPLETED)


@pytest.mark.feature("D-11")
def test_a_pivot_that_lands_after_its_inquiry_said_no_is_told() -> None:
    run = SagaRun(sequence("CPR"))
    run.done()
    run.failed(retryable=False)
    run.done()
    run.late(1)
    assert [each.kind for each in run.incidents] == [IncidentKind.LATE_EFFECT]
    run.finish()
    assert run.stands(Status.COMPENSATED)


@pytest.mark.feature("D-11")
def test_an_effect_that_lands_after_a_person_ended_the_saga_is_told_and_stays() -> None:
    run = SagaRun(sequence("C"))
    run.order(TerminateRequested, force=True)
    run.done()
    run.late(0)
    assert [each.kind for each in run.incidents] == [IncidentKind.LATE_EFFECT]
    assert run.stands(Status.TERMINATED)
    assert run.state.outstanding is None


@pytest.mark.feature("D-11")
def test_settling_the_second_undo_by_hand_closes_that_one() -> None:
    """P26: the undo that is in flight is the one of the new round."""
    run = in_doubt(InDoubt.UNDO)
    run.late(2, Direction.COMPENSATE)
    undo = run.waiting.command_id
    run.refused()
    run.order(MarkDoneRequested)
    assert (run.waiting.direction, run.waiting.round) == (Direction.CLOSE, 1)
    assert run.waiting.command_id != undo


def test_a_late_effect_of_an_unknown_step_or_under_a_foreign_id_is_stale() -> None:
    """P6."""
    run = in_doubt(InDoubt.UNDO)
    for step, identity in (("s2", "0" * 32), ("other", run.waiting.command_id)):
        assert run.feed(LateEffect(at_ms=0, command_id=identity, step=step)) == (RecordStale(),)
