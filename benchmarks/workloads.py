"""The workloads: which sagas are run, by which participants, and on which accounts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

from examples.money_transfer import batched
from examples.money_transfer import transfer as one_by_one
from examples.money_transfer.transfer import Receipt, Transfer
from saga import PIVOT, RETRIABLE, Participant, Saga

WORKLOADS: Final = ("transfer", "five-steps")
PARTICIPANTS: Final = ("stateless", "business", "business-batch")
STEPS: Final = {
    "transfer": ("withdraw", "deposit"),
    "five-steps": ("withdraw", "withdraw", "deposit", "deposit", "notify"),
}
ACCOUNTS: Final = 1_000
BALANCE: Final = 1_000_000_000

savings = Participant("savings", start_to_close=timedelta(seconds=30))
giro = Participant("giro", start_to_close=timedelta(seconds=30))
notifier = Participant("notifier", start_to_close=timedelta(seconds=30))


@savings.activity
async def withdraw(transfer: Transfer) -> Receipt:
    return Receipt(account=transfer.source, balance=0)


@withdraw.compensation
async def refund(transfer: Transfer) -> None:
    pass


@giro.activity(kind=PIVOT)
async def deposit(transfer: Transfer) -> Receipt:
    return Receipt(account=transfer.target, balance=0)


@notifier.activity(kind=RETRIABLE)
async def notify(transfer: Transfer) -> None:
    pass


def participants(form: str) -> list[Participant]:
    """Return the three services: without a database, one transaction per command, or one per batch."""
    if form == "stateless":
        return [savings, giro, notifier]
    module = one_by_one if form == "business" else batched
    return [module.savings, module.giro, module.notifier]


def saga(workload: str) -> Saga[Transfer, Any]:
    """Return a workload as a saga; its activities have one contract, whichever form the participants take."""
    take, give, tell = one_by_one.withdraw, one_by_one.deposit, one_by_one.notify
    if workload == "transfer":
        return Saga("transfer", Transfer).step(take).step(give).returns(one_by_one.transferred)
    return (
        Saga("five-steps", Transfer)
        .step(take, name="withdraw-1")
        .step(take, name="withdraw-2")
        .step(give, name="deposit-1")
        .step(give, name="deposit-2", kind=RETRIABLE)
        .step(tell)
    )


def account(number: int) -> str:
    """Return the id of an account."""
    return f"account-{number:04}"


def transfers(seed: int) -> Iterator[dict[str, Any]]:
    """Yield transfers between two accounts drawn at random, without end."""
    draw = random.Random(seed)
    number = 0
    while True:
        number += 1
        source, target = draw.sample(range(ACCOUNTS), 2)
        yield {
            "id": f"{seed}-{number}",
            "source": account(source),
            "target": account(target),
            "amount": draw.randint(1, 100),
        }
