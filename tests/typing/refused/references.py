"""References and made inputs that name what is not there."""

from datetime import timedelta

from pydantic import BaseModel

from saga import Participant, Saga, make


class Transfer(BaseModel):
    source: str
    amount: int
    note: str | None = None


class Receipt(BaseModel):
    reference: str


class Deposit(BaseModel):
    account: str
    amount: int


bank = Participant("bank", start_to_close=timedelta(seconds=1))
withdraw = bank.contract("withdraw", Transfer, Receipt, compensated=True)
deposit = bank.contract("deposit", Deposit, Receipt, compensated=True)
saga = Saga("transfer", Transfer)

a = withdraw.out.refrence  # error
b = saga.input.target  # error
c = withdraw.at("x").out.amount  # error
withdraw.at(3)  # error
make(Deposit, account=saga.input.amount, amount=1)  # error
make(Deposit, account=saga.input.note, amount=1)  # error
make(Deposit, account=withdraw.out, amount=1)  # error
make(Deposit, account="a", amount="1")  # error
make(Deposit, account="a")  # error
make(Deposit, account="a", amount=1, more=2)  # error
saga.step(deposit, make(Deposit, account=withdraw.out.reference, amount=withdraw.out.reference))  # error
