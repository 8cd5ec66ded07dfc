"""Payloads end to end: too large ones stop where they appear, and nothing is prepared anew for a message (row D-02)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from pydantic import TypeAdapter
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession

from saga import Participant, PayloadTooLarge, Saga, SagaCompensated
from tests.client.shop import Order, Place, Receipt, orders, purchase, shop

pytestmark = pytest.mark.feature("D-02", acceptance=True)

MIB = 1024 * 1024
SAGAS = 20

printer = Participant("printer", start_to_close=timedelta(seconds=10))


@printer.activity
async def print_out(order: Order, session: AsyncSession) -> Receipt:
    """Say more than a message carries, after a write of its own."""
    await session.execute(insert(orders).values(id=f"printed {order.item}"))
    return Receipt(number="9" * 10 * MIB)


@print_out.compensation
async def tear_up(order: Order) -> None: ...


printing = Saga("printing", Order).step(print_out).returns(print_out.out)


async def test_an_input_of_10_mib_is_refused_at_start_and_nothing_is_written(place: Place) -> None:
    """C-02: the caller's transaction is whole and may go on."""
    large = Order(item="x" * 10 * MIB)
    async with place.app().as_client() as client, place.session() as session:
        with pytest.raises(PayloadTooLarge) as alone:
            await client.start(purchase, large, id="alone")
        await session.execute(insert(orders).values(id="o-1"))
        with pytest.raises(PayloadTooLarge):
            await client.start(purchase, large, id="inside", session=session)
        await session.commit()
    assert "item" in alone.value.text
    assert "xxx" not in alone.value.text
    assert await place.count("orders") == 1
    assert await place.count("saga_instance") == 0


async def test_an_output_of_10_mib_undoes_its_own_step_and_the_saga_turns_back(place: Place) -> None:
    """The handler's own write is rolled back with it; it is not tried again."""
    async with place.app(sagas=[printing], participants=[printer]) as app:
        with pytest.raises(SagaCompensated) as ended:
            await app.client.execute(printing, Order(), timeout=timedelta(seconds=20))
    assert (ended.value.step, ended.value.reason) == ("print_out", "payload_too_large")
    assert await place.count("orders") == 0
    failures = await place.rows("SELECT attempt FROM saga_history WHERE event = 'ActivityFailed'")
    assert [tuple(row) for row in failures] == [(1,)]


async def test_no_adapter_is_built_for_a_message(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYD-8: once at registration, never on the way."""
    built: list[Any] = []
    real = TypeAdapter.__init__

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        built.append(arguments)
        real(self, *arguments, **options)

    async with place.app(participants=[shop]) as app:
        monkeypatch.setattr(TypeAdapter, "__init__", counted)
        handles = [await app.client.start(purchase, Order(), id=f"o-{n}") for n in range(SAGAS)]
        for handle in handles:
            assert (await handle.result(timeout=timedelta(seconds=20))).number == "c-book"
    assert built == []
