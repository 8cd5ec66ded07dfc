"""The shop's pages: an order is taken in one commit with its saga, and told how that ended."""

from __future__ import annotations

from datetime import timedelta
from os import environ
from typing import Any

from flask import Flask, request
from sqlalchemy import create_engine, make_url
from sqlalchemy.orm import Session

from examples.flask_shop.sagas import Order, Sale, app, purchase
from saga import ResultTimeout, SagaCompensated, SagaNotFound, SyncClient

PLAIN = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}
PATIENCE = timedelta(seconds=5)

address = make_url(environ.get("SHOP_DATABASE", "sqlite:///shop.db"))
engine = create_engine(address.set(drivername=PLAIN[address.get_backend_name()]))
sagas = SyncClient(app)  # opens at its first use, in each worker that gunicorn forks
shop = Flask(__name__)


@shop.post("/orders")
def take_order() -> tuple[dict[str, Any], int]:
    """Write the sale and start its saga: both, or neither. The id makes it safe to send again."""
    order = Order.model_validate(request.get_json())
    sagas.open()  # on SQLite, with its one writer, before our transaction begins
    with Session(engine) as session, session.begin():
        if session.get(Sale, order.id) is None:
            session.add(Sale(id=order.id, item=order.item, cents=order.cents))
            session.flush()
            sagas.start(purchase, order, id=order.id, session=session)
    return {"id": order.id}, 201


@shop.get("/orders/<id>")
def how_it_ended(id: str) -> tuple[dict[str, Any], int]:
    """Wait for the end, for a while."""
    try:
        return {"receipt": sagas.result(sagas.find(purchase, id), timeout=PATIENCE)}, 200
    except SagaCompensated as ended:
        return {"refused": ended.reason}, 409
    except SagaNotFound:
        return {}, 404
    except ResultTimeout:
        return {}, 202
