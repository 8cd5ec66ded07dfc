"""A right program: every way to declare activities and steps."""

from datetime import timedelta
from typing import assert_type
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from saga import (
    PIVOT,
    READ_ONLY,
    RETRIABLE,
    Activity,
    ActivityContext,
    Inquiry,
    Participant,
    Refused,
    Result,
    RetryPolicy,
    Saga,
    arguments,
    make,
)


class Transfer(BaseModel):
    source: str
    target: str
    amount: int


class Receipt(BaseModel):
    reference: str


class Deposit(BaseModel):
    account: str
    amount: int
    reference: str | None = None


class Summary(BaseModel):
    first: str
    second: str


accounts = Participant("accounts", start_to_close=timedelta(seconds=30))


@accounts.activity
async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
    if transfer.amount < 0:
        raise Refused("negative", {"amount": transfer.amount})
    return Receipt(reference="w")


@withdraw.compensation
async def refund(transfer: Transfer, session: AsyncSession) -> None: ...


@accounts.activity(kind=PIVOT, retry=RetryPolicy(attempts=3))
async def deposit(order: Deposit, session: AsyncSession, context: ActivityContext) -> Receipt:
    return Receipt(reference=context.operation_key)


@accounts.activity(batch=100, no_compensation="only a note")
async def note(transfers: list[Transfer], session: AsyncSession) -> list[Receipt | Refused]:
    return [Receipt(reference=each.source) for each in transfers]


@accounts.activity
async def reserve(transfer: Transfer) -> Result[Receipt, int]:
    return Result(Receipt(reference="r"), undo=transfer.amount)


@reserve.compensation(start_to_close=None)
async def release(transfer: Transfer, undo: int | None) -> None: ...


@accounts.activity(no_compensation="only a note")
async def book(account: str, amount: int, session: AsyncSession) -> Receipt:
    return Receipt(reference=account)


@accounts.activity
async def hold(
    account: str, amount: int, context: ActivityContext, session: AsyncSession
) -> Result[Receipt, int]:
    return Result(Receipt(reference=account), undo=amount)


@accounts.activity
async def tell(transfer: Transfer, note: str | None, token: UUID) -> None: ...


@accounts.activity
async def named(transfer: Transfer, *, session: AsyncSession) -> Receipt:
    return Receipt(reference="n")


@accounts.activity
async def in_context(transfer: Transfer, context: ActivityContext) -> Receipt:
    return Receipt(reference=context.operation_key)


@accounts.activity
def plain(transfer: Transfer, session: Session) -> Receipt:
    return Receipt(reference="p")


@plain.compensation
def plain_undo(transfer: Transfer, receipt: Receipt, session: Session) -> None: ...


@accounts.activity(no_compensation="only a note")
def plain_book(account: str, amount: int, session: Session) -> Receipt:
    return Receipt(reference=account)


@accounts.activity
def plain_hold(account: str, amount: int, context: ActivityContext, session: Session) -> Result[Receipt, int]:
    return Result(Receipt(reference=account), undo=amount)


@accounts.activity(kind=PIVOT)
def plain_reserve(transfer: Transfer, context: ActivityContext) -> Result[Receipt, int]:
    return Result(Receipt(reference="r"), undo=transfer.amount)


@plain_reserve.compensation(start_to_close=None)
def plain_release(transfer: Transfer, undo: int | None) -> None: ...


@accounts.activity(batch=100, no_compensation="only a note")
def plain_note(transfers: list[Transfer], session: Session) -> list[Receipt | Refused]:
    return [Receipt(reference=each.source) for each in transfers]


@accounts.activity(batch=100)
def plain_many(transfers: list[Transfer], session: Session) -> list[Result[Receipt, int]]:
    return [Result(Receipt(reference=each.source), undo=each.amount) for each in transfers]


@accounts.activity(at_least_once=True)
def plain_charge(transfer: Transfer, context: ActivityContext) -> Receipt:
    return Receipt(reference=context.operation_key)


@plain_charge.inquiry
def plain_look(transfer: Transfer, context: ActivityContext) -> Receipt | Inquiry:
    return Inquiry.NOT_DONE


@accounts.activity
def plain_tell(account: str, amount: int) -> None: ...


assert_type(plain.out, Receipt)
assert_type(plain_book.out.reference, str)
assert_type(plain_hold.out, Receipt)
assert_type(plain_reserve.out.reference, str)
assert_type(plain_note.out, Receipt)
assert_type(plain_many.out, Receipt)
assert_type(plain_charge.out, Receipt)
assert_type(book.out.reference, str)
assert_type(hold.out, Receipt)
look = accounts.contract("look", str, Receipt, kind=READ_ONLY)
notify = accounts.contract("notify", Transfer, type(None), kind=RETRIABLE)

start = Saga("transfer", Transfer)
assert_type(start, Saga[Transfer, None])
assert_type(start.input.amount, int)
assert_type(withdraw.out, Receipt)
assert_type(reserve.out.reference, str)
assert_type(note.out, Receipt)
assert_type(withdraw.at("second").out.reference, str)

whole = (
    start.step(withdraw)
    .step(withdraw, name="second", retry=RetryPolicy(attempts=2), start_to_close=None)
    .step(reserve)
    .step(note)
    .step(look, start.input.source)
    .step(look, withdraw.at("second").out.reference, name="look-again")
    .step(
        deposit,
        make(Deposit, account=start.input.target, amount=start.input.amount, reference=reserve.out.reference),
    )
    .step(book, arguments(start.input.source, start.input.amount))
    .step(hold, arguments(withdraw.at("second").out.reference, 3))
    .step(tell, arguments(start.input, deposit.out.reference, UUID(int=1)))
    .step(named)
    .step(in_context)
    .step(notify)
    .step(plain)
    .step(plain_book, arguments(plain.out.reference, 3))
    .step(plain_hold, arguments(start.input.source, start.input.amount))
    .step(plain_reserve)
    .step(plain_note)
    .step(plain_charge)
    .step(plain_tell, arguments(start.input.source, start.input.amount))
)
assert_type(whole, Saga[Transfer, None])
assert_type(whole.returns(deposit.out), Saga[Transfer, Receipt])
assert_type(whole.returns(deposit.out.reference), Saga[Transfer, str])
assert_type(
    whole.returns(make(Summary, first=deposit.out.reference, second=reserve.out.reference)),
    Saga[Transfer, Summary],
)


def served(activity: Activity[Transfer, Receipt, ...]) -> Saga[Transfer, Receipt]:
    return Saga("other", Transfer).step(activity).returns(activity.out)


def plain_unit_test(session: Session) -> None:
    plain(Transfer(source="a", target="b", amount=1), session)
    plain_undo(Transfer(source="a", target="b", amount=1), Receipt(reference="p"), session)
    plain_book("a", 1, session)


async def unit_test(session: AsyncSession) -> None:
    await withdraw(Transfer(source="a", target="b", amount=1), session)
    await withdraw(Transfer(source="a", target="b", amount=1), session=session)
    await book("a", 1, session)
