"""What the processes of the crash tests run: a bank with three steps, in one process or as services.

    python -m tests.crash.stage                       a forge: reads jobs as JSON lines, forks a process for each
    saga coordinator tests.crash.stage:coordinator    saga participant tests.crash.stage:participant

The forge has imported everything before it forks, so that a process of its own costs next to nothing. A process plays
every order to its end and leaves; what it was told to die of, it dies of. Started again on the same database without
that, it asks for the same orders again, as a caller does who was never answered.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from sqlalchemy import insert, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from saga import ActivityContext, Participant, Refused, Saga, SagaCompensated, failpoints
from saga.app import App
from saga.brokers.base import OutMessage, PublishOutcome
from saga.brokers.memory import MemoryBroker
from saga.client import Client
from saga.clock import SystemClock
from saga.coordinator.arrivals import ReplyArrival
from saga.messages import commands_channel, replies_channel
from saga.outbox import relay
from saga.storage.base import Filter
from saga.storage.sqlalchemy.database import async_url
from tests.crash.books import ACCOUNTS, accounts, bookings, orders
from tests.plugins.watch import CANARY

REDRIVE: Final = timedelta(milliseconds=300)
SECONDS_MAX: Final = 60
"""Generous: a loaded machine is no failure."""
LEASE_SECONDS: Final = 1.0
"""Of the embedded form: who is started again waits for the lease of who was killed."""


class Order(BaseModel):
    id: str
    amount: int = 10
    approved: bool = True
    waits: bool = False
    card: str = CANARY


ORDERS: Final = (Order(id="plain"), Order(id="refused", approved=False), Order(id="in session"))
WAITING: Final = Order(id="waits", waits=True)

bank = Participant("bank", start_to_close=timedelta(seconds=10))
entered = asyncio.Event()


@bank.activity
async def debit(order: Order, session: AsyncSession, context: ActivityContext) -> None:
    await book(session, context, "forward", "source", -order.amount)
    if order.waits:
        entered.set()
        await asyncio.sleep(0.2)


@debit.compensation
async def give_back(order: Order, session: AsyncSession, context: ActivityContext) -> None:
    await book(session, context, "compensate", "source", order.amount)


@bank.activity
async def credit(order: Order, session: AsyncSession, context: ActivityContext) -> None:
    await book(session, context, "forward", "target", order.amount)


@credit.compensation
async def take_back(order: Order, session: AsyncSession, context: ActivityContext) -> None:
    await book(session, context, "compensate", "target", -order.amount)


@bank.activity(no_compensation="it only looks")
async def approve(order: Order, session: AsyncSession, context: ActivityContext) -> None:
    if not order.approved:
        raise Refused("not_approved")
    await book(session, context, "forward", "source", 0)


async def book(
    session: AsyncSession, context: ActivityContext, direction: str, account: str, delta: int
) -> None:
    await session.execute(
        update(accounts).where(accounts.c.id == account).values(balance=accounts.c.balance + delta)
    )
    row = {"run": context.run_id, "step": context.step, "direction": direction, "delta": delta}
    await session.execute(insert(bookings).values(row))


payment = Saga("payment", Order).step(debit).step(credit).step(approve)

teller = Participant("teller", start_to_close=timedelta(seconds=10))
held, ordered = asyncio.Event(), asyncio.Event()


@teller.activity
async def hold(order: Order, session: AsyncSession, context: ActivityContext) -> None:
    held.set()
    # before the first statement: SQLite has one writer, and the cancel is another
    if order.id == "cancelled":
        await ordered.wait()
    else:
        await asyncio.sleep(0.2)
    await book(session, context, "forward", "source", -order.amount)


@hold.compensation
async def let_go(order: Order, session: AsyncSession, context: ActivityContext) -> None:
    await book(session, context, "compensate", "source", order.amount)


# E-07: one is cancelled and one reaches its deadline while the first step's action runs
stopped = Saga("stopped", Order).step(hold).step(credit)
late = Saga("late", Order, deadline=timedelta(milliseconds=100)).step(hold).step(credit)
SAGAS: Final = (payment, stopped, late)


# --- as services ------------------------------------------------------------------------------

if "STAGE_DATABASE" in os.environ:
    served: dict[str, Any] = {
        "broker": os.environ["STAGE_BROKER"],
        "namespace": os.environ["STAGE_NAMESPACE"],
        "redrive": REDRIVE,
    }
    coordinator = App(os.environ["STAGE_DATABASE"], sagas=[payment], **served)
    participant = App(os.environ["STAGE_DATABASE"], participants=[bank], **served)


# --- all in one process -----------------------------------------------------------------------


class LosingBroker(MemoryBroker):
    """Loses the first reply: confirmed, never delivered."""

    lost = False

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        if not self.lost and messages and messages[0].channel == replies_channel("default"):
            self.lost = True
            future: asyncio.Future[PublishOutcome] = asyncio.get_running_loop().create_future()
            future.set_result(PublishOutcome.CONFIRMED)
            return [future, *super().publish(messages[1:])]
        return super().publish(messages)


def race(app: App) -> None:
    """Hold replies until a wake-up time has passed, and hand both over in the same instant (T3)."""
    assert app._running is not None
    assert app._running.coordinator is not None
    batcher = app._running.coordinator._arrivals
    offer_all, held = batcher.offer_all, list[Any]()

    def together(arrivals: Iterable[Any]) -> int:
        arrived = list(arrivals)
        if all(isinstance(each, ReplyArrival) for each in arrived):
            held.extend(arrived)
            return len(arrived)
        both = [*arrived, *held]
        held.clear()
        return offer_all(both)

    batcher.offer_all = together  # type: ignore[method-assign, assignment]


async def play(database: str, scene: str) -> None:
    broker = LosingBroker() if scene == "reply lost" else MemoryBroker()
    app = App(database, broker=broker, sagas=SAGAS, participants=[bank, teller], redrive=REDRIVE)
    async with app:
        if scene == "queue deleted":
            broker.queues.delete(commands_channel("default", "bank"))
        if scene == "timer and reply at once":
            race(app)
        if scene == "stopped in a handler":
            await app.client.start(payment, WAITING, id=WAITING.id)
            await entered.wait()
            return
        stopping = [] if scene else await stop_two(app.client)
        await every_order(app.client, database)
        for handle in stopping:
            with suppress(SagaCompensated):
                await handle.result(timeout=timedelta(seconds=SECONDS_MAX))
        await drained(database)


async def every_order(client: Client, database: str, prefix: str = "") -> None:
    """Start every order and wait until it has ended as it should."""
    handles = []
    for order in ORDERS:
        mine = order.model_copy(update={"id": prefix + order.id})
        if order.id == "in session":
            handles.append(await start_with_order(client, database, mine))
        else:
            handles.append(await client.start(payment, mine, id=mine.id))
    if await known(client, WAITING.id):
        handles.append(await client.find(payment, WAITING.id))
    for handle in handles:
        with suppress(SagaCompensated):  # which one does is seen in the books
            await handle.result(timeout=timedelta(seconds=SECONDS_MAX))


async def drained(database: str) -> None:
    """Wait until the outbox is empty: what was sent and never deleted is sent and deleted by the relay."""
    connection = sqlite3.connect(database.removeprefix("sqlite+aiosqlite:///"), timeout=SECONDS_MAX)
    clock = SystemClock()
    while connection.execute("SELECT count(*) FROM saga_outbox").fetchone() != (0,):
        await clock.sleep(0.02)
    connection.close()


async def stop_two(client: Client) -> list[Any]:
    """Start one that reaches its deadline and one that is cancelled as soon as its first action runs, or again."""
    before = await client.count(Filter(id="cancelled"))
    handles = [
        await client.start(saga, Order(id=id), id=id) for saga, id in ((late, "late"), (stopped, "cancelled"))
    ]
    if not before:
        await held.wait()
    await client.cancel(handles[1], reason="asked again by who was never answered")
    ordered.set()
    return handles


async def known(client: Client, id: str) -> bool:
    return await client._store.find(None, payment.name, id) is not None


async def start_with_order(client: Client, database: str, order: Order) -> Any:
    """The order's row and the saga in one transaction of the caller."""
    busy = {"timeout": SECONDS_MAX} if database.startswith("sqlite") else {}
    engine = create_async_engine(async_url(database), connect_args=busy)
    async with AsyncSession(engine) as session, session.begin():
        if not await known(client, order.id):
            await session.execute(insert(orders).values(id=order.id))
        handle = await client.start(payment, order, id=order.id, session=session)
    await engine.dispose()
    return handle


def make_tables(path: Path) -> None:
    connection = sqlite3.connect(path)
    with connection:
        for table in (accounts, bookings, orders):
            columns = ", ".join(f'"{column.name}"' for column in table.c if column.name != "id")
            key = "id TEXT PRIMARY KEY" if table is not bookings else "id INTEGER PRIMARY KEY"
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {table.name} ({key}{', ' if columns else ''}{columns})"
            )
        connection.executemany("INSERT OR IGNORE INTO account VALUES (?, ?)", ACCOUNTS.items())
    connection.close()


# --- the forge --------------------------------------------------------------------------------


def run(job: dict[str, str]) -> None:
    signal.alarm(SECONDS_MAX)
    relay.LEASE_SECONDS = LEASE_SECONDS  # type: ignore[misc]
    path = Path(job["path"])
    sys.stderr = path.with_suffix(".log").open("a")
    make_tables(path)
    failpoints.arm(job["fail"])
    asyncio.run(play(f"sqlite+aiosqlite:///{path}", job["scene"]))


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(json.loads(line))
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(ended), flush=True)


if __name__ == "__main__":
    main()
