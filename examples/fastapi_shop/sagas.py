"""The saga of an order, and who carries it out: reserve a piece, then charge; what cannot be paid is put back."""

from __future__ import annotations

from datetime import timedelta
from os import environ

from pydantic import BaseModel
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from saga import PIVOT, App, Participant, Refused, Saga

DATABASE = environ.get("SHOP_DATABASE", "sqlite+aiosqlite:///shop.db")
CREDIT_CENTS = 10_000


class Base(DeclarativeBase):
    """The shop's tables."""


class Stock(Base):
    __tablename__ = "stock"
    item: Mapped[str] = mapped_column(primary_key=True)
    pieces: Mapped[int]


class Sale(Base):
    __tablename__ = "sale"
    id: Mapped[str] = mapped_column(primary_key=True)
    item: Mapped[str]
    cents: Mapped[int]


class Payment(Base):
    __tablename__ = "payment"
    sale: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int]


class Order(BaseModel):
    id: str
    item: str
    cents: int


shop = Participant("shop", start_to_close=timedelta(seconds=10))


@shop.activity
async def reserve(order: Order, session: AsyncSession) -> None:
    there = Stock.item == order.item, Stock.pieces > 0
    taken = await session.execute(
        update(Stock).where(*there).values(pieces=Stock.pieces - 1).returning(Stock.item)
    )
    if taken.first() is None:
        raise Refused("sold_out")


@reserve.compensation
async def put_back(order: Order, session: AsyncSession) -> None:
    await session.execute(update(Stock).where(Stock.item == order.item).values(pieces=Stock.pieces + 1))


@shop.activity(kind=PIVOT)
async def charge(order: Order, session: AsyncSession) -> str:
    if order.cents > CREDIT_CENTS:
        raise Refused("no_credit")
    session.add(Payment(sale=order.id, cents=order.cents))
    return f"receipt of {order.id}"


purchase = Saga("purchase", Order).step(reserve).step(charge).returns(charge.out)

app = App(
    DATABASE,
    broker=environ.get("SHOP_BROKER", "database://"),
    namespace=environ.get("SHOP_NAMESPACE", "shop"),
    sagas=[purchase],
    participants=[shop],
)
