"""Where the inbox's tests run: a fresh database on each stack, and its broker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.inbox.rig import Mailer, own
from tests.stacks import REPEATED, broker_of


@pytest.fixture(params=["sqlite", "postgres-rabbitmq", *REPEATED])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def mailer(stack: str, url: str, request: pytest.FixtureRequest) -> AsyncIterator[Mailer]:
    """A service on the stack, not started."""
    mailer = Mailer(url, broker_of(stack, request) or "memory://")
    async with mailer.engine.begin() as connection:
        await connection.run_sync(own.create_all)
    yield mailer
    await mailer.stop()
    await mailer.engine.dispose()
