"""Both services in one process, each with its own database: `python -m examples.outbox_only`.

The broker is the shop's database; with `BROKER=amqp://...` or `kafka://...` in its place nothing else changes.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from sqlalchemy.ext.asyncio import create_async_engine

from examples.outbox_only import mailer, orders


async def main(folder: Path) -> None:
    shop_url, mailer_url = f"sqlite:///{folder / 'shop.db'}", f"sqlite:///{folder / 'mailer.db'}"
    shop_engine = create_async_engine(shop_url.replace("sqlite", "sqlite+aiosqlite"))
    mailer_engine = create_async_engine(mailer_url.replace("sqlite", "sqlite+aiosqlite"))
    sent: list[str] = []
    stop = asyncio.Event()

    async def post(id: str, email: str, text: str) -> None:
        sent.append(id)
        print(f"  to {email}: {text}")
        if len(sent) == 3:
            stop.set()

    shop = orders.Shop(shop_engine, shop_url, "database://")
    mails = mailer.Mailer(mailer_engine, mailer_url, shop_url, post)
    async with shop.app:
        for engine, base in ((shop_engine, orders.Base), (mailer_engine, mailer.Base)):
            async with engine.begin() as connection:
                await connection.run_sync(base.metadata.create_all)
        for number, cents in enumerate((1250, 0, 800, 4999), 1):
            try:
                await shop.place(f"o-{number}", f"reader{number}@example.com", cents)
                print(f"placed o-{number}")
            except ValueError as error:
                print(f"not placed: {error}")
        async with asyncio.timeout(60):
            await mails.run(stop)
    print(f"{len(sent)} letters for 3 orders that were placed")
    await shop_engine.dispose()
    await mailer_engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
