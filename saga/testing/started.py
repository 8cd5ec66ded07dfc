"""What a transaction has started and nobody else can see yet: for tests that roll everything back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from pydantic_core import from_json
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from saga.storage.sqlalchemy.tables import instance


@dataclass(frozen=True, slots=True)
class Started:
    """A saga that will begin when the transaction commits, and will never have been if it rolls back."""

    saga: str
    id: str
    input: Any
    """As JSON: dictionaries, lists, numbers and text."""
    run_id: UUID


async def started(session: AsyncSession, *, namespace: str = "default") -> list[Started]:
    """Return what the session's open transaction has started, sorted by saga and id.

    That is what it sees and a second connection of its engine does not: whoever started it, in whatever session on
    the same connection. Runs nothing and writes nothing.
    """
    i = instance.c
    query = (
        select(i.saga, i.saga_id, i.input, i.run_id)
        .where(i.namespace == namespace)
        .order_by(i.saga, i.saga_id)
    )
    here = (await session.execute(query)).all()
    async with AsyncEngine(session.get_bind().engine).connect() as other:
        committed = set(await other.scalars(select(i.run_id).where(i.namespace == namespace)))
    return [
        Started(saga, saga_id, from_json(raw), run_id)
        for saga, saga_id, raw, run_id in here
        if run_id not in committed
    ]
