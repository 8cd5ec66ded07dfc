"""Sagas whose result is not what their type says."""

from datetime import timedelta

from pydantic import BaseModel

from saga import Participant, Saga


class Transfer(BaseModel):
    amount: int


class Receipt(BaseModel):
    reference: str


bank = Participant("bank", start_to_close=timedelta(seconds=1))
withdraw = bank.contract("withdraw", Transfer, Receipt, compensated=True)
saga = Saga("transfer", Transfer).step(withdraw)

a: Saga[Transfer, str] = saga.returns(withdraw.out)  # error
b: Saga[Transfer, Receipt] = saga.returns(withdraw.out.reference)  # error
c: Saga[Transfer, Receipt] = saga  # error
d: Saga[Receipt, None] = saga  # error
saga.returns()  # error
Saga("transfer", 3)  # error
Saga("transfer")  # error
Saga(Transfer, "transfer")  # error
Saga("transfer", Transfer, version="1")  # error
