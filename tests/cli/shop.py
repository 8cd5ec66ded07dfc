"""An app for the tests of the command line: one order goes through, one is refused, one stands still, one waits."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from pydantic import BaseModel

from saga import PIVOT, RETRIABLE, App, Participant, Refused, RetryPolicy, Saga
from saga.brokers.base import OutMessage
from saga.clock import SystemClock
from saga.messages import CONTENT_TYPE, replies_channel
from saga.storage.base import Filter

HOUR = timedelta(hours=1)
SLOW = RetryPolicy(initial=HOUR, maximum=HOUR, attempts=None, schedule_to_close=None, incident_at=10)
ESCAPES = "red\x1b[31m\x07"


class Order(BaseModel):
    item: str = "book"
    trouble: str = ""


ORDERS = (("good", ""), ("poor", "poor"), ("stuck", "release"), ("busy", "busy"), (ESCAPES, "poor"))
clock = SystemClock()

bank = Participant("bank", start_to_close=timedelta(seconds=30))


@bank.activity
async def reserve(order: Order) -> None:
    """Nothing to reserve in a test."""


@reserve.compensation(retry=SLOW)
async def release(order: Order) -> None:
    if order.trouble == "release":
        raise Refused("locked")


@bank.activity(kind=PIVOT, retry=RetryPolicy(initial=HOUR, maximum=HOUR, schedule_to_close=None))
async def charge(order: Order) -> None:
    if order.trouble == "busy":
        raise RuntimeError("canary-payload")
    if order.trouble:
        raise Refused("no_money")


@bank.activity(kind=RETRIABLE)
async def ship(order: Order) -> None:
    """Nothing to ship in a test."""


purchase = Saga("purchase", Order).step(reserve).step(charge).step(ship)


def __getattr__(name: str) -> Any:
    """`app` is made anew for each command, on the database that the test says."""
    if name == "app":
        return App(os.environ["SHOP_DATABASE"], sagas=[purchase], participants=[bank])
    raise AttributeError(name)


async def fill(url: str) -> None:
    """Leave a database with a saga in each state, and one message that could not be read."""
    async with App(url, sagas=[purchase], participants=[bank]) as app:
        client = app.client
        for id, trouble in ORDERS:
            handle = await client.start(purchase, Order(trouble=trouble), id=id)
            while not await _there(client, handle, trouble):
                await clock.sleep(0.01)
        app.broker.publish([OutMessage(replies_channel("default"), ESCAPES.encode(), CONTENT_TYPE)])
        while not await client.dead_letters():
            await clock.sleep(0.01)


async def _there(client: Any, handle: Any, trouble: str) -> bool:
    seen = await handle.describe()
    if trouble == "busy":
        return seen.waiting is not None and seen.waiting.retry_at is not None
    wanted = {"": "completed", "poor": "compensated", "release": "needs_attention"}[trouble]
    return await client.count(Filter(run_id=handle.run_id, statuses=[wanted])) == 1
