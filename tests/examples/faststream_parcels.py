"""A FastStream service, as a process: three subscribers of its own, and the two activities of `parcels` beside them.

`BROKER_URL`, `DATABASE_URL` and `SAGA_NAMESPACE` say where; `SAGA_FAIL` arms crash points.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Annotated, Any

from faststream import Context, Depends, FastStream, Logger
from sqlalchemy import insert, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from saga import App, Refused, failpoints
from saga.brokers.faststream import FastStreamBroker
from tests.examples.parcels import Order, Parcel, parcels

URL = os.environ["BROKER_URL"]
DATABASE = os.environ["DATABASE_URL"]
NAMESPACE = os.environ["SAGA_NAMESPACE"]


class Base(DeclarativeBase):
    """The service's tables."""


class Shipped(Base):
    __tablename__ = "parcel"
    id: Mapped[str] = mapped_column(primary_key=True)
    cancelled: Mapped[bool] = mapped_column(default=False)


class Note(Base):
    __tablename__ = "note"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    handler: Mapped[str]
    text: Mapped[str]


class Limits:
    """What is injected."""

    grams_max = 30_000


async def limits() -> AsyncIterator[Limits]:
    yield Limits()


def make_broker() -> Any:
    if URL.startswith("kafka"):
        from faststream.kafka import KafkaBroker

        return KafkaBroker(URL.removeprefix("kafka://"), enable_idempotence=True)
    from faststream.rabbit import RabbitBroker

    return RabbitBroker(URL)


broker = make_broker()
sagas = FastStreamBroker(broker)
served = sagas.participant(parcels.name, start_to_close=parcels.start_to_close)
app = App(DATABASE, broker=sagas, namespace=NAMESPACE, participants=[served])
service = FastStream(broker, lifespan=app.lifespan, on_shutdown=[app.stop])
engine = create_async_engine(DATABASE)


async def write_down(handler: str, text: str) -> None:
    async with AsyncSession(engine) as session, session.begin():
        session.add(Note(handler=handler, text=text))


@broker.subscriber(f"{NAMESPACE}.notes")
async def note(text: str) -> None:
    await write_down("note", text)


@broker.subscriber(f"{NAMESPACE}.asked")
@broker.publisher(f"{NAMESPACE}.answered")
async def ask(text: str) -> str:
    return f"{text}?"


@broker.subscriber(f"{NAMESPACE}.answered")
async def answer(text: str) -> None:
    await write_down("answer", text)


@served.activity
async def ship(
    order: Order, session: AsyncSession, logger: Logger, limits: Annotated[Limits, Depends(limits)]
) -> Parcel:
    if order.grams > limits.grams_max:
        raise Refused("too_heavy")
    logger.info("ships %s", order.id)
    await session.execute(insert(Shipped).values(id=order.id, cancelled=False))
    return Parcel(parcel=order.id)


@ship.compensation
async def take_back(order: Order, session: AsyncSession, limits: Limits = Depends(limits)) -> None:
    assert limits.grams_max >= order.grams
    await session.execute(update(Shipped).where(Shipped.id == order.id).values(cancelled=True))


@served.activity(no_compensation="a label is thrown away")
async def label(order: Order, service: FastStream = Context("app")) -> str:
    assert service.running
    return f"{order.address} ({order.grams} g)"


@service.after_startup
async def told() -> None:
    print("service is up", flush=True)


if __name__ == "__main__":
    failpoints.arm(os.environ.get("SAGA_FAIL", ""))
    asyncio.run(service.run())
