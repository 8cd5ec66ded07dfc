"""The fixture `stack`: a prepared database and a broker, per stack; `real_broker` asks for RabbitMQ where it stands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import aiormq
import pytest

from saga import failpoints
from saga.clock import SystemIds
from saga.storage.sqlalchemy import tables as t
from tests.coordinator.harness import Calls, Stack
from tests.features_due import POSTGRES_RABBITMQ
from tests.plugins.canary import watch_of
from tests.stacks import REPEATED
from tests.upgraded import upgraded

TOLD = (t.incident, t.history, t.audit, t.stale_reply)
"""What is shown to people who may not see payloads."""


@pytest.fixture
def sqlite_file(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a file with our tables."""
    with upgraded("sqlite", request) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres-rabbitmq", *REPEATED])
async def stack(request: pytest.FixtureRequest) -> AsyncIterator[Stack]:
    """What a test runs on. Where only SQL matters, `postgres-rabbitmq` is PostgreSQL with the in-process broker."""
    name = str(request.param)
    with upgraded(name, request) as url:
        made = Stack(name, url, f"c{SystemIds().uuid7().hex[:20]}")
        yield made
        for table in TOLD:
            watch_of(request.config).check(table.name, await made.rows(table.select()))
        await made.close()
    failpoints.disarm()
    if made.rabbitmq_url is not None:
        await delete_queues(made)


@pytest.fixture
def calls(stack: Stack, request: pytest.FixtureRequest) -> Calls | None:
    """What the server itself counts, where it does."""
    if stack.name != POSTGRES_RABBITMQ:
        return None
    return Calls(request.getfixturevalue("postgres_server"), stack.url)


@pytest.fixture
def real_broker(stack: Stack, request: pytest.FixtureRequest) -> None:
    """On the stack `postgres-rabbitmq` the broker is RabbitMQ, not one in the process."""
    if stack.name == POSTGRES_RABBITMQ:
        stack.rabbitmq_url = request.getfixturevalue("rabbitmq_url")


async def delete_queues(stack: Stack) -> None:
    assert stack.rabbitmq_url is not None
    connection = await aiormq.connect(stack.rabbitmq_url)
    channel = await connection.channel()
    for queue in stack.channels():
        await channel.queue_delete(queue)
    await connection.close()
