"""Starting a saga: once per id, by the policies the caller names (row C-01)."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event

from saga import (
    PIVOT,
    RETRIABLE,
    AlreadyClosed,
    AlreadyOpen,
    App,
    PastPivot,
    PayloadInvalid,
    Saga,
    SagaCompensated,
    StartConflict,
    failpoints,
)
from saga.client import IfClosed
from saga.coordinator.verbs import Verbs
from saga.engine.verbs import Moved, Verb
from saga.storage.base import Changes
from saga.storage.sqlalchemy.coordinator import SqlClientStore
from tests.client.shop import LIMIT, Order, Place, charge, gates, purchase, reserve

pytestmark = pytest.mark.feature("C-01")

OTHER = Order(item="pen")


async def runs(place: Place, id: str) -> list[Any]:
    return await place.rows(
        "SELECT run_number, status FROM saga_instance WHERE saga_id = :id ORDER BY run_number", id=id
    )


# --- open -------------------------------------------------------------------------------------


async def test_an_open_id_gives_its_run_again_or_says_that_it_is_open(place: Place) -> None:
    async with place.app().as_client() as client:
        first = await client.start(purchase, Order(), id="o-1")
        again = await client.start(purchase, Order(), id="o-1")
        assert again.run_id == first.run_id
        with pytest.raises(StartConflict):
            await client.start(purchase, OTHER, id="o-1")
        for input in (Order(), OTHER):
            with pytest.raises(AlreadyOpen):
                await client.start(purchase, input, id="o-1", if_open="fail")
        assert len(await runs(place, "o-1")) == 1


async def test_a_policy_for_closed_ids_says_nothing_of_an_open_one(place: Place) -> None:
    async with place.app().as_client() as client:
        first = await client.start(purchase, Order(), id="o-1")
        for policy in ("start_again", "start_again_if_not_completed", "fail"):
            closed: IfClosed = policy
            assert (await client.start(purchase, Order(), id="o-1", if_closed=closed)).run_id == first.run_id


@pytest.mark.parametrize("in_session", [False, True], ids=["alone", "in a session"])
async def test_cancel_then_start_stops_the_open_run_and_starts_the_next(
    place: Place, in_session: bool
) -> None:
    """P16: the audit row stands in the commit of the cancel, the caller's own if there is a session."""
    gate = gates["slow"] = asyncio.Event()
    async with place.app() as app:
        handle = await app.client.start(purchase, Order(item="slow"), id="o-1")
        if in_session:
            async with place.session() as session, session.begin():
                after = await app.client.start(
                    purchase, Order(), id="o-1", session=session, if_open="cancel_then_start"
                )
                assert not await place.rows("SELECT 1 FROM saga_audit"), "not committed yet"
        else:
            after = await app.client.start(purchase, Order(), id="o-1", if_open="cancel_then_start")
        assert after.run_id != handle.run_id
        assert (await after.result()).number == "c-book"
        gate.set()
        with pytest.raises(SagaCompensated):
            await handle.result()
    audits = await place.rows("SELECT verb, actor, reason, status_before FROM saga_audit")
    assert [tuple(row) for row in audits] == [("cancel", "client.start", "cancel_then_start", "running")]
    assert [tuple(row) for row in await runs(place, "o-1")] == [(1, "compensated"), (2, "completed")]


