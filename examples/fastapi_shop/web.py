"""The shop's routes: an order is taken in one commit with its saga, looked at, and cancelled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from examples.fastapi_shop.sagas import DATABASE, Order, Sale, app, purchase
from saga import Client, SagaNotFound

engine = create_async_engine(DATABASE)
shop = FastAPI(lifespan=app.lifespan)


async def transaction() -> AsyncIterator[AsyncSession]:
    """The request's own session: committed when its function has returned, rolled back when it has raised."""
    async with AsyncSession(engine) as session, session.begin():
        yield session


# scope="function": without it FastAPI ends the dependency, and so commits, only after the answer has left
Transaction = Annotated[AsyncSession, Depends(transaction, scope="function")]
Sagas = Annotated[Client, Depends(app.get_client)]


@shop.post("/orders", status_code=201)
async def take_order(order: Order, session: Transaction, sagas: Sagas) -> dict[str, str]:
    """Write the sale and start its saga: both, or neither. The id makes it safe to send again."""
    if await session.get(Sale, order.id) is None:
        session.add(Sale(id=order.id, item=order.item, cents=order.cents))
        await session.flush()
        await sagas.start(purchase, order, id=order.id, session=session)
    return {"id": order.id}


@shop.get("/orders/{id}")
async def look_at_order(id: str, sagas: Sagas) -> dict[str, str | None]:
    """Say where the order is: running, completed, or what it turned back for."""
    seen = await (await sagas.find(purchase, id)).describe()
    return {"status": seen.status, "step": seen.current_step, "cause": seen.cause}


@shop.delete("/orders/{id}", status_code=202)
async def cancel_order(id: str, sagas: Sagas) -> dict[str, str]:
    """Turn the order back, unless it has ended: what was reserved is put back."""
    moved = await sagas.cancel(await sagas.find(purchase, id), reason="the customer's wish")
    return {"status": moved.after}


@shop.exception_handler(SagaNotFound)
async def no_such_order(request: Request, error: SagaNotFound) -> JSONResponse:
    return JSONResponse({}, status_code=404)
