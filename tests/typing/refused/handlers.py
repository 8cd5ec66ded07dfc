"""Activities and compensations declared or called wrongly."""

from datetime import timedelta

from pydantic import BaseModel

from saga import Participant, Refused, Result, RetryPolicy


class Transfer(BaseModel):
    amount: int


class Receipt(BaseModel):
    reference: str


bank = Participant("bank", start_to_close=timedelta(seconds=1))


@bank.activity
async def withdraw(transfer: Transfer) -> Receipt:
    return Receipt(reference="w")


@bank.activity
def plain(transfer: Transfer) -> Receipt:
    return Receipt(reference="w")


@bank.activity
def two(account: str, amount: int) -> Receipt:
    return Receipt(reference="w")


@bank.activity(batch=10)  # error
def plain_no_lists(transfer: Transfer) -> Receipt:
    return Receipt(reference="w")


@plain.inquiry  # error
def answers_something_else(transfer: Transfer) -> Transfer:
    return transfer


@bank.activity
def plain_wrong_undo(transfer: Transfer) -> Result[Receipt, int]:
    return Result(Receipt(reference="r"), undo="x")  # error


@bank.activity(batch=10)  # error
async def no_lists(transfer: Transfer) -> Receipt:
    return Receipt(reference="w")


@bank.activity
async def wrong_undo(transfer: Transfer) -> Result[Receipt, int]:
    return Result(Receipt(reference="r"), undo="x")  # error


async def unit_test() -> None:
    await withdraw(3)  # error
    await withdraw()  # error
    await withdraw(Transfer(amount=1), Transfer(amount=2))  # error


plain(3)  # error
plain()  # error
plain(Transfer(amount=1), Transfer(amount=2))  # error
print(plain.out.nothing)  # error
print(two.out.nothing)  # error
plain.compensation(3)  # error
Participant(3)  # error
Participant("x", start_to_close=30)  # error
Participant("x", retry=3)  # error
bank.contract("x", Transfer)  # error
bank.contract("x", Transfer, Receipt, compensated="yes")  # error
bank.contract("x", Transfer, Receipt, batch=3)  # error
withdraw.compensation(batch="3")  # error
Refused()  # error
RetryPolicy(initial=1)  # error
RetryPolicy(attempts="3")  # error