async def test_cancel_then_start_that_finds_the_run_ended_does_what_it_says_for_a_closed_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the cancel the run completed: nothing was cancelled, so nothing is started again."""
    gate = gates["slow"] = asyncio.Event()
    async with place.app() as app:
        handle = await app.client.start(purchase, Order(item="slow"), id="o-1")
        order = Verbs.order

        async def ended_meanwhile(self: Verbs, verb: Verb, run_id: UUID, **how: Any) -> Moved:
            gate.set()
            await handle.result()
            return await order(self, verb, run_id, **how)

        monkeypatch.setattr(Verbs, "order", ended_meanwhile)
        same = await app.client.start(purchase, Order(item="slow"), id="o-1", if_open="cancel_then_start")
        assert same.run_id == handle.run_id
        with pytest.raises(AlreadyClosed):
            await app.client.start(
                purchase, Order(item="slow"), id="o-1", if_open="cancel_then_start", if_closed="fail"
            )


async def test_cancel_then_start_rolled_back_leaves_the_open_run_alone(place: Place) -> None:
    async with place.app().as_client() as client:
        first = await client.start(purchase, Order(), id="o-1")
        async with place.session() as session:
            await client.start(purchase, Order(), id="o-1", session=session, if_open="cancel_then_start")
            await session.rollback()
        assert not await place.rows("SELECT 1 FROM saga_audit")
        assert [tuple(row) for row in await runs(place, "o-1")] == [(1, "running")]
        assert (await client.find(purchase, "o-1")).run_id == first.run_id


# --- closed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", ["completed", "compensated"])
async def test_a_closed_id_is_used_started_again_or_refused_as_the_caller_says(
    place: Place, ended: str
) -> None:
    input = Order(cents=100 if ended == "completed" else LIMIT + 5)
    async with place.app() as app:
        client = app.client
        first = await client.start(purchase, input, id="o-1")
        if ended == "completed":
            await first.result()
        else:
            with pytest.raises(SagaCompensated):
                await first.result()

        assert (await client.start(purchase, input, id="o-1")).run_id == first.run_id
        with pytest.raises(StartConflict):
            await client.start(purchase, OTHER, id="o-1")
        with pytest.raises(AlreadyClosed):
            await client.start(purchase, input, id="o-1", if_closed="fail")
        unless = await client.start(purchase, input, id="o-1", if_closed="start_again_if_not_completed")
        assert (unless.run_id == first.run_id) == (ended == "completed")
        if ended == "compensated":
            with pytest.raises(SagaCompensated):
                await unless.result()
        again = await client.start(purchase, OTHER, id="o-1", if_closed="start_again")
        assert again.run_id not in (first.run_id, unless.run_id)
        assert (await again.result()).number == "c-pen"
        assert (await client.find(purchase, "o-1")).run_id == again.run_id


async def test_of_those_who_start_again_at_once_one_makes_the_next_run(place: Place) -> None:
    """The run number is part of the key; the others find what he made open, and use it."""
    async with place.app() as app:
        first = await app.client.start(purchase, Order(), id="o-1")
        await first.result()
        gates["book"] = gate = asyncio.Event()
        handles = await asyncio.gather(
            *(app.client.start(purchase, Order(), id="o-1", if_closed="start_again") for _ in range(8))
        )
        assert len({handle.run_id for handle in handles} - {first.run_id}) == 1
        assert [row.run_number for row in await runs(place, "o-1")] == [1, 2]
        gate.set()
        await handles[0].result()


# --- ids --------------------------------------------------------------------------------------


async def test_ids_are_compared_as_bytes(place: Place) -> None:
    """No case folding, no trimming, no Unicode normalisation (words 3 of the feature table)."""
    ids = [
        "Order-A",
        "order-a",
        "order-a ",
        " order-a",
        "\u00e9",
        "e\u0301",
        "\u017f",
        "s",
        "x" * 200,
        "漢" * 200,
    ]
    async with place.app().as_client() as client:
        handles = [await client.start(purchase, Order(), id=id) for id in ids]
        assert len({handle.run_id for handle in handles}) == len(ids)
        for id, handle in zip(ids, handles, strict=True):
            assert (await client.find(purchase, id)).run_id == handle.run_id


@pytest.mark.parametrize("id", ["", "x" * 201, "nul\0", "\ud800"], ids=["empty", "long", "nul", "surrogate"])
async def test_an_id_that_no_database_could_keep_is_refused_before_anything_is_written(
    place: Place, id: str
) -> None:
    async with place.app().as_client() as client:
        with pytest.raises(PayloadInvalid):
            await client.start(purchase, Order(), id=id)
        assert await place.count("saga_instance") == 0


async def test_without_an_id_every_start_is_a_run_of_its_own_named_by_it(place: Place) -> None:
    async with place.app().as_client() as client:
        one, two = await client.start(purchase, Order()), await client.start(purchase, Order())
        assert one.run_id != two.run_id
        assert one.id == str(one.run_id)


# --- one commit for many ----------------------------------------------------------------------


def noted(app: App) -> list[str]:
    """Return a list that grows by each statement which a started app runs."""
    assert app._running is not None
    assert app._running.database is not None
    statements: list[str] = []

    @event.listens_for(app._running.database.engine.sync_engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    return statements


async def test_starts_at_the_same_time_share_a_commit(place: Place) -> None:
    """K-05: a hundred starts, two commits at most: one that is under way, one for all that came meanwhile."""
    app = place.app()
    async with app.as_client() as client:
        statements = noted(app)
        handles = await asyncio.gather(*(client.start(purchase, Order(), id=f"o-{n}") for n in range(100)))
        inserts = [each for each in statements if "INSERT INTO saga_outbox" in each]
        assert len(inserts) <= 2, statements
        assert len({handle.run_id for handle in handles}) == 100
        assert await place.count("saga_instance") == 100


async def test_a_start_of_a_new_id_reads_no_instance(place: Place) -> None:
    app = place.app()
    async with app.as_client() as client:
        statements = noted(app)
        await client.start(purchase, Order(), id="o-1")
        assert any("INSERT" in each and "saga_instance" in each for each in statements)
        assert not [each for each in statements if each.startswith("SELECT") and "saga_instance" in each]


async def test_one_start_that_cannot_be_written_does_not_hurt_those_that_share_its_commit(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SqlClientStore.start

    async def start(self: SqlClientStore, changes: Changes) -> Any:
        if any(row.saga_id == "o-3" for row in changes.new):
            raise ValueError("this one")
        return await whole(self, changes)

    monkeypatch.setattr(SqlClientStore, "start", start)
    async with place.app().as_client() as client:
        ended = await asyncio.gather(
            *(client.start(purchase, Order(), id=f"o-{n}") for n in range(8)), return_exceptions=True
        )
        assert [type(each).__name__ for each in ended] == ["Handle"] * 3 + ["ValueError"] + ["Handle"] * 4
        assert await place.count("saga_instance") == 7


async def test_a_start_that_runs_again_after_a_lost_answer_knows_its_own_first_run(place: Place) -> None:
    """P31, P3: the run id that is there already is this very start, so `fail` does not fail."""
    async with place.app().as_client() as client:
        failpoints.arm("C3:raise:n=1")
        handle = await client.start(purchase, Order(), id="o-1", if_open="fail")
        assert failpoints.disarm()["C3"] == 2
        assert [tuple(row) for row in await runs(place, "o-1")] == [(1, "running")]
        assert (await client.find(purchase, "o-1")).run_id == handle.run_id
        histories = await place.rows("SELECT version FROM saga_history")
        assert [tuple(row) for row in histories] == [(1,)]
        assert await place.count("saga_outbox") <= 1


async def test_past_the_pivot_cancel_then_start_says_so_and_writes_nothing(place: Place) -> None:
    final = Saga("final", Order).step(reserve, kind=PIVOT).step(charge, kind=RETRIABLE)
    gate = gates["charge book"] = asyncio.Event()

    async def past_pivot() -> bool:
        return bool(await place.rows("SELECT 1 FROM saga_instance WHERE version >= 2"))

    async with place.app(sagas=[final]) as app:
        handle = await app.client.start(final, Order(), id="o-1")
        await place.until(past_pivot)
        with pytest.raises(PastPivot):
            await app.client.start(final, Order(), id="o-1", if_open="cancel_then_start")
        assert not await place.rows("SELECT 1 FROM saga_audit")
        assert (await app.client.find(final, "o-1")).run_id == handle.run_id
        gate.set()
        await handle.result()
