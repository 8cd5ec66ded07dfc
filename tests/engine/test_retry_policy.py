"""Row D-03 in virtual time: delays inside their bounds, jitter that spreads, a budget that is kept exactly."""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest

from saga.engine.decide import UNANSWERED_MS
from saga.engine.effects import IncidentKind
from saga.engine.events import TimerFired
from saga.engine.model import Redrive
from saga.engine.sending import RETRY_AFTER_MAX_MS
from saga.engine.state import CauseKind, Status
from saga.messages import Direction
from saga.retry import COMPENSATION, FORWARD, RetryPolicy
from tests.engine.runs import SagaRun, seconds, sequence

pytestmark = pytest.mark.stack("pure")

STEPS: Final = 10_000
BUCKETS: Final = 20
# Of 20 equally likely buckets: exceeded by chance once in 10,000 times.
CHI_SQUARE_MAX: Final = 50.8


def fail_until_given_up(run: SagaRun, attempt_takes_ms: int) -> list[tuple[int, int, int]]:
    """Fail every attempt of the first step; return number, delay and start of each retry."""
    retries: list[tuple[int, int, int]] = []
    while True:
        failed_attempt = run.waiting.attempt
        run.now_ms += attempt_takes_ms
        run.failed()
        if not run.stands(Status.RUNNING):
            return retries
        failed_at = run.now_ms
        run.wake()
        retries.append((failed_attempt, run.now_ms - failed_at, run.now_ms))


