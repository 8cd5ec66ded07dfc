"""A service of its own process that consumes events: `saga participant tests.inbox.stage:app`, killed by the tests."""

from __future__ import annotations

import os
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncSession

from saga import App, EventContext, Inbox, RetryPolicy
from tests.inbox.rig import OrderPlaced, write

inbox = Inbox()

if "INBOX_DATABASE" in os.environ:
    topic = os.environ["INBOX_TOPIC"]
    quick = RetryPolicy(initial=timedelta(milliseconds=1), maximum=timedelta(milliseconds=1))

    @inbox.consumer(topic, retry=quick)
    async def record(event: OrderPlaced, session: AsyncSession, context: EventContext) -> None:
        """Writes, publishes that it did, and fails a third of the first attempts."""
        await write(session, event.number, context.attempt, context.id)
        more = OrderPlaced(number=event.number)
        await app.outbox.publish(more, topic=f"{topic}-done", session=session)
        if event.number % 3 == 0 and context.attempt == 1:
            raise ValueError("the first attempt")

    app = App(
        os.environ["INBOX_DATABASE"],
        broker=os.environ["INBOX_BROKER"],
        namespace=os.environ["INBOX_NAMESPACE"],
        topics=[topic, f"{topic}-done"],
        inboxes=[inbox],
    )
