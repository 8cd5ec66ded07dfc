"""Callers without an event loop who start a saga with the wrong input, or take its result for something else."""

from datetime import timedelta

from pydantic import BaseModel
from sqlalchemy import Engine

from saga import Participant, Saga, SyncClient


class Transfer(BaseModel):
    amount: int


class Receipt(BaseModel):
    reference: str


bank = Participant("bank", start_to_close=timedelta(seconds=1))
withdraw = bank.contract("withdraw", Transfer, Receipt, compensated=True)
saga = Saga("transfer", Transfer).step(withdraw).returns(withdraw.out)


def start(client: SyncClient, order: Transfer, engine: Engine) -> None:
    client.start(saga, Receipt(reference="r"))  # error
    client.start(saga)  # error
    client.start(saga, order, "t-1")  # error
    client.start(saga, order, session=engine)  # error
    client.start(saga, order, if_open="ignore")  # error
    client.execute(saga, order, timeout=30)  # error
    client.result(saga)  # error
    client.cancel("t-1")  # error
    client.mark_done(client.start(saga, order))  # error
    client.publish(Receipt(reference="r"))  # error
    text: str = client.execute(saga, order, timeout=timedelta(seconds=1))  # error
    print(text)
