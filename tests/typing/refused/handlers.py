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


@bank.activity  # error
def not_async(transfer: Transfer) -> Receipt:
    return Receipt(reference="w")


@withdraw.compensation  # error
def undo_not_async(transfer: Transfer) -> None: ...


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
