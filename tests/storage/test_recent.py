"""What a process wrote last is a guess: bounded, aged in database time, and given up when it proves wrong."""

from __future__ import annotations

from uuid import UUID

import pytest

from saga.storage.base import Changes, Loaded, MovedRow, NewInstance, ValueKey, ValueRow
from saga.storage.sqlalchemy import recent
from saga.storage.sqlalchemy.recent import Known, RecentInstances

RUN = UUID(int=1)


class HandClock:
    """Stands where it was put."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def instances(clock: HandClock) -> RecentInstances:
    return RecentInstances(clock)  # type: ignore[arg-type]


def new(run_id: UUID = RUN, *, input: bytes = b"{}", wakeup_ms: int | None = 30_000) -> NewInstance:
    return NewInstance(run_id, "transfer", 1, "x", 1, "running", "{}", input, wakeup_ms, None)


def loaded(run_id: UUID = RUN, *, now_ms: int = 7) -> Loaded:
    return Loaded(run_id, "transfer", 1, "x", 3, "{}", b"{}", now_ms, 30_000, "running")


def moved() -> MovedRow:
    return MovedRow(RUN, 3, "running", 4, "running", '{"d": 1}', 60_000, None)


def test_what_was_started_is_known_with_its_time_reckoned_on(
    clock: HandClock, instances: RecentInstances
) -> None:
    instances.keep_new([new()], clock.seconds)
    clock.seconds += 1.5
    assert instances.take([RUN])[RUN].row == Loaded(
        RUN, "transfer", 1, "x", 1, "{}", b"{}", 1_500, 30_000, "running"
    )


def test_what_was_moved_is_known_as_it_was_written(clock: HandClock, instances: RecentInstances) -> None:
    first, second = ValueKey(RUN, "s1", 0, 0, "output"), ValueKey(RUN, "s2", 0, 0, "output")
    before = Known(loaded(now_ms=200), clock.seconds, clock.seconds, (ValueRow(first, b"1"),))
    changes = Changes(moved=[moved()], values=[ValueRow(second, b"2")])
    instances.keep_moved({RUN: before}, changes)
    clock.seconds += 0.1
    known = instances.take([RUN])[RUN]
    row = known.row
    assert (row.version, row.state, row.wakeup_ms, row.now_ms) == (4, '{"d": 1}', 60_000, 300)
    assert known.values == (ValueRow(first, b"1"), ValueRow(second, b"2"))


def test_what_another_process_moved_is_not_kept(instances: RecentInstances) -> None:
    instances.keep_moved({}, Changes(moved=[moved()]))
    assert not instances.take([RUN])


def test_an_instance_is_given_to_one_batch_at_a_time(clock: HandClock, instances: RecentInstances) -> None:
    instances.keep_new([new()], clock.seconds)
    assert instances.take([RUN]).keys() == {RUN}
    assert not instances.take([RUN])


@pytest.mark.parametrize(
    "instance", [new(wakeup_ms=None), new(input=b" " * recent.BYTES_MAX)], ids=["closed", "large"]
)
def test_what_is_closed_or_large_is_not_kept(
    clock: HandClock, instances: RecentInstances, instance: NewInstance
) -> None:
    instances.keep_new([instance], clock.seconds)
    assert not instances.take([RUN])


def test_the_database_is_asked_for_its_time_again(clock: HandClock, instances: RecentInstances) -> None:
    """P10: moving on does not make an old reading of the database's clock any younger."""
    known = Known(loaded(), clock.seconds, clock.seconds)
    for _ in range(3):
        instances.keep(known)
        clock.seconds += recent.ANCHOR_SECONDS / 3 - 0.1
        known = instances.take([RUN])[RUN]
    instances.keep(known)
    clock.seconds += 1
    assert not instances.take([RUN])


def test_after_a_wrong_guess_nothing_is_guessed_for_a_while(
    clock: HandClock, instances: RecentInstances
) -> None:
    other = UUID(int=2)
    instances.keep_new([new()], clock.seconds)
    instances.mistaken()
    instances.keep_new([new(other)], clock.seconds)
    assert not instances.take([RUN, other])
    clock.seconds += recent.DISTRUST_SECONDS
    instances.keep_new([new(other)], clock.seconds)
    assert instances.take([other])


def test_the_oldest_goes_first(
    clock: HandClock, instances: RecentInstances, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "INSTANCES_MAX", 2)
    runs = [UUID(int=number) for number in range(3)]
    instances.keep_new((new(run) for run in runs), clock.seconds)
    assert instances.take(runs).keys() == set(runs[1:])
