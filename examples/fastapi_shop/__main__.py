"""Makes the shop's tables, with some books to sell: `python -m examples.fastapi_shop [BOOKS]`."""

from __future__ import annotations

import asyncio
import sys

from sqlalchemy.ext.asyncio import AsyncSession

from examples.fastapi_shop.sagas import Base, Stock
from examples.fastapi_shop.web import engine


async def open_shop(books: int) -> None:
    """Make the tables, and put books on the shelf; there are no lamps."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine) as session, session.begin():
        session.add_all([Stock(item="book", pieces=books), Stock(item="lamp", pieces=0)])
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(open_shop(int(sys.argv[1]) if sys.argv[1:] else 100))
