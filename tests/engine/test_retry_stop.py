"""Why a step is not tried again, as its line of history says (row D-03)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic_core import from_json

from saga.engine.decide import decide, initial, next_due_ms
from saga.engine.events import (
    ActivityFailed,
    ActivityRefused,
    CancelRequested,
    Event,
    SagaStarted,
    TimerFired,
)
from saga.engine.history import entry
from saga.engine.state import State
from tests.engine.runs import RUN, sequence

pytestmark = [pytest.mark.stack("pure"), pytest.mark.feature("D-03")]

Next = Callable[[State], Event]


def fail(state: State, *, at_ms: int = 0, **how: Any) -> Event:
    waiting = state.outstanding
    assert waiting is not None
    known: dict[str, Any] = {
        "at_ms": max(at_ms, waiting.sent_ms),
        "command_id": waiting.command_id,
        "attempt": waiting.attempt,
    }
    return ActivityFailed(**known, error="Oops", **how)


def fail_for_good(state: State) -> Event:
    return fail(state, retryable=False)


def fail_late(state: State) -> Event:
    return fail(state, at_ms=899_999, retry_after_ms=5)


def refuse(state: State) -> Event:
    waiting = state.outstanding
    assert waiting is not None
    return ActivityRefused(
        at_ms=waiting.sent_ms, command_id=waiting.command_id, attempt=waiting.attempt, code="no"
    )


def wake(state: State) -> Event:
    due = next_due_ms(sequence("CC"), state, 0)
    assert due is not None
    return TimerFired(at_ms=due)


def wake_too_late(state: State) -> Event:
    return TimerFired(at_ms=3_600_000)


def cancel(state: State) -> Event:
    return CancelRequested(at_ms=0, reason="test")


@pytest.mark.parametrize("word", ["CC", "PR"], ids=["compensatable", "pivot"])
@pytest.mark.parametrize(
    ("events", "stop"),
    [
        ([fail], None),
        ([*[fail, wake] * 9, fail], "attempts"),
        ([fail_for_good], "not_retryable"),
        ([fail_late], "schedule_to_close"),
        ([fail, wake_too_late], "schedule_to_close"),
        ([cancel, fail], "cancelled"),
        ([fail, cancel], "cancelled"),
        ([refuse], None),
    ],
    ids=[
        "goes on",
        "attempts",
        "not retryable",
        "budget",
        "nobody there",
        "cancelled while it ran",
        "cancelled while it waited",
        "refused: the code says why",
    ],
)
def test_the_line_that_ends_the_retries_says_why_and_no_other(
    word: str, events: list[Next], stop: str | None
) -> None:
    assert _stops(word, events) == [None] * len(events) + [stop]


def test_an_answer_that_never_comes_ends_with_the_budget() -> None:
    assert _stops("CC", [wake_too_late]) == [None, "schedule_to_close"]


def test_what_must_succeed_never_stops() -> None:
    """P8, P15: past the pivot, and for a pivot that does not answer, retries have no end."""
    assert _stops("PR", [wake_too_late]) == [None, None]


def _stops(word: str, events: list[Next]) -> list[str | None]:
    """Play the events; return what each line of history says."""
    definition, state, said = sequence(word), initial("default", RUN), list[str | None]()
    for make in [lambda _state: SagaStarted(at_ms=0), *events]:
        event = make(state)
        after, effects = decide(definition, state, event)
        said.append(from_json(entry(event, definition, state, after, effects).detail).get("retry_stop"))
        state = after
    return said
