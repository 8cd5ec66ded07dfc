"""Operators' verbs at every state of a saga of four steps: where each leads, and which effects are told to stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import pytest

from saga.compensation.kinds import StepKind
from saga.engine.effects import Dispatch, IncidentKind
from saga.engine.events import (
    AbandonRequested,
    CompensationFailed,
    Event,
    MarkDoneRequested,
    RetryRequested,
    SkipRequested,
    TerminateRequested,
)
from saga.engine.state import CLOSED, Status
from saga.engine.verbs import Verb, allowed, standing
from saga.errors import VerbNotAllowed
from saga.messages import NO_BARRIER, Direction
from tests.engine.runs import SagaRun, sequence

pytestmark = pytest.mark.stack("pure")

FOUR: Final = "CCPR"


def forward(done: int) -> Callable[[], SagaRun]:
    """The step after `done` ones is out."""

    def made() -> SagaRun:
        run = SagaRun(sequence(FOUR))
        for _ in range(done):
            run.done()
        return run

    return made


def waits_for_retry() -> SagaRun:
    run = forward(1)()
    run.failed()
    return run


def fence_out() -> SagaRun:
    run = forward(2)()
    run.failed(retryable=False)
    return run


def undoing(undone: int) -> Callable[[], SagaRun]:
    """The pivot was refused, and `undone` steps are undone."""

    def made() -> SagaRun:
        run = forward(2)()
        run.refused()
        for _ in range(undone):
            run.done()
        return run

    return made


def undo_failed() -> SagaRun:
    run = undoing(0)()
    run.refused("locked")
    return run


def stuck_behind_pivot() -> SagaRun:
    run = forward(3)()
    run.refused()
    return run


def first_in_doubt() -> SagaRun:
    run = forward(0)()
    run.run_out()
    return run


PLACES: Final[dict[str, tuple[Callable[[], SagaRun], str, tuple[str, ...]]]] = {
    # where it stands: how it got there, verbs allowed, effects that stand ("?" where in doubt)
    "first step out": (forward(0), "cancel terminate", ("s0?",)),
    "second step out": (forward(1), "cancel terminate", ("s0", "s1?")),
    "second step waits for a retry": (waits_for_retry, "cancel retry terminate", ("s0", "s1?")),
    "pivot out": (forward(2), "cancel terminate", ("s0", "s1", "s2?")),
    "pivot's fence out": (fence_out, "terminate", ("s0", "s1", "s2?")),
    "past the pivot": (forward(3), "terminate", ("s0", "s1", "s2", "s3?")),
    "stuck past the pivot": (stuck_behind_pivot, "retry terminate abandon", ("s0", "s1", "s2", "s3?")),
    "first step in doubt": (first_in_doubt, "terminate", ("s0?",)),
    "undoing the second": (undoing(0), "terminate", ("s0", "s1")),
    "undoing the first": (undoing(1), "terminate", ("s0",)),
    "undo failed": (undo_failed, "retry mark-done skip terminate abandon", ("s0", "s1")),
    "completed": (forward(4), "", ("s0", "s1", "s2", "s3")),
    "compensated": (undoing(2), "", ()),
}
EVENTS: Final[dict[Verb, Callable[[int], Event]]] = {
    Verb.RETRY: lambda at_ms: RetryRequested(at_ms=at_ms),
    Verb.MARK_DONE: lambda at_ms: MarkDoneRequested(at_ms=at_ms),
    Verb.SKIP: lambda at_ms: SkipRequested(at_ms=at_ms),
    Verb.TERMINATE: lambda at_ms: TerminateRequested(at_ms=at_ms, force=True),
    Verb.ABANDON: lambda at_ms: AbandonRequested(at_ms=at_ms),
}
LEADS_TO: Final = {
    Verb.MARK_DONE: Status.COMPENSATING,
    Verb.SKIP: Status.COMPENSATING,
    Verb.TERMINATE: Status.TERMINATED,
    Verb.ABANDON: Status.ABANDONED,
}


def stands(run: SagaRun) -> tuple[str, ...]:
    found = standing(run.definition, run.state)
    return tuple(f"s{each.step}?" if each.in_doubt else f"s{each.step}" for each in found)


def cases() -> Iterator[tuple[str, Verb]]:
    for place in PLACES:
        yield from ((place, verb) for verb in EVENTS)


@pytest.mark.feature("C-11", acceptance=True)
@pytest.mark.parametrize(("place", "verb"), list(cases()), ids=lambda each: str(each).replace(" ", "-"))
def test_a_verb_leads_where_the_table_says_and_names_what_stands(place: str, verb: Verb) -> None:
    given, verbs, effects = PLACES[place]
    run = given()
    assert allowed(run.definition, run.state) == tuple(Verb(each) for each in verbs.split())
    assert stands(run) == effects
    before = run.state
    if verb not in verbs.split():
        with pytest.raises(VerbNotAllowed) as caught:
            run.feed(EVENTS[verb](run.now_ms))
        assert caught.value.allowed == tuple(verbs.split())
        assert run.state is before
        return
    run.feed(EVENTS[verb](run.now_ms))
    assert run.state.status is LEADS_TO.get(verb, before.status)
    if run.state.status in CLOSED:
        assert stands(run) == effects, "closing without undo loses no effect from the list"
        assert run.state.outstanding is not None
        assert run.state.outstanding.direction in (Direction.FENCE, Direction.CLOSE)


@pytest.mark.feature("C-11")
@pytest.mark.parametrize("place", [place for place, (_, verbs, _) in PLACES.items() if "cancel" not in verbs])
def test_cancel_changes_nothing_where_it_is_not_listed(place: str) -> None:
    run = PLACES[place][0]()
    before = run.state
    run.cancel()
    assert run.state is before


@pytest.mark.feature("C-11")
def test_terminate_names_the_effects_that_stand_and_wants_force() -> None:
    run = forward(2)()
    with pytest.raises(VerbNotAllowed) as caught:
        run.order(TerminateRequested)
    assert "s0, s1, s2" in caught.value.text
    assert "cancel" in caught.value.text


@pytest.mark.feature("C-11")
def test_terminate_needs_no_force_where_only_reading_steps_ran() -> None:
    run = SagaRun(sequence("OO"))
    run.done()
    run.order(TerminateRequested)
    assert run.stands(Status.TERMINATED)


@pytest.mark.feature("E-06")
def test_retry_sends_the_next_attempt_now_under_the_same_command_id() -> None:
    run = undo_failed()
    waiting = run.waiting
    (sent,) = run.order(RetryRequested)
    assert isinstance(sent, Dispatch)
    assert (sent.command_id, sent.attempt, sent.resend) == (waiting.command_id, waiting.attempt + 1, False)
    run.finish()
    assert run.stands(Status.COMPENSATED)


@pytest.mark.feature("E-06")
def test_retry_of_an_instance_set_apart_asks_for_the_answer_once_more() -> None:
    run = forward(1)()
    (sent,) = run.order(RetryRequested, set_apart=True)
    assert isinstance(sent, Dispatch)
    assert (sent.attempt, sent.resend) == (1, True)


@pytest.mark.feature("E-06")
@pytest.mark.parametrize(("verb", "state"), [(MarkDoneRequested, "compensated"), (SkipRequested, "skipped")])
def test_settling_by_hand_closes_the_undo_first_and_goes_on(verb: type[Event], state: str) -> None:
    """P26: the undo in flight is closed before anything else is undone."""
    run = undo_failed()
    old = run.waiting.command_id
    run.order(verb)
    assert (run.waiting.step, run.waiting.direction) == (1, Direction.CLOSE)
    assert run.waiting.command_id != old
    run.done()
    assert (run.waiting.step, run.waiting.direction) == (0, Direction.COMPENSATE)
    run.done()
    assert run.stands(Status.COMPENSATED)
    assert [undo.state for undo in run.state.plan] == [state, "compensated"]
    assert stands(run) == (("s1",) if state == "skipped" else ())


@pytest.mark.feature("E-06")
def test_an_undo_that_had_run_before_it_was_settled_by_hand_is_told() -> None:
    """P26: done by hand and done by us: money may have gone back twice, so somebody must know."""
    run = undo_failed()
    run.order(MarkDoneRequested)
    run.had_run()
    assert run.incidents[-1].kind is IncidentKind.HAD_RUN
    run.finish()
    assert run.stands(Status.COMPENSATED)


@pytest.mark.feature("E-06")
def test_a_participant_without_barrier_holds_nothing_up() -> None:
    run = undo_failed()
    run.order(SkipRequested)
    run.feed(CompensationFailed(**run.address, error=NO_BARRIER))
    assert (run.waiting.step, run.waiting.direction) == (0, Direction.COMPENSATE)


@pytest.mark.feature("C-11")
@pytest.mark.parametrize("had_run", [False, True])
def test_what_was_in_flight_when_it_was_terminated_is_confirmed_or_told(had_run: bool) -> None:
    run = forward(1)()
    run.order(TerminateRequested, force=True)
    if had_run:
        run.had_run()
        assert [each.kind for each in run.incidents] == [IncidentKind.HAD_RUN]
    else:
        run.done()
        assert not run.incidents
    assert run.state.outstanding is None
    assert run.stands(Status.TERMINATED)


@pytest.mark.feature("C-11")
def test_where_there_is_no_barrier_nothing_is_waited_for_after_the_end() -> None:
    """P26: the settlement says that it cannot be confirmed, instead of not yet for ever."""
    run = forward(1)()
    run.order(TerminateRequested, force=True)
    run.feed(CompensationFailed(**run.address, error="Boom"))
    fence = run.state.outstanding
    assert fence is not None, "a failure that says nothing changes nothing"
    run.feed(CompensationFailed(**run.address, error=NO_BARRIER))
    assert run.state.outstanding is None
    assert run.stands(Status.TERMINATED)


def test_reading_steps_never_stand() -> None:
    run = SagaRun(sequence("COC"))
    run.done()
    run.done()
    assert [run.definition.steps[each.step].kind for each in standing(run.definition, run.state)] == [
        StepKind.COMPENSATABLE,
        StepKind.COMPENSATABLE,
    ]
