"""Environments with plain `def` handlers: the same faults, the same account of what was done, the clock that jumps."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from examples.money_transfer.transfer import Transfer, accounts
from saga import PIVOT, Participant, Refused, Saga
from saga.testing import Environment
from tests.testing.bank import ORDER, balances, metadata, open_accounts

pytestmark = [pytest.mark.feature("D-09"), pytest.mark.stack("sqlite")]

bank = Participant("plain", start_to_close=timedelta(seconds=30))
told: list[str] = []


def change(session: Session, account: str, by: int) -> None:
    session.execute(update(accounts).where(accounts.c.id == account).values(balance=accounts.c.balance + by))


@bank.activity
def withdraw(transfer: Transfer, session: Session) -> str:
    change(session, transfer.source, -transfer.amount)
    return "withdrawn"


@withdraw.compensation
def put_back(transfer: Transfer, output: str, session: Session) -> None:
    assert output == "withdrawn"
    change(session, transfer.source, transfer.amount)


@bank.activity(kind=PIVOT, batch=10)
def deposit(transfers: list[Transfer], session: Session) -> list[str | Refused]:
    for transfer in transfers:
        change(session, transfer.target, transfer.amount)
    return ["deposited" for _ in transfers]


@bank.activity(no_compensation="only a note", retry=bank.retry)
def note(transfer: Transfer) -> None:
    told.append(threading.current_thread().name)


plain_transfer = Saga("plain-transfer", Transfer).step(note).step(withdraw).step(deposit)
STEPS = ("note", "withdraw", "deposit")


@pytest.fixture
async def env() -> AsyncIterator[Environment]:
    told.clear()
    async with Environment(plain_transfer, tables=metadata) as env:
        await open_accounts(env)
        yield env


async def test_plain_handlers_run_in_threads_and_are_kept_account_of(env: Environment) -> None:
    ended = await env.run(plain_transfer, ORDER)
    assert (ended.status, ended.done) == ("completed", STEPS)
    assert ended.took < timedelta(seconds=5)
    assert told == ["saga-handler"]
    assert await balances(env) == {"alice": 75, "bob": 75}


@pytest.mark.parametrize(
    "name",
    ["lose_command", "lose_reply", "duplicate_command", "duplicate_reply", "delay_command", "crash", "fail"],
)
@pytest.mark.parametrize("step", STEPS)
async def test_what_a_saga_must_bear_changes_nothing(env: Environment, name: str, step: str) -> None:
    fault = getattr(env.faults, name)(step)
    ended = await env.run(plain_transfer, ORDER)
    assert (ended.status, ended.done, fault.fired) == ("completed", STEPS, 1)
    assert await balances(env) == {"alice": 75, "bob": 75}


async def test_a_participant_that_dies_before_its_commit_does_its_work_once(env: Environment) -> None:
    crashed = env.faults.crash("withdraw", committed=False, times=2)
    ended = await env.run(plain_transfer, ORDER)
    assert (ended.status, ended.done, crashed.fired) == ("completed", STEPS, 2)
    assert await balances(env) == {"alice": 75, "bob": 75}


async def test_a_refusal_turns_back(env: Environment) -> None:
    env.faults.refuse("deposit", reason="closed_account")
    ended = await env.run(plain_transfer, ORDER)
    assert (ended.status, ended.reason) == ("compensated", "closed_account")
    assert ended.done == ("note", "withdraw", "undo withdraw")
    assert await balances(env) == {"alice": 100, "bob": 50}


async def test_while_a_handler_blocks_its_thread_time_stands_still() -> None:
    participant = Participant("slow", start_to_close=timedelta(seconds=30))

    @participant.activity(no_compensation="only a wait")
    def wait(transfer: Transfer) -> str:
        time.sleep(0.3)
        return "waited"

    waiting = Saga("waiting", Transfer).step(wait).returns(wait.out)
    async with Environment(waiting) as env:
        ended = await env.run(waiting, ORDER)
    assert (ended.status, ended.result) == ("completed", "waited")
    assert ended.took < timedelta(seconds=5)


async def test_a_handler_that_hangs_meets_its_limit() -> None:
    participant, opened = Participant("slow", start_to_close=timedelta(seconds=30)), threading.Event()
    calls: list[int] = []

    @participant.activity(no_compensation="only a wait")
    def wait(transfer: Transfer, session: Session) -> str:
        calls.append(1)
        if len(calls) == 1:
            opened.wait(20.0)
        return "waited"

    waiting = Saga("waiting", Transfer).step(wait).returns(wait.out)
    async with Environment(waiting) as env:
        ended = await env.run(waiting, ORDER)
        opened.set()
    assert (ended.status, ended.result, len(calls)) == ("completed", "waited", 2)
    assert ended.took > timedelta(seconds=30)
