"""Row E-05 on the engine: every step fails before, at and after the pivot, with and without its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from saga.engine.effects import IncidentKind, RecordStale
from saga.engine.events import ActivityCompleted, ActivityRefused
from saga.engine.state import CauseKind, Status
from saga.messages import Direction
from tests.engine.runs import SagaRun, sequence

pytestmark = [pytest.mark.stack("pure"), pytest.mark.feature("E-05")]

WORD: Final = "CCPRR"
PIVOT: Final = WORD.index("P")


def refuse(run: SagaRun) -> None:
    run.refused()


def fail_for_good(run: SagaRun) -> None:
    run.failed(retryable=False)


def fail_every_attempt(run: SagaRun) -> None:
    command = run.waiting.command_id
    for _ in range(20):
        if run.incidents or run.waiting.command_id != command:
            return
        run.failed()
        if run.waiting.retry_ms is not None:
            run.wake()
    raise AssertionError("twenty failures, and nobody is told")


def never_answer(run: SagaRun) -> None:
    run.run_out()


def cancel(run: SagaRun) -> None:
    run.cancel()
    run.run_out()


TROUBLES: Final[list[Callable[[SagaRun], None]]] = [
    refuse,
    fail_for_good,
    fail_every_attempt,
    never_answer,
    cancel,
]


def at_step(step: int) -> SagaRun:
    run = SagaRun(sequence(WORD))
    for _ in range(step):
        run.done()
    assert run.waiting.step == step
    return run


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("step", range(PIVOT))
def test_before_the_pivot_every_trouble_leads_back(step: int, trouble: Callable[[SagaRun], None]) -> None:
    run = at_step(step)

    trouble(run)
    run.finish()

    assert run.stands(Status.COMPENSATED)
    in_doubt = [] if trouble is refuse else [step]
    assert run.undone == [*in_doubt, *reversed(range(step))]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("step", range(PIVOT + 1, len(WORD)))
def test_past_the_pivot_every_trouble_leads_forward(step: int, trouble: Callable[[SagaRun], None]) -> None:
    run = at_step(step)

    trouble(run)
    run.finish()

    assert run.stands(Status.COMPLETED)
    assert run.undone == []


def test_a_refused_pivot_leads_back_without_a_fence() -> None:
    """P20: its refusal is final, the barrier row keeps it."""
    run = at_step(PIVOT)

    run.refused("no such account")

    assert run.stands(Status.COMPENSATING)
    assert [sent.direction for sent in run.dispatches[-1:]] == [Direction.COMPENSATE]
    run.finish()
    assert run.undone == [1, 0]


@pytest.mark.parametrize("trouble", [fail_for_good, fail_every_attempt], ids=lambda each: each.__name__)
@pytest.mark.parametrize("had_run", [True, False])
def test_a_failed_pivot_is_fenced_before_there_is_a_plan(
    trouble: Callable[[SagaRun], None], had_run: bool
) -> None:
    run = at_step(PIVOT)

    trouble(run)

    assert run.asks_to(Direction.FENCE)
    assert run.state.plan == ()
    assert run.stands(Status.RUNNING)
    run.finish(pivot_had_run=had_run)
    assert run.stands(Status.COMPLETED if had_run else Status.COMPENSATED)
    assert run.undone == ([] if had_run else [1, 0])


def test_an_unanswered_pivot_goes_neither_way_and_is_asked_for_on_and_on() -> None:
    run = at_step(PIVOT)

    run.run_out()

    assert run.stands(Status.NEEDS_ATTENTION)
    assert [(each.kind, each.step) for each in run.incidents] == [(IncidentKind.PIVOT_UNKNOWN, PIVOT)]
    for _ in range(100):
        before = len(run.dispatches)
        run.wake()
        assert len(run.dispatches) == before + 1
        assert run.dispatches[-1].direction is Direction.FORWARD
        assert run.dispatches[-1].resend
    assert len(run.incidents) == 1


@pytest.mark.parametrize("answer", ["done", "refused", "failed"])
def test_an_unknown_pivot_heals_by_its_late_answer(answer: str) -> None:
    run = at_step(PIVOT)
    run.run_out()

    getattr(run, answer)()
    run.finish()

    assert run.stands(Status.COMPLETED if answer == "done" else Status.COMPENSATED)


def test_a_late_success_of_a_fenced_pivot_is_stale_and_the_fence_tells_the_same() -> None:
    """I5: the fence decides, so that there is one decision."""
    run = at_step(PIVOT)
    pivot = run.waiting
    run.failed(retryable=False)

    late = ActivityCompleted(at_ms=run.now_ms, command_id=pivot.command_id, attempt=1)

    assert run.feed(late) == (RecordStale(),)
    run.finish(pivot_had_run=True)
    assert run.stands(Status.COMPLETED)


@pytest.mark.parametrize(
    "trouble", [refuse, fail_every_attempt, never_answer], ids=lambda each: each.__name__
)
def test_a_fence_in_trouble_is_an_incident_and_goes_on(trouble: Callable[[SagaRun], None]) -> None:
    run = at_step(PIVOT)
    run.failed(retryable=False)

    trouble(run)

    assert run.stands(Status.NEEDS_ATTENTION)
    assert {each.kind for each in run.incidents} == {IncidentKind.PIVOT_UNKNOWN}
    run.finish()
    assert run.stands(Status.COMPENSATED)


@pytest.mark.parametrize("ended", ["done", "had_run", "nothing"])
def test_a_cancel_of_a_running_pivot_waits_and_obeys_its_answer(ended: str) -> None:
    run = at_step(PIVOT)
    run.cancel()
    assert run.asks_to(Direction.FORWARD), "a running action is waited for (P5)"
    if ended == "done":
        run.done()
    else:
        run.failed()
        assert run.asks_to(Direction.FENCE), "a cancelled step is not tried again"
    run.finish(pivot_had_run=ended == "had_run")

    assert run.stands(Status.COMPENSATED if ended == "nothing" else Status.COMPLETED)
    if ended == "nothing":
        assert run.state.cause is not None
        assert run.state.cause.kind is CauseKind.CANCELLED
    else:
        assert run.state.cause is None


def test_a_cancel_waits_for_the_running_attempt_and_no_longer() -> None:
    """P5: neither racing the action nor waiting out the whole budget."""
    run = at_step(0)
    run.now_ms += 5_000
    run.cancel()
    assert run.due_ms == 30_000

    run.wake()

    assert (run.state.status, run.now_ms) == (Status.COMPENSATING, 30_000)


def test_a_cancel_between_two_attempts_turns_back_at_once_with_the_step_in_doubt() -> None:
    run = at_step(1)
    run.failed()

    run.cancel()

    assert run.stands(Status.COMPENSATING)
    assert [(undo.step, undo.in_doubt) for undo in run.state.plan] == [(1, True), (0, False)]


def test_a_step_that_succeeds_after_a_cancel_is_undone_as_done() -> None:
    run = at_step(1)
    run.cancel()

    run.done()

    assert [(undo.step, undo.in_doubt) for undo in run.state.plan] == [(1, False), (0, False)]


def test_a_second_cancel_changes_nothing() -> None:
    run = at_step(1)
    run.cancel()
    before = run.state

    run.cancel()

    assert run.state is before


@pytest.mark.parametrize("meanwhile", ["waiting to retry", "attempt 2 runs"])
def test_a_refusal_past_the_pivot_counts_once_and_for_its_own_attempt_only(meanwhile: str) -> None:
    """P6, P20: it is not final, so an old copy of it says nothing about the attempt that runs now."""
    run = at_step(PIVOT + 1)
    first = run.address
    run.refused()
    if meanwhile == "attempt 2 runs":
        run.wake()
    before = run.state

    assert run.feed(ActivityRefused(**first, code="no")) == (RecordStale(),)
    assert run.state is before
