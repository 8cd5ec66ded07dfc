"""Money from a savings account to a giro account, at two banks: payloads, tables, activities and the saga.

Each activity is one local transaction of the service that owns the data: the balance moves by a delta, the ledger gets
a row, and the library's own row beside them makes sure that this happens once, however often the command arrives.
"""

from datetime import timedelta

from pydantic import BaseModel, PositiveInt
from sqlalchemy import BigInteger, Column, Integer, MetaData, String, Table, insert, update
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


metadata = MetaData()
accounts = Table(
    "account", metadata, Column("id", String, primary_key=True), Column("balance", BigInteger, nullable=False)
)
ledger = Table(
    "ledger",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("transfer", String, nullable=False),
    Column("account", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("delta", BigInteger, nullable=False),
)
notifications = Table(
    "notification",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("transfer", String, nullable=False),
    Column("message", String, nullable=False),
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


async def move(
    session: AsyncSession, transfer: Transfer, kind: str, account: str, delta: int, refusal: str
) -> Receipt:
    moved = accounts.c.balance + delta
    guarded = update(accounts).where(accounts.c.id == account, moved >= 0).values(balance=moved)
    balance = await session.scalar(guarded.returning(accounts.c.balance))
    if balance is None:
        raise Refused(refusal)
    row = {"transfer": transfer.id, "account": account, "kind": kind, "delta": delta}
    await session.execute(insert(ledger).values(row))
    return Receipt(account=account, balance=balance)


transferred = make(Transferred, source=withdraw.out, target=deposit.out)
money_transfer = (
    Saga("money-transfer", Transfer).step(withdraw).step(deposit).step(notify).returns(transferred)
)
