"""The order service: an order and the event that tells of it are rows of one transaction."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.outbox_only.events import ORDERS, OrderPlaced
from saga import App


class Base(DeclarativeBase):
    """The service's own tables."""


class Order(Base):
    """What somebody bought."""

    __tablename__ = "shop_order"
    id: Mapped[str] = mapped_column(primary_key=True)
    email: Mapped[str]
    cents: Mapped[int]


class Shop:
    """Places orders."""

    def __init__(
        self, engine: AsyncEngine, database: str, broker: str, namespace: str = "shop", topic: str = ORDERS
    ) -> None:
        self.app = App(database, broker=broker, namespace=namespace, topics=[topic])
        self._engine = engine
        self._topic = topic

    async def place(self, id: str, email: str, cents: int) -> None:
        """Place an order. Whatever raises, there is neither the order nor its event."""
        async with AsyncSession(self._engine) as session, session.begin():
            session.add(Order(id=id, email=email, cents=cents))
            await session.flush()
            event = OrderPlaced(order=id, email=email, cents=cents)
            await self.app.outbox.publish(event, topic=self._topic, key=id, session=session)
            if cents <= 0:
                raise ValueError(f"order {id} is worth nothing")
