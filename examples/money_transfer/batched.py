"""The same saga with handlers that take up to a hundred commands at once: one transaction, one update per account.

A batch reads its accounts once, locked in key order so that two batches never wait for each other in a circle, decides
in the order of arrival who is refused, and only then writes: what is refused has written nothing. Contract, queues and
fingerprint are those of `transfer.py`, so a service can change over while transfers are open.
"""

from collections import Counter
from collections.abc import Iterable
from datetime import timedelta

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from examples.money_transfer.transfer import (
    Receipt,
    Transfer,
    Transferred,
    accounts,
    ledger,
    notifications,
)
from saga import PIVOT, RETRIABLE, Participant, Refused, Saga, make

BATCH = 100

savings = Participant("savings", start_to_close=timedelta(seconds=30))
giro = Participant("giro", start_to_close=timedelta(seconds=30))
notifier = Participant("notifier", start_to_close=timedelta(seconds=30))

Move = tuple[Transfer, str, int]
"""A transfer, and by how much it moves which account."""


@savings.activity(batch=BATCH)
async def withdraw(transfers: list[Transfer], session: AsyncSession) -> list[Receipt | Refused]:
    moves = [(transfer, transfer.source, -transfer.amount) for transfer in transfers]
    return await move(session, "withdraw", moves, "insufficient_funds")


@withdraw.compensation(batch=BATCH)
async def refund(transfers: list[Transfer], session: AsyncSession) -> list[Refused | None]:
    moves = [(transfer, transfer.source, transfer.amount) for transfer in transfers]
    answers = await move(session, "refund", moves, "unknown_account")
    return [answer if isinstance(answer, Refused) else None for answer in answers]


@giro.activity(batch=BATCH, kind=PIVOT)
async def deposit(transfers: list[Transfer], session: AsyncSession) -> list[Receipt | Refused]:
    moves = [(transfer, transfer.target, transfer.amount) for transfer in transfers]
    return await move(session, "deposit", moves, "unknown_account")


@notifier.activity(batch=BATCH, kind=RETRIABLE)
async def notify(transfers: list[Transfer], session: AsyncSession) -> list[None]:
    rows = [
        {"transfer": each.id, "message": f"{each.amount} cents have arrived on {each.target}"}
        for each in transfers
    ]
    await session.execute(insert(notifications), rows)
    return [None] * len(transfers)


async def move(session: AsyncSession, kind: str, moves: list[Move], refusal: str) -> list[Receipt | Refused]:
    balances = await lock(session, {account for _, account, _ in moves})
    answers: list[Receipt | Refused] = []
    deltas: Counter[str] = Counter()
    rows = []
    for transfer, account, delta in moves:
        if account not in balances or balances[account] + delta < 0:
            answers.append(Refused(refusal))
            continue
        balances[account] += delta
        deltas[account] += delta
        rows.append({"transfer": transfer.id, "account": account, "kind": kind, "delta": delta})
        answers.append(Receipt(account=account, balance=balances[account]))
    if rows:
        await session.execute(ADD, [{"key": key, "delta": deltas[key]} for key in sorted(deltas)])
        await session.execute(insert(ledger), rows)
    return answers


async def lock(session: AsyncSession, keys: Iterable[str]) -> dict[str, int]:
    held = select(accounts.c.id, accounts.c.balance).where(accounts.c.id.in_(sorted(keys)))
    rows = await session.execute(held.order_by(accounts.c.id).with_for_update())
    return {row.id: row.balance for row in rows}


ADD = (
    update(accounts)
    .where(accounts.c.id == bindparam("key"))
    .values(balance=accounts.c.balance + bindparam("delta"))
)

transferred = make(Transferred, source=withdraw.out, target=deposit.out)
money_transfer = (
    Saga("money-transfer", Transfer).step(withdraw).step(deposit).step(notify).returns(transferred)
)
