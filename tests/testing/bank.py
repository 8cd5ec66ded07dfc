"""The sagas of these tests: the money transfer with real balances, and one of contracts only."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from sqlalchemy import func, insert, select

from examples.money_transfer.transfer import Transfer, accounts, ledger, metadata, money_transfer
from saga import PIVOT, RETRIABLE, Participant, Saga
from saga.testing import Ended, Environment

ORDER = Transfer(id="t-1", source="alice", target="bob", amount=25)
TOTAL = 150
STEPS = ("withdraw", "deposit", "notify")
BACK = ("withdraw", "undo withdraw")


async def open_accounts(env: Environment) -> None:
    async with env.session() as session, session.begin():
        await session.execute(
            insert(accounts), [{"id": "alice", "balance": 100}, {"id": "bob", "balance": 50}]
        )


async def balances(env: Environment) -> dict[str, int]:
    async with env.session() as session:
        rows = (await session.execute(select(accounts.c.id, accounts.c.balance))).all()
    return {row.id: row.balance for row in rows}


async def moves(env: Environment) -> list[str]:
    async with env.session() as session:
        return list(await session.scalars(select(ledger.c.kind).order_by(ledger.c.id)))


async def conserved(env: Environment, ended: Ended[Any]) -> None:
    async with env.session() as session:
        total = await session.scalar(select(func.sum(accounts.c.balance)))
    assert total == TOTAL, f"{total} instead of {TOTAL}"


class Parcel(BaseModel):
    weight: int = 1


class Label(BaseModel):
    code: str


warehouse = Participant("warehouse", start_to_close=None)
reserve = warehouse.contract("reserve", Parcel, Label, compensated=True)
pick = warehouse.contract("pick", Parcel, type(None), compensated=True)
ship = warehouse.contract("ship", Parcel, Label, kind=PIVOT)
thank = warehouse.contract("thank", Parcel, type(None), kind=RETRIABLE)
shipping = Saga("shipping", Parcel).step(reserve).step(pick).step(ship).step(thank).returns(ship.out)

__all__ = ["metadata", "money_transfer"]
