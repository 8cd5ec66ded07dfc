"""Payloads: strict in, JSON bytes out, within the limit; the rules of pydantic that this leans on (PYD-1 to PYD-8)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, computed_field

from saga.definition.activity import Participant
from saga.errors import DefinitionError, PayloadInvalid, PayloadTooLarge
from saga.messages import BODY_BYTES_MAX
from saga.outcomes import ActivityContext, Refused, Result
from saga.payloads import NONE, WARNING_BYTES, codec

pytestmark = [pytest.mark.stack("pure"), pytest.mark.feature("D-02")]


class Order(BaseModel):
    number: int
    at: AwareDatetime | None = None
    price: Decimal | None = None
    key: UUID | None = None
    rate: float | None = None


orders = codec(Order, what="order")


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b'{"number":"12"}', "number: int_type"),
        (b'{"number":1.0}', "number: int_type"),
        (b'{"number":true}', "number: int_type"),
        (b'{"number":1,"secret":"x"}', "*: extra_forbidden"),
        (b'{"number":1,"at":1700000000}', "at: datetime_type"),
        (b'{"number":1,"at":"2026-01-01T00:00:00"}', "at: timezone_aware"),
        (b'{"number":1,"rate":"1.5"}', "rate: float_type"),
        (b'{"number":1,"price":0.1}', "price: decimal_float"),
        (b"[]", "body: model_type"),
        (b"{", "body: json_invalid"),
        (b"", "body: json_invalid"),
        (b"[" * 5_000, "body: json_invalid"),
    ],
)
def test_what_is_not_exactly_of_the_type_is_refused_with_its_path(raw: bytes, path: str) -> None:
    """PYD-1, PYD-2, PYD-7."""
    with pytest.raises(PayloadInvalid) as caught:
        orders.decode(raw, what="input")

    assert path in caught.value.text
    assert caught.value.__cause__ is None


def test_a_refusal_never_shows_the_value() -> None:
    """PYD-4."""
    with pytest.raises(PayloadInvalid) as caught:
        orders.decode(b'{"number":"4111111111111111"}')

    shown = (
        f"{caught.value!r} {caught.value} {caught.value.text} {caught.value.__notes__} {caught.value.args}"
    )
    assert "4111" not in shown


def test_json_texts_of_decimals_times_and_uuids_are_accepted_and_come_back() -> None:
    """PYD-3: strict refuses them from Python objects, so values come from JSON bytes only."""
    key = b"12345678-1234-5678-1234-567812345678"
    raw = b'{"number":1,"at":"2026-01-01T00:00:00Z","price":"0.10","key":"' + key + b'","rate":null}'

    assert orders.encode(orders.decode(raw)) == raw
    assert orders.decode(raw).price == Decimal("0.10")


def test_a_float_that_json_lacks_is_refused_by_the_reader() -> None:
    """PYD-5: NaN leaves as null; a field that cannot be null refuses it."""
    rates = codec(float, what="rate")

    with pytest.raises(PayloadInvalid):
        rates.decode(rates.encode(float("nan")))
    for raw in (b"NaN", b"Infinity", b"-Infinity"):
        with pytest.raises(PayloadInvalid):
            codec(Order, what="x").decode(b'{"number":' + raw + b"}")


def test_a_value_of_another_type_is_refused_when_it_leaves() -> None:
    with pytest.raises(PayloadInvalid):
        orders.encode("no order")  # type: ignore[arg-type]


def test_fields_bear_their_own_names_whatever_their_aliases() -> None:
    class Aliased(BaseModel):
        model_config = ConfigDict(serialize_by_alias=True)
        full_name: str = Field(alias="fullName")

    known = codec(Aliased, what="x")

    assert known.encode(Aliased(fullName="n")) == b'{"full_name":"n"}'
    assert known.decode(b'{"full_name":"n"}').full_name == "n"
    assert list(known.schema()["properties"]) == ["full_name"]
    with pytest.raises(PayloadInvalid):
        known.decode(b'{"fullName":"n"}')


def test_defaults_are_drawn_once_and_then_travel() -> None:
    """P32."""
    raw = orders.encode(orders.decode(b'{"number":1}'))

    assert orders.encode(orders.decode(raw)) == raw


def test_a_large_payload_is_logged_and_a_larger_one_refused_with_its_largest_field(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Page(BaseModel):
        title: str
        parts: list[str]

    pages = codec(Page, what="page")
    with caplog.at_level(logging.WARNING, "saga.payloads"):
        pages.encode(Page(title="t", parts=["x" * WARNING_BYTES]), what="output")
        assert "output of 65" in caplog.text
        pages.encode(Page(title="t", parts=["x"]))
        assert len(caplog.records) == 1
    with pytest.raises(PayloadTooLarge) as caught:
        pages.encode(Page(title="t", parts=["x" * BODY_BYTES_MAX, "y"]))
    assert "parts.0" in caught.value.text
    assert "xxx" not in caught.value.text


def test_an_adapter_is_built_once_for_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYD-8: at registration, never for a message."""
    built = []
    real = TypeAdapter.__init__

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        built.append(args)
        real(self, *args, **kwargs)

    monkeypatch.setattr(TypeAdapter, "__init__", counting)
    assert codec(Order, what="again") is orders
    for _ in range(100):
        orders.encode(orders.decode(b'{"number":1}'))
    assert built == []


