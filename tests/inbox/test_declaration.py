"""Consumers are checked where they are declared, and apps where they are made."""

from __future__ import annotations

import pytest
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from saga import App, ConfigurationError, DefinitionError, DuplicateActivity, Inbox
from saga.inbox.served import consumed


class Happened(BaseModel):
    number: int


def test_a_consumer_is_known_by_topic_and_type() -> None:
    inbox = Inbox()

    @inbox.consumer("orders")
    async def record(event: Happened) -> None: ...

    with pytest.raises(DuplicateActivity):

        @inbox.consumer("orders", type="Happened")
        async def again(event: Happened) -> None: ...

    @inbox.consumer("orders", type="com.example.happened.v2")
    async def other(event: Happened) -> None: ...

    assert set(inbox.consumers) == {("orders", "Happened"), ("orders", "com.example.happened.v2")}
    with pytest.raises(DuplicateActivity):
        consumed([inbox, inbox])


def test_a_consumer_takes_one_event_and_returns_nothing() -> None:
    inbox = Inbox()
    with pytest.raises(DefinitionError, match="takes one event"):

        @inbox.consumer("orders")
        async def nothing(session: AsyncSession) -> None: ...

    with pytest.raises(DefinitionError, match="nobody reads"):

        @inbox.consumer("orders")
        async def returns(event: Happened) -> int:
            return 1

    with pytest.raises(DefinitionError, match="cannot name a topic"):
        inbox.consumer("not a name")
    with pytest.raises(DefinitionError, match="AsyncSession"):

        @inbox.consumer("orders")
        def threaded(event: Happened, session: AsyncSession) -> None: ...


def test_an_inbox_needs_a_database() -> None:
    with pytest.raises(ConfigurationError, match="needs a database"):
        App(broker="memory://", inboxes=[Inbox()])
