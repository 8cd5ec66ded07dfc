"""A payment service with its provider elsewhere: `python -m tests.crash.payments`, to be killed and stopped.

The provider is a socket that a test serves: one JSON line asks, one answers, and the line may be cut after the deed.
Where everything runs in one process (`PAYMENTS_EMBEDDED`), that process also starts the orders and leaves at their end.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final

from pydantic import BaseModel

from saga import (
    ActivityContext,
    Inquiry,
    Participant,
    Refused,
    RetryPolicy,
    Saga,
    SagaCompensated,
    failpoints,
)
from saga.app import App
from tests.plugins.watch import CANARY

LIMIT: Final = timedelta(seconds=2)
REDRIVE: Final = timedelta(milliseconds=500)
SECONDS_MAX: Final = 150


class Order(BaseModel):
    id: str
    card: str = CANARY
    amount: int = 10
    shipped: bool = True


class Receipt(BaseModel):
    charge: str


quick = RetryPolicy(initial=timedelta(milliseconds=100), schedule_to_close=timedelta(minutes=10))
payments = Participant("payments", start_to_close=LIMIT, retry=quick)


@payments.activity(at_least_once=True)
async def charge(order: Order, context: ActivityContext) -> Receipt:
    answer = await ask("charge", key=context.operation_key, order=order.id, amount=order.amount)
    return Receipt(charge=answer["charge"])


@charge.compensation(
    retry=RetryPolicy(initial=timedelta(milliseconds=100), attempts=None, schedule_to_close=None)
)
async def refund(order: Order, receipt: Receipt | None, context: ActivityContext) -> None:
    await ask("refund", key=context.operation_key, charge=receipt.charge if receipt else context.forward_key)


@charge.inquiry
async def look(order: Order, context: ActivityContext) -> Receipt | Inquiry:
    answer = await ask("look", key=context.operation_key)
    return Receipt(charge=answer["charge"]) if answer["charge"] else Inquiry.NOT_DONE


@payments.activity(no_compensation="it leaves the house last")
async def ship(order: Order) -> None:
    if not order.shipped:
        raise Refused("out_of_stock")


async def ask(verb: str, **known: Any) -> dict[str, Any]:
    """Ask the provider. Raises ConnectionError if the line is cut."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(os.environ["PAYMENTS_PROVIDER"]))
    try:
        writer.write(json.dumps({"verb": verb, "by": os.getpid(), **known}).encode() + b"\n")
        line = await reader.readline()
        if not line:
            raise ConnectionResetError("the line was cut")
        answer: dict[str, Any] = json.loads(line)
        return answer
    finally:
        writer.close()


sale = Saga("sale", Order).step(charge).step(ship)
# gives up before a participant that is stopped comes back
hasty = Saga("hasty", Order).step(
    charge, retry=RetryPolicy(initial=timedelta(milliseconds=100), schedule_to_close=timedelta(seconds=2))
)


def make_app(*, redrive: timedelta = REDRIVE, **roles: Any) -> App:
    """The app of this process, or of the test's."""
    return App(
        os.environ["PAYMENTS_DATABASE"],
        broker=os.environ.get("PAYMENTS_BROKER"),
        namespace=os.environ["PAYMENTS_NAMESPACE"],
        redrive=redrive,
        **roles,
    )


async def main() -> None:
    failpoints.arm(os.environ["SAGA_FAIL"])
    if "PAYMENTS_EMBEDDED" not in os.environ:
        async with make_app(participants=[payments]):
            print("ready", flush=True)
            await asyncio.Event().wait()
    app = make_app(participants=[payments], sagas=[sale, hasty])
    async with app:
        handles = []
        for number in range(int(os.environ["PAYMENTS_EMBEDDED"])):
            order = Order(id=f"order-{number}", shipped=number % 2 == 0)
            handles.append(await app.client.start(sale, order, id=order.id))
        for handle in handles:
            with suppress(SagaCompensated):
                await handle.result(timeout=timedelta(seconds=SECONDS_MAX))


if __name__ == "__main__":
    asyncio.run(main())
