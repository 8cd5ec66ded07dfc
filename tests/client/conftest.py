"""Where the client's tests run: a fresh database, and on the servers' stack a RabbitMQ namespace of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from saga import failpoints
from tests.client import shop
from tests.stacks import REPEATED, broker_of


@pytest.fixture(params=["sqlite", "postgres-rabbitmq", *REPEATED])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def place(stack: str, url: str, request: pytest.FixtureRequest) -> AsyncIterator[shop.Place]:
    place = shop.Place(stack, url, broker_of(stack, request))
    async with place.engine.begin() as connection:
        await connection.run_sync(shop.own.create_all)
    yield place
    failpoints.disarm()
    shop.gates.clear()
    await place.engine.dispose()
