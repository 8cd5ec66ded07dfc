"""The retry policy as arithmetic: caps, jitter, ends, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saga.retry import COMPENSATION, FORWARD, RetryPolicy

pytestmark = [pytest.mark.stack("pure"), pytest.mark.feature("D-03")]


def test_the_cap_doubles_up_to_the_maximum() -> None:
    assert [FORWARD.cap_ms(attempt) for attempt in range(1, 9)] == [
        *(1_000, 2_000, 4_000, 8_000, 16_000, 32_000),
        *(60_000, 60_000),
    ]
    assert COMPENSATION.cap_ms(10_000) == 600_000


@given(st.text(max_size=40), st.integers(1, 100_000))
def test_a_delay_lies_within_its_cap_and_is_the_same_each_time(command_id: str, attempt: int) -> None:
    delay = COMPENSATION.delay_ms(command_id, attempt)

    assert 0 <= delay <= COMPENSATION.cap_ms(attempt)
    assert delay == COMPENSATION.delay_ms(command_id, attempt)


def test_the_delay_of_a_known_command_never_changes() -> None:
    """Coordinators of two releases side by side agree on when a retry is due."""
    assert [FORWARD.delay_ms("0123456789abcdef", attempt) for attempt in (1, 2, 3)] == [206, 463, 323]


@pytest.mark.parametrize(
    "changes",
    [
        {"initial": timedelta(0)},
        {"initial": timedelta(seconds=-1)},
        {"maximum": timedelta(milliseconds=1)},
        {"factor": 0.5},
        {"attempts": 0},
        {"schedule_to_close": timedelta(0)},
        {"incident_at": 0},
    ],
    ids=str,
)
def test_a_policy_without_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(FORWARD, **changes)  # type: ignore[arg-type]


def test_endless_means_neither_attempts_nor_time_run_out() -> None:
    assert RetryPolicy(attempts=None, schedule_to_close=None).endless
    assert not RetryPolicy(attempts=None).endless
    assert not RetryPolicy(schedule_to_close=None).endless
