"""A right program: every way to start a saga, wait for it and look at it."""

from datetime import timedelta
from typing import assert_type

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from saga import Client, Description, Handle, Participant, Saga


class Transfer(BaseModel):
    amount: int


class Receipt(BaseModel):
    reference: str


bank = Participant("bank", start_to_close=timedelta(seconds=1))
withdraw = bank.contract("withdraw", Transfer, Receipt, compensated=True)
saga = Saga("transfer", Transfer).step(withdraw).returns(withdraw.out)
silent = Saga("silent", Transfer).step(withdraw)


async def run(client: Client, session: AsyncSession) -> None:
    handle = await client.start(
        saga, Transfer(amount=1), id="t-1", session=session, if_open="fail", if_closed="start_again"
    )
    assert_type(handle, Handle[Receipt])
    assert_type(await handle.result(timeout=timedelta(seconds=30)), Receipt)
    assert_type(await client.execute(saga, Transfer(amount=1)), Receipt)
    assert_type(await client.start(silent, Transfer(amount=1)), Handle[None])
    assert_type(await client.find(saga, "t-1"), Handle[Receipt])
    assert_type(client.handle(saga, handle.run_id), Handle[Receipt])
    assert_type(await handle.describe(), Description)
