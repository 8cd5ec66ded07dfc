"""What the two services say to each other: the only module that both import."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel

ORDERS: Final = "orders"


class OrderPlaced(BaseModel):
    """An order was placed, and its transaction is committed."""

    order: str
    email: str
    cents: int
