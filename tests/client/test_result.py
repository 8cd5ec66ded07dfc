"""Waiting for the end of a saga and looking at it (row C-10, without progress and watch)."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from saga import (
    AlreadyClosed,
    AlreadyOpen,
    ResultTimeout,
    SagaCompensated,
    SagaError,
    SagaNotFound,
    StartConflict,
)
from saga.clock import SystemClock
from saga.errors import StorageUnavailable
from saga.storage.base import Closed
from saga.storage.sqlalchemy.coordinator import SqlClientStore
from tests.client.shop import LIMIT, Order, Place, gates, purchase

pytestmark = pytest.mark.feature("C-10")

SECOND = timedelta(seconds=1)


async def test_a_result_is_typed_and_may_be_asked_for_any_number_of_times(place: Place) -> None:
    async with place.app() as app:
        handle = await app.client.start(purchase, Order(), id="o-1")
        for _ in range(2):
            assert (await handle.result(timeout=30 * SECOND)).number == "c-book"
        assert (await app.client.execute(purchase, Order(), id="o-1")).number == "c-book"
        assert (await app.client.handle(purchase, handle.run_id).result()).number == "c-book"


async def test_a_compensated_saga_raises_what_was_refused_why_and_what_was_undone(place: Place) -> None:
    async with place.app() as app:
        handle = await app.client.start(purchase, Order(cents=LIMIT + 5), id="o-1")
        with pytest.raises(SagaCompensated) as ended:
            await handle.result()
    error = ended.value
    assert (error.saga, error.step, error.saga_id) == ("purchase", "charge", "o-1")
    assert (error.reason, error.details, error.undone) == ("too_expensive", {"missing": 5}, ("reserve",))


async def test_a_result_that_does_not_come_in_time_is_a_timeout_and_the_saga_goes_on(place: Place) -> None:
    gate = gates["slow"] = asyncio.Event()
    async with place.app() as app:
        handle = await app.client.start(purchase, Order(item="slow"), id="o-1")
        for timeout in (timedelta(0), timedelta(milliseconds=20)):
            with pytest.raises(ResultTimeout):
                await handle.result(timeout=timeout)
        gate.set()
        assert (await handle.result()).number == "c-slow"


async def test_waiters_of_the_coordinators_process_wake_at_once_without_asking_the_database(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: object) -> list[Closed]:
        return []

    monkeypatch.setattr(SqlClientStore, "read_closed", nothing)
    async with place.app() as app:
        handle = await app.client.start(purchase, Order(), id="o-1")
        assert (await handle.result(timeout=30 * SECOND)).number == "c-book"


async def test_another_process_learns_of_the_end_by_asking_once_a_second(place: Place) -> None:
    gate = gates["slow"] = asyncio.Event()
    clock = SystemClock()
    async with place.app(), place.app().as_client() as client:
        handle = await client.start(purchase, Order(item="slow"), id="o-1")
        waiting = asyncio.ensure_future(handle.result())
        await place.until(lambda: running(place))
        gate.set()

        async def ended() -> bool:
            return bool(await place.rows("SELECT 1 FROM saga_instance WHERE closed_at IS NOT NULL"))

        await place.until(ended)
        since = clock.monotonic()
        assert (await waiting).number == "c-slow"
        assert clock.monotonic() - since < 2.0


async def test_who_asks_again_for_what_has_ended_need_not_wait_for_the_next_turn(place: Place) -> None:
    clock = SystemClock()
    async with place.app() as app:
        handle = await app.client.start(purchase, Order(), id="o-1")
        await handle.result()
        waits = []
        for _ in range(3):
            since = clock.monotonic()
            await handle.result()
            waits.append(clock.monotonic() - since)
    assert min(waits) < 0.5


async def running(place: Place) -> bool:
    return bool(await place.rows("SELECT 1 FROM saga_instance WHERE closed_at IS NULL"))


async def test_a_database_that_is_away_for_a_while_does_not_lose_the_waiters(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, failures = SqlClientStore.read_closed, iter([StorageUnavailable(), StorageUnavailable()])

    async def read_closed(self: SqlClientStore, runs: list[object]) -> object:
        if (failure := next(failures, None)) is not None:
            raise failure
        return await whole(self, runs)  # type: ignore[arg-type]

    monkeypatch.setattr(SqlClientStore, "read_closed", read_closed)
    async with place.app() as app:
        await (await app.client.start(purchase, Order(), id="o-1")).result()
        async with place.app().as_client() as client:
            assert (await (await client.find(purchase, "o-1")).result(timeout=30 * SECOND)).number == "c-book"
    assert next(failures, None) is None


async def test_waiters_are_told_when_nobody_asks_any_more(place: Place) -> None:
    """A stopped app and an error that no second try mends leave nobody waiting for ever."""
    app = place.app()
    async with app.as_client() as client:
        handle = await client.start(purchase, Order(), id="o-1")
        waiting = asyncio.ensure_future(handle.result())
        await asyncio.sleep(0)
    with pytest.raises(ResultTimeout):
        await waiting


async def test_a_thousand_waiters_share_their_questions_to_the_database(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, asked = SqlClientStore.read_closed, list[int]()

    async def read_closed(self: SqlClientStore, runs: list[object]) -> object:
        asked.append(len(runs))
        return await whole(self, runs)  # type: ignore[arg-type]

    async with place.app() as app:
        handle = await app.client.start(purchase, Order(), id="o-1")
        await handle.result()
        async with place.app().as_client() as client:
            monkeypatch.setattr(SqlClientStore, "read_closed", read_closed)
            found = await client.find(purchase, "o-1")
            answers = await asyncio.gather(*(found.result() for _ in range(1_000)))
    assert {answer.number for answer in answers} == {"c-book"}
    assert asked == [1]


# --- describe ---------------------------------------------------------------------------------


async def test_a_description_tells_status_history_and_plan_and_no_payload(place: Place) -> None:
    async with place.app() as app:
        handle = await app.client.start(purchase, Order(item="secret", cents=LIMIT + 5), id="o-1")
        with pytest.raises(SagaCompensated):
            await handle.result()
        seen = await handle.describe()
    assert (seen.namespace, seen.saga, seen.version, seen.id) == (place.namespace, "purchase", 1, "o-1")
    assert (seen.run_id, seen.run_number, seen.status) == (handle.run_id, 1, "compensated")
    assert seen.current_step is None
    assert seen.plan == (("reserve", "compensated"),)
    assert seen.incidents == ()
    assert [(line.event, line.step) for line in seen.history] == [
        ("SagaStarted", None),
        ("ActivityCompleted", "reserve"),
        ("ActivityRefused", "charge"),
        ("CompensationCompleted", "reserve"),
    ]
    assert seen.closed_at is not None
    assert timedelta(0) <= seen.closed_at - seen.created_at < timedelta(minutes=1)
    assert seen.created_at.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - seen.created_at) < timedelta(minutes=5)
    assert "secret" not in repr(seen)


async def test_a_description_of_an_open_saga_names_the_step_it_waits_for(place: Place) -> None:
    async with place.app().as_client() as client:
        seen = await (await client.start(purchase, Order(), id="o-1")).describe()
        assert (seen.status, seen.current_step, seen.closed_at) == ("running", "reserve", None)
        with pytest.raises(SagaNotFound):
            await client.find(purchase, "o-2")
        with pytest.raises(SagaNotFound):
            await client.handle(purchase, client._ids.uuid7()).describe()


# --- texts ------------------------------------------------------------------------------------


async def test_the_text_of_an_error_holds_code_class_saga_and_step_only(place: Place) -> None:
    """SQL-9, S20: no id, no reason, no details, no input, whatever went wrong."""
    errors: list[SagaError] = []
    async with place.app() as app:
        client = app.client
        handle = await client.start(purchase, Order(item="canary", cents=LIMIT + 7), id="id-canary")
        with pytest.raises(ResultTimeout) as slow:
            await handle.result(timeout=timedelta(0))
        with pytest.raises(SagaCompensated) as ended:
            await handle.result()
        errors += [slow.value, ended.value]
        for how in ({}, {"if_closed": "fail"}):
            with pytest.raises((StartConflict, AlreadyClosed, AlreadyOpen)) as refused:
                await client.start(purchase, Order(item="other"), id="id-canary", **how)  # type: ignore[arg-type]
            errors.append(refused.value)
        with pytest.raises(SagaNotFound) as missing:
            await client.find(purchase, "canary-2")
        errors.append(missing.value)
    assert [str(error) for error in errors] == [
        "ResultTimeout [SG312] saga=purchase",
        "SagaCompensated [SG401] saga=purchase step=charge",
        "StartConflict [SG303] saga=purchase",
        "AlreadyClosed [SG305] saga=purchase",
        "SagaNotFound [SG307] saga=purchase",
    ]
    for error in errors:
        assert "canary" not in f"{error!s}{error!r}{error.args}{getattr(error, '__notes__', '')}"
        assert error.saga_id is not None
