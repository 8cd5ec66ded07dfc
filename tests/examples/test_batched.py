"""`batched.py` and `transfer.py` are two ways to the same books."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from examples.money_transfer import batched, transfer
from examples.money_transfer.apps import embedded
from examples.money_transfer.books import ServerAuditor, SqliteAuditor
from examples.money_transfer.layouts import prepare_service
from examples.money_transfer.transfer import Transfer, accounts, ledger, metadata, notifications
from saga import Client, Refused, SagaCompensated

OPENING = {"a": 5_000, "b": 1_000, "c": 0}
KNOWN = list(OPENING)
TRANSFERS = 240
Answers = list[Any]


@pytest.mark.feature("I-11")
@pytest.mark.feature("D-10")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stack", ["sqlite", "postgres-rabbitmq"])
async def test_batches_leave_the_same_books_and_answers_as_one_by_one(
    stack: str, seed: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Also where a refusal depends on what came before it in the batch: the order of arrival decides."""
    random = Random(seed)
    orders = [
        Transfer(
            id=f"t-{number}",
            source=random.choice([*KNOWN, "nobody"]),
            target=random.choice([*KNOWN, "nobody"]),
            amount=random.randint(1, 900),
        )
        for number in range(TRANSFERS)
    ]
    sizes = [random.randint(1, batched.BATCH) for _ in range(TRANSFERS)]
    books = []
    for play in (_one_by_one, _in_batches):
        if stack == "sqlite":
            url = f"sqlite+aiosqlite:///{tmp_path / play.__name__}.db"
        else:
            url = request.getfixturevalue("postgres_server").create_database()
        books.append(await _played(url, play, orders, sizes))
    assert books[0] == books[1]
    refused = sum(isinstance(answer, str) for answer in books[0][0])
    assert 0 < refused < len(books[0][0])


async def _one_by_one(session: AsyncSession, activity: str, orders: list[Transfer]) -> Answers:
    answers: Answers = []
    for order in orders:
        try:
            answers.append(await _function(transfer, activity)(order, session))
        except Refused as refused:
            answers.append(refused.reason)
    return answers


async def _in_batches(session: AsyncSession, activity: str, orders: list[Transfer]) -> Answers:
    answers = await _function(batched, activity)(orders, session)
    return [answer.reason if isinstance(answer, Refused) else answer for answer in answers]


def _function(form: Any, activity: str) -> Any:
    return getattr(form, activity)


async def _played(url: str, play: Any, orders: list[Transfer], sizes: list[int]) -> tuple[Answers, Any]:
    """Withdraw everything, refund every third that succeeded, deposit the others; return answers and books."""
    engine = create_async_engine(url)
    answers: Answers = []
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.execute(
            insert(accounts), [{"id": key, "balance": balance} for key, balance in OPENING.items()]
        )
    rest = list(orders)
    for size in sizes:
        batch, rest = rest[:size], rest[size:]
        if not batch:
            break
        async with AsyncSession(engine) as session, session.begin():
            withdrawn = await play(session, "withdraw", batch)
            done = [order for order, said in zip(batch, withdrawn, strict=True) if not isinstance(said, str)]
            back, on = done[::3], [order for order in done if order not in done[::3]]
            for activity, which in (("refund", back), ("deposit", on), ("notify", on)):
                if which:
                    answers += await play(session, activity, which)
            answers += withdrawn
    async with engine.connect() as connection:
        books = [
            [tuple(row) for row in await connection.execute(query)]
            for query in (
                select(accounts).order_by(accounts.c.id),
                select(ledger.c.transfer, ledger.c.account, ledger.c.kind, ledger.c.delta).order_by(
                    ledger.c.id
                ),
                select(notifications.c.transfer, notifications.c.message).order_by(notifications.c.id),
            )
        ]
    await engine.dispose()
    return answers, books


@pytest.mark.feature("I-11")
@pytest.mark.feature("D-10")
@pytest.mark.parametrize("stack", ["sqlite", "postgres-rabbitmq"])
async def test_an_app_with_batches_ends_every_transfer_with_the_books_of_one_by_one(
    stack: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A hundred at once, from two accounts that all of them want; who is refused does not depend on the order."""
    orders = [
        Transfer(
            id=f"t-{number}",
            source="ab"[number % 2],
            target="nobody" if number % 7 == 0 else "c",
            amount=amount,
        )
        for number, amount in enumerate([1, 2, 3, 10**9, 5] * 20)
    ]
    books = []
    for form in ("one-by-one", "batched"):
        if stack == "sqlite":
            path = tmp_path / f"{form}.db"
            url, options = f"sqlite:///{path}", {}
            auditor: Any = SqliteAuditor(path)
        else:
            url = request.getfixturevalue("postgres_server").create_database()
            options = {
                "broker": request.getfixturevalue("rabbitmq_server").url,
                "namespace": f"{tmp_path.name}-{form}",
            }
            auditor = ServerAuditor([(url, "public")], (url, "public"))
        await prepare_service(
            url, None if stack == "sqlite" else "public", list(metadata.tables.values()), OPENING
        )
        async with embedded(url, batched=form == "batched", **options) as app, asyncio.timeout(30):
            ends = await asyncio.gather(*(_end(app.client, order) for order in orders))
        books.append((ends, await asyncio.to_thread(auditor.read)))
    (ends, one_by_one), (ends_in_batches, in_batches) = books
    assert ends == ends_in_batches
    assert Counter(ends) == {"insufficient_funds": 20, "unknown_account": 12, "completed": 68}
    assert one_by_one.balances == in_batches.balances
    assert Counter(one_by_one.moves) == Counter(in_batches.moves)
    assert Counter(one_by_one.notified) == Counter(in_batches.notified)
    assert in_batches.total == sum(OPENING.values())


async def _end(client: Client, order: Transfer) -> str:
    try:
        await client.execute(transfer.money_transfer, order, id=order.id)
    except SagaCompensated as ended:
        return ended.reason
    return "completed"
