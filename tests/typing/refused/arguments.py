"""Handlers with several payload arguments that are given something else."""

from datetime import timedelta

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from saga import ActivityContext, Participant, Result, Saga, arguments, make


class Transfer(BaseModel):
    source: str
    amount: int


class Receipt(BaseModel):
    reference: str


bank = Participant("bank", start_to_close=timedelta(seconds=1))
saga = Saga("transfer", Transfer)


@bank.activity
async def book(account: str, amount: int) -> Receipt:
    return Receipt(reference=account)


@bank.activity(no_compensation="a note")
async def note(account: str, transfer: Transfer, session: AsyncSession, context: ActivityContext) -> Receipt:
    return Receipt(reference=account)


@bank.activity
async def hold(account: str, amount: int, session: AsyncSession) -> Result[Receipt, int]:
    return Result(Receipt(reference=account), undo=amount)


withdraw = bank.contract("withdraw", Transfer, Receipt)

saga.step(book)  # error
saga.step(book, saga.input.source)  # error
saga.step(book, make(Transfer, source="a", amount=1))  # error
saga.step(book, arguments(saga.input.source))  # error
saga.step(book, arguments(saga.input.source, saga.input.source))  # error
saga.step(book, arguments(saga.input.amount, saga.input.source))  # error
saga.step(book, arguments(saga.input.source, saga.input.amount, 1))  # error
saga.step(note, saga.input.source)  # error
saga.step(note, arguments(saga.input.source, saga.input.amount))  # error
saga.step(hold, arguments(saga.input.source, "1"))  # error
saga.step(hold, arguments("a", hold.out))  # error
saga.step(withdraw, arguments(saga.input))  # error
saga.step(withdraw, arguments(saga.input.source, saga.input.amount))  # error
_a = book.out.account  # error
