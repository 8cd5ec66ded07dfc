"""Sagas of steps s1, s2, ... with contracts only, and schedules that are over in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from saga.compensation.kinds import InDoubt, StepKind
from saga.definition.activity import Participant
from saga.definition.builder import Saga
from saga.retry import RetryPolicy
from tests.coordinator.harness import Order, Receipt

MS = timedelta(milliseconds=1)
QUICK = RetryPolicy(initial=MS, maximum=2 * MS, attempts=3, schedule_to_close=timedelta(days=365))
"""Time may be jumped over without ending a budget; a test of a deadline brings its own."""
ENDLESS = RetryPolicy(initial=MS, maximum=2 * MS, attempts=None, schedule_to_close=None, incident_at=10)


def work(queue: str = "work") -> Participant:
    return Participant(queue, start_to_close=timedelta(seconds=30))


def sequence(
    count: int,
    *,
    name: str = "sequence",
    version: int = 1,
    pivot: int | None = None,
    retry: RetryPolicy = QUICK,
    undo_retry: RetryPolicy = ENDLESS,
    start_to_close: timedelta | None = timedelta(seconds=30),
    queue: str = "work",
    names: Mapping[int, str] | None = None,
    in_doubt: InDoubt = InDoubt.UNDO,
    deadline: timedelta | None = None,
) -> Saga[Order, None]:
    """Return a saga of `count` steps that can all be undone; from `pivot` on (1 is the first) it goes forward only."""
    owner = Participant(queue, start_to_close=start_to_close)
    saga: Saga[Any, None] = Saga(name, Order, version=version, deadline=deadline)
    for number in range(1, count + 1):
        step = (names or {}).get(number, f"s{number}")
        policy = InDoubt.UNDO
        if pivot is None or number < pivot:
            policy = in_doubt
            activity = owner.contract(
                step, Order, Receipt, compensated=True, retry=retry, compensation_retry=undo_retry
            )
        elif number == pivot:
            activity = owner.contract(step, Order, Receipt, kind=StepKind.PIVOT, retry=retry)
        else:
            activity = owner.contract(step, Order, Receipt, kind=StepKind.RETRIABLE, retry=ENDLESS)
        saga = saga.step(activity, in_doubt=policy)
    return saga
