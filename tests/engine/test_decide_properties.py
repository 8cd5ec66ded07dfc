"""Any saga, any events in any order: nothing forbidden happens, and with answers that succeed it ends."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saga.engine.effects import RecordStale
from saga.engine.events import (
    ActivityCompleted,
    ActivityFailed,
    ActivityRefused,
    Answer,
    CompensationCompleted,
    CompensationFailed,
    CompensationRefused,
    FenceFoundEffect,
    TimerFired,
)
from saga.engine.model import Redrive
from saga.engine.state import CLOSED, CauseKind
from saga.messages import Direction
from saga.retry import RetryPolicy
from tests.engine.runs import SagaRun, seconds, sequence, words

pytestmark = pytest.mark.stack("pure")

WORDS: Final = [word for length in range(1, 6) for word in words(length)]
POLICIES: Final = [
    RetryPolicy(),
    RetryPolicy(attempts=1),
    RetryPolicy(attempts=2, schedule_to_close=None),
    RetryPolicy(attempts=None, schedule_to_close=seconds(40)),
    RetryPolicy(attempts=3, schedule_to_close=seconds(5)),
]
UNDO_POLICIES: Final = [
    RetryPolicy(attempts=None, schedule_to_close=None, incident_at=10),
    RetryPolicy(attempts=None, schedule_to_close=None, incident_at=1),
    RetryPolicy(attempts=None, schedule_to_close=None, incident_at=2, maximum=seconds(600)),
]
ANSWERS: Final[list[tuple[type[Answer], dict[str, Any]]]] = [
    (ActivityCompleted, {}),
    (ActivityRefused, {"code": "no"}),
    (ActivityFailed, {"error": "Boom"}),
    (CompensationCompleted, {}),
    (CompensationCompleted, {"nothing": True}),
    (CompensationRefused, {"code": "no"}),
    (CompensationFailed, {"error": "Boom"}),
    (FenceFoundEffect, {}),
]

Act = tuple[Any, ...]

sagas = st.builds(
    sequence,
    st.sampled_from(WORDS),
    retry=st.sampled_from(POLICIES),
    undo_retry=st.sampled_from(UNDO_POLICIES),
    start_to_close_ms=st.sampled_from([None, 1_000, 30_000, 600_000]),
    redrive=st.sampled_from([Redrive(), Redrive(first_ms=200, max_ms=2_000)]),
)
acts: st.SearchStrategy[Act] = st.one_of(
    st.sampled_from([("done",), ("done",), ("refused",), ("had run",), ("cancel",)]),
    st.tuples(st.just("failed"), st.booleans(), st.none() | st.integers(0, 100_000)),
    st.tuples(st.just("wake"), st.booleans(), st.booleans()),
    st.tuples(st.just("pass"), st.integers(0, 1_000_000)),
    st.tuples(st.just("stray"), st.sampled_from(ANSWERS), st.integers(0, 9), st.integers(0, 2)),
)
scripts = st.lists(acts, max_size=25)


def play(run: SagaRun, script: list[Act]) -> SagaRun:
    """Do what the script says; what needs an outstanding command is left out of a closed run."""
    for act in script:
        is_open = run.state.status not in CLOSED
        match act:
            case ("done",) if is_open:
                run.done()
            case ("refused",) if is_open:
                run.refused()
            case ("had run",) if is_open:
                run.had_run()
            case ("failed", retryable, after_ms) if is_open:
                run.failed(retryable=retryable, after_ms=after_ms)
            case ("wake", may_resend, broker_forgot) if is_open:
                run.wake(may_resend=may_resend, broker_forgot=broker_forgot)
            case ("pass", wait_ms):
                run.now_ms += wait_ms
                run.feed(TimerFired(at_ms=run.now_ms))
            case ("cancel",):
                run.cancel()
            case ("stray", (answer, rest), which, older):
                sent = run.dispatches[which % len(run.dispatches)]
                attempt = max(1, sent.attempt - older)
                run.feed(answer(at_ms=run.now_ms, command_id=sent.command_id, attempt=attempt, **rest))
    return run


@pytest.mark.feature("E-01")
@pytest.mark.feature("E-02")
@pytest.mark.feature("E-04")
@pytest.mark.feature("E-05")
@settings(max_examples=400, deadline=None)
@given(sagas, scripts)
def test_nothing_forbidden_happens_whatever_comes_in_whatever_order(
    definition: Any, script: list[Act]
) -> None:
    """The rules are in `SagaRun._check`; they are looked at after every event."""
    play(SagaRun(definition), script)


@settings(max_examples=400, deadline=None)
@given(sagas, scripts, st.booleans())
def test_every_saga_ends_once_everything_succeeds(definition: Any, script: list[Act], had_run: bool) -> None:
    run = play(SagaRun(definition), script)

    run.finish(pivot_had_run=had_run)

    assert run.state.status in CLOSED


@settings(max_examples=150, deadline=None)
@given(sagas, scripts)
def test_a_repeated_event_changes_nothing_more(definition: Any, script: list[Act]) -> None:
    """P6: an answer that moved the saga on is stale when it comes again."""
    run = play(SagaRun(definition), script)
    if run.state.status in CLOSED or run.waiting.direction is not Direction.FORWARD:
        return
    again = ActivityCompleted(**run.address)
    run.feed(again)
    before = run.state

    assert run.feed(again) == (RecordStale(),)
    assert run.state is before


@settings(max_examples=150, deadline=None)
@given(sagas, scripts)
def test_an_early_wake_up_changes_nothing(definition: Any, script: list[Act]) -> None:
    run = play(SagaRun(definition), script)
    due = run.due_ms
    if due is None or due <= run.now_ms:
        return
    before = run.state

    assert run.feed(TimerFired(at_ms=due - 1)) == ()
    assert run.state is before


@settings(max_examples=150, deadline=None)
@given(sagas, scripts)
def test_a_due_wake_up_moves_the_due_time_on(definition: Any, script: list[Act]) -> None:
    """Otherwise an instance would be woken for ever without getting anywhere."""
    run = play(SagaRun(definition), script)
    for _ in range(20):
        if run.state.status in CLOSED:
            return
        run.wake()
        following = run.due_ms
        assert following is None or following > run.now_ms


@settings(max_examples=150, deadline=None)
@given(sagas, scripts)
def test_who_turned_back_without_a_cause_of_its_own_was_cancelled(definition: Any, script: list[Act]) -> None:
    run = play(SagaRun(definition), [act for act in script if act[0] in ("done", "had run", "cancel")])

    if run.state.cause is not None:
        assert run.state.cause.kind is CauseKind.CANCELLED
