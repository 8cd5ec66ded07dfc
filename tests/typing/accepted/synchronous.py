"""A right program without an event loop: the client, sessions and results have the types of the asynchronous ones."""

from datetime import timedelta
from typing import assert_type
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import Connection
from sqlalchemy.orm import Session, scoped_session

from saga import Description, Handle, Participant, Saga, SyncClient


class Transfer(BaseModel):
    amount: int


class Receipt(BaseModel):
    reference: str


bank = Participant("bank", start_to_close=timedelta(seconds=1))
withdraw = bank.contract("withdraw", Transfer, Receipt, compensated=True)
saga = Saga("transfer", Transfer).step(withdraw).returns(withdraw.out)


def run(
    client: SyncClient, session: Session, connection: Connection, registry: scoped_session[Session]
) -> None:
    handle = client.start(saga, Transfer(amount=1), id="t-1", session=session, if_open="fail")
    assert_type(handle, Handle[Receipt])
    assert_type(client.start(saga, Transfer(amount=1), session=connection), Handle[Receipt])
    assert_type(client.start(saga, Transfer(amount=1), session=registry), Handle[Receipt])
    assert_type(client.result(handle, timeout=timedelta(seconds=30)), Receipt)
    assert_type(client.execute(saga, Transfer(amount=1)), Receipt)
    assert_type(client.find(saga, "t-1"), Handle[Receipt])
    assert_type(client.describe(handle), Description)
    assert_type(client.count(), int)
    client.cancel(handle, reason="changed my mind", session=session)
    assert_type(client.publish(Receipt(reference="r"), topic="receipts", session=session), UUID)
    with client as opened:
        assert_type(opened, SyncClient)
