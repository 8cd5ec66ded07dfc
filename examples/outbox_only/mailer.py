"""The mailer: it records each event once in a table of its own, and sends what is recorded at least once.

Recording is a local write, so it happens exactly once, with the row of the inbox that remembers the event. Sending is
not: a process that dies between the post's yes and the row that says so sends again. So every letter bears the id of
its event, which is the same on each copy, and whoever takes letters drops a second one by it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.outbox_only.events import ORDERS, OrderPlaced
from saga import App, EventContext, Inbox

LOOK_SECONDS = 0.2


class Base(DeclarativeBase):
    """The service's own tables."""


class Letter(Base):
    """A mail that is to be sent, by the id of the event that asked for it."""

    __tablename__ = "letter"
    id: Mapped[str] = mapped_column(primary_key=True)
    email: Mapped[str]
    text: Mapped[str]
    sent: Mapped[bool] = mapped_column(default=False)


inbox = Inbox()


@inbox.consumer(ORDERS)
async def record(event: OrderPlaced, session: AsyncSession, context: EventContext) -> None:
    """One letter for each order."""
    text = f"Your order {event.order} over {event.cents / 100:.2f} is on its way."
    session.add(Letter(id=context.id, email=event.email, text=text))


Post = Callable[[str, str, str], Awaitable[None]]
"""Takes a letter: its id, the address, the text. Whoever raises has not taken it."""


class Mailer:
    """Records and sends."""

    def __init__(
        self,
        engine: AsyncEngine,
        database: str,
        broker: str,
        post: Post,
        namespace: str = "mailer",
        inbox: Inbox = inbox,
    ) -> None:
        self.app = App(database, broker=broker, namespace=namespace, inboxes=[inbox])
        self._engine = engine
        self._post = post

    async def send_recorded(self) -> int:
        """Send what is recorded and not sent, and return how many."""
        async with AsyncSession(self._engine) as session:
            letters = (await session.scalars(select(Letter).where(~Letter.sent).order_by(Letter.id))).all()
        for letter in letters:
            await self._post(letter.id, letter.email, letter.text)
            # killed here, the letter is sent again: under the same id
            async with AsyncSession(self._engine) as session, session.begin():
                (await session.get_one(Letter, letter.id)).sent = True
        return len(letters)

    async def run(self, stop: asyncio.Event) -> None:
        """Record and send until `stop` is set."""
        async with self.app:
            while not stop.is_set():
                await self.send_recorded()
                await asyncio.sleep(LOOK_SECONDS)
