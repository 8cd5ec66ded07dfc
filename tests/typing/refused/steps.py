"""Steps whose activity or input does not fit."""

from datetime import timedelta

from pydantic import BaseModel

from saga import Participant, RetryPolicy, Saga, make


class Transfer(BaseModel):
    source: str
    amount: int


class Receipt(BaseModel):
    reference: str


class Deposit(BaseModel):
    account: str
    amount: int


bank = Participant("bank", start_to_close=timedelta(seconds=1))
withdraw = bank.contract("withdraw", Transfer, Receipt, compensated=True)
deposit = bank.contract("deposit", Deposit, Receipt, compensated=True)
look = bank.contract("look", str, Receipt)
saga = Saga("transfer", Transfer)

saga.step(deposit)  # error
saga.step(look)  # error
saga.step(deposit, saga.input)  # error
saga.step(deposit, withdraw.out)  # error
saga.step(look, saga.input.amount)  # error
saga.step(look, withdraw.out)  # error
saga.step(withdraw, make(Deposit, account="a", amount=1))  # error
saga.step("withdraw")  # error
saga.step(bank)  # error
saga.step()  # error
saga.step(withdraw, name=3)  # error
saga.step(withdraw, kind="pivot")  # error
saga.step(withdraw, retry=3)  # error
saga.step(withdraw, start_to_close=30)  # error
saga.step(withdraw, no_compensation=True)  # error
saga.step(withdraw, retries=RetryPolicy())  # error
