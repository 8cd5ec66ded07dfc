"""The deadline of a saga ends the way forward and undoes what is in doubt; it races no action and bounds no undo."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from saga.engine.state import CauseKind, Status
from saga.messages import Direction
from tests.engine.runs import SagaRun, sequence

pytestmark = [pytest.mark.stack("pure"), pytest.mark.feature("E-07")]

DEADLINE: Final = 60_000


def run_of(word: str) -> SagaRun:
    return SagaRun(replace(sequence(word), deadline_ms=DEADLINE))


def reach_deadline(run: SagaRun) -> None:
    """Wake until the deadline has passed."""
    while run.now_ms < DEADLINE:
        run.wake()


def test_a_running_action_is_waited_for_and_then_undone() -> None:
    run = run_of("CC")
    run.done()
    reach_deadline(run)
    assert run.stands(Status.RUNNING)
    assert run.asks_to(Direction.FORWARD), "no undo while its action runs"
    run.done()
    assert run.stands(Status.COMPENSATING)
    run.finish()
    assert run.stands(Status.COMPENSATED)
    assert run.undone == [1, 0]
    assert run.state.cause is not None
    assert (run.state.cause.kind, run.state.cause.code) == (CauseKind.TIMED_OUT, "deadline")


def test_an_answer_after_the_deadline_turns_back_though_no_timer_fired() -> None:
    run = run_of("CC")
    run.now_ms = DEADLINE
    run.done()
    assert run.stands(Status.COMPENSATING)
    assert run.undone == [0]


def test_the_last_step_done_late_is_undone_like_any_other() -> None:
    run = run_of("C")
    run.now_ms = DEADLINE
    run.done()
    run.finish()
    assert run.stands(Status.COMPENSATED)


def test_an_action_that_never_answers_is_undone_in_doubt_after_its_limit() -> None:
    run = run_of("CC")
    run.done()
    reach_deadline(run)
    sent = run.waiting.sent_ms
    run.wake()
    assert run.stands(Status.COMPENSATING)
    assert run.now_ms >= sent + 30_000, "not before its last sending could have run"
    assert [(undo.step, undo.in_doubt) for undo in run.state.plan] == [(1, True), (0, False)]


def test_an_attempt_that_waits_for_its_time_is_not_waited_for() -> None:
    run = run_of("CC")
    run.done()
    run.now_ms = DEADLINE - 1
    run.failed(after_ms=500_000)
    assert run.due_ms == DEADLINE
    run.wake()
    assert run.stands(Status.COMPENSATING)


def test_past_the_pivot_the_deadline_means_nothing() -> None:
    run = run_of("CPR")
    run.done()
    run.done()
    while run.now_ms <= 2 * DEADLINE:
        run.wake()
    assert run.stands(Status.RUNNING)
    run.finish()
    assert run.stands(Status.COMPLETED)


def test_a_pivot_under_way_decides() -> None:
    run = run_of("CPR")
    run.done()
    reach_deadline(run)
    run.done()
    assert run.stands(Status.RUNNING), "it ran, so the saga goes forward"
    run.finish()
    assert run.stands(Status.COMPLETED)


def test_the_undo_has_no_deadline() -> None:
    run = run_of("CC")
    run.done()
    run.refused()
    while run.now_ms < 2 * DEADLINE:
        run.wake()
    assert run.stands(Status.COMPENSATING)


def test_a_cancel_after_the_deadline_changes_nothing() -> None:
    run = run_of("CC")
    reach_deadline(run)
    before = run.state
    run.cancel()
    assert run.state is before