@pytest.mark.feature("D-03", acceptance=True, scale=1.0)
def test_10_000_failing_steps_keep_their_bounds_their_spread_and_their_budget() -> None:
    definition = sequence("C")
    spread: Counter[int] = Counter()
    ended_by = Counter[str]()
    for number in range(STEPS):
        run = SagaRun(definition, run_id=f"run-{number}", checked=False)
        slow = number % 2 == 1
        retries = fail_until_given_up(run, attempt_takes_ms=100_000 if slow else 10)
        for failed_attempt, delay, started_ms in retries:
            cap = min(1_000 * 2 ** (failed_attempt - 1), 60_000)
            assert 0 <= delay <= cap
            assert started_ms < 900_000, "no attempt starts outside the budget of 15 minutes"
            spread[min(delay * BUCKETS // cap, BUCKETS - 1)] += 1
        attempts = len(retries) + 1
        if attempts == 10:
            ended_by["attempts"] += 1
        else:
            ended_by["budget"] += 1
            next_start = run.now_ms + FORWARD.delay_ms(run.dispatches[0].command_id, attempts)
            assert next_start >= 900_000, "given up only when the next attempt would start outside the budget"
        assert attempts <= 10
        assert run.state.cause is not None
        assert (run.state.cause.kind, run.state.cause.attempt) == (CauseKind.FAILED, attempts)
        assert run.stands(Status.COMPENSATING)
    assert min(ended_by["attempts"], ended_by["budget"]) > 1_000
    expected = spread.total() / BUCKETS
    chi_square = sum((spread[bucket] - expected) ** 2 / expected for bucket in range(BUCKETS))
    assert chi_square < CHI_SQUARE_MAX


@pytest.mark.feature("D-03")
def test_the_same_history_gives_the_same_delays() -> None:
    first, second = (fail_until_given_up(SagaRun(sequence("C")), 10) for _ in range(2))

    assert first == second
    assert len(first) == 9


@pytest.mark.feature("D-03")
@pytest.mark.feature("E-06")
def test_an_undo_is_retried_without_end_and_flagged_at_attempt_ten() -> None:
    run = SagaRun(sequence("CC"))
    run.done()
    run.refused()
    for attempt in range(1, 101):
        assert run.waiting.attempt == attempt
        run.failed()
        assert run.state.status is (Status.NEEDS_ATTENTION if attempt >= 10 else Status.COMPENSATING)
        failed_at = run.now_ms
        run.wake()
        assert run.now_ms - failed_at <= min(1_000 * 2 ** (attempt - 1), 600_000)
    assert {incident.kind for incident in run.incidents} == {IncidentKind.COMPENSATION_FAILED}

    run.done()

    assert run.stands(Status.COMPENSATED)


@pytest.mark.feature("E-06")
def test_an_undo_that_refuses_a_hundred_times_and_then_works_ends_compensated_untouched() -> None:
    run = SagaRun(sequence("CC"))
    run.done()
    run.refused()
    for _ in range(100):
        run.refused()
        assert run.stands(Status.NEEDS_ATTENTION)
        run.wake()

    run.done()

    assert run.stands(Status.COMPENSATED)
    assert len(run.incidents) == 100


@pytest.mark.feature("D-04")
def test_a_handler_that_names_a_delay_gets_it() -> None:
    run = SagaRun(sequence("C"))

    run.failed(after_ms=123_456)

    assert run.due_ms == 123_456


@pytest.mark.feature("D-04")
def test_a_delay_beyond_the_budget_ends_the_step_at_once() -> None:
    run = SagaRun(sequence("CC"))
    run.done()

    run.failed(after_ms=900_001)

    assert run.stands(Status.COMPENSATING)


@pytest.mark.feature("D-04")
def test_a_delay_without_measure_is_cut_to_a_week() -> None:
    run = SagaRun(sequence("PR"))
    run.done()

    run.failed(after_ms=10**18)

    assert run.due_ms == RETRY_AFTER_MAX_MS


@pytest.mark.feature("D-04")
def test_what_no_retry_can_mend_is_not_retried() -> None:
    run = SagaRun(sequence("CC"))
    run.done()

    run.failed(retryable=False)

    assert run.stands(Status.COMPENSATING)
    assert [sent.attempt for sent in run.dispatches if sent.direction is Direction.FORWARD] == [1, 1]


@pytest.mark.feature("D-03")
def test_an_attempt_whose_time_came_while_nobody_was_there_is_not_sent_after_the_budget() -> None:
    run = SagaRun(sequence("CC"))
    run.done()
    run.failed()
    run.now_ms += 3_600_000

    run.wake()

    assert run.stands(Status.COMPENSATING)
    assert run.state.cause is not None
    assert run.state.cause.kind is CauseKind.TIMED_OUT


@pytest.mark.parametrize("first_ms", [200, 30_000])
@pytest.mark.parametrize("start_to_close_ms", [1_000, 45_000, 1_200_000])
def test_an_unanswered_step_is_given_up_when_its_budget_and_its_latest_attempt_are_over(
    first_ms: int, start_to_close_ms: int
) -> None:
    """P4, P5: sent again until the deadline, and not undone while the latest copy may still run."""
    run = SagaRun(sequence("CC", start_to_close_ms=start_to_close_ms, redrive=eager(first_ms)))
    run.done()
    latest_ms = run.now_ms
    for _ in range(100):
        if run.stands(Status.RUNNING) and run.wake() and run.stands(Status.RUNNING):
            latest_ms = run.now_ms
    assert run.stands(Status.COMPENSATING)
    assert latest_ms < 900_000
    assert run.now_ms == max(900_000, latest_ms + start_to_close_ms)


def eager(first_ms: int) -> Redrive:
    """Sends again while the attempt may still be running."""
    return Redrive(first_ms=first_ms, long_ms=10**9)


def test_a_late_wake_up_sends_nothing_after_the_budget_and_waits_for_the_latest_copy() -> None:
    run = SagaRun(sequence("CC", start_to_close_ms=1_200_000, redrive=eager(30_000)))
    run.now_ms = 950_000

    assert run.feed(TimerFired(at_ms=run.now_ms)) == ()
    assert run.stands(Status.RUNNING)
    run.now_ms = 1_200_000
    run.feed(TimerFired(at_ms=run.now_ms))

    assert run.stands(Status.COMPENSATING)


def test_what_is_cancelled_is_not_sent_again() -> None:
    run = SagaRun(sequence("CC", start_to_close_ms=60_000, redrive=eager(200)))
    run.cancel()
    assert run.due_ms == 60_000

    run.now_ms = 10_000
    assert run.feed(TimerFired(at_ms=run.now_ms)) == ()
    run.wake()

    assert run.stands(Status.COMPENSATING)


def test_resends_keep_id_and_attempt_and_back_off() -> None:
    """P4."""
    run = SagaRun(sequence("CC", retry=RetryPolicy(attempts=None, schedule_to_close=None)))
    at_ms = []
    for _ in range(6):
        run.wake()
        at_ms.append(run.now_ms)

    assert {(sent.command_id, sent.attempt) for sent in run.dispatches} == {(run.waiting.command_id, 1)}
    assert [sent.resend for sent in run.dispatches] == [False] + [True] * 6
    gaps = [after - before for before, after in zip([0, *at_ms], at_ms, strict=False)]
    assert gaps == sorted(gaps)
    assert (gaps[0], gaps[-1]) == (30_000, 300_000)


def test_a_command_carries_the_milliseconds_that_remain() -> None:
    """P10."""
    run = SagaRun(sequence("CPR"))
    run.done()
    run.now_ms += 100_000
    run.failed()
    run.wake()

    assert [sent.remaining_ms for sent in run.dispatches] == [900_000, 900_000, 900_000 - run.now_ms]
    run.done()
    assert run.dispatches[-1].remaining_ms is None


def test_a_resend_waits_while_the_redrive_budget_is_used_up() -> None:
    """P4."""
    run = SagaRun(sequence("CC"))
    before = run.state

    assert run.wake(may_resend=False) == ()
    assert run.state is before
    assert len(run.wake()) == 1


def test_a_broker_that_forgot_is_told_again_at_once() -> None:
    run = SagaRun(sequence("CC"))
    run.now_ms += 1

    due = run.due_ms
    assert due is not None
    assert due > run.now_ms
    run.now_ms, sent = 1, run.wake(broker_forgot=True, may_resend=False)

    assert len(sent) == 1


@pytest.mark.feature("E-06")
@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("CC", IncidentKind.COMPENSATION_FAILED),
        ("PR", IncidentKind.STEP_FAILED_AFTER_PIVOT),
    ],
)
def test_what_must_succeed_and_is_not_answered_becomes_visible(word: str, kind: IncidentKind) -> None:
    """A participant that is gone for good leaves no saga open in silence."""
    run = SagaRun(sequence(word))
    run.done()
    if word == "CC":
        run.refused()
    sent_ms = run.now_ms
    for _ in range(20):
        if not run.incidents:
            run.wake()

    assert run.now_ms - sent_ms >= UNANSWERED_MS
    assert run.now_ms - sent_ms <= UNANSWERED_MS + 300_000
    assert [(incident.kind, incident.error) for incident in run.incidents] == [(kind, "no_answer")]
    run.run_out()
    run.wake()
    assert len(run.incidents) == 1, "once is enough"
    run.finish()


def test_the_defaults_are_those_of_the_table() -> None:
    assert (FORWARD.attempts, FORWARD.schedule_to_close) == (10, seconds(900))
    assert (FORWARD.initial, FORWARD.factor, FORWARD.maximum) == (seconds(1), 2.0, seconds(60))
    assert (COMPENSATION.initial, COMPENSATION.maximum, COMPENSATION.incident_at) == (
        seconds(1),
        seconds(600),
        10,
    )
    assert COMPENSATION.endless
    assert not FORWARD.endless
