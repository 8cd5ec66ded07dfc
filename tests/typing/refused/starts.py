"""Callers who start a saga with the wrong input, or take its result for something else."""

from datetime import timedelta

from pydantic import BaseModel
from sqlalchemy import Engine

from saga import Client, Handle, Participant, Saga


class Transfer(BaseModel):
    amount: int


class Receipt(BaseModel):
    reference: str


bank = Participant("bank", start_to_close=timedelta(seconds=1))
withdraw = bank.contract("withdraw", Transfer, Receipt, compensated=True)
saga = Saga("transfer", Transfer).step(withdraw).returns(withdraw.out)
silent = Saga("silent", Transfer).step(withdraw)


async def start(client: Client, order: Transfer, engine: Engine) -> None:
    await client.start(saga, Receipt(reference="r"))  # error
    await client.start(saga, {"amount": 1})  # error
    await client.start(saga, 1)  # error
    await client.start(saga)  # error
    await client.start("transfer", order)  # error
    await client.start(withdraw, order)  # error
    await client.start(saga, order, "t-1")  # error
    await client.start(saga, order, id=1)  # error
    await client.start(saga, order, session=engine)  # error
    await client.start(saga, order, if_open="ignore")  # error
    await client.start(saga, order, if_open="start_again")  # error
    await client.start(saga, order, if_closed="cancel_then_start")  # error
    await client.start(saga, order, idempotency_key="t-1")  # error
    await client.execute(saga, Receipt(reference="r"))  # error
    await client.execute(saga, order, timeout=30)  # error


async def finish(client: Client, handle: Handle[Receipt], order: Transfer) -> None:
    _a: Handle[Transfer] = await client.start(saga, order)  # error
    _b: Handle[Receipt] = await client.start(silent, order)  # error
    _c: str = await handle.result()  # error
    _d: Receipt = await (await client.start(silent, order)).result()  # error
    _e: Receipt = handle.result()  # error
    print((await handle.result()).amount)  # error
    await handle.result(timeout=30)  # error
    await handle.result(30)  # error
    await handle.reslut()  # error
    _f: Transfer = await client.execute(saga, order)  # error
    _g: Handle[str] = await client.find(saga, "t-1")  # error
    print((await handle.describe()).result)  # error
    handle.run_id = None  # error
    _h: Handle[Transfer] = handle  # error
    _j: Handle[Transfer] = client.handle(saga, handle.run_id)  # error
    _k: Receipt = await client.find(saga, "t-1")  # error
    _l: Transfer = await handle.result(timeout=timedelta(seconds=1))  # error
    wants_transfer(handle)  # error


def wants_transfer(handle: Handle[Transfer]) -> None: ...
