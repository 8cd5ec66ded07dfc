"""The mailer of `examples/outbox_only` as a process: its post is a file of one line for each letter that it took."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from sqlalchemy.ext.asyncio import create_async_engine

from examples.outbox_only.mailer import Mailer, record
from saga import Inbox
from saga.storage.sqlalchemy.database import async_url


async def main() -> None:
    url, letters = os.environ["MAILER_DATABASE"], Path(os.environ["MAILER_LETTERS"])

    async def post(id: str, email: str, text: str) -> None:
        with letters.open("a") as file:  # noqa: ASYNC230 - one line
            file.write(f"{id} {email}\n")

    engine = create_async_engine(async_url(url))
    inbox = Inbox()
    inbox.consumer(os.environ["MAILER_TOPIC"])(record)  # the broker is shared with other tests
    broker, namespace = os.environ["MAILER_BROKER"], os.environ["MAILER_NAMESPACE"]
    mailer = Mailer(engine, url, broker, post, namespace, inbox)
    await mailer.run(asyncio.Event())


if __name__ == "__main__":
    asyncio.run(main())
