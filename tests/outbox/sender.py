"""A process that sends the events of an outbox: `python -m tests.outbox.sender DATABASE BROKER NAMESPACE`."""

from __future__ import annotations

import asyncio
import sys

from saga import App


async def send(database: str, broker: str, namespace: str) -> None:
    """Send until killed."""
    async with App(database, broker=broker, namespace=namespace, topics=["orders"]):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(send(*sys.argv[1:]))
