"""Where the tests of the doors run. A further broker joins by its stack's name and what `BROKERS` says of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Final

import aiormq
import pytest

from saga import failpoints
from saga.messages import commands_channel, replies_channel
from tests.doors.place import Place
from tests.outbox.upgraded import upgraded

BROKERS: Final = {
    "sqlite": None,
    "postgres-rabbitmq": "rabbitmq_url",
    "postgres": "database://",
    "sqlite-shared": "database://",
}
"""Stack to its broker's address, or to the fixture that gives one; None is the broker in the process."""


@pytest.fixture(params=BROKERS)
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(stack: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a database with our tables."""
    with upgraded(stack, request) as url:
        yield url


@pytest.fixture
async def place(stack: str, url: str, request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    named = BROKERS[stack]
    broker_url = str(request.getfixturevalue(named)) if named is not None and "://" not in named else named
    place = Place(stack, url, broker_url)
    yield place
    failpoints.disarm()
    await place.close()
    if broker_url is not None and broker_url.startswith("amqp"):
        names = [replies_channel(each) for each in place.namespaces]
        names += [commands_channel(each, "desk") for each in place.namespaces]
        await _delete_queues(broker_url, names)


async def _delete_queues(url: str, names: list[str]) -> None:
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    for name in names:
        await channel.queue_delete(name)
        await channel.queue_delete(f"{name}.parked")
    await connection.close()
