"""Money from a savings account to a giro account, at two banks: payloads, tables, activities and the saga.

Each activity is one local transaction of the service that owns the data: the balance moves by a delta, the ledger gets
a row, and the library's own row beside them makes sure that this happens once, however often the command arrives.
"""

from datetime import timedelta

from pydantic import BaseModel, PositiveInt
from sqlalchemy import BigInteger, Column, Integer, MetaData, String, Table, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from saga import PIVOT, RETRIABLE, Participant, Refused, Saga, make


class Transfer(BaseModel):
    id: str
    source: str
    target: str
    amount: PositiveInt  # in cents: money is never a float


class Receipt(BaseModel):
    account: str
    balance: int


class Transferred(BaseModel):
    source: Receipt
    target: Receipt


metadata, NAME = MetaData(), String(100)  # MySQL and MariaDB ask for a length
accounts = Table(
    "account", metadata, Column("id", NAME, primary_key=True), Column("balance", BigInteger, nullable=False)
)
ledger = Table(
    "ledger",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("transfer", NAME, nullable=False),
    Column("account", NAME, nullable=False),
    Column("kind", NAME, nullable=False),
    Column("delta", BigInteger, nullable=False),
)
notifications = Table(
    "notification",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("transfer", NAME, nullable=False),
    Column("message", NAME, nullable=False),
)

savings = Participant("savings", start_to_close=timedelta(seconds=30))
giro = Participant("giro", start_to_close=timedelta(seconds=30))
notifier = Participant("notifier", start_to_close=timedelta(seconds=30))


@savings.activity
async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
    return await move(session, transfer, "withdraw", transfer.source, -transfer.amount, "insufficient_funds")


@withdraw.compensation
async def refund(transfer: Transfer, session: AsyncSession) -> None:
    await move(session, transfer, "refund", transfer.source, transfer.amount, "unknown_account")


@giro.activity(kind=PIVOT)  # once the money has arrived, the transfer only goes forward
async def deposit(transfer: Transfer, session: AsyncSession) -> Receipt:
    return await move(session, transfer, "deposit", transfer.target, transfer.amount, "unknown_account")


@notifier.activity(kind=RETRIABLE)
async def notify(transfer: Transfer, session: AsyncSession) -> None:
    message = f"{transfer.amount} cents have arrived on {transfer.target}"
    await session.execute(insert(notifications).values(transfer=transfer.id, message=message))


async def move(session: AsyncSession, by: Transfer, kind: str, name: str, delta: int, code: str) -> Receipt:
    moved = accounts.c.balance + delta
    guarded = update(accounts).where(accounts.c.id == name, moved >= 0).values(balance=moved)
    if session.get_bind().dialect.update_returning:
        balance = await session.scalar(guarded.returning(accounts.c.balance))
    else:  # MySQL and MariaDB return nothing of an UPDATE
        balance = await session.scalar(
            select(moved).where(accounts.c.id == name, moved >= 0).with_for_update()
        )
        await session.execute(guarded)
    if balance is None:
        raise Refused(code)
    await session.execute(insert(ledger).values(transfer=by.id, account=name, kind=kind, delta=delta))
    return Receipt(account=name, balance=balance)


transferred = make(Transferred, source=withdraw.out, target=deposit.out)
money_transfer = (
    Saga("money-transfer", Transfer).step(withdraw).step(deposit).step(notify).returns(transferred)
)