@pytest.mark.parametrize("type_", [type("Opaque", (), {}), "Missing", "list[Missing]", 3], ids=str)
def test_what_pydantic_cannot_describe_is_refused_at_registration(type_: Any) -> None:
    with pytest.raises(DefinitionError, match="SG101"):
        codec(type_, what="x")


def test_a_type_that_writes_what_it_would_not_read_is_refused_at_registration() -> None:
    """PYD-5."""

    class Computed(BaseModel):
        side: int

        @computed_field  # type: ignore[prop-decorator]
        @property
        def area(self) -> int:
            return self.side**2

    class Hidden(BaseModel):
        side: int
        secret: str = Field(exclude=True)

    for type_, field in ((Computed, "area"), (list[Computed], "area"), (Hidden, "secret")):
        with pytest.raises(DefinitionError) as caught:
            codec(type_, what="x")
        assert f"({field})" in caught.value.text


def test_dataclasses_and_plain_types_are_payloads_too() -> None:
    @dataclass
    class Point:
        x: int
        y: int

    assert codec(Point, what="p").decode(b'{"x":1,"y":2}') == Point(1, 2)
    assert codec(list[int], what="l").decode(b"[1,2]") == [1, 2]
    assert NONE.encode(None) == b"null"
    with pytest.raises(PayloadInvalid):
        codec(Point, what="p").decode(b'{"x":1,"y":"2"}')


# --- signatures ---------------------------------------------------------------------------------


def participant() -> Participant:
    return Participant("p", start_to_close=timedelta(seconds=1))


def test_several_arguments_become_one_generated_model() -> None:
    @participant().activity
    async def pay(account: str, amount: int, context: ActivityContext) -> None: ...

    assert pay.input.decode(b'{"account":"a","amount":1}').model_dump() == {"account": "a", "amount": 1}
    assert pay.handler is not None
    assert (pay.handler.spread, pay.handler.context_argument) == (("account", "amount"), "context")
    with pytest.raises(PayloadInvalid):
        pay.input.decode(b'{"account":"a"}')


def test_a_result_splits_into_output_and_undo_data() -> None:
    @participant().activity
    async def act(order: Order) -> Result[int, str]:
        return Result(order.number, "undo")

    assert (act.output.type, act.undo.type) == (int, str)


def test_a_batch_handler_takes_and_gives_lists() -> None:
    @participant().activity(batch=10)
    async def act(orders: list[Order]) -> list[int | Refused]:
        return [order.number for order in orders]

    assert (act.input.type, act.output.type) == (Order, int)
    assert act.handler is not None
    assert act.handler.batch == 10


def _declare(function: Any, **options: Any) -> None:
    participant().activity(**options)(function)


def test_a_signature_that_says_too_little_is_refused() -> None:
    async def no_annotation(order): ...  # type: ignore[no-untyped-def]
    async def no_return(order: Order): ...  # type: ignore[no-untyped-def]
    async def stars(*orders: Order) -> None: ...
    async def unknown(order: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
    async def two_contexts(order: Order, a: ActivityContext, b: ActivityContext) -> None: ...
    async def no_lists(order: Order) -> None: ...
    def not_async(order: Order) -> None: ...

    for function in (no_annotation, no_return, stars, unknown, two_contexts):
        with pytest.raises(DefinitionError, match="SG101"):
            _declare(function, name="x")
    for batch in (5, 0, 1_001):
        with pytest.raises(DefinitionError, match="SG101"):
            _declare(no_lists, batch=batch)


def test_a_compensation_gets_what_it_names_by_type() -> None:
    one = participant()

    @one.activity
    async def act(order: Order) -> Result[int, str]:
        return Result(order.number, "undo")

    @act.compensation
    async def undo(order: Order, undo: str | None, output: int) -> None: ...

    assert act.compensation_ is not None
    handler = act.compensation_.handler
    assert handler is not None
    assert (handler.payload_argument, handler.undo_argument, handler.output_argument) == (
        "order",
        "undo",
        "output",
    )
    assert (handler.undo_optional, handler.output_optional) == (True, False)


def test_a_compensation_that_asks_for_something_else_is_refused() -> None:
    @participant().activity
    async def act(order: Order) -> int:
        return order.number

    with pytest.raises(DefinitionError) as caught:

        @act.compensation
        async def undo(order: Order, other: datetime) -> None: ...

    assert "'other'" in caught.value.text


@pytest.mark.feature("D-01", acceptance=True, scale=1.0)
async def test_the_decorated_name_stays_a_plain_function_and_a_contract_needs_no_code() -> None:
    @participant().activity
    async def double(order: Order) -> int:
        return order.number * 2

    contract = participant().contract("double", Order, int)

    assert await double(Order(number=4)) == 8
    assert contract.input is double.input
    with pytest.raises(DefinitionError, match="SG101"):
        contract(Order(number=4))
