"""Handlers that FastStream gives arguments to, and what our adapter refuses of FastStream or stands on (row I-05)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

import pytest
from faststream import Context, Depends, FastStream, StreamMessage
from faststream.kafka import KafkaBroker
from faststream.rabbit import RabbitBroker
from sqlalchemy.ext.asyncio import AsyncSession

from saga import (
    ActivityContext,
    App,
    BrokerUnavailable,
    ConfigurationError,
    DefinitionError,
    Refused,
    Saga,
    SagaCompensated,
)
from saga.brokers.base import Delivery
from saga.brokers.faststream import FastStreamBroker
from saga.brokers.faststream.consumer import End, Held

pytestmark = [pytest.mark.feature("I-05"), pytest.mark.stack("sqlite")]

LIMIT = timedelta(seconds=10)


@dataclass
class Order:
    id: str


class Rates:
    """What is injected."""

    in_use = False


async def rates() -> AsyncIterator[Rates]:
    given = Rates()
    given.in_use = True
    yield given
    given.in_use = False


def plain_rates() -> Rates:
    return Rates()


def other_rates() -> Rates:
    given = Rates()
    given.in_use = True
    return given


@pytest.fixture
def broker() -> RabbitBroker:
    return RabbitBroker("amqp://localhost")


# --- what a handler is given ------------------------------------------------------------------


async def test_a_handler_gets_its_own_from_the_command_and_the_rest_from_faststream(
    broker: RabbitBroker, sqlite_url: str
) -> None:
    bank = FastStreamBroker(broker).participant("bank", start_to_close=LIMIT)
    seen: list[Any] = []

    @bank.activity
    async def pay(
        order: Order,
        session: AsyncSession,
        ctx: ActivityContext,
        rates: Annotated[Rates, Depends(rates)],
        service: FastStream = Context("app"),
    ) -> str:
        """What it does."""
        seen.append((session.is_active, ctx.step, rates.in_use, service))
        return order.id

    @pay.compensation
    async def pay_back(order: Order, output: str | None, rates: Rates = Depends(plain_rates)) -> None:
        seen.append((order.id, output, rates.in_use))

    service = FastStream(broker)  # made later than its handlers: it brings the context that they are given
    handler = pay.handler
    assert handler is not None
    assert (handler.payload_argument, handler.session_argument, handler.context_argument) == (
        "order",
        "session",
        "ctx",
    )
    assert handler.function.__doc__ == "What it does."

    @bank.activity(no_compensation="the last step")
    async def refuse(order: Order) -> None:
        raise Refused("never_mind")

    saga = Saga("payment", Order).step(pay).step(refuse)
    async with App(sqlite_url, sagas=[saga], participants=[bank]) as app:
        with pytest.raises(SagaCompensated) as ended:
            await app.client.execute(saga, Order("o-1"), timeout=timedelta(seconds=60))
    assert ended.value.reason == "never_mind"
    assert seen == [(True, "pay", True, service), ("o-1", "o-1", False)]


def test_a_plain_def_gets_them_too(broker: RabbitBroker) -> None:
    bank = FastStreamBroker(broker).participant("bank", start_to_close=LIMIT)

    @bank.activity
    def pay(order: Order, rates: Rates = Depends(plain_rates)) -> bool:
        return rates.in_use

    assert pay.handler is not None
    assert pay.handler.threaded
    assert not pay(Order("o-1"))
    with broker.provider.scope(plain_rates, other_rates):
        assert pay(Order("o-1")), "as tests of a FastStream service put something else in its place"


def test_a_handler_that_asks_for_nothing_is_called_itself(broker: RabbitBroker) -> None:
    bank = FastStreamBroker(broker).participant("bank", start_to_close=LIMIT)

    async def pay(order: Order) -> None: ...

    activity = bank.activity(pay)
    assert activity.handler is not None
    assert activity.handler.function is pay


def test_what_is_refused_of_a_handler_is_refused_here_too(broker: RabbitBroker) -> None:
    bank = FastStreamBroker(broker).participant("bank", start_to_close=LIMIT)
    with pytest.raises(DefinitionError):

        @bank.activity
        async def pay(order: Order, unknown, rates: Rates = Depends(rates)) -> None:  # type: ignore[no-untyped-def]
            ...


# --- what is refused of a broker --------------------------------------------------------------


def test_a_broker_that_is_neither_rabbitmq_nor_kafka_is_refused() -> None:
    with pytest.raises(ConfigurationError) as refused:
        FastStreamBroker(object())
    assert "faststream.rabbit.RabbitBroker" in refused.value.text


def test_a_kafka_producer_whose_confirms_can_be_lost_is_refused() -> None:
    """The private name that is looked at is FastStream's: this test is what notices when it goes."""
    for options in ({}, {"acks": 1}, {"acks": 0}):
        with pytest.raises(ConfigurationError) as refused:
            FastStreamBroker(KafkaBroker("localhost:9092", **options))  # type: ignore[arg-type]
        assert "enable_idempotence" in refused.value.text
    FastStreamBroker(KafkaBroker("localhost:9092", acks="all"))
    FastStreamBroker(KafkaBroker("localhost:9092", enable_idempotence=True))


async def test_a_broker_that_is_away_is_told_so(sqlite_url: str) -> None:
    sagas = FastStreamBroker(RabbitBroker("amqp://guest:secret@localhost:1"))
    app = App(sqlite_url, broker=sagas, participants=[sagas.participant("bank", start_to_close=LIMIT)])
    with pytest.raises(BrokerUnavailable) as refused:
        await app.start(coordinator=False, participants=True)
    assert "secret" not in refused.value.text


# --- when a message of FastStream's ends --------------------------------------------------------


def delivered(held: Held, count: int) -> list[Delivery]:
    made = [Delivery("c", b"", "", {}, False, 1, token=held) for _ in range(count)]
    held.unsettled.update(made)
    return made


async def test_a_message_is_acked_when_all_that_came_in_it_is_settled_each_once() -> None:
    held = Held(StreamMessage(raw_message=None, body=b""))
    first, second = delivered(held, 2)
    held.settle(first, again=False)
    held.settle(first, again=False)
    assert not held.end.done()
    held.settle(second, again=False)
    assert held.end.result() is End.ACK


async def test_one_that_is_wanted_again_brings_back_the_whole_message() -> None:
    held = Held(StreamMessage(raw_message=None, body=b""))
    first, second = delivered(held, 2)
    held.settle(first, again=True)
    assert not held.end.done()
    held.settle(second, again=False)
    assert held.end.result() is End.NACK


async def test_what_is_left_is_not_acked_by_a_late_reply() -> None:
    held = Held(StreamMessage(raw_message=None, body=b""))
    (only,) = delivered(held, 1)
    held.leave()
    held.settle(only, again=False)
    assert held.end.result() is End.LEFT
